//! Shared memory of processes: found, compared with what was sent of it, and laid into its restored self.
//!
//! Writes to shared memory cannot be followed: whoever has the file can write to it, through a mapping that nobody tracks or with
//! write(2). So each round reads all of it, and what counts is whether a page *is* another than the one that was sent, by a digest of
//! 64 bits for each (XXH3, seeded with a secret of each segment's own: whoever chooses what is written cannot make two pages that are
//! taken for the same). The round in the freeze is exact, since nobody writes then. What is followed this way:
//!
//! | memory | in `/proc/PID/maps` | |
//! |---|---|---|
//! | `mmap(MAP_SHARED \| MAP_ANONYMOUS)` | `/dev/zero (deleted)` | CRIU makes a memfd of that name of it |
//! | `memfd_create(2)`, mapped | `/memfd:NAME (deleted)` | |
//! | shmget(2) | `/SYSVKEY (deleted)` | left to CRIU |
//! | files of a tmpfs, POSIX shared memory | their paths | files, no memory of a process |
//! | shared memory of hugetlbfs | `/anon_hugepage (deleted)` | left to CRIU |
//!
//! CRIU gives each such segment a number, its inode's, and has its pages in images of their own. The library that is preloaded into
//! CRIU keeps it from the pages of segments that are followed (`hide`), and on restore writes what was kept of a segment into the file
//! that CRIU has just made for it ([`laying`]). Who writes there is the restored process itself, in its own cgroup, so the memory is
//! accounted to the container and not to the agent.

pub mod laying;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::OnceLock;

use nix::unistd::Pid;
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::io::Errno;
use twox_hash::XxHash3_64;

use crate::digest;
use crate::maps::{self, Mapping};
use crate::range::{PageRange, PageRanges};
use crate::{PAGE_SIZE, parallel};

/// Segments smaller than this are left to CRIU: that they need no round saves less than their entry costs.
const LEAST_LENGTH: u64 = 256 * 1024;
/// Bytes that a thread reads and compares at a time, of which it keeps what has changed.
const SHARE: u64 = 4 << 20;
/// Bytes of which what changed is handed over together,
const BATCH: u64 = 1 << 20;
/// and those that are read with one call, few enough to be in the processor's cache when they are looked at.
const PIECE: usize = 256 * 1024;
#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: usize = PAGE_SIZE as usize;

/// A segment of shared memory, and what was sent of it.
#[derive(Debug)]
pub struct SharedMemory {
    number: u32,
    file: File,
    /// What it had at the last look.
    existing: PageRanges,
    digests: Digests,
    /// The digests' seed, which nobody else knows.
    secret: u64,
}

/// The digest of each page as it was read last; 0: it never was, or there was none. A segment may be huge and have little in it, so
/// only groups exist in which there is something.
#[derive(Debug, Default)]
struct Digests(HashMap<u64, Box<[u64; GROUP]>>);

/// Pages of a group.
const GROUP: usize = 64;

impl Digests {
    fn place(page: PageRange) -> (u64, usize) {
        let number = page.start / PAGE_SIZE;
        (number / GROUP as u64, usize::try_from(number % GROUP as u64).unwrap_or(0))
    }

    fn of(&self, page: PageRange) -> u64 {
        let (group, index) = Self::place(page);
        self.0.get(&group).map_or(0, |group| group[index])
    }

    fn set(&mut self, page: PageRange, digest: u64) {
        let (group, index) = Self::place(page);
        self.0.entry(group).or_insert_with(|| Box::new([0; GROUP]))[index] = digest;
    }

    fn forget(&mut self, pages: &PageRanges) {
        for page in pages.iter().flat_map(PageRange::single_pages) {
            let (group, index) = Self::place(page);
            if let Some(digests) = self.0.get_mut(&group) {
                digests[index] = 0;
                if digests.iter().all(|digest| *digest == 0) {
                    self.0.remove(&group);
                }
            }
        }
    }
}

