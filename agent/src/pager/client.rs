//! The agent's side of a pager: starting it, stopping it, waiting for it.
//!
//! Everything but [`start`] needs nothing but the path of the status file: it works for a pager that an earlier agent started.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use podferry_common::failure::{Failure, FailureCode};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use super::ending::end_processes;
use super::messages::{Holder, PagerJob, PagerState, PagerStatus};
use crate::worker::record;

/// Where CRIU looks for a server of lazy pages, in the restore's working directory (CRIU 4.2.1, `LAZY_PAGES_SOCK_NAME`).
const LAZY_SOCKET: &str = "lazy-pages.socket";
/// How long a started pager gets until it says that it waits.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a pager gets to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks at a starting or stopping pager.
const SOON: Duration = Duration::from_millis(2);
/// Between two looks whether the holders live. For so long a container may read zeros when both are killed at once.
const TICK: Duration = Duration::from_millis(10);

/// A pager that was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagerProcess {
    /// Of the first holder at that time.
    pub pid: u32,
    /// What [`stop`] and [`wait_filled`] need.
    pub status: PathBuf,
}

/// Listens where CRIU, restoring with the working directory `work`, will look for a pager. An earlier restore's socket is removed.
///
/// The directory may have any path: a socket's address has 108 bytes at most, so it is named by a descriptor of its directory, and
/// CRIU names it relative to that.
///
/// # Errors
/// When the directory cannot be opened, or the socket not be made in it.
pub fn listen(work: &Path) -> io::Result<UnixListener> {
    let folder = File::open(work)?;
    let socket = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd())).join(LAZY_SOCKET);
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(socket)
}

/// Starts a pager. It waits for CRIU at `listener`, which is from [`listen`] and has no other holder any more. `job_file` is where the job is written, `log` what the pager's own log is appended to.
///
/// The handover has to be written before. It must have every process of the images, also those without lazy pages.
///
/// # Errors
/// When it does not start in time. Then nothing is left of it.
pub async fn start(
    program: &Path,
    job: &PagerJob,
    job_file: &Path,
    listener: UnixListener,
    log: &Path,
) -> Result<PagerProcess, Failure> {
    let failed = |what: &str, error: io::Error| {
        Failure::new(FailureCode::Internal, format!("{what}: {error}")).in_phase("restore")
    };
    let starting = PagerStatus { holders: Vec::new(), container: job.container.clone(), state: PagerState::Starting };
    let written = record::store(&job.status, &starting).and_then(|()| record::store(job_file, job));
    written.map_err(|error| failed("the pager's job cannot be written", error))?;
    let log_file = OpenOptions::new().create(true).append(true).open(log);
    let log_file = log_file.map_err(|error| failed("the pager's log cannot be opened", error))?;
    let mut command = Command::new(program);
    command.arg(job_file).stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(log_file);
    let child = command.spawn().map_err(|error| failed(&format!("{} cannot be started", program.display()), error))?;
    // It has the listener, too.
    drop(command);
    started(child, job, log).await
}

async fn started(mut child: tokio::process::Child, job: &PagerJob, log: &Path) -> Result<PagerProcess, Failure> {
    let begun = Instant::now();
    loop {
        let waits = status(&job.status).is_ok_and(|status| status.state != PagerState::Starting);
        if let Some(pid) = child.id()
            && waits
        {
            tokio::spawn(async move { child.wait().await });
            return Ok(PagerProcess { pid, status: job.status.clone() });
        }
        if let Ok(Some(status)) = child.try_wait() {
            let said = std::fs::read_to_string(log).unwrap_or_default();
            let said = said.lines().last().unwrap_or("nothing").to_owned();
            let message = format!("the pager ended at once ({status}); it said: {said}");
            return Err(Failure::new(FailureCode::Internal, message).in_phase("restore"));
        }
        if begun.elapsed() > START_TIMEOUT {
            let _gone_already = child.start_kill();
            let message = "the pager does not begin to wait for the restore";
            return Err(Failure::new(FailureCode::DeadlineExceeded, message).in_phase("restore"));
        }
        sleep(SOON).await;
    }
}

/// What a pager said last.
///
/// # Errors
/// When there is no such file, or it is damaged.
pub fn status(path: &Path) -> io::Result<PagerStatus> {
    record::load(path)?.ok_or_else(|| record::at(path, &io::ErrorKind::NotFound.into()))
}

