//! What arrives for one migration: images into memory, the writable layer and volumes into their folders.
//!
//! Everything here comes from another node: names were checked by the transfer, files are unpacked under limits, and
//! nothing is looked at before the source's certificate was that of the node that the coordinator named.

use std::collections::HashMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_common::tls::PeerInfo;
use podferry_criu::{PageSetWriter, Run, page_flags};
use podferry_filesystem::SeedStore;
use podferry_memory::digest::Comparison;
use podferry_runtime::DESCRIPTORS;
use podferry_transfer::{Authorize, Deltas, Introduction, Object, Owner, PageRun, Sink};
use tokio::sync::watch;

use super::memory::{self, ArrivingMemory, List, ListOf, MemoryError};
use super::seeds::{ArrivingTree, Unpacking, WriteBack};
use crate::context;
use crate::metrics::Metrics;
use crate::source::VERIFY;

/// Where CRIU's inventory is kept until everything is here: CRIU may be waiting for it at its own place.
const INVENTORY: (&str, &str) = ("inventory.img", "inventory.arrived");

/// How far a transfer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Nothing has come, or not everything.
    Waiting,
    /// Everything is here and verified.
    Complete,
    /// It broke.
    Broken(Failure),
}

/// Where one migration's data goes.
#[derive(Debug)]
pub struct Inbox {
    /// What is being received; none once nothing is taken any more.
    open: Mutex<Option<Opened>>,
    source: Peer,
    images: PathBuf,
    arrival: watch::Sender<Arrival>,
    /// Whether the container's descriptors are here, which runc looks at first.
    described: watch::Sender<bool>,
    taken: Mutex<bool>,
}

impl Inbox {
    /// Takes data from `source` only: images into `images`, and these trees, by their names. With `post_copy` some memory may stay with
    /// the source.
    pub(super) fn new(source: Peer, images: PathBuf, trees: Vec<(String, ArrivingTree)>, post_copy: bool) -> Arc<Self> {
        let (arrival, _) = watch::channel(Arrival::Waiting);
        let (described, _) = watch::channel(false);
        let memory = ArrivingMemory::new(images.clone(), post_copy);
        let open = Mutex::new(Some(Opened { places: HashMap::new(), memory, trees: trees.into_iter().collect() }));
        Arc::new(Self { open, source, images, arrival, described, taken: Mutex::new(false) })
    }

    /// Takes nothing any more. When this returns, nobody writes into the folders. Blocks for the disk at most.
    pub fn shut(&self) {
        let Some(open) = self.open.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        for place in open.places.into_values() {
            match place {
                Place::Layer(unpacking) => drop(unpacking.finish()),
                Place::Seeds(_, receiving) => drop(receiving.finish()),
                _ => {}
            }
        }
        open.trees.into_values().for_each(ArrivingTree::shut);
    }

    /// Waits until what came of files before their tree is on the disk, as far as that was begun. Blocks.
    ///
    /// # Errors
    /// When it is not: a later sync would not tell.
    pub fn written_back(&self) -> io::Result<()> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let trees = open.iter_mut().flat_map(|open| open.trees.values_mut());
        let begun: Vec<WriteBack> = trees.filter_map(ArrivingTree::take_write_back).collect();
        drop(open);
        begun.into_iter().try_for_each(WriteBack::finish)
    }

    fn with_open<T>(&self, work: impl FnOnce(&mut Opened) -> Result<T, Failure>) -> Result<T, Failure> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        work(open.as_mut().ok_or_else(|| failed(io::Error::other("the migration was aborted")))?)
    }

    /// Waits until the container's descriptors are here. False when they come with all the rest, or not at all.
    pub async fn is_described(&self) -> bool {
        let (mut described, mut arrival) = (self.described.subscribe(), self.arrival.subscribe());
        tokio::select! {
            biased;
            _ = arrival.wait_for(|arrival| *arrival != Arrival::Waiting) => false,
            described = described.wait_for(|described| *described) => described.is_ok(),
        }
    }

    /// Whether memory of a process has come beside CRIU's.
    pub fn has_memory(&self) -> bool {
        self.with_open(|open| Ok(open.memory.is_there())).unwrap_or(false)
    }

    /// To be told when the transfer ends.
    pub fn arrival(&self) -> watch::Receiver<Arrival> {
        self.arrival.subscribe()
    }
}

/// The transfers that are expected.
#[derive(Clone, Debug)]
pub struct Admissions {
    expected: Arc<Mutex<HashMap<MigrationId, Arc<Inbox>>>>,
    metrics: Metrics,
}

impl Admissions {
    /// None yet. What comes is counted.
    pub fn new(metrics: Metrics) -> Self {
        Self { expected: Arc::default(), metrics }
    }

    /// Expects one.
    pub fn expect(&self, migration: MigrationId, inbox: Arc<Inbox>) {
        self.lock().insert(migration, inbox);
    }

