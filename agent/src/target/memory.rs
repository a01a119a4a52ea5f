//! Memory that arrives before its process does.
//!
//! Pages that the source sent while its processes ran are kept in stores in the images' folder, which is a tmpfs. At the end of the
//! transfer they are put together with what CRIU dumped: a page that CRIU has too is taken from there, and every other one that the
//! process has in the end is *lazy*. The [pager](crate::pager) lays those in behind the restored process.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::PathBuf;

use podferry_criu::{CriuError, PageSetWriter, Run};
use podferry_memory::PAGE_SIZE;
use podferry_memory::digest::{Comparison, DigestError};
use podferry_memory::handover::{Handover, HandoverError};
use podferry_memory::range::{PageRange, PageRanges};
use podferry_memory::shared::laying;
use podferry_memory::store::{Store, StoreError};
use podferry_transfer::delta::Page;
use podferry_transfer::{ApplyError, Deltas, Owner, PageRun};

/// The most bytes of addresses that a process may have pages in, each 2 MiB counting whole. Only what comes takes memory.
const MOST_ADDRESSES: u64 = 256 << 30;
/// The most bytes of a list of existing pages: a million ranges.
const LONGEST_LIST: usize = 16 << 20;
/// Bytes of a range in such a list.
const RANGE: usize = 16;
/// The first address that no process has (57 bits).
const END_OF_ADDRESSES: u64 = 1 << 56;

/// Why memory that came cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// It cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Changes came that do not go with what is kept.
    #[error("memory of {owner} cannot be changed: {source}")]
    Changes {
        /// Whose it is.
        owner: Owner,
        /// Why.
        source: ApplyError,
    },
    /// It cannot be left to the pager.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// CRIU's images cannot be completed.
    #[error(transparent)]
    Images(#[from] CriuError),
    /// A list of existing pages is none.
    #[error("the list of the existing pages of {owner} makes no sense: {what}")]
    List {
        /// Whose they are.
        owner: Owner,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Pages are to come later, and nobody said where they are.
    #[error("the source keeps memory of process {process}, which this migration is not for")]
    NotPostCopy {
        /// The process, by its id inside the container.
        process: u32,
    },
    /// A page that the process has did not come.
    #[error("the pages {range} of {owner} exist and did not come")]
    Missing {
        /// Whose they are.
        owner: Owner,
        /// The first of them.
        range: String,
    },
    /// Digests came that have no place.
    #[error("digests came of process {process}, {what}")]
    Digests {
        /// The process, by its id inside the container.
        process: u32,
        /// Why they have none.
        what: &'static str,
    },
    /// Digests came that are not those of the process's pages.
    #[error("the digests of process {process}'s pages make no sense: {source}")]
    NoDigests {
        /// The process, by its id inside the container.
        process: u32,
        /// What is wrong with them.
        source: DigestError,
    },
    /// The end check found a difference.
    #[error(
        "memory of process {process} (its id inside the container) is not what it is on the source: {pages} of {compared} pages \
         differ, the first at {first}"
    )]
    Different {
        /// The process, by its id inside the container.
        process: u32,
        /// How many pages,
        pages: u64,
        /// of how many,
        compared: u64,
        /// and the first of them.
        first: PageRange,
    },
    /// Memory of a process came after the source had read it for the last time.
    #[error("memory of process {process} came after the digests of its pages")]
    Late {
        /// The process, by its id inside the container.
        process: u32,
    },
    /// Memory came of something that nobody has announced.
    #[error("memory came of {owner}, of which none was to come")]
    Unannounced {
        /// Whose it is.
        owner: Owner,
    },
    /// Shared memory has a number that CRIU gives none.
    #[error("there is no shared memory {0}: CRIU's numbers have 32 bits")]
    Number(u64),
    /// Shared memory cannot be left to CRIU.
    #[error("shared memory cannot be left for the restore: {0}")]
    Laying(io::Error),
    /// The source says that a process exists, and CRIU does not.
    #[error("CRIU dumped no process {process}, whose memory came before the freeze")]
    NoProcess {
        /// The process, by its id inside the container.
        process: u32,
    },
}

/// Memory of all processes of one container on its way.
#[derive(Debug)]
pub(crate) struct ArrivingMemory {
    folder: PathBuf,
    stores: HashMap<Owner, Store>,
    existing: BTreeMap<Owner, PageRanges>,
    /// What of that stays with the source for now.
    later: BTreeMap<u32, PageRanges>,
    /// Whether any may.
    post_copy: bool,
    /// Processes of whose pages digests have come: nothing of them changes any more.
    compared: HashSet<u32>,
    /// What CRIU dumped of each owner, not yet completed.
    dumped: BTreeMap<Owner, PageSetWriter>,
}

