//! Shared memory of the container's processes: compared round by round, since writes to it cannot be followed.
//!
//! A segment is sent once, whoever has mapped it, and from then on the pages of it that are not what they were. CRIU does not see a
//! segment that is hidden with the rest; one that comes after that is its own. What it costs in the freeze grows with its size: all
//! of it is read once more, and written once on the target. So that is part of what a freeze is predicted to take.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::unistd::Pid;
use podferry_memory::PAGE_SIZE;
use podferry_memory::parallel;
use podferry_memory::previous::{Budget, PreviousPages};
use podferry_memory::range::PageRanges;
use podferry_memory::shared::{self, Compared, SharedMemory};
use podferry_runtime::Member;
use podferry_transfer::{Object, ObjectWriter, Owner, Pool};

use super::{SendError, Way, send_list};
use crate::source::batch::Parted;

/// Bytes that CRIU's process lays in in a second: measured (`docs/performance.md`), and less than that on a busy node.
const LAYING_RATE: u64 = 1 << 30;

/// The most segments that are followed, each with an open file; others are left to CRIU.
const MOST: usize = 1024;

/// The segments that are followed.
#[derive(Debug, Default)]
pub(super) struct Segments {
    all: BTreeMap<u32, Segment>,
    /// How long the last round took to compare them.
    comparing: Duration,
}

#[derive(Debug)]
struct Segment {
    memory: SharedMemory,
    previous: PreviousPages,
}

impl Segments {
    /// Finds the segments that these processes have mapped now, and forgets those that none has any more.
    pub(super) fn find(&mut self, members: &[Member], budget: &Budget) {
        let mut seen = BTreeSet::new();
        for member in members {
            // One that has ended meanwhile has none; another one may have its segments.
            let new = shared::find(Pid::from_raw(member.pid), &mut seen, |number| self.all.contains_key(&number))
                .unwrap_or_default();
            for memory in new.into_iter().take(MOST - self.all.len().min(MOST)) {
                let previous = PreviousPages::new(budget.clone());
                self.all.insert(memory.number(), Segment { memory, previous });
            }
        }
        self.all.retain(|number, _| seen.contains(number));
    }

    /// Sends what is not as it was sent last. Gives how many pages, and why segments are left to CRIU from now on.
    pub(super) fn round(&mut self, number: u32, way: &Way) -> Result<(u64, Vec<String>), SendError> {
        let (mut pages, mut left) = (0, Vec::new());
        let (mut failed, mut comparing) = (Vec::new(), Duration::ZERO);
        for (of, segment) in &mut self.all {
            segment.previous.begin_round();
            // One thread: the container needs the others.
            match segment.send(1, number, way) {
                Ok(sent) => {
                    pages += sent.compared.changed;
                    comparing += sent.comparing;
                }
                Err(SendError::Read { source, .. }) => failed.push((*of, source)),
                Err(error) => return Err(error),
            }
        }
        for (of, error) in failed {
            self.all.remove(&of);
            left.push(format!("shared memory {of} is moved in the freeze: it cannot be read: {error}"));
        }
        self.comparing = comparing;
        Ok((pages, left))
    }

    /// What they add to a freeze.
    pub(super) fn cost(&self) -> Duration {
        let bytes: u64 = self.all.values().map(|segment| segment.memory.compared_bytes()).sum();
        let threads = u32::try_from(parallel::threads()).unwrap_or(1);
        self.comparing / threads + Duration::from_micros(bytes / (LAYING_RATE / 1_000_000))
    }

    /// Device and inode of each, which CRIU is not to see the pages of.
    pub(super) fn files(&self) -> std::io::Result<Vec<(u64, u64)>> {
        self.all.values().map(|segment| segment.memory.file()).collect()
    }

    /// Sends what is left, and which pages there are. The container must stand still.
    pub(super) fn last_round(&mut self, number: u32, way: &Way) -> Result<u64, SendError> {
        let mut pages = 0;
        for segment in self.all.values_mut() {
            segment.previous.begin_last_round();
            let sent = segment.send(parallel::threads(), number, way)?;
            pages += sent.compared.changed;
            segment.send_existing(&sent.compared.existing, way)?;
        }
        Ok(pages)
    }

    /// Sends the digests of all pages, for the end check, behind the last round. Gives how many pages there are.
    pub(super) fn send_digests(&self, way: &Way) -> Result<u64, SendError> {
        let mut pages = 0;
        for segment in self.all.values().filter(|segment| segment.memory.compared_bytes() > 0) {
            let (mut writer, _) = way.open(&Object::Digests { owner: segment.owner() })?;
            segment.memory.read_digests::<SendError>(|digests| {
                way.pause()?;
                Ok(writer.data_blocking(Bytes::from(digests))?)
            })?;
            writer.close_blocking()?;
            pages += segment.memory.compared_bytes() / PAGE_SIZE;
        }
        Ok(pages)
    }
}

/// What became of a segment's round.
struct Sent {
    compared: Compared,
    /// How long it took, without the sending.
    comparing: Duration,
}

impl Segment {
    const fn owner(&self) -> Owner {
        Owner::SharedMemory(self.memory.number() as u64)
    }

    fn send(&mut self, threads: usize, round: u32, way: &Way) -> Result<Sent, SendError> {
        let (object, begun) = (Object::Memory { owner: self.owner(), round }, Instant::now());
        let mut open: Option<(ObjectWriter, Pool)> = None;
        let mut sending = Duration::ZERO;
        let previous = &mut self.previous;
        let compared = self.memory.compare::<SendError>(threads, |ranges, contents| {
            way.pause()?;
            let begun = Instant::now();
            let (writer, pool) = match &mut open {
                Some(open) => open,
                none => none.insert(way.open(&object)?),
            };
            Parted::of(ranges, contents, previous, pool).send(writer, pool)?;
            sending += begun.elapsed();
            Ok(())
        });
        // Also after an error: the object has to be closed for the transfer to go on without this segment.
        if let Some((writer, _)) = open {
            writer.close_blocking()?;
        }
        Ok(Sent { compared: compared?, comparing: begun.elapsed().saturating_sub(sending) })
    }

    fn send_existing(&self, existing: &PageRanges, way: &Way) -> Result<(), SendError> {
        send_list(&Object::Existing { owner: self.owner() }, existing, way)
    }
}
