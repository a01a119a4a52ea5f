//! Kept pages that one process leaves to another: files in one folder, which has to lie on a tmpfs.
//!
//! | file | what |
//! |---|---|
//! | `memory-PID.store` | the pages of a process, sparse; `PID` is its id inside its namespace |
//! | `memory.index` | where in it which page is, and which pages are lazy; there whole or not at all |
//!
//! The index is written in the freeze, so it is as compact as it can be without any work: for each process a head, 140 bytes for
//! each 2 MiB of addresses, and 16 for each lazy range; a check sum at the end. All numbers are little-endian.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::PAGE_SIZE;
use crate::bitmap::{BITS, Bitmap};
use crate::pager::Kept;
use crate::range::{PageRange, PageRanges};
use crate::store::{Chunk, Store, StoreError};

/// Why pages cannot be handed over.
#[derive(Debug, Error)]
pub enum HandoverError {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The index is not what [`Handover::write`] writes.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The files of a handover.
#[derive(Clone, Copy, Debug)]
pub struct Handover;

const INDEX: &str = "memory.index";
/// `PFMEM`, and the version of the format.
const MAGIC: u64 = u64::from_be_bytes(*b"PFMEM\0\0\x01");
/// The largest index that is read: beyond what a TiB of single pages takes.
const MOST_BYTES: u64 = 4 << 30;
/// The first address behind those that a process can have (57 bits with five levels of page tables).
const ADDRESSES: u64 = 1 << 56;
const CHUNK_BYTES: u64 = BITS as u64 * PAGE_SIZE;

impl Handover {
    /// A store whose pages lie in the folder; `pid` is the process's id inside its namespace. One that is there is replaced.
    pub fn store(folder: &Path, pid: i32, bytes: u64) -> Result<Store, HandoverError> {
        let path = store_path(folder, pid);
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&path);
        Ok(Store::in_file(opened.map_err(failed("make", &path))?, bytes)?)
    }

    /// Writes the index: of each process its id inside its namespace, its store from [`Handover::store`] and the pages that its
    /// images call lazy. A process without lazy pages has to be among them, too: CRIU hands over its memory.
    pub fn write(folder: &Path, processes: &[(i32, &Store, &PageRanges)]) -> Result<(), HandoverError> {
        let (path, new) = (folder.join(INDEX), folder.join("memory.index.new"));
        let bytes = encode(processes);
        let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
        let written = opened.and_then(|mut file| file.write_all(&bytes)).and_then(|()| fs::rename(&new, &path));
        written.map_err(failed("write", &path))
    }

    /// Whether something was left in a folder.
    pub fn is_there(folder: &Path) -> bool {
        folder.join(INDEX).is_file()
    }

    /// Opens what was left in a folder.
    pub fn read(folder: &Path) -> Result<HashMap<i32, Kept>, HandoverError> {
        let path = folder.join(INDEX);
        let length = fs::metadata(&path).map_err(failed("look at", &path))?.len();
        if length > MOST_BYTES {
            return Err(HandoverError::Damaged { path, what: "it is too long" });
        }
        let bytes = fs::read(&path).map_err(failed("read", &path))?;
        let processes = decode(&bytes).ok_or(HandoverError::Damaged { path, what: "its contents make no sense" })?;
        processes.into_iter().map(|process| process.open(folder)).collect()
    }

    /// Removes all files of a handover, and with them the memory that they take from the node.
    pub fn remove(folder: &Path) -> Result<(), HandoverError> {
        for entry in fs::read_dir(folder).map_err(failed("list", folder))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let store = name.strip_prefix("memory-").and_then(|name| name.strip_suffix(".store"));
            if name == INDEX || store.is_some() {
                fs::remove_file(entry.path()).map_err(failed("remove", &entry.path()))?;
            }
        }
        Ok(())
    }
}

fn store_path(folder: &Path, pid: i32) -> PathBuf {
    folder.join(format!("memory-{pid}.store"))
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> HandoverError {
    move |source| HandoverError::File { action, path: path.to_owned(), source }
}

/// A process of the index.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    capacity: u64,
    chunks: Vec<(u64, u64, Bitmap, Bitmap)>,
    lazy: PageRanges,
}