impl ArrivingMemory {
    /// Keeps it in this folder. With `post_copy` some of it may stay with the source.
    pub(crate) fn new(folder: PathBuf, post_copy: bool) -> Self {
        let (existing, later, dumped) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { folder, stores: HashMap::new(), existing, later, post_copy, compared: HashSet::new(), dumped }
    }

    /// Whether memory of any process has come, or is to.
    pub(crate) fn is_there(&self) -> bool {
        self.stores.keys().any(|owner| matches!(owner, Owner::Process(_)))
    }

    /// Memory comes.
    pub(crate) fn open(&mut self, owner: Owner) -> Result<(), MemoryError> {
        if self.stores.contains_key(&owner) {
            return Ok(());
        }
        let store = match owner {
            Owner::Process(process) => Handover::store(&self.folder, process.cast_signed(), MOST_ADDRESSES)?,
            Owner::SharedMemory(segment) => {
                let number = u32::try_from(segment).map_err(|_| MemoryError::Number(segment))?;
                laying::store(&self.folder, number, MOST_ADDRESSES).map_err(MemoryError::Laying)?
            }
        };
        self.stores.insert(owner, store);
        Ok(())
    }

    /// Keeps pages of an owner of which memory comes.
    pub(crate) fn keep(&mut self, owner: Owner, run: &PageRun) -> Result<(), MemoryError> {
        if let Owner::Process(process) = owner
            && self.compared.contains(&process)
        {
            return Err(MemoryError::Late { process });
        }
        let Some(store) = self.stores.get_mut(&owner) else { return Err(MemoryError::Unannounced { owner }) };
        let mut rest: &[u8] = &run.bytes;
        let mut index = 0;
        while index < run.count {
            let is_zero = |index| usize::try_from(index).is_ok_and(|index| run.zero.is_zero(index));
            let zero = is_zero(index);
            let end = (index + 1..run.count).find(|next| is_zero(*next) != zero).unwrap_or(run.count);
            let range = PageRange::new(run.vaddr + index * PAGE_SIZE, run.vaddr + end * PAGE_SIZE);
            if zero {
                store.put_zero(range)?;
            } else {
                let (pages, after) = rest.split_at(usize::try_from(range.length()).unwrap_or(rest.len()));
                store.put(range, pages)?;
                rest = after;
            }
            index = end;
        }
        Ok(())
    }

    /// Changes pages that are kept.
    pub(crate) fn change(&mut self, owner: Owner, deltas: &Deltas) -> Result<(), MemoryError> {
        let Some(store) = self.stores.get(&owner) else { return Err(MemoryError::Unannounced { owner }) };
        let previous = |vaddr, page: &mut Page| {
            let kept = store.run(PageRange::new(vaddr, vaddr + PAGE_SIZE));
            kept.inspect(|kept| page.copy_from_slice(kept)).is_some()
        };
        let changed = deltas.apply(previous).map_err(|source| MemoryError::Changes { owner, source })?;
        changed.runs().try_for_each(|run| self.keep(owner, &run))
    }

    /// Takes a list of the pages that there are in the end, or of those that stay with the source.
    fn take_list(&mut self, kind: ListOf, list: &[u8]) -> Result<(), MemoryError> {
        let ranges = parse(list).map_err(|what| MemoryError::List { owner: kind.owner(), what })?;
        match kind {
            ListOf::Existing(owner) => drop(self.existing.insert(owner, ranges)),
            ListOf::Later(process) if self.post_copy => drop(self.later.insert(process, ranges)),
            ListOf::Later(process) => return Err(MemoryError::NotPostCopy { process }),
        }
        Ok(())
    }

    /// Digests of a process's pages come, for the end check.
    pub(crate) fn open_digests(&mut self, process: u32) -> Result<Comparison, MemoryError> {
        let refused = |what| Err(MemoryError::Digests { process, what });
        let Some(existing) = self.existing.get(&Owner::Process(process)) else {
            return refused("and no list of its pages before them");
        };
        if !self.stores.contains_key(&Owner::Process(process)) {
            return refused("of which no memory came before the freeze");
        }
        if !self.compared.insert(process) {
            return refused("of which they came already");
        }
        Ok(Comparison::of(existing.clone()))
    }