/// What a round found in a segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Pages that it has.
    pub existing: PageRanges,
    /// How many of them were not what they were.
    pub changed: u64,
}

/// Which segment a mapping is of, if it is one that can be followed: its number.
fn number_of(mapping: &Mapping) -> Option<u32> {
    let followed = mapping.name == "/dev/zero (deleted)"
        || mapping.name.starts_with("/memfd:") && mapping.name.ends_with(" (deleted)");
    // CRIU takes 32 bits of the inode's number.
    (followed && !mapping.is_crius()).then(|| u32::try_from(mapping.inode).ok()).flatten()
}

/// The device of all memory files of this kernel.
fn device() -> Option<u64> {
    static DEVICE: OnceLock<Option<u64>> = OnceLock::new();
    *DEVICE.get_or_init(|| {
        let file = memfd_create("podferry-device", MemfdFlags::CLOEXEC).ok()?;
        Some(File::from(file).metadata().ok()?.dev())
    })
}

/// The segments that a process has mapped and that are not `known`. `seen` has the numbers of those that processes were found to have,
/// which are looked for no further. One that is gone before it can be opened is left out.
///
/// # Errors
/// When the process's mappings cannot be read.
pub fn find(process: Pid, seen: &mut BTreeSet<u32>, known: impl Fn(u32) -> bool) -> io::Result<Vec<SharedMemory>> {
    let mut new = Vec::new();
    for mapping in maps::read(process)? {
        let Some(number) = number_of(&mapping).filter(|number| !seen.contains(number)) else { continue };
        if !known(number) {
            let Some(segment) = SharedMemory::open(process, &mapping, number) else { continue };
            new.push(segment);
        }
        seen.insert(number);
    }
    Ok(new)
}

impl SharedMemory {
    /// Opens what is mapped there, if it still is, and is big enough to be followed.
    fn open(process: Pid, mapping: &Mapping, number: u32) -> Option<Self> {
        let PageRange { start, end } = mapping.range;
        // The link may be of another mapping by now, and the file's name is the container's to choose.
        let file = File::open(format!("/proc/{process}/map_files/{start:x}-{end:x}")).ok()?;
        let found = file.metadata().ok()?;
        let is_it = found.ino() == mapping.inode && Some(found.dev()) == device();
        (is_it && found.len() >= LEAST_LENGTH).then(|| Self::of(number, file))
    }

    fn of(number: u32, file: File) -> Self {
        // Its keys are the operating system's random numbers.
        let secret = RandomState::new().hash_one(());
        Self { number, file, existing: PageRanges::new(), digests: Digests::default(), secret }
    }

    /// CRIU's number of it: that of its inode.
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// The device and the inode of its file.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn file(&self) -> io::Result<(u64, u64)> {
        let metadata = self.file.metadata()?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Reads all pages that were there at the last look, and hands over their digests as [`digest`] has them, ascending. Nobody may write
    /// to it meanwhile.
    ///
    /// # Errors
    /// When it cannot be read, and what `take` says.
    pub fn read_digests<E: From<io::Error>>(&self, mut take: impl FnMut(Vec<u8>) -> Result<(), E>) -> Result<(), E> {
        for group in self.shares().chunks(parallel::threads()) {
            for digests in parallel::together(group, |share| self.digests_of(*share)) {
                take(digests?)?;
            }
        }
        Ok(())
    }

    fn digests_of(&self, share: PageRange) -> io::Result<Vec<u8>> {
        let (mut buffer, mut digests) = (vec![0; PIECE], Vec::new());
        for piece in share.cut(PIECE as u64) {
            let buffer = &mut buffer[..usize::try_from(piece.length()).unwrap_or(PIECE)];
            read_or_zeros(&self.file, buffer, piece.start)?;
            digests.extend(buffer.chunks_exact(PAGE).flat_map(digest::of_page));
        }
        Ok(digests)
    }

