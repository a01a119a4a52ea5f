//! A client of the REST API over real TLS, such as a script would be.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request};
use http_body_util::BodyExt as _;
use hyper::Response;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use podferry_common::identity::{IdentityFiles, Peer};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const PATIENCE: Duration = Duration::from_secs(30);

/// Where a coordinator with this log listens for REST: it says so before it says that it listens for gRPC.
pub(crate) fn address(log: &[String]) -> String {
    let mut lines = log.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let line = lines.find(|line| line["message"] == "listening for REST").expect("it listens for REST");
    line["address"].as_str().unwrap().to_owned()
}

/// Who asks, and where.
pub(crate) struct Rest {
    pub(crate) address: String,
    pub(crate) config: ClientConfig,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(|value| value.to_str().unwrap()).unwrap_or_default()
    }
}

/// A server-sent event.
#[derive(Debug, Default)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) data: Value,
}

impl Rest {
    /// A client with these files, or one that shows no certificate.
    pub(crate) fn new(address: &str, files: &IdentityFiles, shows_certificate: bool) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&files.ca).unwrap()).unwrap();
        let chain = CertificateDer::pem_file_iter(&files.certificate).unwrap().collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_protocol_versions(&[&TLS13]).unwrap().with_root_certificates(roots);
        let config = if shows_certificate {
            builder.with_client_auth_cert(chain, key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        Self { address: address.to_owned(), config }
    }

    pub(crate) async fn connect(&self) -> io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(&self.address).await?;
        let name = Peer::Coordinator.server_name().unwrap();
        timeout(PATIENCE, TlsConnector::from(Arc::new(self.config.clone())).connect(name, tcp)).await?
    }

    /// Sends a request on a connection of its own. TLS 1.3 lets a client finish first, so a server that does not trust it breaks this.
    pub(crate) async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, String> {
        let stream = self.connect().await.map_err(|error| error.to_string())?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let answer = timeout(PATIENCE, sender.send_request(request)).await.expect("an answer in time");
        answer.map_err(|error| format!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string)))
    }

    pub(crate) async fn ask(&self, request: Request<Body>) -> Result<Answer, String> {
        let (head, body) = self.send(request).await?.into_parts();
        let body = timeout(PATIENCE, body.collect()).await.expect("the whole answer in time").unwrap();
        let text = String::from_utf8(body.to_bytes().into()).unwrap();
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, text })
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.ask(Request::get(path).body(Body::empty()).unwrap()).await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::post(path).header("content-type", "application/json");
        self.ask(request.body(body.into()).unwrap()).await.unwrap()
    }

    /// Watches a migration to the end of the stream.
    pub(crate) async fn watch(&self, id: &str) -> Vec<Event> {
        self.watch_at(&format!("/api/v1/migrations/{id}/watch")).await
    }

    /// Watches anything to the end of the stream.
    pub(crate) async fn watch_at(&self, path: &str) -> Vec<Event> {
        let answer = self.get(path).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, "text/event-stream"), "{answer:?}");
        answer.text.split("\n\n").filter(|block| !block.trim().is_empty()).filter_map(event).collect()
    }
}

/// An event, or nothing where there is only a comment.
fn event(block: &str) -> Option<Event> {
    let mut event = Event::default();
    for line in block.lines().filter(|line| !line.starts_with(':')) {
        let (field, value) = line.split_once(": ").unwrap();
        match field {
            "event" => value.clone_into(&mut event.name),
            "id" => value.clone_into(&mut event.id),
            "data" => event.data = serde_json::from_str(value).unwrap(),
            _ => panic!("{line}"),
        }
    }
    (!event.name.is_empty()).then_some(event)
}
