//! HTTPS for the API server, which shows no certificate: everybody in the pods' network can connect, and what they can take is bounded.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use hyper::Request;
use hyper::body::Incoming as Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::Evictions;
use super::review::Question;

/// Connections at a time. An API server keeps a few.
const CONNECTIONS: usize = 128;
/// How long a request's head may take: a connection that stays silent for so long between two requests is closed.
const SILENCE: Duration = Duration::from_secs(90);
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Bytes of a question. Most of it says who asks.
const MAX_QUESTION: usize = 512 << 10;
/// Bytes that a request's line and headers may have.
const MAX_HEAD: usize = 16 << 10;
/// The pause when no connection can be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers at that path until `stop` is cancelled.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    path: String,
    evictions: Arc<Evictions>,
    stop: CancellationToken,
) {
    let router = router(&path, evictions);
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let accepting = async {
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((tcp, _)) => {
                    let tls = TlsAcceptor::from(Arc::clone(&tls));
                    let conversation = converse(tcp, tls, slot, router.clone());
                    tokio::spawn(stop.clone().run_until_cancelled_owned(conversation));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection about an eviction cannot be accepted");
                    sleep(PAUSE).await;
                }
            }
        }
    };
    let _stopped = stop.run_until_cancelled(accepting).await;
}

fn router(path: &str, evictions: Arc<Evictions>) -> Router {
    Router::new().route(path, post(answer)).layer(DefaultBodyLimit::max(MAX_QUESTION)).with_state(evictions)
}

async fn answer(State(evictions): State<Arc<Evictions>>, question: Result<Json<Question>, JsonRejection>) -> Response {
    // Whatever is no answer lets the eviction through: `failurePolicy: Ignore`.
    match question {
        Ok(Json(question)) => match question.of_eviction() {
            Some(request) => Json(evictions.answer(request).await).into_response(),
            None => (StatusCode::BAD_REQUEST, "this is no question about an eviction\n").into_response(),
        },
        Err(rejected) => rejected.into_response(),
    }
}

async fn converse(tcp: TcpStream, tls: TlsAcceptor, slot: OwnedSemaphorePermit, router: Router) {
    let _slot = slot;
    let stream = match timeout(HANDSHAKE, tls.accept(tcp)).await {
        Ok(Ok(stream)) => stream,
        // An API server that has not heard of this leader's certificate yet, or a probe.
        Ok(Err(error)) => return tracing::debug!(%error, "a connection about an eviction was broken off"),
        Err(_) => return,
    };
    let service = service_fn(move |request: Request<Body>| router.clone().oneshot(request));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(SILENCE).max_buf_size(MAX_HEAD);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a connection about an eviction broke");
    }
}