    /// All that there was at the last look, in pieces for one thread each.
    fn shares(&self) -> Vec<PageRange> {
        self.existing.iter().flat_map(|range| range.cut(SHARE)).collect()
    }

    /// Bytes that were compared last.
    pub fn compared_bytes(&self) -> u64 {
        self.existing.pages() * PAGE_SIZE
    }

    /// Reads all that there is, on so many threads, and hands over what is not as it was handed over last, batch by batch, ascending.
    /// Offsets in the segment stand for addresses.
    ///
    /// # Errors
    /// When it cannot be read, and what `take` says. What was handed over then counts as handed over.
    pub fn compare<E: From<io::Error>>(
        &mut self,
        threads: usize,
        mut take: impl FnMut(&[PageRange], Vec<u8>) -> Result<(), E>,
    ) -> Result<Compared, E> {
        let existing = self.look()?;
        // What is a hole now and comes again later is sent again.
        self.digests.forget(&self.existing.difference(&existing));
        self.existing = existing.clone();
        let mut compared = Compared { existing, changed: 0 };
        for group in self.shares().chunks(threads.max(1)) {
            for batches in parallel::together(group, |share| self.changed(*share)) {
                for Changed { ranges, contents, digests } in batches? {
                    take(ranges.as_slice(), contents)?;
                    compared.changed += ranges.pages();
                    for (page, digest) in ranges.iter().flat_map(PageRange::single_pages).zip(digests) {
                        self.digests.set(page, digest);
                    }
                }
            }
        }
        Ok(compared)
    }

    /// What exists: the kernel counts a page that was never written, or was given back, as a hole.
    fn look(&self) -> io::Result<PageRanges> {
        let mut existing = PageRanges::new();
        let mut position = 0;
        loop {
            let start = match seek(&self.file, SeekFrom::Data(position)) {
                Ok(start) => start,
                Err(Errno::NXIO) => return Ok(existing),
                Err(error) => return Err(error.into()),
            };
            // Shorter since: what lies behind the end is no more.
            let end = match seek(&self.file, SeekFrom::Hole(start)) {
                Ok(end) => end,
                Err(Errno::NXIO) => return Ok(existing),
                Err(error) => return Err(error.into()),
            };
            let range = PageRange::new(start / PAGE_SIZE * PAGE_SIZE, end.next_multiple_of(PAGE_SIZE));
            existing.push(range);
            position = range.end;
        }
    }

    /// Reads a share, and keeps what is not as it was.
    fn changed(&self, share: PageRange) -> io::Result<Vec<Changed>> {
        let mut buffer = vec![0; PIECE];
        let batches = share.cut(BATCH).map(|batch| self.changed_of(batch, &mut buffer));
        let batches: Vec<Changed> = batches.collect::<io::Result<_>>()?;
        Ok(batches.into_iter().filter(|changed| !changed.ranges.is_empty()).collect())
    }

    fn changed_of(&self, batch: PageRange, buffer: &mut [u8]) -> io::Result<Changed> {
        let mut changed = Changed::default();
        for piece in batch.cut(PIECE as u64) {
            let buffer = &mut buffer[..usize::try_from(piece.length()).unwrap_or(PIECE)];
            read_or_zeros(&self.file, buffer, piece.start)?;
            for (page, contents) in piece.single_pages().zip(buffer.chunks_exact(PAGE)) {
                // Never 0, which stands for none.
                let digest = XxHash3_64::oneshot_with_seed(self.secret, contents).max(1);
                if self.digests.of(page) != digest {
                    changed.ranges.push(page);
                    changed.contents.extend_from_slice(contents);
                    changed.digests.push(digest);
                }
            }
        }
        Ok(changed)
    }
}

/// Pages that are not what they were, ascending, with what they hold.
#[derive(Debug, Default)]
struct Changed {
    ranges: PageRanges,
    contents: Vec<u8>,
    digests: Vec<u64>,
}

