//! The writable layer, or a volume, as it comes in: first what its large files hold, while the container still runs where it is, then
//! the tree.
//!
//! Each object is unpacked on a thread of its own, so that a slow disk holds the transfer up and nothing else. What a file holds is
//! brought to the disk as soon as it has come, beside that: of what is synced before the seal little is left to write then.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use podferry_filesystem::{Limits, SeedStore};

/// Pieces of an object that may wait for the disk.
const QUEUE: usize = 4;
/// Files that may wait to be written back. What finds no room is synced with the rest of the layer.
const WRITE_BACK_QUEUE: usize = 64;

/// A layer or volume as it comes in: where it goes, and what has come before it.
#[derive(Debug)]
pub(super) struct ArrivingTree {
    dest: PathBuf,
    folder: PathBuf,
    limits: Limits,
    standing: Standing,
    write_back: Option<WriteBack>,
}

#[derive(Debug)]
enum Standing {
    /// Nothing has come.
    Empty,
    /// Between two objects.
    Kept(SeedStore),
    /// An object comes in.
    Receiving,
    /// The layer has come, or is coming.
    Unpacked,
}

impl ArrivingTree {
    /// Will be unpacked into the empty folder `dest`, with as much as there is room for now. What comes before is kept in `seeds`, which
    /// is made when the first one comes.
    pub(super) fn new(dest: PathBuf, seeds: PathBuf) -> Self {
        let max_bytes = podferry_filesystem::free_bytes(&dest).unwrap_or(u64::MAX);
        let limits = Limits { max_bytes, ..Limits::default() };
        Self { dest, folder: seeds, limits, standing: Standing::Empty, write_back: None }
    }

    /// Begins to take in an object of seeds. Its store has to be [put back](Self::put_back).
    pub(super) fn receive(&mut self) -> io::Result<Unpacking<SeedStore>> {
        let mut store = match std::mem::replace(&mut self.standing, Standing::Receiving) {
            Standing::Empty => SeedStore::create(&self.folder, self.limits).map_err(io::Error::other)?,
            Standing::Kept(store) => store,
            Standing::Receiving | Standing::Unpacked => {
                return Err(io::Error::other("seeds come before the ones before are complete, or behind their layer"));
            }
        };
        if self.write_back.is_none() {
            self.write_back = Some(WriteBack::start()?);
        }
        let files = self.write_back.as_ref().and_then(|write_back| write_back.files.clone());
        Unpacking::start("seeds", move |pieces| {
            store.receive(pieces, |file| write_back(files.as_ref(), file))?;
            Ok(store)
        })
    }

    /// An object has come in.
    pub(super) fn put_back(&mut self, store: SeedStore) {
        self.standing = Standing::Kept(store);
    }

    /// Begins to unpack the tree, once.
    pub(super) fn unpack(&mut self) -> io::Result<Unpacking<()>> {
        let store = match std::mem::replace(&mut self.standing, Standing::Unpacked) {
            Standing::Empty => None,
            Standing::Kept(store) => Some(store),
            Standing::Receiving | Standing::Unpacked => {
                return Err(io::Error::other("the layer comes a second time, or before its seeds are complete"));
            }
        };
        // It ends by itself, beside what else is to be done until the seal.
        if let Some(write_back) = &mut self.write_back {
            write_back.files = None;
        }
        let (dest, limits) = (self.dest.clone(), self.limits);
        Unpacking::start("unpack", move |pieces| {
            podferry_filesystem::unpack_with_seeds(pieces, &dest, &limits, store)?;
            Ok(())
        })
    }

    /// Who has brought files to the disk, if anybody has: to be waited for, once.
    pub(super) fn take_write_back(&mut self) -> Option<WriteBack> {
        self.write_back.take()
    }

    /// Waits until nobody has a file of it open.
    pub(super) fn shut(mut self) {
        // Nobody needs them any more.
        let _on_the_disk_or_not = self.take_write_back().map(WriteBack::finish);
    }
}

/// A thread that brings files to the disk. The kernel tells only once of what it could not write: whoever syncs the file later hears
/// nothing of it. So it has to be [waited for](Self::finish).
#[derive(Debug)]
pub(super) struct WriteBack {
    /// None when no more come.
    files: Option<SyncSender<File>>,
    /// Ends with the first failure.
    thread: JoinHandle<io::Result<()>>,
}

impl WriteBack {
    fn start() -> io::Result<Self> {
        let (files, incoming) = sync_channel::<File>(WRITE_BACK_QUEUE);
        let work = move || incoming.into_iter().try_for_each(|file| file.sync_data());
        Ok(Self { files: Some(files), thread: thread::Builder::new().name("write-back".to_owned()).spawn(work)? })
    }

    /// Waits until all files are on the disk that were given to it.
    ///
    /// # Errors
    /// When one is not.
    pub(super) fn finish(self) -> io::Result<()> {
        drop(self.files);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that writes files back panicked")))
    }
}

fn write_back(files: Option<&SyncSender<File>>, file: OwnedFd) {
    match files.map(|files| files.try_send(file.into())) {
        // Those that find no room are synced with the rest; a failure is told when it is waited for.
        None | Some(Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_))) => {}
    }
}

/// A thread that unpacks an object while it comes in.
#[derive(Debug)]
pub(super) struct Unpacking<T> {
    pieces: SyncSender<Bytes>,
    /// None once it has failed.
    thread: Option<JoinHandle<podferry_filesystem::Result<T>>>,
}

