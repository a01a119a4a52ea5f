//! Pages that stayed here, read for the target that fetches them: see [`podferry_proto::fetch`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Pid;
use podferry_common::failure::{Failure, FailureCode};
use podferry_memory::PAGE_SIZE;
use podferry_memory::copier::Copier;
use podferry_memory::range::PageRange;
use podferry_proto::v1::{FetchPages, FetchResponse};
use podferry_runtime::Member;
use podferry_transfer::compression::Packer;
use podferry_transfer::parcel::{self, MOST_PAGES};
use podferry_transfer::{Pool, Share};
use tokio::time::Instant;

use super::SourcePart;
use crate::context::{Context, blocking};

/// The first address that no process has (57 bits).
const END_OF_ADDRESSES: u64 = 1 << 56;
/// Bytes of the most pages that are read at once.
const MOST_BYTES: usize = (MOST_PAGES as usize) << 12;

/// Reads pages of the processes of a container that stands still.
#[expect(missing_debug_implementations, reason = "the packer has none")]
pub struct PageReader {
    context: Context,
    part: Arc<SourcePart>,
    /// The processes, by their ids inside the container.
    pids: HashMap<u32, Pid>,
    /// Of the process that was asked about last: each has a megabyte of buffer, and there may be hundreds of processes.
    copier: Option<(u32, Copier)>,
    packer: Option<Packer>,
    pace: Option<Pace>,
    /// Of what the node may send. The container does not wait for it, or it comes first.
    share: Option<Share>,
}

impl PageReader {
    /// Of this part's container. With `awaited`, the migration's bandwidth limit does not hold.
    ///
    /// # Errors
    /// When the processes cannot be listed.
    pub async fn of(context: &Context, part: Arc<SourcePart>, awaited: bool) -> Result<Self, Failure> {
        let (compress, limit) = part.fetched_by().map_or((false, None), |by| (by.compress, by.bandwidth_limit));
        let container = part.container.clone().ok_or_else(|| {
            let message = "what runc knows of the frozen container cannot be read";
            context.refusal(FailureCode::Unavailable, message).in_phase("fill")
        })?;
        let members = blocking(move || Ok(container.tree())).await?;
        let members = members.map_err(|error| {
            let what = "the frozen container's processes cannot be listed";
            context.failure(FailureCode::DataLoss, what, &error).in_phase("fill")
        })?;
        let pid = |member: Member| (member.inner.unsigned_abs(), Pid::from_raw(member.pid));
        let pids = members.into_iter().map(pid).collect();
        let packer = compress.then(|| Packer::new(Pool::new(2))).transpose();
        let packer = packer.map_err(|error| context.failure(FailureCode::Internal, "zstd cannot be set up", &error))?;
        let pace = limit.filter(|_| !awaited).map(Pace::new);
        let share = context.shares.as_ref().map(|shares| if awaited { shares.urgent_share() } else { shares.share() });
        Ok(Self { context: context.clone(), part, pids, copier: None, packer, pace, share })
    }

    /// Reads pages. Gives the reader back for the next ones.
    ///
    /// # Errors
    /// `DATA_LOSS` when they cannot be had any more.
    pub async fn read(mut self, asked: &FetchPages) -> Result<(Self, FetchResponse), Failure> {
        let range = self.check(asked)?;
        if !self.part.stands_still() {
            return Err(dead(&self.context));
        }
        let process = asked.process;
        let (mut reader, response) = blocking(move || {
            let response = self.read_now(process, range)?;
            Ok((self, response))
        })
        .await?;
        if let Some(pace) = &mut reader.pace {
            tokio::time::sleep_until(pace.next(Instant::now(), response.contents.len())).await;
        }
        if let Some(share) = &mut reader.share {
            share.spend(response.contents.len()).await;
        }
        Ok((reader, response))
    }

    fn check(&self, asked: &FetchPages) -> Result<PageRange, Failure> {
        let count = u64::from(asked.count);
        let end = count.checked_mul(PAGE_SIZE).and_then(|length| asked.address.checked_add(length));
        let fits = (1..=u64::from(MOST_PAGES)).contains(&count) && asked.address.is_multiple_of(PAGE_SIZE);
        let end = end.filter(|end| fits && *end <= END_OF_ADDRESSES).ok_or_else(|| {
            let message = format!("{count} pages at {:#x} cannot be asked for", asked.address);
            self.context.refusal(FailureCode::InvalidArgument, message).in_phase("fill")
        })?;
        Ok(PageRange::new(asked.address, end))
    }

    fn read_now(&mut self, process: u32, range: PageRange) -> Result<FetchResponse, Failure> {
        let pid = *self.pids.get(&process).ok_or_else(|| dead(&self.context))?;
        if self.copier.as_ref().is_none_or(|(of, _)| *of != process) {
            self.copier = Some((process, Copier::new(pid, MOST_BYTES)));
        }
        let Some((_, copier)) = &mut self.copier else { return Err(dead(&self.context)) };
        let mut contents = Vec::new();
        // All of it in one batch, which has room for the most that may be asked for.
        let copied = copier.read_into(&[range].into_iter().collect(), Vec::new, |_, read| {
            contents = read;
            Ok::<(), std::io::Error>(())
        });
        let failed = |what: &str, error: &std::io::Error| {
            self.context.failure(FailureCode::Internal, what, error).in_phase("fill")
        };
        let copied = copied.map_err(|error| failed("pages of the frozen container cannot be read", &error))?;
        // Nothing of a process that stands still goes away but with its end.
        if !copied.vanished.is_empty() {
            return Err(dead(&self.context));
        }
        parcel::pack(process, range.start, &contents, self.packer.as_mut())
            .map_err(|error| failed("pages cannot be packed", &error))
    }
}

fn dead(context: &Context) -> Failure {
    let message = "the frozen processes that had the pages are gone";
    context.refusal(FailureCode::DataLoss, message).in_phase("fill")
}

/// Lets so many bytes go in a second.
#[derive(Debug)]
struct Pace {
    bytes_per_second: u64,
    free: Option<Instant>,
}

impl Pace {
    fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), free: None }
    }

    /// When so many bytes may go that could go now.
    fn next(&mut self, now: Instant, bytes: usize) -> Instant {
        let next = self.free.map_or(now, |free| free.max(now));
        #[expect(clippy::cast_precision_loss, reason = "a duration")]
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.free = Some(next + takes);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_bytes_go_in_a_second_than_may_and_a_pause_gives_no_credit() {
        let (mut pace, begun) = (Pace::new(1000), Instant::now());
        let after = |ms: u64| begun + Duration::from_millis(ms);
        for piece in 0..11 {
            assert_eq!(pace.next(begun, 500), after(piece * 500));
        }
        assert_eq!(pace.next(after(60_000), 500), after(60_000));
        assert_eq!(pace.next(after(60_000), 500), after(60_500));
    }
}