/// Ends the pager of a restore that is given up, and what the restore has made of the container. Returns its last state.
///
/// # Errors
/// When the restore is complete: its processes need the pager then. When it does not stop.
pub async fn stop(path: &Path) -> Result<PagerState, Failure> {
    let refused = |code, message: String| Err(Failure::new(code, message).in_phase("restore"));
    let begun = Instant::now();
    loop {
        let status = match status(path) {
            Ok(status) => status,
            Err(error) => return refused(FailureCode::Internal, format!("the pager's status cannot be read: {error}")),
        };
        match status.state {
            PagerState::Filling { .. } => {
                let message = "the restored processes need their pager: end them instead".to_owned();
                return refused(FailureCode::FailedPrecondition, message);
            }
            state if state.is_last() => return Ok(state),
            // It may be about to say who holds it, and would then wait for a restore that never comes.
            _ if status.holders.is_empty() && begun.elapsed() < START_TIMEOUT => {}
            _ if !is_held(&status) => return Ok(wait_filled(path).await),
            _ => status.holders.first().copied().into_iter().for_each(terminate),
        }
        if begun.elapsed() > START_TIMEOUT + STOP_TIMEOUT {
            return refused(FailureCode::DeadlineExceeded, "the pager does not stop".to_owned());
        }
        sleep(SOON).await;
    }
}

/// Whether nothing is lost of the memory that was left to a pager: it serves, or all is in place. One without a last word whose
/// holders were all killed does not serve: what is missing reads as zeros then.
pub fn is_well(path: &Path) -> bool {
    let look = || status(path).ok();
    let Some(seen) = look() else { return false };
    // One holder may have started another, or ended well, between reading the file and looking for those it names.
    status_is_well(&seen) || look().is_some_and(|now| now != seen || status_is_well(&now))
}

fn status_is_well(status: &PagerStatus) -> bool {
    match status.state {
        PagerState::Done { .. } => true,
        PagerState::Failed { .. } | PagerState::Lost { .. } => false,
        PagerState::Starting | PagerState::Waiting | PagerState::Serving | PagerState::Filling { .. } => {
            is_held(status)
        }
    }
}

/// Notes that a container is lost whose pager has seen no harm: it was ended for another reason, and its pages are given up.
///
/// # Errors
/// When the file cannot be read or written.
pub fn note_lost(path: &Path, message: &str) -> io::Result<()> {
    let status = status(path)?;
    record::store(path, &PagerStatus { state: PagerState::Lost { message: message.to_owned() }, ..status })
}

fn terminate(holder: Holder) {
    let Some(pid) = Pid::from_raw(holder.pid) else { return };
    // The descriptor pins the process; the look at the start time after it makes sure that it is the right one.
    if let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty())
        && holder.is_alive()
    {
        let _gone_already = pidfd_send_signal(&descriptor, Signal::TERM);
    }
}

fn is_held(status: &PagerStatus) -> bool {
    status.holders.iter().any(|holder| holder.is_alive())
}

