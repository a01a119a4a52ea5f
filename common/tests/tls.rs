//! Real connections over loopback: who gets in, who does not, and what a server survives.

#![expect(clippy::unwrap_used, reason = "the helpers of these tests panic as the tests do")]

use std::error::Error;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use podferry_common::chain;
use podferry_common::identity::{Identity, IdentityError, IdentityFiles, LocalCa, Peer};
use podferry_common::tls::{self, Incoming, PeerInfo, Protocol, TlsError};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::transport::Server;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const HOUR: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(20);

fn agent(name: &str) -> Peer {
    Peer::Agent(name.parse().unwrap())
}

/// A cluster's authority and its identities, in a folder that goes away with it.
struct Cluster {
    folder: TempDir,
    ca: LocalCa,
}

impl Cluster {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = LocalCa::create(&folder.path().join("ca")).unwrap();
        Self { folder, ca }
    }

    fn files(&self, name: &str) -> IdentityFiles {
        IdentityFiles::in_folder(self.folder.path().join(name))
    }

    fn identity_for(&self, peer: &Peer, lifetime: Duration) -> Identity {
        let files = self.files(&peer.dns_name());
        self.ca.issue(peer, lifetime, &files).unwrap();
        Identity::load(files).unwrap()
    }

    fn identity(&self, peer: &Peer) -> Identity {
        self.identity_for(peer, HOUR)
    }
}

/// A listener that writes one byte to whoever gets in and reports every `accept`.
struct Door {
    addr: String,
    seen: tokio::sync::mpsc::UnboundedReceiver<Result<PeerInfo, TlsError>>,
    task: JoinHandle<()>,
}

impl Door {
    async fn open(identity: Identity) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let (report, seen) = tokio::sync::mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let outcome = match tls::accept(tcp, &identity).await {
                    Ok((mut stream, info)) => {
                        // Who only looked at the handshake may be gone already.
                        let _ = stream.write_all(b"!").await;
                        let _ = stream.shutdown().await;
                        Ok(info)
                    }
                    Err(error) => Err(error),
                };
                report.send(outcome).unwrap();
            }
        });
        Self { addr, seen, task }
    }

    async fn outcome(&mut self) -> Result<PeerInfo, TlsError> {
        timeout(SOON, self.seen.recv()).await.expect("the server's side ends").unwrap()
    }

    async fn refusal(&mut self) -> String {
        chain(&self.outcome().await.expect_err("the server refuses"))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Dials and reads the one byte: a server that refuses the client says so at the first read.
async fn enter(addr: &str, identity: &Identity, expected: &Peer) -> Result<u8, Box<dyn Error>> {
    let mut stream = tls::dial(addr, identity, expected).await?;
    Ok(timeout(SOON, stream.read_u8()).await??)
}

#[tokio::test]
async fn both_ends_know_each_other_by_name() {
    let cluster = Cluster::new();
    let mut door = Door::open(cluster.identity(&agent("n1"))).await;
    let coordinator = cluster.identity(&Peer::Coordinator);
    let stream = tls::dial(&door.addr, &coordinator, &agent("n1")).await.unwrap();
    let session = stream.get_ref().1;
    assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let suite = session.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    assert!(stream.get_ref().0.nodelay().unwrap());
    let local = stream.get_ref().0.local_addr().unwrap();
    assert_eq!(door.outcome().await.unwrap(), PeerInfo { peer: Peer::Coordinator, addr: local });
}

#[tokio::test]
async fn another_cluster_is_refused_by_both_sides() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let mut door = Door::open(ours.identity(&agent("n1"))).await;

    // A client that trusts the wrong authority refuses the server.
    let stranger = theirs.identity(&Peer::Coordinator);
    let refused = tls::dial(&door.addr, &stranger, &agent("n1")).await.unwrap_err();
    assert!(matches!(refused, TlsError::ClientHandshake { .. }), "{refused:?}");
    assert!(chain(&refused).contains("UnknownIssuer"), "{}", chain(&refused));
    door.refusal().await;

    // A client that trusts ours, with a certificate of theirs, is refused by the server.
    let files = theirs.files("mixed");
    theirs.ca.issue(&Peer::Coordinator, HOUR, &files).unwrap();
    fs::write(&files.ca, ours.ca.certificate()).unwrap();
    let intruder = Identity::load(files).unwrap();
    enter(&door.addr, &intruder, &agent("n1")).await.unwrap_err();
    let refusal = door.refusal().await;
    assert!(refusal.contains("UnknownIssuer"), "{refusal}");
}

