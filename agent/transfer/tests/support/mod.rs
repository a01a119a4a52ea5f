//! Two agents in one process: identities of one authority, a server that keeps what it gets.

#![expect(clippy::unwrap_used, reason = "only tests use it")]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use podferry_common::identity::{Identity, IdentityFiles, LocalCa, Peer};
use podferry_common::tls::PeerInfo;
use podferry_common::{Failure, FailureCode, MigrationId};
use podferry_proto::Version;
use podferry_transfer::delta::Page;
use podferry_transfer::{Authorize, Deltas, Introduction, Object, PageRun, Sink, TransferServer};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// What a sink was told, in order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Call {
    Open(u32, Object),
    Data(u32, u64, Bytes),
    Pages(PageRun),
    Close(u32, u64),
    End,
    Abort(String),
}

/// Everything that the receiver's side does and is told to do.
#[derive(Default)]
pub(crate) struct Store {
    pub(crate) calls: Mutex<Vec<Call>>,
    pub(crate) taken: AtomicU64,
    /// While set, the sink does not take data.
    pub(crate) stuck: AtomicBool,
    /// What to refuse instead of taking data.
    pub(crate) full: AtomicBool,
    pub(crate) panics: AtomicBool,
    pub(crate) keep_bytes: AtomicBool,
    /// While set, the sink takes changes of pages that it has.
    pub(crate) takes_deltas: AtomicBool,
    /// What pages hold, by address.
    pub(crate) pages: Mutex<HashMap<u64, Page>>,
    pub(crate) expected: Mutex<Option<MigrationId>>,
}

