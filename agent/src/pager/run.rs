//! What the pager's two processes do.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use podferry_common::failure::chain;
use podferry_memory::handover::Handover;
use podferry_memory::pager::slot::Slot;
use podferry_memory::pager::{self, Ended, Paged, PagerError, Progress, Surroundings};

use super::ending::end_processes;
use super::messages::{Holder, PagerJob, PagerState, PagerStatus};
use crate::worker::record;

/// The argument that makes a pager the second holder.
pub const SECOND: &str = "second";
/// Below those of the container: a pager that is killed for want of memory costs more than it gives.
const OOM_SCORE: &str = "-900";
/// In the folder of the handover: see [`Slot`].
const SLOT: &str = "pager.slot";

/// Which of the two holders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The one that works. Its standard input is the socket at which CRIU connects.
    First,
    /// The one that waits to take over. Its standard input is the link to the first.
    Second,
}

/// Does the job. Returns when it is done, or when it is clear that it cannot be: the status file says which.
///
/// # Errors
/// When it cannot even begin.
pub fn run(job_file: &Path, role: Role) -> Result<(), Box<dyn Error>> {
    // Out of the agent's session: a signal to its group is none of ours.
    rustix::process::setsid()?;
    spare_from_oom();
    let stop = stop_signal()?;
    let job: PagerJob = record::load(job_file)?.ok_or("there is no such job")?;
    let given = io::stdin().as_fd().try_clone_to_owned()?;
    let kept = Handover::read(&job.handover)?;
    let slot = slot(&job.handover)?;
    let mut around = Around::of(job, job_file);
    let stop = Some(stop.as_fd());
    let ended = match role {
        Role::First => Some(pager::serve_first(UnixListener::from(given), kept, slot, stop, &mut around)),
        Role::Second => pager::serve_second(given, kept, slot, stop, &mut around)?,
    };
    if ended.is_some_and(|ended| ended.outcome.is_ok()) {
        Handover::remove(&around.job.handover)?;
    }
    Ok(())
}

/// SIGTERM asks a pager to stop, which it does as long as the restore is not complete.
fn stop_signal() -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn slot(folder: &Path) -> io::Result<Slot> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    Slot::of(&options.open(folder.join(SLOT))?)
}

fn spare_from_oom() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE) {
        tracing::debug!(%error, "the pager is killed like any other when memory runs out");
    }
}

/// The pager's surroundings: the status file, the other holder, the container.
struct Around {
    job: PagerJob,
    job_file: PathBuf,
    second: Option<Holder>,
    state: PagerState,
}

impl Around {
    fn of(job: PagerJob, job_file: &Path) -> Self {
        Self { job, job_file: job_file.to_owned(), second: None, state: PagerState::Starting }
    }

    fn note(&self) {
        let holders = Holder::of_pid(std::process::id()).into_iter().chain(self.second).collect();
        let status = PagerStatus { holders, container: self.job.container.clone(), state: self.state.clone() };
        if let Err(error) = record::store(&self.job.status, &status) {
            tracing::error!(%error, "the pager's status cannot be written");
        }
    }
}

impl Surroundings for Around {
    fn start_second(&mut self, link: OwnedFd) -> io::Result<Option<Child>> {
        // Also when the file was replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("podferry-pager").arg(&self.job_file).arg(SECOND);
        let child = command.stdin(link).stdout(Stdio::null()).spawn()?;
        self.second = Holder::of_pid(child.id());
        self.note();
        Ok(Some(child))
    }

    fn fetcher(&mut self) -> Option<io::Result<UnixStream>> {
        self.job.fetch.as_ref().map(UnixStream::connect)
    }

    fn progress(&mut self, progress: Progress) {
        self.state = match progress {
            Progress::Waiting => PagerState::Waiting,
            Progress::Serving => PagerState::Serving,
            Progress::Filling { left_pages } => PagerState::Filling { left_pages },
        };
        self.note();
    }

    fn end_processes(&mut self) {
        end_processes(&self.job.container);
    }

    fn ended(&mut self, ended: &Ended) {
        self.state = last_state(ended);
        tracing::info!(migration = self.job.migration, state = ?self.state, "the pager ends");
        self.note();
    }
}

fn last_state(ended: &Ended) -> PagerState {
    match &ended.outcome {
        Ok(Paged { pages, faults, fill }) => {
            let fill_ms = u64::try_from(fill.as_millis()).unwrap_or(u64::MAX);
            PagerState::Done { pages: *pages, faults: *faults, fill_ms }
        }
        Err(error) if ended.complete => PagerState::Lost { message: message(error) },
        Err(error) => PagerState::Failed { message: message(error) },
    }
}

fn message(error: &PagerError) -> String {
    chain(error)
}