impl<T: Send + 'static> Unpacking<T> {
    fn start(
        name: &str,
        unpack: impl FnOnce(&mut Pieces) -> podferry_filesystem::Result<T> + Send + 'static,
    ) -> io::Result<Self> {
        let (pieces, incoming) = sync_channel(QUEUE);
        let work = move || {
            let mut reader = Pieces { incoming, rest: Bytes::new() };
            let unpacked = unpack(&mut reader)?;
            // Whatever follows the end is not part of the object, and a sender that waits for it must not hang.
            let _broken_off = io::copy(&mut reader, &mut io::sink());
            Ok(unpacked)
        };
        let thread = Some(thread::Builder::new().name(name.to_owned()).spawn(work)?);
        Ok(Self { pieces, thread })
    }

    /// Gives it the next piece.
    ///
    /// # Errors
    /// When unpacking has failed.
    pub(super) fn write(&mut self, piece: Bytes) -> io::Result<()> {
        match self.pieces.send(piece) {
            Ok(()) => Ok(()),
            Err(_ended) => join(self.thread.take()).and(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Waits until all is unpacked.
    ///
    /// # Errors
    /// When unpacking fails.
    pub(super) fn finish(self) -> io::Result<T> {
        let Self { pieces, thread } = self;
        drop(pieces);
        join(thread)
    }
}

fn join<T>(thread: Option<JoinHandle<podferry_filesystem::Result<T>>>) -> io::Result<T> {
    match thread.ok_or(io::ErrorKind::BrokenPipe)?.join() {
        Ok(result) => result.map_err(io::Error::other),
        Err(_) => Err(io::Error::other("the unpacking thread panicked")),
    }
}

/// The pieces of an object as something to read.
struct Pieces {
    incoming: Receiver<Bytes>,
    rest: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.incoming.recv() {
                Ok(piece) => self.rest = piece,
                Err(_) => return Ok(0),
            }
        }
        let taken = out.len().min(self.rest.len());
        out[..taken].copy_from_slice(&self.rest.split_to(taken));
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::path::Path;

    use podferry_filesystem::{Host, Overlay, Pass, Seeder, WritableLayer, pack_with_seeds};

    use super::*;

    struct Alone;

    impl Host for Alone {
        fn is_cancelled(&self) -> bool {
            false
        }

        fn has_no_writer(&self, _: BorrowedFd<'_>) -> bool {
            false
        }
    }

    /// A layer of one file: its seeds, and itself.
    fn streams(upper: &Path) -> (Bytes, Bytes) {
        std::fs::create_dir(upper).unwrap();
        std::fs::write(upper.join("file"), vec![7; 100_000]).unwrap();
        let overlay = Overlay { lower: Vec::new(), upper: upper.to_owned(), work: PathBuf::new() };
        let (layer, mut seeder) = (WritableLayer::Overlay(overlay), Seeder::default());
        let (mut seeds, mut tree) = (Vec::new(), Vec::new());
        seeder.pass(&layer, Pass::Frozen, &Alone, &mut seeds).unwrap();
        pack_with_seeds(&layer, &seeder, &mut tree).unwrap();
        (seeds.into(), tree.into())
    }

    fn arriving(folder: &Path) -> ArrivingTree {
        std::fs::create_dir(folder.join("dest")).unwrap();
        ArrivingTree::new(folder.join("dest"), folder.join("seeds"))
    }

    #[test]
    fn a_layer_is_made_of_its_seeds_and_their_folder_goes() {
        let folder = tempfile::tempdir().unwrap();
        let (seeds, tree) = streams(&folder.path().join("upper"));
        let mut arriving = arriving(folder.path());
        let mut receiving = arriving.receive().unwrap();
        receiving.write(seeds).unwrap();
        arriving.put_back(receiving.finish().unwrap());
        let mut unpacking = arriving.unpack().unwrap();
        unpacking.write(tree).unwrap();
        unpacking.finish().unwrap();
        assert_eq!(std::fs::read(folder.path().join("dest/file")).unwrap(), vec![7; 100_000]);
        assert!(!folder.path().join("seeds").exists());
        assert!(arriving.receive().is_err(), "seeds behind their layer");
        assert!(arriving.unpack().is_err(), "a second layer");
        arriving.take_write_back().unwrap().finish().unwrap();
        arriving.shut();
    }

    #[test]
    fn what_comes_before_seeds_are_complete_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut arriving = arriving(folder.path());
        let receiving = arriving.receive().unwrap();
        assert!(arriving.receive().is_err());
        assert!(arriving.unpack().is_err());
        assert!(receiving.finish().is_err(), "nothing has come");
    }

    /// A pipe cannot be brought to any disk.
    #[test]
    fn what_cannot_be_written_back_is_told() {
        let write_back = WriteBack::start().unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        super::write_back(write_back.files.as_ref(), reader.into());
        assert_eq!(write_back.finish().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn the_first_error_is_told_while_more_comes() {
        let folder = tempfile::tempdir().unwrap();
        let mut receiving = arriving(folder.path()).receive().unwrap();
        let noise = Bytes::from_static(b"no stream of seeds");
        let told = (0..1000).find_map(|_| receiving.write(noise.clone()).err()).unwrap();
        assert!(told.to_string().contains("refused"), "{told}");
    }
}