#[tokio::test]
async fn another_node_than_expected_is_refused() {
    let cluster = Cluster::new();
    let door = Door::open(cluster.identity(&agent("n1"))).await;
    let coordinator = cluster.identity(&Peer::Coordinator);
    for other in [agent("n2"), Peer::Coordinator, Peer::client("n1").unwrap()] {
        let refused = tls::dial(&door.addr, &coordinator, &other).await.unwrap_err();
        assert!(chain(&refused).contains("not valid for name"), "{}", chain(&refused));
    }
}

#[tokio::test]
async fn a_certificate_with_two_names_is_nobodys() {
    let cluster = Cluster::new();
    let authority = rcgen::KeyPair::from_pem(&fs::read_to_string(cluster.folder.path().join("ca/ca-key.pem")).unwrap());
    let issuer = rcgen::Issuer::from_ca_cert_pem(cluster.ca.certificate(), authority.unwrap()).unwrap();
    let issue = |names: &[String], to: &IdentityFiles| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(names.to_vec()).unwrap();
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        fs::write(&to.certificate, params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        fs::write(&to.key, key.serialize_pem()).unwrap();
    };
    let files = cluster.files("two");
    cluster.ca.issue(&agent("n1"), HOUR, &files).unwrap();
    let mut names = vec![agent("n1").dns_name(), agent("n2").dns_name()];
    issue(&names, &files);
    let refused = Identity::load(files.clone()).unwrap_err();
    assert!(matches!(refused, IdentityError::Peer { .. }), "{refused:?}");

    // A server that has such a certificate all the same is refused by who dials it.
    let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
    let own = CertificateDer::from_pem_file(&files.certificate).unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let _stream = tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(tcp).await.unwrap();
    });
    let client = cluster.identity(&Peer::Coordinator);
    let refused = tls::dial(&addr, &client, &agent("n1")).await.unwrap_err();
    assert!(matches!(refused, TlsError::Unnamed { .. }), "{refused:?}");
    server.await.unwrap();

    // Nor may the authority vouch for names outside of its domain.
    names = vec!["example.org".to_owned()];
    issue(&names, &files);
    assert!(Identity::load(files).is_err());
}

#[tokio::test]
async fn expired_certificates_are_refused_on_both_sides() {
    let cluster = Cluster::new();
    let short = Duration::from_secs(1);
    let old_agent = cluster.identity_for(&agent("old"), short);
    let old_client = cluster.identity_for(&Peer::client("old").unwrap(), short);
    assert!(old_agent.not_after() <= SystemTime::now() + short);
    tokio::time::sleep(Duration::from_millis(2100)).await;

    let coordinator = cluster.identity(&Peer::Coordinator);
    let door = Door::open(old_agent).await;
    let refused = tls::dial(&door.addr, &coordinator, &agent("old")).await.unwrap_err();
    assert!(chain(&refused).contains("expired"), "{}", chain(&refused));

    let mut door = Door::open(coordinator).await;
    enter(&door.addr, &old_client, &Peer::Coordinator).await.unwrap_err();
    let refusal = door.refusal().await;
    assert!(refusal.contains("expired"), "{refusal}");
}

/// A TLS client with the cluster's trust but its own rules.
fn foreign_client(
    cluster: &Cluster,
    version: &'static rustls::SupportedProtocolVersion,
    certificate: Option<&Peer>,
    protocols: &[&[u8]],
) -> TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(cluster.ca.certificate().as_bytes()).unwrap()).unwrap();
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match certificate {
        None => builder.with_no_client_auth(),
        Some(peer) => {
            let files = cluster.files("foreign");
            cluster.ca.issue(peer, HOUR, &files).unwrap();
            let own = CertificateDer::from_pem_file(&files.certificate).unwrap();
            builder.with_client_auth_cert(vec![own], PrivateKeyDer::from_pem_file(&files.key).unwrap()).unwrap()
        }
    };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

