use std::time::{Duration, Instant};

use podferry_common::identity::{Identity, IdentityFiles, LocalCa, Peer};
use podferry_common::tls::Protocol;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::access::Gate;
use crate::api::Core;
use crate::cluster::Inventory;
use crate::metrics::Metrics;
use crate::runner::Deadlines;
use crate::store::Store;
use crate::testing;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(20);
const ASK: &[u8] = b"GET /api/v1/version HTTP/1.1\r\nhost: x\r\n\r\n";

/// A server in this process, and the certificate of a client.
struct Stage {
    folder: TempDir,
    address: String,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<()>,
}

impl Stage {
    async fn new(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = LocalCa::create(&folder.path().join("authority")).unwrap();
        let files = |name: &str| IdentityFiles::in_folder(folder.path().join(name));
        ca.issue(&Peer::Coordinator, HOUR, &files("coordinator")).unwrap();
        ca.issue(&Peer::client("tester").unwrap(), HOUR, &files("client")).unwrap();
        let identity = Identity::load(files("coordinator")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let incoming = Incoming::speaking(Protocol::Http1, listener, &identity);
        let address = incoming.local_addr().unwrap().to_string();
        let inventory = folder.path().join("inventory.toml");
        std::fs::write(&inventory, "").unwrap();
        let store = Store::open(&folder.path().join("state")).unwrap();
        let agents = testing::agents(folder.path());
        let audit = testing::audit(folder.path());
        let runner = testing::runner(&agents, &store, &audit);
        let gate = Gate::new(None, audit, Metrics::default()).unwrap();
        let inventory_now = Inventory::load(&inventory).unwrap();
        let core = Core::new(inventory_now, agents, store, runner, Deadlines::default(), gate);
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(Current::new(core, inventory), incoming, limits, stop.clone()));
        Self { folder, address, stop, server }
    }

    async fn connect(&self) -> TlsStream<TcpStream> {
        let files = IdentityFiles::in_folder(self.folder.path().join("client"));
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&files.ca).unwrap()).unwrap();
        let chain = CertificateDer::pem_file_iter(&files.certificate).unwrap().collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
        let config = builder.with_client_auth_cert(chain, key).unwrap();
        let tcp = TcpStream::connect(&self.address).await.unwrap();
        let name = Peer::Coordinator.server_name().unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap()
    }
}

/// All that comes until the server hangs up.
async fn rest_of(stream: &mut TlsStream<TcpStream>) -> String {
    let mut text = Vec::new();
    // It may hang up without a word of TLS.
    let _ended = timeout(SOON, stream.read_to_end(&mut text)).await.expect("the server hangs up");
    String::from_utf8(text).unwrap()
}

/// The answer's first bytes.
async fn answered(stream: &mut TlsStream<TcpStream>) -> String {
    let mut text = [0; 12];
    timeout(SOON, stream.read_exact(&mut text)).await.expect("an answer").unwrap();
    String::from_utf8(text.to_vec()).unwrap()
}

#[tokio::test]
async fn silent_and_slow_callers_are_hung_up_on() {
    let head = Duration::from_millis(300);
    let stage = Stage::new(Limits { head, body: head, ..Limits::default() }).await;
    let begun = Instant::now();
    for sent in [&b""[..], b"GET /api/v1/ver", ASK] {
        let mut stream = stage.connect().await;
        stream.write_all(sent).await.unwrap();
        let said = rest_of(&mut stream).await;
        assert_eq!(said.starts_with("HTTP/1.1 200"), sent == ASK, "{said}");
    }
    let mut slow = stage.connect().await;
    slow.write_all(b"POST /api/v1/migrations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n").await.unwrap();
    slow.write_all(b"content-length: 100\r\n\r\n{\"workload\":").await.unwrap();
    let said = rest_of(&mut slow).await;
    assert!(said.starts_with("HTTP/1.1 408") && said.contains("DEADLINE_EXCEEDED"), "{said}");
    let mut long = stage.connect().await;
    long.write_all(format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(MAX_HEAD_BYTES)).as_bytes())
        .await
        .unwrap();
    let said = rest_of(&mut long).await;
    assert!(said.starts_with("HTTP/1.1 431"), "{said}");
    assert!(begun.elapsed() > 4 * head);
}

#[tokio::test]
async fn more_connections_than_there_may_be_wait_for_one_to_end() {
    let stage = Stage::new(Limits { connections: 2, ..Limits::default() }).await;
    let (mut first, mut second) = (stage.connect().await, stage.connect().await);
    for stream in [&mut first, &mut second] {
        stream.write_all(ASK).await.unwrap();
        assert_eq!(answered(stream).await, "HTTP/1.1 200");
    }
    let mut third = stage.connect().await;
    third.write_all(ASK).await.unwrap();
    let mut byte = [0; 1];
    assert!(timeout(Duration::from_millis(200), third.read(&mut byte)).await.is_err(), "it waits");
    drop(first);
    assert_eq!(answered(&mut third).await, "HTTP/1.1 200");
}

#[tokio::test]
async fn a_stop_closes_what_is_idle_and_ends_the_server() {
    let stage = Stage::new(Limits::default()).await;
    let mut idle = stage.connect().await;
    idle.write_all(ASK).await.unwrap();
    assert_eq!(answered(&mut idle).await, "HTTP/1.1 200");
    stage.stop.cancel();
    timeout(SOON / 4, stage.server).await.expect("it ends without waiting for the head").unwrap();
    assert!(TcpStream::connect(&stage.address).await.is_err(), "nobody listens");
}

#[tokio::test]
async fn a_caller_that_reads_nothing_of_its_answers_is_hung_up_on() {
    let stage = Stage::new(Limits { silence: Duration::from_millis(500), ..Limits::default() }).await;
    let mut stream = stage.connect().await;
    let asking = async { while stream.write_all(ASK).await.is_ok() {} };
    timeout(SOON, asking).await.expect("the server hangs up when nothing more goes through");
}