    /// Expects it no longer.
    pub fn forget(&self, migration: MigrationId) {
        self.lock().remove(&migration);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Arc<Inbox>>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Authorize for Admissions {
    fn admit(&self, peer: &PeerInfo, introduction: &Introduction) -> Result<Box<dyn Sink>, Failure> {
        let refuse = |why: &str| {
            tracing::warn!(peer = ?peer.peer, addr = %peer.addr, migration = %introduction.migration_id, why, "a transfer is refused");
            Failure::new(FailureCode::PermissionDenied, why)
        };
        let inbox = self
            .lock()
            .get(&introduction.migration_id)
            .cloned()
            .ok_or_else(|| refuse("this migration is not expected here"))?;
        if peer.peer != inbox.source {
            return Err(refuse("the coordinator named another source for this migration"));
        }
        let mut taken = inbox.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *taken, true) {
            return Err(refuse("this migration's data came already"));
        }
        drop(taken);
        Ok(Box::new(Receiving { inbox, metrics: self.metrics.clone() }))
    }
}

/// One transfer as it comes in.
struct Receiving {
    inbox: Arc<Inbox>,
    metrics: Metrics,
}

/// What is being received.
#[derive(Debug)]
struct Opened {
    /// Objects, by their number in the transfer.
    places: HashMap<u32, Place>,
    /// What comes before the freeze: memory,
    memory: ArrivingMemory,
    /// and what files hold, by the names of their trees.
    trees: HashMap<String, ArrivingTree>,
}

impl Opened {
    fn tree(&mut self, name: &str) -> Result<&mut ArrivingTree, Failure> {
        let unknown = || failed(io::Error::other(format!("no layer named {name} is expected")));
        self.trees.get_mut(name).ok_or_else(unknown)
    }
}

/// Where an object goes.
enum Place {
    Image(PathBuf, File),
    Pages(Owner, PageSetWriter),
    /// Memory of this owner.
    Memory(Owner),
    List(List),
    /// Digests of this owner's pages.
    Digests(Owner, Comparison),
    Layer(Unpacking<()>),
    /// Of the tree of this name.
    Seeds(String, Unpacking<SeedStore>),
}

impl fmt::Debug for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Image(..) => "Image",
            Self::Pages(..) => "Pages",
            Self::Memory(_) => "Memory",
            Self::List(_) => "List",
            Self::Digests(..) => "Digests",
            Self::Layer(_) => "Layer",
            Self::Seeds(..) => "Seeds",
        })
    }
}

/// An image that cannot be written, and why.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the image {}", path.display())]
struct ImageError {
    path: PathBuf,
    source: io::Error,
}

fn failed(error: impl std::error::Error + 'static) -> Failure {
    context::out_of_room(&error)
        .unwrap_or_else(|| Failure::from_error(FailureCode::Aborted, &error))
        .in_phase("transfer")
}

/// What the end check says, in a phase of its own: so both nodes tell it apart from a transfer that broke.
fn different(error: MemoryError) -> Failure {
    if !matches!(error, MemoryError::Different { .. }) {
        return failed(error);
    }
    tracing::error!(%error, "the end check found a difference");
    Failure::from_error(FailureCode::Internal, &error).in_phase(VERIFY).remedy(
        "report this with the logs of both agents: it ought not to happen, and nothing was moved; `--strategy warm` copies no memory \
         beforehand and does not depend on what failed here",
    )
}

impl Sink for Receiving {
    fn received(&mut self, wire_bytes: u64) {
        self.metrics.received(wire_bytes);
    }

    fn open(&mut self, id: u32, object: &Object) -> Result<(), Failure> {
        let place = self.place(object)?;
        self.inbox.with_open(|open| {
            if let Place::Memory(owner) = place {
                open.memory.open(owner).map_err(failed)?;
            }
            open.places.insert(id, place);
            Ok(())
        })
    }

    fn data(&mut self, id: u32, _offset: u64, data: Bytes) -> Result<(), Failure> {
        self.inbox.with_open(|open| match open.places.get_mut(&id) {
            Some(Place::Image(path, file)) => {
                file.write_all(&data).map_err(|source| failed(ImageError { path: path.clone(), source }))
            }
            Some(Place::Layer(unpacking)) => unpacking.write(data).map_err(failed),
            Some(Place::Seeds(_, receiving)) => receiving.write(data).map_err(failed),
            Some(Place::List(list)) => list.extend(&data).map_err(failed),
            Some(Place::Digests(owner, comparison)) => open.memory.compare(*owner, comparison, &data).map_err(failed),
            Some(Place::Pages(..) | Place::Memory(_)) | None => {
                Err(failed(io::Error::other("data for what takes none")))
            }
        })
    }