    /// Compares the next pages of a process with digests.
    pub(crate) fn compare(&self, process: u32, comparison: &mut Comparison, digests: &[u8]) -> Result<(), MemoryError> {
        let owner = Owner::Process(process);
        let Some(store) = self.stores.get(&owner) else { return Err(MemoryError::Unannounced { owner }) };
        comparison.compare(store, digests).map_err(|source| MemoryError::NoDigests { process, source })
    }

    /// Completes CRIU's images of an owner, or keeps them until it is known which pages are here already.
    pub(crate) fn dumped(&mut self, owner: Owner, images: PageSetWriter) -> Result<(), MemoryError> {
        // Memory of processes comes before the freeze: without any by now, there will be none.
        if matches!(owner, Owner::Process(_)) && !self.is_there() {
            return Ok(images.finish()?);
        }
        self.dumped.insert(owner, images);
        Ok(())
    }

    /// Everything is here: completes all images, and leaves the lazy pages for the pager, and shared memory for CRIU.
    pub(crate) fn complete(&mut self) -> Result<(), MemoryError> {
        let (mut processes, mut segments) = (Vec::new(), Vec::new());
        for (owner, images) in std::mem::take(&mut self.dumped) {
            match owner {
                Owner::Process(process) => processes.push((process.cast_signed(), self.put_together(process, images)?)),
                Owner::SharedMemory(segment) => segments.extend(self.put_aside(segment, images)?),
            }
        }
        self.existing.retain(|owner, _| matches!(owner, Owner::Process(_)));
        let without = self.existing.keys().filter_map(|owner| match owner {
            Owner::Process(process) => Some(process),
            Owner::SharedMemory(_) => None,
        });
        if let Some(process) = without.chain(self.later.keys()).next() {
            return Err(MemoryError::NoProcess { process: *process });
        }
        if !segments.is_empty() {
            let left = segments.iter().map(|(number, store)| (*number, store));
            laying::write(&self.folder, left).map_err(MemoryError::Laying)?;
        }
        if !processes.is_empty() {
            let left: Vec<_> = processes.iter().map(|(process, (store, lazy))| (*process, store, lazy)).collect();
            Handover::write(&self.folder, &left)?;
        }
        Ok(())
    }

    fn put_together(&mut self, process: u32, images: PageSetWriter) -> Result<(Store, PageRanges), MemoryError> {
        let owner = Owner::Process(process);
        // CRIU asks the pager for the pages of every process, also of one that has none there.
        let later = self.later.remove(&process).unwrap_or_default();
        let kept = self.existing.remove(&owner).and_then(|existing| Some((self.stores.remove(&owner)?, existing)));
        let Some((mut store, existing)) = kept else {
            images.finish()?;
            return Ok((Handover::store(&self.folder, process.cast_signed(), 1)?, PageRanges::new()));
        };
        let lazy = images.finish_with_lazy(&runs(&existing))?;
        let lazy: PageRanges = lazy.iter().map(|run| PageRange::new(run.address, run.end())).collect();
        // What came of the others is old.
        let here = lazy.difference(&later);
        check_all_here(owner, &store, &here)?;
        store.retain(&here)?;
        Ok((store, lazy))
    }

    /// What was kept of shared memory that CRIU restores; none when all of it is CRIU's. A page that CRIU has too is taken from there.
    fn put_aside(&mut self, segment: u64, images: PageSetWriter) -> Result<Option<(u32, Store)>, MemoryError> {
        let owner = Owner::SharedMemory(segment);
        let Some(existing) = self.existing.remove(&owner) else {
            images.finish()?;
            return Ok(None);
        };
        let missing = images.missing(&runs(&existing));
        let missing = missing.iter().map(|run| PageRange::new(run.address, run.end())).collect();
        images.finish()?;
        // Of one without any pages none came.
        self.open(owner)?;
        let Some(mut store) = self.stores.remove(&owner) else { return Ok(None) };
        check_all_here(owner, &store, &missing)?;
        store.retain(&missing)?;
        let number = u32::try_from(segment).map_err(|_| MemoryError::Number(segment))?;
        Ok(Some((number, store)))
    }
}

fn runs(ranges: &PageRanges) -> Vec<Run> {
    ranges.iter().map(|range| Run { address: range.start, pages: range.pages(), flags: 0 }).collect()
}