impl Process {
    fn open(self, folder: &Path) -> Result<(i32, Kept), HandoverError> {
        let path = store_path(folder, self.pid);
        let file = File::options().read(true).write(true).open(&path).map_err(failed("open", &path))?;
        let length = file.metadata().map_err(failed("look at", &path))?.len();
        if self.capacity.checked_mul(CHUNK_BYTES) != Some(length) {
            return Err(HandoverError::Damaged { path, what: "it has not the length that the index says" });
        }
        let number = |place: u64| usize::try_from(place).unwrap_or(usize::MAX);
        let chunks = self
            .chunks
            .into_iter()
            .map(|(key, place, pages, zeros)| (key, Chunk { place: number(place), pages, zeros }));
        let store = Store::with_chunks(file, number(self.capacity), chunks.collect())?;
        Ok((self.pid, Kept { store, lazy: self.lazy }))
    }
}

fn encode(processes: &[(i32, &Store, &PageRanges)]) -> Vec<u8> {
    let words = |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
    let mut bytes = words(&[MAGIC, processes.len() as u64]);
    for (pid, store, lazy) in processes {
        let (capacity, chunks) = store.chunks();
        let head = [u64::from(pid.cast_unsigned()), capacity as u64, chunks.len() as u64, lazy.as_slice().len() as u64];
        bytes.extend_from_slice(&words(&head));
        for (key, chunk) in chunks {
            bytes.extend_from_slice(&words(&[*key, chunk.place as u64]));
            bytes.extend_from_slice(&chunk.pages.to_bytes());
            bytes.extend_from_slice(&chunk.zeros.to_bytes());
        }
        bytes.reserve(lazy.as_slice().len() * 16);
        for range in *lazy {
            bytes.extend_from_slice(&range.start.to_le_bytes());
            bytes.extend_from_slice(&range.end.to_le_bytes());
        }
    }
    let sum = check_sum(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

/// FNV-1a over words: it finds a file that was not written by [`encode`], not an adversary.
fn check_sum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum, word| {
        let word = word.try_into().map(u64::from_le_bytes).unwrap_or_default();
        (sum ^ word).wrapping_mul(0x100_0000_01b3)
    })
}

/// `None` when these are not bytes of [`encode`].
fn decode(bytes: &[u8]) -> Option<Vec<Process>> {
    let (bytes, sum) = bytes.split_last_chunk::<8>()?;
    let mut reader = Reader { rest: bytes };
    if check_sum(bytes) != u64::from_le_bytes(*sum) || reader.word()? != MAGIC {
        return None;
    }
    let count = reader.word()?;
    let mut processes = Vec::new();
    let mut pids = HashSet::new();
    for _ in 0..count {
        let process = reader.process()?;
        if !pids.insert(process.pid) {
            return None;
        }
        processes.push(process);
    }
    reader.rest.is_empty().then_some(processes)
}