    fn pages(&mut self, run: PageRun) -> Result<(), Failure> {
        self.inbox.with_open(|open| match open.places.get_mut(&run.object) {
            Some(Place::Pages(_, images)) => add_pages(images, &run),
            Some(Place::Memory(_)) if run.absent => Err(failed(io::Error::other("memory without contents"))),
            Some(Place::Memory(owner)) => open.memory.keep(*owner, &run).map_err(failed),
            _ => Err(failed(io::Error::other("pages for what takes none"))),
        })
    }

    fn deltas(&mut self, deltas: Deltas) -> Result<(), Failure> {
        self.inbox.with_open(|open| match open.places.get(&deltas.object()) {
            Some(Place::Memory(owner)) => open.memory.change(*owner, &deltas).map_err(failed),
            _ => Err(failed(io::Error::other("changes of pages for what keeps none"))),
        })
    }

    fn close(&mut self, id: u32, length: u64, _digest: u64) -> Result<(), Failure> {
        self.metrics.received_whole(length);
        self.inbox.with_open(|open| match open.places.remove(&id) {
            Some(Place::Image(path, _)) => {
                if path.ends_with(DESCRIPTORS) {
                    self.inbox.described.send_replace(true);
                }
                Ok(())
            }
            Some(Place::Memory(_)) => Ok(()),
            Some(Place::Pages(owner, images)) => open.memory.dumped(owner, images).map_err(failed),
            Some(Place::List(list)) => list.finish(&mut open.memory).map_err(failed),
            Some(Place::Digests(owner, comparison)) => memory::verdict(owner, comparison).map_err(different),
            Some(Place::Layer(unpacking)) => unpacking.finish().map_err(failed),
            Some(Place::Seeds(name, receiving)) => {
                let store = receiving.finish().map_err(failed)?;
                open.tree(&name).map(|tree| tree.put_back(store))
            }
            None => Err(failed(io::Error::other("what is not open is closed"))),
        })
    }

    fn end(self: Box<Self>) -> Result<(), Failure> {
        let incomplete = || failed(io::Error::other("the transfer ends with open objects"));
        self.inbox.with_open(|open| {
            open.places.is_empty().then_some(()).ok_or_else(incomplete)?;
            open.memory.complete().map_err(failed)
        })?;
        self.inbox.arrival.send_replace(Arrival::Complete);
        Ok(())
    }

    fn abort(self: Box<Self>, reason: &Failure) {
        self.inbox.arrival.send_replace(Arrival::Broken(reason.clone()));
    }
}

fn add_pages(images: &mut PageSetWriter, run: &PageRun) -> Result<(), Failure> {
    let present = run.flags & page_flags::PRESENT != 0 && !run.absent;
    if !present || run.flags & page_flags::PARENT != 0 {
        return Err(failed(io::Error::other("pages of a parent image, and there is none")));
    }
    let placed = Run { address: run.vaddr, pages: run.count, flags: run.flags };
    let is_zero = |index| usize::try_from(index).is_ok_and(|index| run.zero.is_zero(index));
    images.add(placed, is_zero, &run.bytes).map_err(failed)
}

impl Receiving {
    fn place(&self, object: &Object) -> Result<Place, Failure> {
        let place = match object {
            Object::ImageFile(name) => {
                let name = if name == INVENTORY.0 { INVENTORY.1 } else { name };
                let path = self.inbox.images.join(name);
                match create(&path) {
                    Ok(file) => Place::Image(path, file),
                    Err(source) => return Err(failed(ImageError { path, source })),
                }
            }
            Object::Pages { owner, id } => {
                let of = match owner {
                    Owner::Process(pid) => podferry_criu::Owner::Process(*pid),
                    Owner::SharedMemory(id) => podferry_criu::Owner::SharedMemory(*id),
                };
                Place::Pages(*owner, PageSetWriter::create(&self.inbox.images, of, *id).map_err(failed)?)
            }
            Object::Layer(name) => {
                Place::Layer(self.inbox.with_open(|open| open.tree(name)?.unpack().map_err(failed))?)
            }
            Object::Seeds { layer: name, .. } => {
                let receiving = self.inbox.with_open(|open| open.tree(name)?.receive().map_err(failed))?;
                Place::Seeds(name.clone(), receiving)
            }
            Object::Memory { owner, .. } => Place::Memory(*owner),
            Object::Existing { owner } => Place::List(List::of(ListOf::Existing(*owner))),
            Object::Later { process } => Place::List(List::of(ListOf::Later(*process))),
            Object::Digests { owner } => {
                let comparison = self.inbox.with_open(|open| open.memory.open_digests(*owner).map_err(failed))?;
                Place::Digests(*owner, comparison)
            }
        };
        Ok(place)
    }
}

/// CRIU's inventory, which is not in its place yet.
pub(super) fn arrived_inventory(images: &Path) -> PathBuf {
    images.join(INVENTORY.1)
}

/// Puts CRIU's inventory in its place, if it has come. Idempotent.
pub(super) fn place_inventory(images: &Path) -> io::Result<()> {
    match std::fs::rename(arrived_inventory(images), images.join(INVENTORY.0)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}
