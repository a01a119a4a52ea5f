//! The real binaries on loopback, asked over one connection each.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use axum::http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1::{SendRequest, handshake},
};
use hyper_util::rt::TokioIo;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use podferry_workloads::{
    ballast::{Ballast, BallastDigest},
    cart::{LogReport, Tick},
    catalogue::{self, PRODUCTS, Page, Product},
    order_log::LoggedOrder,
    shop::{Answer, Cart, Operation, Refusal},
};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A running service; ended by its process id when dropped.
struct Service {
    child: Child,
    address: SocketAddr,
}

impl Service {
    fn start(binary: &str, environment: &[(&str, &str)]) -> Self {
        let mut child = Command::new(binary)
            .env("PORT", "0")
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the service starts");
        let output = BufReader::new(child.stdout.take().unwrap());
        let line = output.lines().map(Result::unwrap).find(|line| line.contains("listening on ")).expect("an address");
        let port = line.split("0.0.0.0:").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
        Self { child, address: SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap())) }
    }

    fn cart(folder: &Path) -> Self {
        let log = folder.join("orders.log");
        Self::start(env!("CARGO_BIN_EXE_shopping-cart"), &[("ORDER_LOG", log.to_str().unwrap()), ("TICK_MS", "1")])
    }

    async fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Connection(sender)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Connection(SendRequest<Full<Bytes>>);

impl Connection {
    async fn send(&mut self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        self.0.ready().await.unwrap();
        self.0.send_request(request).await.unwrap()
    }

    async fn request<T: DeserializeOwned>(&mut self, method: Method, path: &str, body: Bytes) -> (StatusCode, T) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "test")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .unwrap();
        let response = self.send(request).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let parsed =
            serde_json::from_slice(&body).unwrap_or_else(|error| panic!("{path}: {status}: {error}: {body:?}"));
        (status, parsed)
    }

    async fn get<T: DeserializeOwned>(&mut self, path: &str) -> T {
        let (status, body) = self.request(Method::GET, path, Bytes::new()).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        body
    }

    async fn operate<T: DeserializeOwned>(&mut self, sequence: u64, operation: Operation) -> (StatusCode, T) {
        let body = serde_json::to_vec(&operation).unwrap().into();
        self.request(Method::PUT, &format!("/carts/c1/operations/{sequence}"), body).await
    }

    async fn done(&mut self, sequence: u64, operation: Operation) -> Answer {
        let (status, answer) = self.operate(sequence, operation).await;
        assert_eq!(status, StatusCode::OK);
        answer
    }
}