fn check_all_here(owner: Owner, store: &Store, pages: &PageRanges) -> Result<(), MemoryError> {
    match store.missing(pages).as_slice().first() {
        Some(range) => Err(MemoryError::Missing { owner, range: range.to_string() }),
        None => Ok(()),
    }
}

/// All digests of a process have come: fails when a page differs.
pub(crate) fn verdict(process: u32, comparison: Comparison) -> Result<(), MemoryError> {
    let (found, compared) = comparison.finish().map_err(|source| MemoryError::NoDigests { process, source })?;
    match found.first {
        Some(first) => Err(MemoryError::Different { process, pages: found.pages, compared, first }),
        None => Ok(()),
    }
}

/// What pages are in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ListOf {
    /// Those that there are of an owner.
    Existing(Owner),
    /// Those of a process that stay with the source.
    Later(u32),
}

impl ListOf {
    const fn owner(self) -> Owner {
        match self {
            Self::Existing(owner) => owner,
            Self::Later(process) => Owner::Process(process),
        }
    }
}

/// A list of pages that is still coming.
#[derive(Debug)]
pub(crate) struct List {
    kind: ListOf,
    bytes: Vec<u8>,
}

impl List {
    /// Of these pages.
    pub(crate) fn of(kind: ListOf) -> Self {
        Self { kind, bytes: Vec::new() }
    }

    /// The next bytes.
    pub(crate) fn extend(&mut self, bytes: &[u8]) -> Result<(), MemoryError> {
        if self.bytes.len() + bytes.len() > LONGEST_LIST {
            return Err(MemoryError::List { owner: self.kind.owner(), what: "it is too long" });
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// It is complete.
    pub(crate) fn finish(self, memory: &mut ArrivingMemory) -> Result<(), MemoryError> {
        memory.take_list(self.kind, &self.bytes)
    }
}

/// Ranges that ascend and do not touch.
fn parse(list: &[u8]) -> Result<PageRanges, &'static str> {
    let (ranges, rest) = list.as_chunks::<RANGE>();
    if !rest.is_empty() {
        return Err("it ends in the middle of a range");
    }
    let (mut parsed, mut cursor) = (PageRanges::new(), None);
    for range in ranges {
        let (start, end) = range.split_at(RANGE / 2);
        let number = |bytes: &[u8]| bytes.try_into().map_or(u64::MAX, u64::from_le_bytes);
        let (start, end) = (number(start), number(end));
        if !start.is_multiple_of(PAGE_SIZE) || !end.is_multiple_of(PAGE_SIZE) || end > END_OF_ADDRESSES {
            return Err("an address of no page");
        }
        if start >= end || cursor.is_some_and(|cursor| start <= cursor) {
            return Err("its ranges do not ascend");
        }
        cursor = Some(end);
        parsed.push(PageRange::new(start, end));
    }
    Ok(parsed)
}

impl From<MemoryError> for io::Error {
    fn from(error: MemoryError) -> Self {
        Self::other(error)
    }
}

#[cfg(test)]
mod tests {
    use podferry_transfer::{Changes, ZeroMap, is_zero};
    use proptest::prelude::*;

    use super::*;

    fn list(ranges: &[(u64, u64)]) -> Vec<u8> {
        ranges.iter().flat_map(|(start, end)| [start.to_le_bytes(), end.to_le_bytes()]).flatten().collect()
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        assert_eq!(parse(&list(&[(0x1000, 0x3000), (0x4000, 0x5000)])).unwrap().pages(), 3);
        for ranges in [
            &[(0x1000, 0x1000)][..],
            &[(0x2000, 0x1000)],
            &[(0x1001, 0x2000)],
            &[(0x1000, 0x2000), (0x2000, 0x3000)],
            &[(0x4000, 0x5000), (0x1000, 0x2000)],
            &[(0x1000, END_OF_ADDRESSES + PAGE_SIZE)],
        ] {
            assert!(parse(&list(ranges)).is_err(), "{ranges:?}");
        }
        assert!(parse(&[0; 15]).is_err());
    }

    const PAGE: usize = 4096;
    const SEVEN: Owner = Owner::Process(7);

    /// Memory of process 7 that has these pages, from address 0x1000 on.
    fn arriving(folder: &tempfile::TempDir, pages: &[Page]) -> ArrivingMemory {
        let mut memory = ArrivingMemory::new(folder.path().to_owned(), false);
        memory.open(SEVEN).unwrap();
        let (bytes, count) = (pages.concat(), pages.len() as u64);
        let (zero, full) = (ZeroMap::find(&bytes), pages.iter().filter(|page| !is_zero(&page[..])));
        let bytes = full.flatten().copied().collect();
        let run = PageRun { object: 1, vaddr: 0x1000, count, flags: 0, zero, bytes, absent: false };
        memory.keep(SEVEN, &run).unwrap();
        memory
    }