impl Store {
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// How the transfer ended; waits for it.
    pub(crate) fn end(&self) -> Call {
        let begun = Instant::now();
        loop {
            let calls = self.calls();
            let ends: Vec<&Call> = calls.iter().filter(|call| matches!(call, Call::End | Call::Abort(_))).collect();
            match ends[..] {
                [end] => {
                    assert_eq!(calls.last(), Some(end), "it is the last");
                    return end.clone();
                }
                [] => assert!(begun.elapsed() < Duration::from_secs(40), "no end: {} calls", calls.len()),
                _ => panic!("it ended more than once: {ends:?}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn keep(&self, run: &PageRun) {
        let mut full = run.bytes.chunks_exact(4096);
        for index in (0..run.count).filter(|_| !run.absent) {
            let zero = run.zero.is_zero(usize::try_from(index).unwrap());
            let contents = if zero { [0; 4096] } else { full.next().unwrap().try_into().unwrap() };
            self.pages.lock().unwrap().insert(run.vaddr + index * 4096, contents);
        }
    }

    fn note(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
    }

    fn take(&self, bytes: usize) -> Result<(), Failure> {
        while self.stuck.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!self.panics.load(Ordering::Relaxed), "the store was told to panic");
        if self.full.load(Ordering::Relaxed) {
            return Err(Failure::new(FailureCode::ResourceExhausted, "the disk is full").remedy("free some"));
        }
        self.taken.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }
}

pub(crate) struct StoreSink(Arc<Store>);

impl Sink for StoreSink {
    fn open(&mut self, id: u32, object: &Object) -> Result<(), Failure> {
        self.0.note(Call::Open(id, object.clone()));
        Ok(())
    }

    fn data(&mut self, id: u32, offset: u64, bytes: Bytes) -> Result<(), Failure> {
        self.0.take(bytes.len())?;
        if self.0.keep_bytes.load(Ordering::Relaxed) {
            self.0.note(Call::Data(id, offset, bytes));
        }
        Ok(())
    }

    fn pages(&mut self, run: PageRun) -> Result<(), Failure> {
        self.0.take(run.bytes.len())?;
        if self.0.keep_bytes.load(Ordering::Relaxed) {
            self.0.keep(&run);
            self.0.note(Call::Pages(run));
        }
        Ok(())
    }

    fn deltas(&mut self, deltas: Deltas) -> Result<(), Failure> {
        if !self.0.takes_deltas.load(Ordering::Relaxed) {
            return Refusing.deltas(deltas);
        }
        let changed = deltas.apply(|vaddr, page| {
            let pages = self.0.pages.lock().unwrap();
            pages.get(&vaddr).inspect(|kept| page.copy_from_slice(&kept[..])).is_some()
        });
        let changed = changed.map_err(|error| Failure::from_error(FailureCode::Internal, &error))?;
        changed.runs().try_for_each(|run| self.pages(run))
    }

    fn close(&mut self, id: u32, length: u64, _digest: u64) -> Result<(), Failure> {
        self.0.note(Call::Close(id, length));
        Ok(())
    }

    fn end(self: Box<Self>) -> Result<(), Failure> {
        self.0.note(Call::End);
        Ok(())
    }

    fn abort(self: Box<Self>, reason: &Failure) {
        self.0.note(Call::Abort(reason.message.clone()));
    }
}

/// A sink without a way of its own to take changes.
struct Refusing;

impl Sink for Refusing {
    fn open(&mut self, _: u32, _: &Object) -> Result<(), Failure> {
        Ok(())
    }

    fn data(&mut self, _: u32, _: u64, _: Bytes) -> Result<(), Failure> {
        Ok(())
    }

    fn pages(&mut self, _: PageRun) -> Result<(), Failure> {
        Ok(())
    }

    fn close(&mut self, _: u32, _: u64, _: u64) -> Result<(), Failure> {
        Ok(())
    }

    fn end(self: Box<Self>) -> Result<(), Failure> {
        Ok(())
    }

    fn abort(self: Box<Self>, _: &Failure) {}
}

pub(crate) struct Gate(Arc<Store>);

impl Authorize for Gate {
    fn admit(&self, peer: &PeerInfo, introduction: &Introduction) -> Result<Box<dyn Sink>, Failure> {
        assert_eq!(peer.peer, Peer::Agent(introduction.source_node.clone()));
        if *self.0.expected.lock().unwrap() != Some(introduction.migration_id) {
            return Err(Failure::new(FailureCode::PermissionDenied, "no such migration is expected"));
        }
        Ok(Box::new(StoreSink(Arc::clone(&self.0))))
    }
}

/// A cluster of the agents `source`, `target` and `other`, and a client; `target` serves.
pub(crate) struct Cluster {
    folder: TempDir,
    ca: LocalCa,
    pub(crate) address: SocketAddr,
    pub(crate) store: Arc<Store>,
    server: JoinHandle<()>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.store.stuck.store(false, Ordering::Relaxed);
        self.server.abort();
    }
}

pub(crate) fn agent(node: &str) -> Peer {
    Peer::Agent(node.parse().unwrap())
}

impl Cluster {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = LocalCa::create(&folder.path().join("ca")).unwrap();
        let identity = issue(&ca, &folder, "target", &agent("target"));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let store = Arc::new(Store::default());
        store.keep_bytes.store(true, Ordering::Relaxed);
        let service = TransferServer::new(Arc::new(Gate(Arc::clone(&store))));
        let (mut server, incoming) = podferry_transfer::server(listener, &identity);
        let server = server.add_service(service);
        let server = tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        Self { folder, ca, address, store, server }
    }

    pub(crate) fn identity(&self, name: &str, peer: &Peer) -> Identity {
        issue(&self.ca, &self.folder, name, peer)
    }

    pub(crate) fn source(&self) -> Identity {
        self.identity("source", &agent("source"))
    }

    /// An introduction that the target expects.
    pub(crate) fn introduction(&self) -> Introduction {
        let migration_id = MigrationId::new();
        *self.store.expected.lock().unwrap() = Some(migration_id);
        Introduction { migration_id, source_node: "source".parse().unwrap(), version: Version::OURS }
    }
}

fn issue(ca: &LocalCa, folder: &TempDir, name: &str, peer: &Peer) -> Identity {
    let files = IdentityFiles::in_folder(folder.path().join(name));
    ca.issue(peer, Duration::from_secs(3600), &files).unwrap();
    Identity::load(files).unwrap()
}

/// Bytes that nothing packs.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
