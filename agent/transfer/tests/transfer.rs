//! Both roles over real sockets and mutual TLS.

#![expect(clippy::unwrap_used, reason = "tests")]

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use podferry_common::FailureCode;
use podferry_common::identity::Peer;
use podferry_common::tls::TlsError;
use podferry_proto::Version;
use podferry_transfer::compression::Level;
use podferry_transfer::{Changes, Compression, Object, Options, Owner, Place, Sender, SenderStats, TransferError};
use support::{Call, Cluster, agent, noise};

const PAGE: usize = 4096;

async fn connect(cluster: &Cluster, options: Options) -> Result<Sender, TransferError> {
    let address = cluster.address.to_string();
    Sender::connect(&address, &cluster.source(), &agent("target"), &cluster.introduction(), options).await
}

fn memory(id: u32) -> Object {
    Object::Pages { owner: Owner::Process(id), id }
}

fn file(name: &str) -> Object {
    Object::ImageFile(name.to_owned())
}

/// Some pages of text, some of noise, some of zeros.
fn mixed(pages: usize) -> Vec<u8> {
    let mut bytes = noise(pages * PAGE, 7);
    for (index, page) in bytes.chunks_mut(PAGE).enumerate() {
        match index / 5 % 3 {
            0 => page.fill(0),
            1 => page.iter_mut().zip((0_u8..40).cycle()).for_each(|(byte, text)| *byte = text),
            _ => {}
        }
    }
    bytes
}