    fn kept(memory: &ArrivingMemory, index: usize) -> &[u8] {
        let start = (index as u64 + 1) * PAGE_SIZE;
        memory.stores[&SEVEN].run(PageRange::new(start, start + PAGE_SIZE)).unwrap()
    }

    fn arrived(changes: Changes) -> Deltas {
        Deltas::arrived(1, changes).unwrap()
    }

    #[test]
    fn changes_make_of_kept_pages_what_the_source_has() {
        let folder = tempfile::tempdir().unwrap();
        let before = [[1; PAGE], [0; PAGE], [3; PAGE], [4; PAGE]];
        let mut memory = arriving(&folder, &before);
        let mut now = before;
        now[0][100] = 7;
        // A zero page that is not any more, one that becomes zero but for what a delta can say, one that stays.
        now[1][PAGE - 1] = 9;
        now[3][8..16].fill(0);
        let mut changes = Changes::default();
        for (index, (before, now)) in before.iter().zip(&now).enumerate() {
            assert!(changes.add((index as u64 + 1) * PAGE_SIZE, before, now));
        }
        memory.change(SEVEN, &arrived(changes)).unwrap();
        for (index, now) in now.iter().enumerate() {
            assert!(kept(&memory, index) == now, "page {index}");
        }
    }

    #[test]
    fn changes_of_pages_that_are_not_kept_are_refused_and_change_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let before = [[1; PAGE], [2; PAGE]];
        let mut memory = arriving(&folder, &before);
        let changes = |address, previous: &Page| {
            let mut changes = Changes::default();
            for (address, previous) in [(0x1000, &before[0]), (address, previous)] {
                let mut now = *previous;
                now[0] = 77;
                assert!(changes.add(address, previous, &now));
            }
            arrived(changes)
        };
        let missing = memory.change(SEVEN, &changes(0x3000, &before[1]));
        let source = ApplyError::Missing { vaddr: 0x3000 };
        assert!(matches!(missing, Err(MemoryError::Changes { owner: SEVEN, source: found }) if found == source));
        let other = memory.change(SEVEN, &changes(0x2000, &[3; PAGE]));
        assert!(matches!(other, Err(MemoryError::Changes { source: ApplyError::Digest { .. }, .. })), "{other:?}");
        assert!(matches!(memory.change(Owner::Process(8), &changes(0x2000, &before[1])), Err(MemoryError::Unannounced { .. })));
        assert!((0..2).all(|index| kept(&memory, index) == before[index]));
    }

    fn digests(pages: &[Page]) -> Vec<u8> {
        pages.iter().flat_map(|page| podferry_memory::digest::of_page(page)).collect()
    }

    /// Compares digests of these pages with what arrived, of which the list has the same pages.
    fn compared(memory: &mut ArrivingMemory, pages: &[Page]) -> Result<(), MemoryError> {
        memory.take_list(ListOf::Existing(SEVEN), &list(&[(0x1000, (pages.len() as u64 + 1) * PAGE_SIZE)]))?;
        let mut comparison = memory.open_digests(7)?;
        digests(pages).chunks(16).try_for_each(|digests| memory.compare(7, &mut comparison, digests))?;
        verdict(7, comparison)
    }

    #[test]
    fn what_arrived_is_what_the_source_has_or_the_first_difference_is_named() {
        let pages = [[1; PAGE], [0; PAGE], [3; PAGE], [0; PAGE]];
        for (index, changed) in pages.iter().enumerate() {
            let folder = tempfile::tempdir().unwrap();
            compared(&mut arriving(&folder, &pages), &pages).unwrap();
            let mut now = pages;
            now[index][PAGE - 1] = changed[0] + 1;
            let different = compared(&mut arriving(&folder, &pages), &now).unwrap_err();
            let address = (index as u64 + 1) * PAGE_SIZE;
            assert_eq!(
                different.to_string(),
                format!(
                    "memory of process 7 (its id inside the container) is not what it is on the source: 1 of 4 pages differ, the \
                     first at {address:#x}-{:#x}",
                    address + PAGE_SIZE
                )
            );
        }
    }