#[tokio::test]
async fn old_tls_no_certificate_and_no_http2_are_refused() {
    let cluster = Cluster::new();
    let mut door = Door::open(cluster.identity(&agent("n1"))).await;
    let client = Peer::client("alice").unwrap();
    let cases: [(&str, TlsConnector); 3] = [
        ("Tls12NotOffered", foreign_client(&cluster, &rustls::version::TLS12, Some(&client), &[b"h2"])),
        ("no certificates", foreign_client(&cluster, &rustls::version::TLS13, None, &[b"h2"])),
        ("HTTP/2", foreign_client(&cluster, &rustls::version::TLS13, Some(&client), &[])),
    ];
    for (reason, connector) in cases {
        let tcp = TcpStream::connect(&door.addr).await.unwrap();
        let name = agent("n1").server_name().unwrap();
        let entered = async { connector.connect(name, tcp).await?.read_u8().await };
        timeout(SOON, entered).await.unwrap().expect_err(reason);
        let refusal = door.refusal().await;
        assert!(refusal.contains(reason), "{reason}: {refusal}");
    }
    // The same client by the rules gets in, so the refusals were for the reasons named.
    let connector = foreign_client(&cluster, &rustls::version::TLS13, Some(&client), &[b"h2"]);
    let tcp = TcpStream::connect(&door.addr).await.unwrap();
    let mut stream = connector.connect(agent("n1").server_name().unwrap(), tcp).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'!');
    assert_eq!(door.outcome().await.unwrap().peer, client);
}

fn leaf(stream: &tls::TlsStream<TcpStream>) -> Vec<u8> {
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..600 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not within 30 s: {what}");
}

#[tokio::test]
async fn a_new_certificate_is_used_without_a_restart_and_a_broken_one_is_not() {
    let cluster = Cluster::new();
    let server = cluster.identity(&agent("n1"));
    let files = server.files().clone();
    let door = Door::open(server.clone()).await;
    let client = cluster.identity(&Peer::Coordinator);
    let watch = server.watch(Duration::from_millis(20));
    let first = leaf(&tls::dial(&door.addr, &client, &agent("n1")).await.unwrap());
    let first_end = server.not_after();

    // A key that is not the certificate's.
    let key = fs::read(&files.key).unwrap();
    fs::write(&files.key, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert!(matches!(server.reload(), Err(IdentityError::Unusable { .. })));
    fs::write(&files.key, "no key at all").unwrap();
    assert!(matches!(server.reload(), Err(IdentityError::Pem { .. })));
    fs::remove_file(&files.key).unwrap();
    assert!(matches!(server.reload(), Err(IdentityError::Read { .. })));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(leaf(&tls::dial(&door.addr, &client, &agent("n1")).await.unwrap()), first, "the old pair stays");
    fs::write(&files.key, key).unwrap();
    assert!(matches!(server.reload(), Ok(false)), "what it was before is no change");

    // Somebody else's certificate.
    cluster.ca.issue(&agent("n2"), HOUR, &files).unwrap();
    assert!(matches!(server.reload(), Err(IdentityError::OtherPeer { .. })));

    cluster.ca.issue(&agent("n1"), 2 * HOUR, &files).unwrap();
    until("the watch takes the new pair", || server.not_after() > first_end).await;
    let second = leaf(&tls::dial(&door.addr, &client, &agent("n1")).await.unwrap());
    assert_ne!(first, second);
    assert_eq!(server.peer(), agent("n1"));

    drop(door);
    drop(server);
    timeout(SOON, watch).await.expect("the watch ends with its identity").unwrap();
}

/// tonic's health service behind [`Incoming`].
async fn health_server(identity: &Identity) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let incoming = Incoming::new(listener, identity);
    let addr = incoming.local_addr().unwrap();
    let (_reporter, service) = tonic_health::server::health_reporter();
    let only_coordinator = |request: tonic::Request<()>| match request.extensions().get::<PeerInfo>() {
        Some(PeerInfo { peer: Peer::Coordinator, .. }) => Ok(request),
        other => Err(tonic::Status::permission_denied(format!("{other:?}"))),
    };
    let service = tonic::service::interceptor::InterceptedService::new(service, only_coordinator);
    let server = Server::builder().add_service(service);
    let task = tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    (addr, task)
}

async fn ask(channel: tonic::transport::Channel) -> Result<(), tonic::Status> {
    let request = HealthCheckRequest { service: String::new() };
    timeout(SOON, HealthClient::new(channel).check(request)).await.expect("an answer in time").map(|_| ())
}

