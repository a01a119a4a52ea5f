//! HTTP/1.1 over one TCP connection that is never replaced behind the caller's back.

use std::{error::Error, net::SocketAddr};

use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1::{SendRequest, handshake},
};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::TcpStream, task::JoinHandle};

use super::Fault;

/// A keep-alive connection.
#[derive(Debug)]
pub(super) struct Connection {
    target: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// An answer with its whole body.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Connection {
    pub(super) async fn open(target: SocketAddr) -> Result<Self, Fault> {
        let broken = |error: &dyn Error| Fault::Broken(format!("cannot connect to {target}: {}", chain(error)));
        let stream = TcpStream::connect(target).await.map_err(|error| broken(&error))?;
        stream.set_nodelay(true).map_err(|error| broken(&error))?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        // Its outcome reaches whoever waits for an answer.
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { target, sender, driver })
    }

    /// Sends a request and gives its answer once the head is there.
    pub(super) async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, String)],
        body: Bytes,
    ) -> Result<Response<Incoming>, Fault> {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, self.target.to_string());
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(body)).map_err(|error| Fault::Wrong(format!("{path}: {error}")))?;
        let broken = |error: hyper::Error| Fault::Broken(format!("{path}: {}", chain(&error)));
        self.sender.ready().await.map_err(broken)?;
        self.sender.send_request(request).await.map_err(broken)
    }

    /// Sends a request and gives its whole answer.
    pub(super) async fn ask(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, String)],
        body: Bytes,
    ) -> Result<Reply, Fault> {
        let response = self.send(method, path, headers, body).await?;
        let (head, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| Fault::Broken(format!("{path}: {}", chain(&error))))?;
        Ok(Reply { status: head.status, headers: head.headers, body: body.to_bytes() })
    }

    /// Gets a document that has to be there.
    pub(super) async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Fault> {
        let reply = self.ask(Method::GET, path, &[], Bytes::new()).await?;
        if reply.status != StatusCode::OK {
            return Err(reply.unexpected(path));
        }
        reply.json(path)
    }
}

impl Reply {
    pub(super) fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T, Fault> {
        serde_json::from_slice(&self.body).map_err(|error| Fault::Wrong(format!("{path}: {error}: {}", self.excerpt())))
    }

    pub(super) fn unexpected(&self, path: &str) -> Fault {
        Fault::Wrong(format!("{path}: {}: {}", self.status, self.excerpt()))
    }

    fn excerpt(&self) -> String {
        String::from_utf8_lossy(&self.body[..self.body.len().min(200)]).into_owned()
    }
}

/// An error and its causes in one line: hyper's own words do not say "connection reset".
pub(super) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}