#[tokio::test]
async fn the_catalogue_answers_what_the_library_says() {
    let service = Service::start(env!("CARGO_BIN_EXE_catalogue"), &[]);
    let mut client = service.connect().await;
    for id in [1, 2, PRODUCTS] {
        assert_eq!(Some(client.get::<Product>(&format!("/products/{id}")).await), catalogue::product(id));
    }
    let page: Page = client.get("/products?offset=490&limit=20").await;
    assert_eq!(page.items.iter().map(|product| product.id).collect::<Vec<_>>(), (491..=500).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_known_etag_is_answered_without_a_body() {
    let service = Service::start(env!("CARGO_BIN_EXE_catalogue"), &[]);
    let mut client = service.connect().await;
    let request = |etag: &str| {
        Request::get("/products/7")
            .header(header::HOST, "test")
            .header(header::IF_NONE_MATCH, etag)
            .body(Full::new(Bytes::new()))
            .unwrap()
    };
    let response = client.send(request("\"other\"")).await;
    assert_eq!(response.status(), StatusCode::OK);
    let etag = response.headers()[header::ETAG].to_str().unwrap().to_owned();
    assert_eq!(etag, catalogue::etag(&catalogue::product(7).unwrap()));
    response.into_body().collect().await.unwrap();

    let response = client.send(request(&etag)).await;
    assert_eq!(response.status(), StatusCode::NOT_MODIFIED);
    assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());

    let absent = Request::get("/products/501").header(header::HOST, "test").body(Full::new(Bytes::new())).unwrap();
    assert_eq!(client.send(absent).await.status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn ballast_has_the_size_and_digest_that_were_asked_for() {
    let service = Service::start(env!("CARGO_BIN_EXE_catalogue"), &[("BALLAST_MIB", "8")]);
    let mut client = service.connect().await;
    let (_, digest): (_, BallastDigest) = client.request(Method::POST, "/ballast/digest", Bytes::new()).await;
    assert_eq!(digest, Ballast::new(8, 1).digest());
    let status = std::fs::read_to_string(format!("/proc/{}/status", service.child.id())).unwrap();
    let resident = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib: u64 = resident.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib >= 8 * 1024, "{resident}");
}

#[tokio::test]
async fn another_instance_goes_on_with_the_state_of_the_first() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [first, second] = folders.each_ref().map(|folder| Service::cart(folder.path()));
    let (mut old, mut new) = (first.connect().await, second.connect().await);
    let add = Operation::Add { product: 5, count: 3 };
    old.done(1, add).await;
    let ordered = old.done(2, Operation::Order).await;
    old.done(3, add).await;

    let state: serde_json::Value = old.get("/state").await;
    let put = |state: &serde_json::Value| {
        let body = Full::new(serde_json::to_vec(state).unwrap().into());
        Request::put("/state").header(header::HOST, "test").body(body).unwrap()
    };
    let mut changed = state.clone();
    changed["orders"][0]["order"]["items"] = serde_json::json!({"5": 4});
    let refused = new.send(put(&changed)).await.status();
    assert_eq!(refused, StatusCode::INTERNAL_SERVER_ERROR, "a state that is not what was exported");

    let other = tempfile::tempdir().unwrap();
    let third = Service::cart(other.path());
    let mut new = third.connect().await;
    assert_eq!(new.send(put(&state)).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(new.send(put(&state)).await.status(), StatusCode::CONFLICT, "it is new no more");
    // Sent again by a client that lost the answer.
    assert!(new.done(3, add).await.replayed);
    assert_eq!(new.get::<Vec<LoggedOrder>>("/orders").await, [ordered.order.unwrap()]);
    let next = new.done(4, Operation::Order).await.order.unwrap();
    assert_eq!(next.sequence, 2);
    assert_eq!(new.get::<LogReport>("/orders/log").await.orders.len(), 2);
}

/// A client whose request is under way when its service is told to end gets its answer.
#[tokio::test]
async fn the_catalogue_answers_what_it_is_being_asked_before_it_ends() {
    let mut service = Service::start(env!("CARGO_BIN_EXE_catalogue"), &[]);
    let mut stream = TcpStream::connect(service.address).await.unwrap();
    stream.write_all(b"GET /products/7 HTTP/1.1\r\nhost: test\r\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let pid = Pid::from_raw(i32::try_from(service.child.id()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    stream.write_all(b"\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(service.child.wait().unwrap().success());
}

#[tokio::test]
async fn carts_orders_and_the_log_agree_and_outlive_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::cart(folder.path());
    let mut client = service.connect().await;
    let add = Operation::Add { product: 5, count: 3 };
    assert_eq!(client.done(1, add).await.cart.items, [(5, 3)].into());
    assert!(client.done(1, add).await.replayed);
    let (status, refusal): (_, Refusal) = client.operate(3, add).await;
    assert_eq!((status, refusal), (StatusCode::CONFLICT, Refusal::Sequence { last: 1, given: 3 }));
    client.done(2, Operation::Remove { product: 5, count: 1 }).await;
    assert_eq!(client.get::<Cart>("/carts/c1").await, Cart { sequence: 2, items: [(5, 2)].into() });

    let order = client.done(3, Operation::Order).await.order.unwrap();
    assert_eq!((order.sequence, order.order.cart_sequence), (1, 3));
    assert_eq!(client.done(3, Operation::Order).await.order, Some(order.clone()));
    assert_eq!(client.get::<Vec<LoggedOrder>>("/orders?cart=c1").await, std::slice::from_ref(&order));
    let report: LogReport = client.get("/orders/log").await;
    assert_eq!(report, LogReport { last_sequence: 1, last_checksum: order.checksum, orders: vec![order.clone()] });
    assert!(client.get::<LogReport>("/orders/log?cart=other").await.orders.is_empty());

    drop(service);
    let service = Service::cart(folder.path());
    let mut client = service.connect().await;
    assert_eq!(client.get::<Vec<LoggedOrder>>("/orders").await, [order]);
    client.done(1, add).await;
    assert_eq!(client.done(2, Operation::Order).await.order.unwrap().sequence, 2);
}

#[tokio::test]
async fn the_log_endpoint_reads_the_file_and_not_the_memory() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::cart(folder.path());
    let mut client = service.connect().await;
    client.done(1, Operation::Add { product: 5, count: 3 }).await;
    client.done(2, Operation::Order).await;
    let path = folder.path().join("orders.log");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"5\":3", "\"5\":4")).unwrap();
    let request = Request::get("/orders/log").header(header::HOST, "test").body(Full::new(Bytes::new())).unwrap();
    let response = client.send(request).await;
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&body).contains("line 1: checksum"), "{body:?}");
}

#[tokio::test]
async fn the_feed_counts_without_a_gap() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::cart(folder.path());
    let mut client = service.connect().await;
    let request = Request::get("/feed").header(header::HOST, "test").body(Full::new(Bytes::new())).unwrap();
    let mut body = client.send(request).await.into_body();
    let mut text = String::new();
    while text.matches("\n\n").count() < 50 {
        let frame = tokio::time::timeout(Duration::from_secs(10), body.frame()).await.unwrap().unwrap().unwrap();
        text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
    }
    let ticks: Vec<u64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str::<Tick>(data).unwrap().tick)
        .collect();
    assert!(ticks.len() >= 50);
    assert!(ticks.is_sorted_by(|one, two| one + 1 == *two), "{ticks:?}");
}

#[test]
fn sigterm_ends_the_service_at_once_even_with_a_connection_open() {
    let folder = tempfile::tempdir().unwrap();
    let mut service = Service::cart(folder.path());
    let _connection = std::net::TcpStream::connect(service.address).unwrap();
    kill(Pid::from_raw(service.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let asked = Instant::now();
    while asked.elapsed() < Duration::from_secs(30) {
        if let Some(status) = service.child.try_wait().unwrap() {
            assert!(status.success());
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the service ran on after SIGTERM");
}

#[test]
fn a_wrong_variable_is_named() {
    let output = Command::new(env!("CARGO_BIN_EXE_catalogue")).env("PORT", "eighty").output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("PORT is `eighty`"), "{said}");
}