/// An object's bytes and its absent pages, put together from what the sink got.
fn rebuilt(calls: &[Call], id: u32) -> (Vec<u8>, u64) {
    let (mut bytes, mut absent) = (Vec::new(), 0);
    for call in calls {
        match call {
            Call::Data(object, offset, data) if *object == id => {
                assert_eq!(*offset, bytes.len() as u64);
                bytes.extend_from_slice(data);
            }
            Call::Pages(run) if run.object == id && run.absent => absent += run.count,
            Call::Pages(run) if run.object == id => {
                let mut full = run.bytes.chunks_exact(PAGE);
                for page in 0..usize::try_from(run.count).unwrap() {
                    let zero = run.zero.is_zero(page);
                    bytes.extend_from_slice(if zero { &[0; PAGE] } else { full.next().unwrap() });
                }
                assert_eq!(full.next(), None);
            }
            _ => {}
        }
    }
    (bytes, absent)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_arrives_as_it_was_sent() {
    for compression in [Compression::Auto, Compression::Off, Compression::Fixed(Level::Middle)] {
        let cluster = Cluster::new().await;
        let sender = connect(&cluster, Options { compression, ..Options::default() }).await.unwrap();
        let (image, pages) = (noise(3_000_001, 3), mixed(700));
        let mut one = sender.open(&file("core-1.img")).await.unwrap();
        let mut two = sender.open(&memory(5)).await.unwrap();
        let mut layer = sender.open(&Object::Layer("upper.tar".to_owned())).await.unwrap();
        one.data(Bytes::from(image.clone()).slice(..1_000_000)).await.unwrap();
        layer.data(Bytes::from_static(b"layer")).await.unwrap();
        // CRIU's pages come on a thread of their own.
        let memory = Bytes::from(pages.clone());
        let thread = std::thread::spawn(move || {
            two.pages_blocking(0x7000_0000, 1, memory).unwrap();
            two.absent_pages_blocking(0x9000_0000, 2, 1 << 20).unwrap();
            two.close_blocking().unwrap();
        });
        one.data(Bytes::from(image.clone()).slice(1_000_000..)).await.unwrap();
        one.close().await.unwrap();
        layer.close().await.unwrap();
        tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
        let stats = sender.finish().await.unwrap();

        assert_eq!(cluster.store.end(), Call::End, "confirmed means stored");
        let calls = cluster.store.calls();
        assert_eq!(rebuilt(&calls, 1), (image.clone(), 0));
        assert_eq!(rebuilt(&calls, 2), (pages.clone(), 1 << 20));
        assert_eq!(rebuilt(&calls, 3).0, b"layer");
        assert!(calls.contains(&Call::Close(2, pages.len() as u64)));
        let zero = pages.chunks(PAGE).filter(|page| page.iter().all(|byte| *byte == 0)).count() * PAGE;
        assert_eq!(stats.zero_bytes, zero as u64);
        assert_eq!(stats.raw_bytes, (image.len() + pages.len() + 5) as u64);
        let full = stats.raw_bytes - stats.zero_bytes;
        match compression {
            Compression::Fixed(_) => assert!(stats.wire_bytes < full * 9 / 10, "{stats:?}"),
            _ => assert!(stats.wire_bytes < full + 4096, "{stats:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_store_slows_the_sender_and_memory_stays_bounded() {
    let cluster = Cluster::new().await;
    cluster.store.keep_bytes.store(false, Ordering::Relaxed);
    cluster.store.stuck.store(true, Ordering::Relaxed);
    let sender = connect(&cluster, Options::default()).await.unwrap();
    let pool = sender.pool();
    let mut writer = sender.open(&memory(1)).await.unwrap();
    let total = 256_u64 << 20;
    let source = noise(1 << 20, 1);
    let thread = std::thread::spawn({
        let pool = pool.clone();
        move || {
            for index in 0..total >> 20 {
                let mut buffer = pool.take(1 << 20);
                buffer.copy_from_slice(&source);
                writer.pages_blocking(index << 20, 0, pool.share(buffer)).unwrap();
            }
            writer.close_blocking().unwrap();
        }
    });
    // Until it has begun and nothing moves any more: windows and queues are full.
    let (begun, mut before) = (Instant::now(), 0);
    while before <= 1 << 20 || sender.stats().raw_bytes != before {
        assert!(begun.elapsed() < Duration::from_secs(60), "{before} bytes under way");
        before = sender.stats().raw_bytes;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let under_way = 64 << 20;
    assert!(before < under_way, "{before} bytes under way");
    assert!(pool.shared() < 16, "{} buffers", pool.shared());
    cluster.store.stuck.store(false, Ordering::Relaxed);
    tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
    sender.finish().await.unwrap();
    assert!(pool.most_shared() < 16, "{} buffers at most", pool.most_shared());
    assert_eq!(pool.shared(), 0);
    assert_eq!(cluster.store.taken.load(Ordering::Relaxed), total);
    assert_eq!(cluster.store.end(), Call::End);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cap_is_kept() {
    let cluster = Cluster::new().await;
    let cap = 20 << 20;
    let options = Options { compression: Compression::Off, bandwidth_cap: Some(cap), ..Options::default() };
    let sender = connect(&cluster, options).await.unwrap();
    let mut writer = sender.open(&file("big")).await.unwrap();
    let begun = Instant::now();
    writer.data(noise(10 << 20, 1).into()).await.unwrap();
    writer.close().await.unwrap();
    sender.finish().await.unwrap();
    let took = begun.elapsed().as_secs_f64();
    assert!(took > 0.4, "{took} s for half a second's worth");
}

/// Sends until it fails, and says how.
async fn send_until_failure(sender: &Sender) -> TransferError {
    let mut writer = match sender.open(&file("endless")).await {
        Ok(writer) => writer,
        Err(error) => return error,
    };
    let bytes = Bytes::from(noise(1 << 20, 1));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        if let Err(error) = writer.data(bytes.clone()).await {
            return error;
        }
    }
    panic!("it went on and on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_breaks_in_the_middle_fails_both_sides() {
    let cluster = Cluster::new().await;
    let mut relay = Relay::new(&cluster).await;
    let introduction = cluster.introduction();
    let identity = cluster.source();
    let connected =
        Sender::connect(&relay.address, &identity, &agent("target"), &introduction, Options::default()).await;
    let sender = connected.unwrap();
    let failed = sender.failed();
    relay.cut_after(5 << 20);
    let error = send_until_failure(&sender).await;
    assert!(matches!(error, TransferError::Broken { .. }), "{error:?}");
    assert_eq!(failed.await.to_string(), error.to_string());
    assert!(sender.failure().is_some());
    assert_eq!(sender.finish().await.unwrap_err().to_string(), error.to_string());
    let end = tokio::task::spawn_blocking({
        let store = std::sync::Arc::clone(&cluster.store);
        move || store.end()
    });
    let Call::Abort(reason) = end.await.unwrap() else { panic!("it ended well") };
    assert!(reason.contains("before its last frame"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_fails_says_so_to_the_sender() {
    let cluster = Cluster::new().await;
    cluster.store.full.store(true, Ordering::Relaxed);
    let sender = connect(&cluster, Options::default()).await.unwrap();
    let error = send_until_failure(&sender).await;
    let TransferError::Refused(failure) = error else { panic!("{error:?}") };
    assert_eq!((failure.code, failure.message.as_str()), (FailureCode::ResourceExhausted, "the disk is full"));
    assert_eq!(failure.remedy.as_deref(), Some("free some"));
    assert_eq!(cluster.store.end(), Call::Abort("the disk is full".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_panics_fails_the_transfer() {
    let cluster = Cluster::new().await;
    cluster.store.panics.store(true, Ordering::Relaxed);
    let sender = connect(&cluster, Options::default()).await.unwrap();
    let error = send_until_failure(&sender).await;
    let TransferError::Refused(failure) = error else { panic!("{error:?}") };
    assert_eq!(failure.code, FailureCode::Internal);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_transfer_is_discarded_with_the_reason() {
    let cluster = Cluster::new().await;
    let sender = connect(&cluster, Options::default()).await.unwrap();
    let mut writer = sender.open(&memory(1)).await.unwrap();
    writer.pages(0, 0, noise(10 * PAGE, 1).into()).await.unwrap();
    sender.abort("the dump failed").await;
    let Call::Abort(reason) = cluster.store.end() else { panic!("it ended well") };
    assert!(reason.contains("the dump failed"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_sender_discards_the_transfer() {
    let cluster = Cluster::new().await;
    let sender = connect(&cluster, Options::default()).await.unwrap();
    let mut writer = sender.open(&file("half")).await.unwrap();
    writer.data(Bytes::from_static(b"half")).await.unwrap();
    drop(sender);
    assert!(matches!(cluster.store.end(), Call::Abort(_)));
    assert!(matches!(writer.data(Bytes::from(noise(9 << 20, 1))).await, Err(TransferError::Aborted { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_left_open_fails_the_end() {
    let cluster = Cluster::new().await;
    let sender = connect(&cluster, Options::default()).await.unwrap();
    let _open = sender.open(&file("half")).await.unwrap();
    let TransferError::Refused(failure) = sender.finish().await.unwrap_err() else { panic!("not refused") };
    assert!(failure.message.contains("still open"), "{failure}");
    assert!(matches!(cluster.store.end(), Call::Abort(_)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_and_pages_that_cannot_be_are_refused_before_they_are_sent() {
    let cluster = Cluster::new().await;
    let sender = connect(&cluster, Options::default()).await.unwrap();
    assert!(matches!(sender.open(&file("../etc")).await, Err(TransferError::InvalidObject(_))));
    let mut image = sender.open(&file("a")).await.unwrap();
    let page = Bytes::from(vec![1; PAGE]);
    assert!(matches!(image.pages(0, 0, page.clone()).await, Err(TransferError::NoPages { .. })));
    let mut pages = sender.open(&memory(1)).await.unwrap();
    let misplaced = [(1, page.clone()), (0, page.slice(1..)), (0, Bytes::new()), (u64::MAX - 0xfff, page)];
    for (vaddr, bytes) in misplaced {
        assert!(matches!(pages.pages(vaddr, 0, bytes).await, Err(TransferError::NoPages { .. })));
    }
    pages.close().await.unwrap();
    image.close().await.unwrap();
    sender.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_not_let_in() {
    let cluster = Cluster::new().await;
    let address = cluster.address.to_string();
    let target = agent("target");
    let introduction = cluster.introduction();
    let source = cluster.source();

    // A certificate of another authority.
    let elsewhere = Cluster::new().await;
    let foreign = Sender::connect(&address, &elsewhere.source(), &target, &introduction, Options::default()).await;
    assert!(matches!(foreign.err(), Some(TransferError::Connect(_))));

    // Another agent where the target should be.
    let expected = Sender::connect(&address, &source, &agent("other"), &introduction, Options::default()).await;
    let Some(TransferError::Connect(error)) = expected.err() else { panic!("connected to the wrong agent") };
    assert!(matches!(*error, TlsError::ClientHandshake { .. } | TlsError::WrongPeer { .. }), "{error:?}");

    // Trusted certificates of somebody else than who they say they are.
    for peer in [agent("other"), Peer::client("source").unwrap(), Peer::Coordinator] {
        let identity = cluster.identity("somebody", &peer);
        let error = Sender::connect(&address, &identity, &target, &introduction, Options::default()).await.err();
        let Some(TransferError::Refused(failure)) = error else { panic!("{peer}: {error:?}") };
        assert_eq!(failure.code, FailureCode::PermissionDenied);
    }

    // The right agent for a migration that nobody announced.
    *cluster.store.expected.lock().unwrap() = None;
    let error = Sender::connect(&address, &source, &target, &introduction, Options::default()).await.err();
    let Some(TransferError::Refused(failure)) = error else { panic!("{error:?}") };
    assert_eq!((failure.code, &*failure.message), (FailureCode::PermissionDenied, "no such migration is expected"));
    assert_eq!(cluster.store.calls(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_must_meet() {
    let cluster = Cluster::new().await;
    let address = cluster.address.to_string();
    let ours = Version::OURS;
    let spoken = [Version { current: ours.current + 1, oldest: ours.current }, ours];
    let foreign = [Version { current: ours.current + 2, oldest: ours.current + 1 }, Version { current: 0, oldest: 0 }];
    for (version, welcome) in spoken.map(|version| (version, true)).into_iter().chain(foreign.map(|v| (v, false))) {
        let introduction = podferry_transfer::Introduction { version, ..cluster.introduction() };
        let source = cluster.source();
        let sender = Sender::connect(&address, &source, &agent("target"), &introduction, Options::default()).await;
        match sender {
            Ok(sender) => {
                assert!(welcome, "{version:?}");
                sender.finish().await.unwrap();
            }
            Err(TransferError::Refused(failure)) => {
                assert!(!welcome && failure.code == FailureCode::Unimplemented, "{version:?}: {failure}");
            }
            Err(error) => panic!("{version:?}: {error:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_does_not_disturb_others() {
    use tokio::io::AsyncWriteExt as _;
    let cluster = Cluster::new().await;
    let sender = connect(&cluster, Options::default()).await.unwrap();
    for seed in 0..8 {
        let mut garbage = tokio::net::TcpStream::connect(cluster.address).await.unwrap();
        // The server may close before all of it is written.
        let _closed = garbage.write_all(&noise(100_000, seed)).await;
    }
    // Past TLS: HTTP/2 that is none, and gRPC that is none.
    let mut tls =
        podferry_common::tls::dial(&cluster.address.to_string(), &cluster.source(), &agent("target")).await.unwrap();
    let _closed = tls.write_all(&noise(100_000, 1)).await;
    let channel =
        podferry_common::tls::connect(&cluster.address.to_string(), &cluster.source(), &agent("target")).await.unwrap();
    for garbage in [&b"\0\0\0\0\x04abcd"[..], b"\x01\0\0\0\0", b"\0\xff\xff\xff\xff", b"\0\0"] {
        assert_ne!(answer(channel.clone(), garbage).await, tonic::Code::Ok, "{garbage:?}");
    }
    let mut writer = sender.open(&file("fine")).await.unwrap();
    writer.data(Bytes::from_static(b"fine")).await.unwrap();
    writer.close().await.unwrap();
    sender.finish().await.unwrap();
    assert_eq!(cluster.store.end(), Call::End);
}

/// What the service answers to a request stream of these bytes.
async fn answer(mut channel: tonic::transport::Channel, bytes: &'static [u8]) -> tonic::Code {
    use http_body_util::BodyExt as _;
    use tower::{Service as _, ServiceExt as _};
    let body = tonic::body::Body::new(http_body_util::Full::new(Bytes::from_static(bytes)));
    let mut request = http::Request::post("/podferry.v1.TransferService/Transfer").body(body).unwrap();
    request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let response = channel.ready().await.unwrap().call(request).await.unwrap();
    let collected = response.into_body().collect().await.unwrap();
    tonic::Status::from_header_map(collected.trailers().unwrap()).unwrap().code()
}

/// A generated client, which knows nothing of how we write frames: the service is plain gRPC.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ordinary_grpc_client_can_call() {
    use podferry_proto::v1::transfer_response::Kind as Answer;
    use podferry_proto::v1::{TransferRequest, TransferResponse, transfer_service_client::TransferServiceClient};
    use prost::Message as _;
    let cluster = Cluster::new().await;
    let introduction = cluster.introduction();
    let channel =
        podferry_common::tls::connect(&cluster.address.to_string(), &cluster.source(), &agent("target")).await.unwrap();
    let begin = podferry_proto::v1::TransferBegin {
        version: Some(introduction.version.into()),
        migration: introduction.migration_id.to_string(),
        source_node: introduction.source_node.to_string(),
    };
    let kinds = [
        podferry_proto::v1::transfer_request::Kind::Begin(begin),
        podferry_proto::v1::transfer_request::Kind::End(podferry_proto::v1::TransferEnd::default()),
    ];
    let frames = kinds.into_iter().zip(0..).map(|(kind, sequence)| {
        use std::hash::Hasher as _;
        let mut frame = TransferRequest { sequence, kind: Some(kind), ..TransferRequest::default() };
        let mut hasher = twox_hash::XxHash3_64::new();
        hasher.write(&frame.encode_to_vec());
        hasher.write(&twox_hash::XxHash3_64::oneshot(&[]).to_le_bytes());
        frame.checksum = hasher.finish();
        frame
    });
    let frames: Vec<TransferRequest> = frames.collect();
    let mut client = TransferServiceClient::new(channel);
    let mut answers = client.transfer(futures::stream::iter(frames)).await.unwrap().into_inner();
    let mut kinds = Vec::new();
    while let Some(TransferResponse { kind }) = answers.message().await.unwrap() {
        kinds.push(kind.unwrap());
    }
    assert!(matches!(kinds[..], [Answer::Welcome(_), Answer::Finished(_)]), "{kinds:?}");
    assert_eq!(cluster.store.end(), Call::End);
}

/// A TCP relay that can be cut.
struct Relay {
    address: String,
    cut: tokio::sync::watch::Sender<u64>,
    task: tokio::task::JoinHandle<()>,
}

impl Relay {
    async fn new(cluster: &Cluster) -> Self {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (cut, limit) = tokio::sync::watch::channel(u64::MAX);
        let target = cluster.address;
        let task = tokio::spawn(async move {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = tokio::net::TcpStream::connect(target).await.unwrap();
            let (mut near_read, mut near_write) = near.split();
            let (mut far_read, mut far_write) = far.split();
            let forth = async {
                let mut buffer = vec![0; 64 << 10];
                let mut passed = 0;
                loop {
                    let read = near_read.read(&mut buffer).await.unwrap();
                    passed += read as u64;
                    if read == 0 || passed > *limit.borrow() {
                        return;
                    }
                    far_write.write_all(&buffer[..read]).await.unwrap();
                }
            };
            tokio::select! {
                () = forth => {}
                _ = tokio::io::copy(&mut far_read, &mut near_write) => {}
            }
        });
        Self { address, cut, task }
    }

    fn cut_after(&mut self, bytes: u64) {
        self.cut.send(bytes).unwrap();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scattered_pages_of_a_running_process_arrive_where_they_belong() {
    let cluster = Cluster::new().await;
    let sender = connect(&cluster, Options::default()).await.unwrap();
    assert_eq!(sender.version(), Version::OURS.current);
    let bytes = mixed(200);
    let places: Vec<Place> = (0..100).map(|run| Place { vaddr: run * 0x10_0000 + 0x1000, count: 2 }).collect();
    let mut writer = sender.open(&Object::Memory { owner: Owner::Process(7), round: 1 }).await.unwrap();
    writer.scattered(&places, Bytes::from(bytes.clone())).await.unwrap();
    writer.close().await.unwrap();
    sender.finish().await.unwrap();
    let calls = cluster.store.calls();
    assert_eq!(rebuilt(&calls, 1).0, bytes);
    let arrived: Vec<(u64, u64)> = calls
        .iter()
        .filter_map(|call| match call {
            Call::Pages(run) => Some((run.vaddr, run.count)),
            _ => None,
        })
        .collect();
    assert_eq!(arrived, places.iter().map(|place| (place.vaddr, place.count)).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_another_sort_do_not_lie_apart() {
    let cluster = Cluster::new().await;
    let sender = connect(&cluster, Options::default()).await.unwrap();
    let mut writer = sender.open(&memory(1)).await.unwrap();
    let refused = writer.scattered(&[Place { vaddr: 0x1000, count: 1 }], Bytes::from(noise(PAGE, 1))).await;
    assert!(matches!(refused, Err(TransferError::NoPages { .. })), "{refused:?}");
}

/// The pages at these addresses, one byte of each of which becomes `new`, in `pages`.
fn write_one_byte(pages: &mut [u8], vaddr: u64, touched: &[usize], new: u8) -> Changes {
    let mut changes = Changes::default();
    for index in touched {
        let page: &mut [u8; PAGE] = (&mut pages[index * PAGE..][..PAGE]).try_into().unwrap();
        let previous = *page;
        page[index % PAGE] = new;
        assert!(changes.add(vaddr + (index * PAGE) as u64, &previous, page));
    }
    changes
}

/// Sends pages in one round, and in the next what has changed in some of them; none for nothing, not even a frame.
async fn send_two_rounds(cluster: &Cluster, options: Options, pages: &[u8], changes: Option<Changes>) -> SenderStats {
    let sender = connect(cluster, options).await.unwrap();
    let mut first = sender.open(&Object::Memory { owner: Owner::Process(7), round: 1 }).await.unwrap();
    let count = (pages.len() / PAGE) as u64;
    first.scattered(&[Place { vaddr: 0x10_0000, count }], Bytes::copy_from_slice(pages)).await.unwrap();
    first.close().await.unwrap();
    let mut second = sender.open(&Object::Memory { owner: Owner::Process(7), round: 2 }).await.unwrap();
    if let Some(changes) = changes {
        second.deltas(changes).await.unwrap();
    }
    second.close().await.unwrap();
    sender.finish().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_changed_by_eight_bytes_costs_less_than_a_hundred_on_the_wire() {
    let options = Options { compression: Compression::Off, ..Options::default() };
    let before = mixed(40);
    let mut wire = Vec::new();
    for touched in [None, Some(&[17][..]), Some(&[0, 1, 2, 5, 6, 20, 39])] {
        let cluster = Cluster::new().await;
        cluster.store.takes_deltas.store(true, Ordering::Relaxed);
        let mut pages = before.clone();
        let changes = touched.map(|touched| write_one_byte(&mut pages, 0x10_0000, touched, 0xaa));
        let count = touched.map_or(0, <[_]>::len);
        let stats = send_two_rounds(&cluster, options.clone(), &before, changes).await;
        assert_eq!(stats.raw_bytes, ((40 + count) * PAGE) as u64, "changed pages count whole");
        assert!(cluster.store.calls().contains(&Call::Close(2, (count * PAGE) as u64)));
        let kept = cluster.store.pages.lock().unwrap();
        for (index, page) in pages.chunks(PAGE).enumerate() {
            assert!(kept[&(0x10_0000 + (index * PAGE) as u64)] == page, "page {index} after changes of {touched:?}");
        }
        wire.push(stats.wire_bytes);
    }
    let costs: Vec<u64> = wire[1..].iter().map(|bytes| bytes - wire[0]).collect();
    println!("bytes on the wire: {} for one page, {} for seven", costs[0], costs[1]);
    assert!(costs[0] < 100 && costs[1] - costs[0] < 6 * 20, "{costs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_changed_pages_are_packed_like_others() {
    let cluster = Cluster::new().await;
    cluster.store.takes_deltas.store(true, Ordering::Relaxed);
    let before = noise(256 * PAGE, 5);
    let mut pages = before.clone();
    let changes = write_one_byte(&mut pages, 0x10_0000, &(0..256).collect::<Vec<_>>(), 0xaa);
    let options = Options { compression: Compression::Fixed(Level::Fast), ..Options::default() };
    let stats = send_two_rounds(&cluster, options, &before, Some(changes)).await;
    assert!(stats.wire_bytes < before.len() as u64 + 256 * 10, "{stats:?}");
    let kept = cluster.store.pages.lock().unwrap();
    assert!(pages.chunks(PAGE).enumerate().all(|(index, page)| kept[&(0x10_0000 + (index * PAGE) as u64)] == page));
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_what_the_other_side_does_not_have_fail_the_transfer() {
    let before = noise(4 * PAGE, 5);
    // A page that never came; one that is another at the sender; a store that keeps no pages.
    for (vaddr, spoiled, takes, why) in [
        (0x20_0000, false, true, "did not come before"),
        (0x10_0000, true, true, "do not fit what came before"),
        (0x10_0000, false, false, "keeps no pages"),
    ] {
        let cluster = Cluster::new().await;
        cluster.store.takes_deltas.store(takes, Ordering::Relaxed);
        let mut pages = before.clone();
        pages[2 * PAGE + 77] ^= u8::from(spoiled);
        let changes = write_one_byte(&mut pages, vaddr, &[1, 2], 0xaa);
        let sender = connect(&cluster, Options::default()).await.unwrap();
        let mut writer = sender.open(&Object::Memory { owner: Owner::Process(7), round: 1 }).await.unwrap();
        let places = [Place { vaddr: 0x10_0000, count: 4 }];
        writer.scattered(&places, Bytes::copy_from_slice(&before)).await.unwrap();
        writer.deltas(changes).await.unwrap();
        let TransferError::Refused(failure) = sender.failed().await else { panic!("not refused") };
        assert!(failure.message.contains(why), "{failure}");
        assert!(matches!(cluster.store.end(), Call::Abort(_)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_memory_of_a_running_process_has_changes() {
    let cluster = Cluster::new().await;
    let sender = connect(&cluster, Options::default()).await.unwrap();
    let changes = || write_one_byte(&mut noise(PAGE, 1), 0x1000, &[0], 0xaa);
    let mut pages = sender.open(&memory(1)).await.unwrap();
    assert!(matches!(pages.deltas(changes()).await, Err(TransferError::NoPages { .. })));
    let mut running = sender.open(&Object::Memory { owner: Owner::Process(7), round: 1 }).await.unwrap();
    assert!(matches!(running.deltas(Changes::default()).await, Err(TransferError::NoPages { .. })));
}