/// Reads from a file that others may make shorter meanwhile: what is behind its end is zero.
fn read_or_zeros(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer[filled..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use rustix::fs::{FallocateFlags, fallocate, ftruncate};

    use super::*;

    fn segment(pages: u64) -> SharedMemory {
        let file = memfd_create("segment", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, pages * PAGE_SIZE).unwrap();
        SharedMemory::of(7, file.into())
    }

    fn write(segment: &SharedMemory, page: u64, byte: u8) {
        segment.file.write_all_at(&[byte; PAGE], page * PAGE_SIZE).unwrap();
    }

    /// Compares, and puts what changed where it goes.
    fn follow(segment: &mut SharedMemory, threads: usize, copy: &mut BTreeMap<u64, Vec<u8>>) -> Compared {
        let taken = segment.compare::<io::Error>(threads, |ranges, contents| {
            let pages = ranges.iter().flat_map(|range| range.single_pages());
            for (page, contents) in pages.zip(contents.chunks(PAGE)) {
                copy.insert(page.start / PAGE_SIZE, contents.to_vec());
            }
            Ok(())
        });
        let compared = taken.unwrap();
        copy.retain(|page, _| compared.existing.contains(page * PAGE_SIZE));
        compared
    }

    #[test]
    fn only_what_is_another_than_it_was_is_told() {
        let (mut segment, mut copy) = (segment(5000), BTreeMap::new());
        for page in [0, 7, 8, 4999] {
            write(&segment, page, 3);
        }
        let first = follow(&mut segment, 1, &mut copy);
        assert_eq!((first.changed, first.existing.pages()), (4, 4));
        // Written, and the same as before.
        write(&segment, 7, 3);
        assert_eq!(follow(&mut segment, 2, &mut copy).changed, 0);
        write(&segment, 8, 4);
        write(&segment, 9, 0);
        let third = follow(&mut segment, 1, &mut copy);
        assert_eq!((third.changed, third.existing.pages()), (2, 5));
        assert_eq!((copy[&8][0], copy[&9][0], copy[&4999][0]), (4, 0, 3));
        assert_eq!(segment.compared_bytes(), 5 * PAGE_SIZE);
    }

    #[test]
    fn what_was_given_back_is_gone_and_comes_again_whole() {
        let (mut segment, mut copy) = (segment(16), BTreeMap::new());
        write(&segment, 3, 1);
        write(&segment, 9, 1);
        follow(&mut segment, 1, &mut copy);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&segment.file, punch, 3 * PAGE_SIZE, PAGE_SIZE).unwrap();
        assert_eq!(follow(&mut segment, 1, &mut copy).existing.pages(), 1);
        // The same as it was before the hole, of which whoever follows has nothing any more.
        write(&segment, 3, 1);
        assert_eq!(follow(&mut segment, 1, &mut copy).changed, 1);
        ftruncate(&segment.file, 4 * PAGE_SIZE).unwrap();
        let shorter = follow(&mut segment, 1, &mut copy);
        assert_eq!(
            (shorter.changed, shorter.existing.as_slice()),
            (0, &[PageRange::new(3 * PAGE_SIZE, 4 * PAGE_SIZE)][..])
        );
    }

    #[test]
    fn what_the_end_check_compares_is_read_anew() {
        let (mut segment, mut copy) = (segment(5000), BTreeMap::new());
        for page in [7, 4999] {
            write(&segment, page, 3);
        }
        follow(&mut segment, 1, &mut copy);
        // As somebody whom no round has seen.
        write(&segment, 7, 4);
        let mut digests = Vec::new();
        segment
            .read_digests::<io::Error>(|more| {
                digests.extend(more);
                Ok(())
            })
            .unwrap();
        assert_eq!(digests, [4, 3].map(|byte| digest::of_page(&[byte; PAGE])).concat());
    }

    #[test]
    fn a_segment_that_ends_in_the_middle_of_a_page_has_all_of_it() {
        let mut segment = segment(0);
        segment.file.write_all_at(b"end", 2 * PAGE_SIZE).unwrap();
        let mut copy = BTreeMap::new();
        follow(&mut segment, 1, &mut copy);
        assert_eq!((copy.len(), &copy[&2][..4]), (1, &b"end\0"[..]));
    }

    /// A digest for each page up to its end would take 32 GiB.
    #[test]
    fn a_huge_segment_with_little_in_it_takes_little() {
        let (mut segment, mut copy) = (segment(1 << 32), BTreeMap::new());
        write(&segment, (1 << 32) - 1, 5);
        write(&segment, 1 << 20, 6);
        assert_eq!(follow(&mut segment, 1, &mut copy).changed, 2);
        assert_eq!(segment.digests.0.len(), 2);
        ftruncate(&segment.file, 1 << 33).unwrap();
        follow(&mut segment, 1, &mut copy);
        assert_eq!(segment.digests.0.len(), 1);
    }

    #[test]
    fn mappings_of_shared_memory_are_known_by_their_names() {
        let number = |name: &str| {
            let line = format!("7f9f584ba000-7f9f594c4000 rw-s 00000000 00:01 42     {name}");
            number_of(&Mapping::parse(&line).unwrap())
        };
        for name in ["/dev/zero (deleted)", "/memfd:x y (deleted)", "/memfd: (deleted)", "/memfd:/dev/zero (deleted)"] {
            assert_eq!(number(name), Some(42), "{name}");
        }
        for name in [
            "/SYSV00000000 (deleted)",
            "/anon_hugepage (deleted)",
            "/dev/shm/x",
            "/memfd:x",
            "/memfd:CRIUMFD (deleted)",
        ] {
            assert_eq!(number(name), None, "{name}");
        }
    }

    #[test]
    fn a_process_has_the_segments_that_it_maps_and_that_are_big_enough() {
        let map = |length| crate::sys::sparse::SparseMemory::new("podferry-test", length).unwrap();
        let (_big, _small) = (map(1 << 20), map(PAGE));
        let mut seen = BTreeSet::new();
        let found = find(Pid::this(), &mut seen, |_| false).unwrap();
        let lengths: Vec<u64> = found.iter().map(|segment| segment.file.metadata().unwrap().len()).collect();
        assert!(lengths.contains(&(1 << 20)) && lengths.iter().all(|length| *length >= LEAST_LENGTH), "{lengths:?}");
        assert!(find(Pid::this(), &mut seen, |_| false).unwrap().is_empty(), "each is told once");
        let mut seen = BTreeSet::new();
        assert!(
            find(Pid::this(), &mut seen, |number| found.iter().any(|segment| segment.number == number))
                .unwrap()
                .is_empty()
        );
        assert!(found.iter().all(|segment| seen.contains(&segment.number)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_is_written_the_copy_is_the_same_in_the_end(
            rounds in prop::collection::vec(prop::collection::vec((0_u64..64, 0_u8..4), 0..40), 1..6), threads in 1_usize..4,
        ) {
            let (mut segment, mut copy) = (segment(64), BTreeMap::new());
            for writes in rounds {
                for (page, byte) in writes {
                    if byte == 3 {
                        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                        fallocate(&segment.file, punch, page * PAGE_SIZE, PAGE_SIZE).unwrap();
                    } else {
                        write(&segment, page, byte);
                    }
                }
                follow(&mut segment, threads, &mut copy);
                for page in 0..64 {
                    let mut now = vec![0; PAGE];
                    segment.file.read_exact_at(&mut now, page * PAGE_SIZE).unwrap();
                    let kept = copy.get(&page).cloned().unwrap_or_else(|| vec![0; PAGE]);
                    prop_assert!(kept == now, "page {page}");
                }
            }
        }
    }
}