    #[test]
    fn pages_that_stay_with_the_source_are_taken_in_post_copy_only_and_only_of_a_process_that_comes() {
        let folder = tempfile::tempdir().unwrap();
        let later = list(&[(0x1000, 0x2000)]);
        let mut live = arriving(&folder, &[[1; PAGE]]);
        let refused = live.take_list(ListOf::Later(7), &later);
        assert!(matches!(refused, Err(MemoryError::NotPostCopy { process: 7 })), "{refused:?}");
        let mut memory = ArrivingMemory { post_copy: true, ..arriving(&folder, &[[1; PAGE]]) };
        memory.take_list(ListOf::Later(7), &later).unwrap();
        let nobodys = memory.complete();
        assert!(matches!(nobodys, Err(MemoryError::NoProcess { process: 7 })), "{nobodys:?}");
    }

    #[test]
    fn a_page_that_did_not_arrive_is_a_difference() {
        let folder = tempfile::tempdir().unwrap();
        let different = compared(&mut arriving(&folder, &[[1; PAGE]]), &[[1; PAGE], [0; PAGE], [0; PAGE]]).unwrap_err();
        let first = PageRange::new(0x2000, 0x4000);
        assert!(
            matches!(different, MemoryError::Different { process: 7, pages: 2, compared: 3, first: found } if found == first),
            "{different}"
        );
    }

    #[test]
    fn a_store_that_is_changed_behind_the_agents_back_is_found_out() {
        use std::os::unix::fs::FileExt as _;
        let folder = tempfile::tempdir().unwrap();
        let pages = [[1; PAGE], [2; PAGE], [3; PAGE]];
        let mut memory = arriving(&folder, &pages);
        let store = std::fs::File::options().write(true).open(folder.path().join("memory-7.store")).unwrap();
        // The first page is the second one of its 2 MiB.
        store.write_all_at(&[9], 3 * PAGE_SIZE + 77).unwrap();
        let different = compared(&mut memory, &pages).unwrap_err();
        let first = PageRange::new(0x3000, 0x4000);
        assert!(
            matches!(different, MemoryError::Different { pages: 1, first: found, .. } if found == first),
            "{different}"
        );
    }

    #[test]
    fn digests_out_of_place_are_refused_and_so_is_memory_behind_them() {
        let folder = tempfile::tempdir().unwrap();
        let pages = [[1; PAGE], [2; PAGE]];
        let mut memory = arriving(&folder, &pages);
        assert!(matches!(memory.open_digests(7), Err(MemoryError::Digests { process: 7, .. })), "before the list");
        memory.take_list(ListOf::Existing(Owner::Process(8)), &list(&[(0x1000, 0x2000)])).unwrap();
        assert!(matches!(memory.open_digests(8), Err(MemoryError::Digests { process: 8, .. })), "without memory");
        memory.take_list(ListOf::Existing(SEVEN), &list(&[(0x1000, 0x3000)])).unwrap();
        let mut comparison = memory.open_digests(7).unwrap();
        assert!(matches!(memory.open_digests(7), Err(MemoryError::Digests { process: 7, .. })), "a second time");
        for bytes in [vec![0; 12], vec![0; 24], vec![0; 1 << 20]] {
            let refused = memory.compare(7, &mut Comparison::of(memory.existing[&SEVEN].clone()), &bytes);
            assert!(matches!(refused, Err(MemoryError::NoDigests { process: 7, .. })), "{} bytes", bytes.len());
        }
        memory.compare(7, &mut comparison, &digests(&pages[..1])).unwrap();
        let (zero, bytes) = (ZeroMap::default(), vec![1; PAGE].into());
        let late = PageRun { object: 9, vaddr: 0x1000, count: 1, flags: 0, zero, bytes, absent: false };
        assert!(matches!(memory.keep(SEVEN, &late), Err(MemoryError::Late { process: 7 })));
        let mut changes = Changes::default();
        assert!(changes.add(0x1000, &pages[0], &{
            let mut now = pages[0];
            now[5] = 5;
            now
        }));
        assert!(matches!(memory.change(SEVEN, &arrived(changes)), Err(MemoryError::Late { process: 7 })));
        assert!(matches!(
            verdict(7, comparison),
            Err(MemoryError::NoDigests { process: 7, source: DigestError::TooFew(1) })
        ));
    }

    proptest! {
        #[test]
        fn noise_is_no_list_or_a_list_that_ascends(noise in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(ranges) = parse(&noise) {
                prop_assert!(ranges.as_slice().windows(2).all(|two| two[0].end < two[1].start));
            }
        }
    }
}
