//! Hooks that are HTTP requests to the container, on its own loopback.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderName, Method, Request, StatusCode, Uri};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use podferry_network::Netns;
use tokio::net::TcpStream;
use tokio_stream::wrappers::ReceiverStream;

use super::HookName;
use super::hook::{Flow, HookError, Instance, SOURCE_HOST, SOURCE_PORT, Words};

/// How long connecting may take: it is the container's own loopback.
const CONNECT: Duration = Duration::from_secs(5);
/// Tells a hook by where the old instance is reached: `127.0.0.1:PORT`.
const SOURCE: HeaderName = HeaderName::from_static("podferry-source");

/// Where to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpHook {
    port: u16,
    path: String,
}

/// Why nobody answered.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Nobody could be reached.
    #[error("port {port} of the container's loopback does not take a connection")]
    Connect {
        /// Which.
        port: u16,
        /// Why.
        source: io::Error,
    },
    /// Its network cannot be entered.
    #[error(transparent)]
    Network(#[from] podferry_network::Error),
    /// The conversation broke off.
    #[error("the conversation broke off")]
    Hyper(#[from] hyper::Error),
    /// The request cannot be made.
    #[error("the request cannot be made")]
    Request(#[from] http::Error),
}

impl HttpHook {
    /// Reads `http://127.0.0.1:PORT/PATH`, also with localhost and without port.
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|error| format!("is no URL: {error}"))?;
        let here = matches!(uri.host(), Some("127.0.0.1" | "localhost"));
        if uri.scheme_str() != Some("http") || !here {
            return Err(
                "is a URL of elsewhere: only http://127.0.0.1 and http://localhost are the container's".to_owned()
            );
        }
        let port = uri.port_u16().unwrap_or(80);
        if port == 0 {
            return Err("has the port 0".to_owned());
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Self { port, path })
    }
}

/// What looks is `GET`, what brings the state is `PUT`, and what does something is `POST`.
fn method(name: HookName) -> Method {
    match name {
        HookName::Ready | HookName::CaughtUp | HookName::Verify | HookName::Export => Method::GET,
        HookName::Import => Method::PUT,
        HookName::Replicate | HookName::Promote | HookName::Quiesce | HookName::Unquiesce => Method::POST,
    }
}

type Body = BoxBody<Bytes, io::Error>;

pub(super) async fn call(instance: &Instance, name: HookName, hook: &HttpHook, flow: Flow) -> Result<(), HookError> {
    let asking = ask(instance, name, hook, flow.input);
    let (status, mut body) = asking.await.map_err(|source| HookError::Http { name, source })?;
    let mut words = Words::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| HookError::Http { name, source: error.into() })?;
        let Ok(data) = frame.into_data() else { continue };
        match &flow.output {
            Some(output) if status.is_success() => output
                .send(data)
                .await
                .map_err(|_| HookError::Flow { name, source: io::ErrorKind::BrokenPipe.into() })?,
            _ => words.add(&data),
        }
    }
    if status.is_success() {
        return Ok(());
    }
    Err(HookError::Failed { name, status: status.to_string(), said: words.to_string() })
}

async fn ask(
    instance: &Instance,
    name: HookName,
    hook: &HttpHook,
    input: Option<tokio::sync::mpsc::Receiver<Bytes>>,
) -> Result<(StatusCode, Incoming), HttpError> {
    let stream = connect(instance.netns(), hook.port).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a hook's connection broke off");
        }
    });
    let body: Body = match input {
        Some(input) => BoxBody::new(StreamBody::new(ReceiverStream::new(input).map(|data| Ok(Frame::data(data))))),
        None => Empty::new().map_err(|never| match never {}).boxed(),
    };
    let mut request = Request::builder().method(method(name)).uri(&hook.path).header(http::header::HOST, "localhost");
    let told = |wanted: &str| instance.told().iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.as_str());
    if let (Some(host), Some(port)) = (told(SOURCE_HOST), told(SOURCE_PORT)) {
        request = request.header(SOURCE, format!("{host}:{port}"));
    }
    let answer = sender.send_request(request.body(body)?).await?;
    Ok((answer.status(), answer.into_body()))
}

/// A connection to the container's own loopback.
///
/// # Errors
/// When its network cannot be entered, or nobody listens.
pub async fn connect(netns: &Netns, port: u16) -> Result<TcpStream, HttpError> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let failed = |source| HttpError::Connect { port, source };
    let connected = netns.spawn(move || std::net::TcpStream::connect_timeout(&address, CONNECT)).await?;
    let stream = connected.map_err(failed)?;
    stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).map_err(failed)?;
    TcpStream::from_std(stream).map_err(failed)
}