/// Waits until a pager has ended, and gives its last state; for ever while its status cannot be read. When no holder is left that could say one, the container's processes
/// are ended and it is [`PagerState::Lost`], which is also noted in the file.
pub async fn wait_filled(path: &Path) -> PagerState {
    let begun = Instant::now();
    loop {
        match status(path) {
            Ok(status) if status.state.is_last() => return status.state,
            Ok(status) if is_held(&status) => {}
            // Nobody has said yet who holds it.
            Ok(status) if status.holders.is_empty() && begun.elapsed() < START_TIMEOUT => {}
            Ok(seen) => {
                // One holder may have started another, or have written its last word, between the two looks.
                if status(path).is_ok_and(|now| now == seen) {
                    return lose(path, seen).await;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return PagerState::Failed { message: format!("there is no pager: {error}") };
            }
            // That a file cannot be read is no loss of what it tells of: whoever waits may give up.
            Err(error) => tracing::debug!(%error, "a pager's status cannot be read"),
        }
        sleep(TICK).await;
    }
}

async fn lose(path: &Path, mut status: PagerStatus) -> PagerState {
    let container = status.container.clone();
    let ended = tokio::task::spawn_blocking(move || end_processes(&container)).await;
    let mut message = "both holders of the container's memory were killed at once; its processes were ended".to_owned();
    if let Err(error) = ended {
        message =
            format!("both holders of the container's memory were killed, and ending its processes failed: {error}");
    }
    status.state = PagerState::Lost { message };
    if let Err(error) = record::store(path, &status) {
        tracing::error!(%error, "that a container's memory is lost cannot be written down");
    }
    status.state
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::pager::messages::PagedContainer;

    fn status_with(holders: Vec<Holder>, state: PagerState) -> PagerStatus {
        let container = PagedContainer { root: "/nonexistent".into(), id: "none".to_owned(), cgroups: Vec::new() };
        PagerStatus { holders, container, state }
    }

    fn dead() -> Holder {
        let own = Holder::of_pid(std::process::id()).unwrap();
        Holder { start_time: own.start_time + 1, ..own }
    }

    #[test]
    fn criu_finds_the_socket_in_a_folder_whose_path_is_longer_than_an_address() {
        let folder = tempfile::tempdir().unwrap();
        let work = folder.path().join("a".repeat(100)).join("b".repeat(100));
        fs::create_dir_all(&work).unwrap();
        let _earlier = listen(&work).unwrap();
        let listener = listen(&work).unwrap();
        let connect = "import socket; socket.socket(socket.AF_UNIX).connect('lazy-pages.socket')";
        let status = std::process::Command::new("python3").args(["-c", connect]).current_dir(&work).status().unwrap();
        assert!(status.success());
        listener.accept().unwrap();
    }

    #[tokio::test]
    async fn the_last_state_is_given_whoever_asks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status.json");
        let done = PagerState::Done { pages: 7, faults: 1, fill_ms: 3 };
        record::store(&path, &status_with(vec![dead()], done.clone())).unwrap();
        assert_eq!(wait_filled(&path).await, done);
        assert_eq!(stop(&path).await.unwrap(), done);
    }

    #[tokio::test]
    async fn a_status_that_is_not_there_or_cannot_be_read_is_no_loss() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status.json");
        assert!(matches!(wait_filled(&path).await, PagerState::Failed { .. }));
        fs::write(&path, "no").unwrap();
        let waited = tokio::time::timeout(Duration::from_millis(100), wait_filled(&path)).await;
        assert!(waited.is_err(), "{waited:?}");
    }

    #[tokio::test]
    async fn a_pager_that_has_not_said_yet_who_holds_it_is_stopped_when_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status.json");
        record::store(&path, &status_with(Vec::new(), PagerState::Starting)).unwrap();
        let (sender, pager) = tokio::sync::oneshot::channel();
        let says_late = path.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(100)).await;
            let mut pager = Command::new("sleep").arg("60").spawn().unwrap();
            let holder = Holder::of_pid(pager.id()).unwrap();
            record::store(&says_late, &status_with(vec![holder], PagerState::Waiting)).unwrap();
            let ended = tokio::task::spawn_blocking(move || pager.wait()).await.unwrap().unwrap();
            record::store(&says_late, &status_with(vec![holder], PagerState::Failed { message: String::new() }))
                .unwrap();
            sender.send(ended).unwrap();
        });
        let stopped = tokio::time::timeout(START_TIMEOUT, stop(&path)).await;
        stopped.expect("nobody told it to stop").unwrap();
        assert!(!pager.await.unwrap().success());
    }

    #[test]
    fn a_pager_that_has_filled_or_is_held_is_well_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status.json");
        assert!(!is_well(&path));
        let own = Holder::of_pid(std::process::id()).unwrap();
        for (holders, state, wanted) in [
            (vec![dead(), own], PagerState::Serving, true),
            (vec![dead(), dead()], PagerState::Serving, false),
            (vec![dead(), dead()], PagerState::Filling { left_pages: 1 }, false),
            (vec![dead(), dead()], PagerState::Done { pages: 1, faults: 0, fill_ms: 1 }, true),
            (vec![own], PagerState::Failed { message: String::new() }, false),
        ] {
            record::store(&path, &status_with(holders, state)).unwrap();
            assert_eq!(is_well(&path), wanted);
        }
        note_lost(&path, "why").unwrap();
        assert_eq!(status(&path).unwrap().state, PagerState::Lost { message: "why".to_owned() });
    }

    #[tokio::test]
    async fn with_no_holder_left_the_container_is_ended_and_the_loss_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status.json");
        // A folder with the one file of a cgroup that is needed.
        let mut task = Command::new("sleep").arg("60").spawn().unwrap();
        fs::write(folder.path().join("cgroup.procs"), task.id().to_string()).unwrap();
        let procs = folder.path().join("cgroup.procs");
        let reaper = std::thread::spawn(move || {
            let ended = task.wait().unwrap();
            std::fs::write(procs, "").unwrap();
            ended
        });
        let mut status = status_with(vec![dead(), dead()], PagerState::Filling { left_pages: 9 });
        status.container.cgroups = vec![folder.path().to_owned()];
        record::store(&path, &status).unwrap();
        assert!(stop(&path).await.is_err(), "its processes run");
        assert!(matches!(wait_filled(&path).await, PagerState::Lost { .. }));
        assert!(!reaper.join().unwrap().success(), "it was not ended");
        assert!(matches!(super::status(&path).unwrap().state, PagerState::Lost { .. }), "and it is not forgotten");
    }
}