#[tokio::test]
async fn garbage_and_silence_on_the_port_do_not_stop_the_server() {
    let cluster = Cluster::new();
    let (addr, server) = health_server(&cluster.identity(&agent("n1"))).await;
    let coordinator = cluster.identity(&Peer::Coordinator);

    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    let garbage: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0xff; 4096],
        &[0x16, 3, 1, 0xff, 0xff],
    ];
    for bytes in garbage.into_iter().cycle().take(40) {
        let mut tcp = TcpStream::connect(addr).await.unwrap();
        // The server may close before all is written: that is its answer.
        let _ = tcp.write_all(bytes).await;
        let _ = tcp.shutdown().await;
    }
    // Forty handshakes are pending, forty have failed: an honest caller is served at once.
    let started = std::time::Instant::now();
    let channel = tls::connect(&addr.to_string(), &coordinator, &agent("n1")).await.unwrap();
    ask(channel).await.unwrap();
    assert!(started.elapsed() < tls::HANDSHAKE_TIMEOUT, "{:?}", started.elapsed());

    // The handler sees who calls, and may refuse.
    let alice = cluster.identity(&Peer::client("alice").unwrap());
    let channel = tls::connect_lazy(&addr.to_string(), &alice, &agent("n1")).unwrap();
    let refused = ask(channel).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    assert!(refused.message().contains("alice"), "{refused:?}");

    // Who is trusted hears of no refusal; who is not hears why.
    let reason = tls::refusal(&addr.to_string(), &alice, &agent("n1")).await;
    assert!(reason.is_none(), "{reason:?}");
    let files = cluster.files("stranger");
    Cluster::new().ca.issue(&Peer::Coordinator, HOUR, &files).unwrap();
    fs::write(&files.ca, cluster.ca.certificate()).unwrap();
    let stranger = Identity::load(files).unwrap();
    let reason = tls::refusal(&addr.to_string(), &stranger, &agent("n1")).await.unwrap();
    assert!(chain(&reason).contains("UnknownCA"), "{}", chain(&reason));

    assert!(!server.is_finished());
    server.abort();
    drop(silent);
}

#[tokio::test]
async fn a_silent_caller_is_dropped_after_the_timeout() {
    let cluster = Cluster::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut incoming = Incoming::new(listener, &cluster.identity(&agent("n1")));
    let mut silent = TcpStream::connect(incoming.local_addr().unwrap()).await.unwrap();
    let started = std::time::Instant::now();
    let end = timeout(2 * tls::HANDSHAKE_TIMEOUT, silent.read(&mut [0; 16])).await.expect("the server hangs up");
    assert_eq!(end.unwrap_or(0), 0);
    assert!(started.elapsed() >= tls::HANDSHAKE_TIMEOUT.mul_f64(0.9));
    assert!(timeout(Duration::from_millis(50), incoming.next()).await.is_err(), "no connection, and no end");
}

#[tokio::test]
async fn a_listener_for_http_1_takes_nobody_who_wants_http_2_alone() {
    let cluster = Cluster::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut incoming = Incoming::speaking(Protocol::Http1, listener, &cluster.identity(&agent("n1")));
    let addr = incoming.local_addr().unwrap().to_string();
    let refused = tls::dial(&addr, &cluster.identity(&Peer::Coordinator), &agent("n1")).await.unwrap_err();
    assert!(matches!(refused, TlsError::ClientHandshake { .. }), "{refused:?}");
    assert!(timeout(Duration::from_millis(50), incoming.next()).await.is_err(), "no connection, and no end");
}

#[tokio::test]
async fn a_dropped_stream_closes_its_port() {
    let cluster = Cluster::new();
    let identity = cluster.identity(&agent("n1"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let incoming = Incoming::new(listener, &identity);
    let addr = incoming.local_addr().unwrap();
    drop(incoming);
    for _ in 0..1000 {
        if TcpStream::connect(addr).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{addr} still accepts");
}

#[tokio::test]
async fn errors_of_dialling_say_who_and_where() {
    let cluster = Cluster::new();
    let identity = cluster.identity(&Peer::Coordinator);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    drop(listener);
    let refused = tls::dial(&addr, &identity, &agent("n1")).await.unwrap_err();
    let text = chain(&refused);
    assert!(text.contains(&addr) && text.contains("agent n1") && text.contains("refused"), "{text}");
    let refused = tls::connect(&addr, &identity, &agent("n1")).await.unwrap_err();
    assert!(chain(&refused).contains("refused"), "{}", chain(&refused));
    assert!(matches!(tls::connect_lazy("no address", &identity, &agent("n1")), Err(TlsError::Address { .. })));
    let missing = Identity::load(IdentityFiles::in_folder(Path::new("/nonexistent"))).unwrap_err();
    assert!(chain(&missing).contains("/nonexistent/ca.pem"), "{}", chain(&missing));
}