/// Takes one thing after the other; memory is taken only for what is there.
struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn word(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn array<const LENGTH: usize>(&mut self) -> Option<[u8; LENGTH]> {
        let (now, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*now)
    }

    fn process(&mut self) -> Option<Process> {
        let pid = u32::try_from(self.word()?).ok()?.cast_signed();
        let (capacity, chunks, lazy) = (self.word()?, self.word()?, self.word()?);
        if pid <= 0 || capacity > ADDRESSES / CHUNK_BYTES || chunks > capacity {
            return None;
        }
        Some(Process { pid, capacity, chunks: self.chunks(chunks, capacity)?, lazy: self.ranges(lazy)? })
    }

    /// Each for other addresses, and each in a place of its own.
    fn chunks(&mut self, count: u64, capacity: u64) -> Option<Vec<(u64, u64, Bitmap, Bitmap)>> {
        let (mut keys, mut places) = (HashSet::new(), HashSet::new());
        let mut chunks = Vec::new();
        for _ in 0..count {
            let (key, place) = (self.word()?, self.word()?);
            let (pages, zeros) = (Bitmap::from_bytes(&self.array()?), Bitmap::from_bytes(&self.array()?));
            let fits = key < ADDRESSES / CHUNK_BYTES && place < count.min(capacity) && zeros.is_within(&pages);
            if !fits || !keys.insert(key) || !places.insert(place) {
                return None;
            }
            chunks.push((key, place, pages, zeros));
        }
        Some(chunks)
    }

    fn ranges(&mut self, count: u64) -> Option<PageRanges> {
        let mut ranges = PageRanges::new();
        let mut last = None;
        for _ in 0..count {
            let (start, end) = (self.word()?, self.word()?);
            let aligned = start.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE);
            if !aligned || start >= end || end > ADDRESSES || last.is_some_and(|last| last >= start) {
                return None;
            }
            last = Some(end);
            ranges.push(PageRange::new(start, end));
        }
        Some(ranges)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: usize = 4096;

    fn range(start: u64, length: u64) -> PageRange {
        PageRange::new(start * PAGE_SIZE, (start + length) * PAGE_SIZE)
    }

    fn ranges() -> impl Strategy<Value = Vec<PageRange>> {
        let any = (0_u64..3000, 1_u64..40).prop_map(|(start, length)| range(start, length));
        prop::collection::vec(any, 0..20)
    }

    fn fill(store: &mut Store, put: &[PageRange], zero: &[PageRange]) {
        for range in put {
            let value = |page: PageRange| u8::try_from(page.start / PAGE_SIZE % 251 + 1).unwrap();
            let pages: Vec<u8> = range.single_pages().flat_map(|page| vec![value(page); PAGE]).collect();
            store.put(*range, &pages).unwrap();
        }
        for range in zero {
            store.put_zero(*range).unwrap();
        }
    }

    /// Every page of a store.
    fn all(store: &Store) -> Vec<(u64, u8)> {
        let pages = store.ranges();
        let pages = pages.iter().flat_map(PageRange::single_pages);
        pages.map(|page| (page.start, store.run(page).unwrap()[77])).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn another_process_finds_what_was_kept(put in ranges(), zero in ranges(), lazy in ranges()) {
            let folder = tempfile::tempdir().unwrap();
            let (mut one, mut two) = (
                Handover::store(folder.path(), 1, 64 << 20).unwrap(),
                Handover::store(folder.path(), 7, 32 << 20).unwrap(),
            );
            fill(&mut one, &put, &zero);
            fill(&mut two, &zero, &put);
            let lazy: PageRanges = lazy.into_iter().collect();
            let none = PageRanges::new();
            Handover::write(folder.path(), &[(1, &one, &lazy), (7, &two, &none)]).unwrap();
            let read = Handover::read(folder.path()).unwrap();
            prop_assert_eq!(read.len(), 2);
            prop_assert_eq!((&read[&1].lazy, &read[&7].lazy), (&lazy, &none));
            prop_assert_eq!(all(&read[&1].store), all(&one));
            prop_assert_eq!(all(&read[&7].store), all(&two));
            Handover::remove(folder.path()).unwrap();
            prop_assert!(Handover::read(folder.path()).is_err());
        }
    }

    fn sample() -> Vec<u8> {
        let mut store = Store::new(16 << 20).unwrap();
        fill(&mut store, &[range(3, 4), range(1000, 3)], &[range(20, 5)]);
        encode(&[(5, &store, &[range(3, 2), range(1000, 1)].into_iter().collect())])
    }

    proptest! {
        #[test]
        fn noise_is_refused(noise in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert_eq!(decode(&noise), None);
        }

        /// Also with a check sum that fits: what comes out is sound.
        #[test]
        fn what_is_understood_of_a_changed_index_is_sound(at in 0_usize..400, value in any::<u8>(), cut in 0_usize..3) {
            let mut bytes = sample();
            bytes.truncate(bytes.len() - 8 - cut * 8);
            let at = at % bytes.len();
            bytes[at] = value;
            let sum = check_sum(&bytes).to_le_bytes();
            bytes.extend_from_slice(&sum);
            for process in decode(&bytes).into_iter().flatten() {
                prop_assert!(process.chunks.iter().all(|(_, place, ..)| *place < process.capacity));
                prop_assert!(process.pid > 0 && process.lazy.as_slice().windows(2).all(|two| two[0].end < two[1].start));
            }
        }
    }

    #[test]
    fn a_store_of_another_length_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = Handover::store(folder.path(), 1, 8 << 20).unwrap();
        Handover::write(folder.path(), &[(1, &store, &PageRanges::new())]).unwrap();
        File::options().write(true).open(store_path(folder.path(), 1)).unwrap().set_len(5).unwrap();
        assert!(matches!(Handover::read(folder.path()), Err(HandoverError::Damaged { .. })));
        File::options().write(true).open(folder.path().join(INDEX)).unwrap().set_len(90).unwrap();
        assert!(matches!(Handover::read(folder.path()), Err(HandoverError::Damaged { .. })));
    }
}
