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
    #[error("digests came of {owner}, {what}")]
    Digests {
        /// Whose they are.
        owner: Owner,
        /// Why they have none.
        what: &'static str,
    },
    /// Digests came that are not those of the process's pages.
    #[error("the digests of the pages of {owner} make no sense: {source}")]
    NoDigests {
        /// Whose they are.
        owner: Owner,
        /// What is wrong with them.
        source: DigestError,
    },
    /// The end check found a difference.
    #[error(
        "memory of {owner} (by its number inside the container) is not what it is on the source: {pages} of {compared} pages \
         differ, the first at {first}"
    )]
    Different {
        /// Whose it is.
        owner: Owner,
        /// How many pages,
        pages: u64,
        /// of how many,
        compared: u64,
        /// and the first of them.
        first: PageRange,
    },
    /// Memory came after the source had read it for the last time.
    #[error("memory of {owner} came after the digests of its pages")]
    Late {
        /// Whose it is.
        owner: Owner,
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
    /// Of whose pages digests have come: nothing of them changes any more.
    compared: HashSet<Owner>,
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
        if self.compared.contains(&owner) {
            return Err(MemoryError::Late { owner });
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

    /// Digests of an owner's pages come, for the end check.
    pub(crate) fn open_digests(&mut self, owner: Owner) -> Result<Comparison, MemoryError> {
        let refused = |what| Err(MemoryError::Digests { owner, what });
        let Some(existing) = self.existing.get(&owner) else {
            return refused("and no list of its pages before them");
        };
        if !self.stores.contains_key(&owner) {
            return refused("of which no memory came before the freeze");
        }
        if !self.compared.insert(owner) {
            return refused("of which they came already");
        }
        Ok(Comparison::of(existing.clone()))
    }

    /// Compares the next pages of an owner with digests.
    pub(crate) fn compare(&self, owner: Owner, comparison: &mut Comparison, digests: &[u8]) -> Result<(), MemoryError> {
        let Some(store) = self.stores.get(&owner) else { return Err(MemoryError::Unannounced { owner }) };
        comparison.compare(store, digests).map_err(|source| MemoryError::NoDigests { owner, source })
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
        // Who has nothing that could come before the freeze may be CRIU's alone.
        let without = self.existing.iter().filter_map(|(owner, pages)| match owner {
            Owner::Process(process) if !pages.is_empty() => Some(process),
            Owner::Process(_) | Owner::SharedMemory(_) => None,
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

/// All digests of an owner have come: fails when a page differs.
pub(crate) fn verdict(owner: Owner, comparison: Comparison) -> Result<(), MemoryError> {
    let (found, compared) = comparison.finish().map_err(|source| MemoryError::NoDigests { owner, source })?;
    match found.first {
        Some(first) => Err(MemoryError::Different { owner, pages: found.pages, compared, first }),
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
mod tests;
