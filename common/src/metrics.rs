//! Figures for Prometheus: one plain HTTP port with `/metrics` and `/healthz`.
//!
//! It asks for no certificate and says nothing that is secret: listen on the loopback, or where only the monitoring gets. What
//! anybody can do there is bounded: [`MAX_CONNECTIONS`] at once, [`CONNECTION_TIME`] each.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::listen::listen;

/// What the names of all metrics begin with.
pub const PREFIX: &str = "podferry";
/// Connections at once. Whoever opens more waits in the kernel's queue.
pub const MAX_CONNECTIONS: usize = 16;
/// How long one connection may last.
pub const CONNECTION_TIME: Duration = Duration::from_secs(60);
/// How long a request's header may take.
const HEADER_TIME: Duration = Duration::from_secs(5);
/// The pause after an accept that failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Upper bounds of the buckets of times, in seconds: from what a freeze takes at the least to what copying may take at the
/// most.
const SECONDS: [f64; 18] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];
/// Upper bounds of the buckets of rates, in pages per second.
const PAGE_RATES: [f64; 7] = [10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7];

/// A histogram of seconds.
pub fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

/// A histogram of pages per second.
pub fn page_rates() -> Histogram {
    Histogram::new(PAGE_RATES)
}

/// Milliseconds, as reports have them, in seconds, as Prometheus wants them.
pub fn in_seconds(milliseconds: f64) -> f64 {
    milliseconds / 1e3
}

/// A port on which a registry can be read.
#[derive(Debug)]
pub struct Exporter {
    listener: TcpListener,
    registry: Arc<Registry>,
}

impl Exporter {
    /// Listens at `address`.
    ///
    /// # Errors
    /// Those of `bind(2)`.
    pub async fn bind(address: SocketAddr, registry: Registry) -> io::Result<Self> {
        Ok(Self { listener: listen(address).await?, registry: Arc::new(registry) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until it is dropped.
    pub async fn run(self) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((connection, _)) => {
                    let registry = Arc::clone(&self.registry);
                    tokio::spawn(async move {
                        // One that lasts too long is closed, whatever it is doing.
                        let _over = tokio::time::timeout(CONNECTION_TIME, converse(connection, registry)).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "a connection to the metrics cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn converse(connection: TcpStream, registry: Arc<Registry>) {
    let service = service_fn(move |request: Request<_>| {
        let answer = answer(request.method(), request.uri().path(), &registry);
        async move { Ok::<_, Infallible>(answer) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME);
    if let Err(error) = builder.serve_connection(TokioIo::new(connection), service).await {
        tracing::debug!(%error, "a connection to the metrics broke");
    }
}

fn answer(method: &Method, path: &str, registry: &Registry) -> Response<Full<Bytes>> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    match path {
        "/metrics" => figures(registry),
        "/healthz" => text(StatusCode::OK, "ok\n"),
        _ => text(StatusCode::NOT_FOUND, "here are /metrics and /healthz\n"),
    }
}

fn figures(registry: &Registry) -> Response<Full<Bytes>> {
    match encode(registry) {
        Ok(body) => with_type(StatusCode::OK, body, prometheus_text::CONTENT_TYPE),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written out");
            text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written out\n")
        }
    }
}

/// All figures of a registry, in Prometheus' text format.
///
/// # Errors
/// When a collector fails.
pub fn encode(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut body = String::new();
    prometheus_text::encode(&mut body, registry)?;
    Ok(body)
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    with_type(status, body.to_owned(), "text/plain; charset=utf-8")
}

fn with_type(status: StatusCode, body: String, kind: &'static str) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    use super::*;

    async fn exporter() -> SocketAddr {
        let mut registry = Registry::with_prefix(PREFIX);
        let counter: Counter = Counter::default();
        registry.register("seen", "What was seen", counter.clone());
        counter.inc_by(7);
        let exporter = Exporter::bind("127.0.0.1:0".parse().unwrap(), registry).await.unwrap();
        let address = exporter.local_addr().unwrap();
        tokio::spawn(exporter.run());
        address
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut connection = TcpStream::connect(address).await.unwrap();
        connection
            .write_all(format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(20), connection.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn figures_and_health_can_be_read_and_nothing_else() {
        let address = exporter().await;
        let figures = ask(address, "GET /metrics").await;
        assert!(figures.starts_with("HTTP/1.1 200") && figures.contains("version=0.0.4"), "{figures}");
        assert!(figures.contains("# HELP podferry_seen_total What was seen.\n"), "{figures}");
        assert!(figures.contains("\npodferry_seen_total 7\n"), "{figures}");
        assert!(ask(address, "GET /healthz").await.ends_with("\r\n\r\nok\n"));
        assert!(ask(address, "GET /").await.starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics").await.starts_with("HTTP/1.1 405"));
    }

    #[tokio::test]
    async fn who_says_nothing_takes_the_place_of_others_for_a_short_time_only() {
        let address = exporter().await;
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        // All places are taken: this one is answered when the header time of the others is over.
        let begun = std::time::Instant::now();
        assert!(ask(address, "GET /healthz").await.starts_with("HTTP/1.1 200"));
        assert!(begun.elapsed() > HEADER_TIME / 2, "they had no places");
    }
}
