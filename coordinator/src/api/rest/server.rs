//! Connections: each has its own task, and none can keep the others waiting.

use std::sync::Arc;

use axum::Router;
use futures::StreamExt as _;
use hyper::Request;
use hyper::body::Incoming as Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use podferry_common::chain;
use podferry_common::tls::{Incoming, TlsConnection};
use socket2::SockRef;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::Limits;
use super::routes::Front;
use crate::api::Current;

/// Headers that a request may have.
const MAX_HEADERS: usize = 64;
/// Bytes that its line and headers may have.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Serves on these connections, which have to speak HTTP/1.1, until `stop` is cancelled; then finishes the requests under way.
pub async fn serve(core: Current, mut incoming: Incoming, limits: Limits, stop: CancellationToken) {
    let router = Front::new(core, limits, stop.clone()).router();
    let connections = TaskTracker::new();
    let slots = Arc::new(Semaphore::new(limits.connections));
    while let Some((connection, slot)) = next(&mut incoming, &slots, &stop).await {
        connections.spawn(converse(connection, slot, router.clone(), limits, stop.clone()));
    }
    drop(incoming);
    connections.close();
    connections.wait().await;
}

/// The next connection, when there is room for it. `None`: it is over.
async fn next(
    incoming: &mut Incoming,
    slots: &Arc<Semaphore>,
    stop: &CancellationToken,
) -> Option<(TlsConnection, OwnedSemaphorePermit)> {
    let next = async {
        if slots.available_permits() == 0 {
            tracing::warn!("as many REST connections are open as there may be: others wait until one has ended");
        }
        let slot = Arc::clone(slots).acquire_owned().await.ok()?;
        let connection = incoming.next().await?.ok()?;
        Some((connection, slot))
    };
    tokio::select! {
        next = next => next,
        () = stop.cancelled() => None,
    }
}

/// One connection, from its first request to its last.
async fn converse(
    connection: TlsConnection,
    slot: OwnedSemaphorePermit,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
) {
    let _slot = slot;
    let info = connection.peer_info().clone();
    let peer = info.peer.clone();
    let stream = connection.into_inner();
    // A caller that vanished without a word is noticed by what it does not confirm.
    if let Err(error) = SockRef::from(stream.get_ref().0).set_tcp_user_timeout(Some(limits.silence)) {
        tracing::warn!(%peer, %error, "a REST connection has no limit of silence");
    }
    let service = service_fn(move |mut request: Request<Body>| {
        request.extensions_mut().insert(info.clone());
        router.clone().oneshot(request)
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES);
    let mut conversation = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = conversation.as_mut() => ended,
        () = stop.cancelled() => {
            conversation.as_mut().graceful_shutdown();
            conversation.await
        }
    };
    if let Err(error) = ended {
        // Callers hang up whenever they like.
        tracing::debug!(%peer, error = chain(&error), "a REST connection broke");
    }
}

#[cfg(test)]
mod tests;
