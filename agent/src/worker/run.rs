//! What the worker does: one dump, from CRIU's start until the tasks are dead or run on.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use command_fds::FdMapping;
use podferry_common::failure::chain;
use podferry_criu::{CriuError, CriuLog, Notification, Session, Verdict};
use podferry_network::{LinkState, Netns, relay};
use podferry_part::{Next, Reason};
use podferry_runtime::{Container, Freezer, has_stopped_for_good};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::control::Control;
use super::mappings::Mappings;
use super::messages::{DumpJob, Order, Stage, WorkerRecord};
use super::record;

/// The number under which CRIU inherits the page socket.
const PAGE_FD: i32 = 4;
/// How often a waiting worker looks at its deadline and for its agent.
const TICK: Duration = Duration::from_millis(20);
/// How long the cgroup freezer gets. The tasks are stopped already, so it is a matter of microseconds.
const FENCE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a program gets to take connections that have been begun, before it is frozen.
const ACCEPT_TIMEOUT: Duration = Duration::from_millis(100);
/// How often it is looked whether it has.
const ACCEPT_LOOK: Duration = Duration::from_micros(500);
/// How long killed tasks get to die before it is said that they do not.
const DEATH_WARNING: Duration = Duration::from_secs(5);

/// Why a dump is given up whose CRIU died.
const CRIU_GONE: &str = "CRIU was killed while it held the tasks; they run on";

/// One dump.
struct Dump {
    job: DumpJob,
    container: Container,
    control: Arc<Control>,
    record: WorkerRecord,
    /// Why the dump was given up, when it was.
    given_up: Option<String>,
    link_cut: Option<LinkState>,
    mappings: Mappings,
}

/// Does the job; `page_socket` is CRIU's end of the page stream. Returns when the tasks are dead or run on.
///
/// # Errors
/// When it cannot even begin; then nothing was touched.
pub fn run(job: DumpJob, page_socket: OwnedFd) -> Result<(), Box<dyn std::error::Error>> {
    let control = Control::listen(&job.control)?;
    let container = podferry_runtime::find(std::slice::from_ref(&job.root), &job.container)?;
    let mappings = Mappings::watch(job.mappings.as_deref(), &container);
    let record = WorkerRecord::default();
    let mut dump = Dump { job, container, control, record, given_up: None, link_cut: None, mappings };
    let last = dump.go(page_socket);
    dump.control.report(last);
    // The agent reads the last line before it sees the end.
    thread::sleep(TICK);
    Ok(())
}

impl Dump {
    fn go(&mut self, page_socket: OwnedFd) -> Stage {
        let result = self.dump(page_socket);
        if self.record.released {
            return self.destroy();
        }
        match result {
            Ok(()) => {
                tracing::error!("CRIU ended the tasks without having been told to");
                self.destroy()
            }
            Err(error) if self.record.sealed && self.given_up.is_none() => self.hold_without_criu(&error),
            Err(error) => self.undone(&error),
        }
    }

    fn dump(&mut self, page_socket: OwnedFd) -> Result<(), CriuError> {
        let images = open_dir(&self.job.request.images_dir)?;
        let work = open_dir(&self.job.request.work_dir)?;
        let inherit = vec![FdMapping { parent_fd: page_socket, child_fd: PAGE_FD }];
        let session = Session::start_with(&self.job.criu, inherit, self.environment())?;
        self.record.criu_pid = Some(session.pid());
        self.note();
        let options = self.job.request.options(images.as_fd(), work.as_fd(), PAGE_FD);
        let log = CriuLog::of_dump(&self.job.request.work_dir);
        session.dump(options, &log, |notification| self.on_notify(notification))
    }

    /// What spares CRIU work: the library in its calls, which is told what memory has been sent already, and our own programs.
    fn environment(&self) -> Vec<(OsString, OsString)> {
        let mut path = self.job.programs.clone().into_os_string();
        if let Some(inherited) = std::env::var_os("PATH") {
            path.push(":");
            path.push(inherited);
        }
        let mut variables = vec![("PATH".into(), path), ("LD_PRELOAD".into(), self.job.shim.clone().into())];
        if let Some(ranges) = &self.job.hidden {
            variables.push((podferry_memory::hide::HIDE_VARIABLE.into(), ranges.clone().into()));
        }
        if let Some(mappings) = &self.job.mappings {
            variables.push((podferry_memory::hide::MAPPINGS_VARIABLE.into(), mappings.clone().into()));
        }
        variables
    }

    fn on_notify(&mut self, notification: &Notification) -> Verdict {
        tracing::debug!(name = notification.name, "CRIU notifies");
        match notification.name.as_str() {
            "pre-dump" => {
                self.mappings.tell();
                self.let_connections_be_taken();
                self.unless_aborted()
            }
            "network-lock" => self.on_frozen(),
            "network-unlock" => {
                self.join_link();
                Verdict::Proceed
            }
            "post-dump" => self.hold(),
            _ => self.unless_aborted(),
        }
    }

    /// The tasks are stopped: nothing may go in or out any more.
    fn on_frozen(&mut self) -> Verdict {
        // Before: what comes twice is no harm, and what is missing is.
        let cut_at = SystemTime::now();
        if let Err(error) = self.cut_link() {
            return self.give_up(format!("the container's link cannot be cut: {}", chain(&error)));
        }
        if let Err(error) = self.divert() {
            return self.give_up(format!("what comes for the container cannot be held back: {}", chain(&error)));
        }
        self.release_throttle();
        self.mappings.check();
        self.control.report(Stage::Frozen { cut_at });
        self.unless_aborted()
    }

    fn unless_aborted(&mut self) -> Verdict {
        match self.control.order(Duration::ZERO) {
            Some(Order::Abort { reason }) => self.give_up(reason),
            Some(order) => {
                tracing::error!(?order, "an order came too early");
                Verdict::Proceed
            }
            None if self.control.is_abandoned() => self.give_up("the agent is gone".to_owned()),
            None => Verdict::Proceed,
        }
    }

    /// Everything is dumped and the tasks are stopped: waits for the decision.
    fn hold(&mut self) -> Verdict {
        self.control.report(Stage::Dumped);
        loop {
            let order = self.control.order(TICK);
            let next = self.state().next(order.as_ref().map(Order::kind));
            match next {
                Next::Seal => self.seal(),
                Next::Release => {
                    self.record.released = true;
                    self.note();
                    // CRIU would kill them too, but waits for deaths that a v1 freezer does not let happen; and its tidying
                    // afterwards is nothing that the target has to wait for.
                    if stop_all(&self.container) {
                        self.control.report(Stage::Released);
                    }
                    return Verdict::Proceed;
                }
                Next::Ignore => tracing::error!("release was ordered of an unsealed part; ignored"),
                Next::GiveUp(why) => {
                    return self.give_up(match (why, order) {
                        (_, Some(Order::Abort { reason })) => reason,
                        (Reason::CriuGone, _) => CRIU_GONE.to_owned(),
                        (Reason::Late, _) => "the migration's deadline has passed".to_owned(),
                        (Reason::Told | Reason::Abandoned, _) => "the agent is gone".to_owned(),
                    });
                }
                Next::Wait => {}
            }
        }
    }

    fn state(&self) -> podferry_part::Dump {
        podferry_part::Dump {
            sealed: self.record.sealed,
            criu_lives: self.criu_lives(),
            late: SystemTime::now() > self.job.deadline,
            abandoned: self.control.is_abandoned(),
        }
    }

    fn seal(&mut self) {
        if self.record.sealed {
            self.control.report(Stage::Sealed);
            return;
        }
        let fenced = Freezer::of(&self.container).and_then(|freezer| freezer.freeze(FENCE_TIMEOUT));
        if let Err(error) = fenced {
            self.control.report(Stage::NotSealed { message: chain(&error) });
            return;
        }
        // Looked at behind the fence: a CRIU that lives now has held the tasks ever since they were dumped. The tasks of one
        // that died have run on meanwhile, and what they did is not in the images.
        if !self.criu_lives() {
            self.thaw();
            self.control.report(Stage::NotSealed { message: CRIU_GONE.to_owned() });
            return;
        }
        self.record.sealed = true;
        if let Err(error) = record::store(&self.job.record, &self.record) {
            self.record.sealed = false;
            self.thaw();
            self.control.report(Stage::NotSealed { message: format!("the seal cannot be written down: {error}") });
            return;
        }
        self.control.report(Stage::Sealed);
    }

    /// Looks without reaping: that is for the session to do.
    fn criu_lives(&self) -> bool {
        let pid = self.record.criu_pid.and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        pid.is_some_and(|pid| matches!(waitid(WaitId::Pid(pid), look), Ok(None)))
    }

    fn give_up(&mut self, reason: String) -> Verdict {
        tracing::info!(reason, "giving the dump up");
        if self.record.sealed {
            self.thaw();
        }
        self.given_up = Some(reason);
        Verdict::GiveUp
    }

    /// CRIU is gone although the part is sealed: the cgroup's freezer holds the tasks, and the decision still counts.
    fn hold_without_criu(&mut self, error: &CriuError) -> Stage {
        tracing::error!(error = chain(error), "CRIU is gone while it held sealed tasks; the freezer holds them");
        loop {
            match self.control.order(TICK) {
                Some(Order::Release) => {
                    self.record.released = true;
                    self.note();
                    return self.destroy();
                }
                Some(Order::Abort { reason }) => {
                    self.given_up = Some(reason);
                    return self.undone(error);
                }
                Some(Order::Seal) => self.control.report(Stage::Sealed),
                None => {}
            }
        }
    }

    /// Makes sure that no task of the container is left. The link stays cut.
    fn destroy(&mut self) -> Stage {
        kill_all(&self.container);
        Stage::Released
    }

    fn undone(&mut self, error: &CriuError) -> Stage {
        let mut left = Vec::new();
        // It may not have come as far as to stop all tasks.
        self.release_throttle();
        if self.record.sealed && !self.thaw() {
            left.push("the container's cgroup is still frozen".to_owned());
        }
        self.join_link();
        if self.link_cut.is_some() {
            left.push("the container's link is still cut: join it by hand".to_owned());
        }
        if !self.container.is_alive() {
            left.push("the container's init is gone".to_owned());
        }
        let failure = match error {
            CriuError::Dump { failure, .. } => Some(failure.clone()),
            _ => None,
        };
        let message = self.given_up.clone().unwrap_or_else(|| chain(error));
        Stage::Undone {
            message,
            criu_line: failure.as_ref().map(|failure| failure.line.clone()),
            remedy: failure.map(|failure| failure.remedy),
            left,
        }
    }

    fn cut_link(&mut self) -> podferry_network::Result<()> {
        if let Some(link) = &self.job.link {
            self.link_cut = Some(podferry_network::cut(link)?);
        }
        Ok(())
    }

    /// Just before the tasks are stopped: no further connections come, and those that have been begun are taken by the program, if it takes
    /// them at once. CRIU cannot dump what nobody has taken.
    fn let_connections_be_taken(&self) {
        let Some(diverted) = &self.job.diverted else { return };
        let taken = Netns::open(&diverted.netns).and_then(|netns| {
            relay::intercept(&netns, &diverted.home)?;
            let begun = Instant::now();
            while relay::not_accepted(&netns)? > 0 && begun.elapsed() < ACCEPT_TIMEOUT {
                thread::sleep(ACCEPT_LOOK);
            }
            relay::not_accepted(&netns)
        });
        match taken {
            Ok(0) => {}
            Ok(left) => tracing::warn!(left, "connections that the program does not take are reset"),
            Err(error) => tracing::warn!(error = chain(&error), "new connections are not held back before the freeze"),
        }
    }

    fn divert(&self) -> podferry_network::Result<()> {
        let Some(diverted) = &self.job.diverted else { return Ok(()) };
        relay::divert(&Netns::open(&diverted.netns)?, &diverted.home)
    }

    /// Idempotent. The agent does it once more when it hands over what has come meanwhile.
    fn undivert(&self) {
        let Some(diverted) = &self.job.diverted else { return };
        let undone = Netns::open(&diverted.netns).and_then(|netns| relay::undivert(&netns, &diverted.home));
        if let Err(error) = undone {
            tracing::error!(error = chain(&error), "what comes for the container does not reach it");
        }
    }

    fn join_link(&mut self) {
        self.undivert();
        let Some(link) = &self.link_cut else { return };
        match podferry_network::uncut(link) {
            Ok(()) => self.link_cut = None,
            Err(error) => tracing::error!(error = chain(&error), "the container's link cannot be joined again"),
        }
    }

    /// The dump is slow if that fails, and the agent sees to it when the container runs on.
    fn release_throttle(&self) {
        if let Some(throttled) = &self.job.throttled
            && let Err(error) = throttled.release()
        {
            tracing::error!(error = chain(&error), "the container stays throttled");
        }
    }

    fn thaw(&self) -> bool {
        let thawed = Freezer::of(&self.container).and_then(|freezer| freezer.thaw(FENCE_TIMEOUT));
        thawed
            .inspect_err(|error| tracing::error!(error = chain(error), "the container's cgroup cannot be thawed"))
            .is_ok()
    }

    fn note(&self) {
        if let Err(error) = record::store(&self.job.record, &self.record) {
            tracing::warn!(%error, path = %self.job.record.display(), "the worker's record cannot be written");
        }
    }
}

/// Kills every task of a container. True when none will run another instruction.
///
/// They are not gone then: their memory is given back meanwhile, and nobody waits for that with a container standing still. CRIU traces
/// them, so it is CRIU that has to collect those that died; until it has, the init of a pid namespace waits for them in its own exit.
fn stop_all(container: &Container) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < DEATH_WARNING {
        let killed = kill_once(container).is_ok();
        if killed && container.cgroups.processes().is_ok_and(|left| left.into_iter().all(has_stopped_for_good)) {
            return true;
        }
        thread::sleep(Duration::from_millis(1));
    }
    tracing::error!(container = container.id, "killed tasks do not die while CRIU traces them; letting it go first");
    false
}

/// Kills every task of a container and returns when none is left.
pub fn kill_all(container: &Container) {
    let begun = Instant::now();
    let mut warned = false;
    loop {
        if kill_once(container).is_ok_and(|left| left == 0) && !container.is_alive() {
            return;
        }
        if !warned && begun.elapsed() > DEATH_WARNING {
            warned = true;
            tracing::error!(container = container.id, "killed tasks do not die (uninterruptible I/O?); still waiting");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Sends every task its end, then thaws the cgroup: none runs another instruction of its program. Returns how many there
/// were. When they cannot be listed nothing is thawed: who was sent nothing would run.
pub(crate) fn kill_once(container: &Container) -> Result<usize, podferry_runtime::Error> {
    let processes = container.cgroups.processes().inspect_err(|error| {
        tracing::error!(error = chain(error), container = container.id, "a container's processes cannot be listed");
    })?;
    for pid in &processes {
        if let Some(pid) = rustix::process::Pid::from_raw(*pid) {
            let _gone_already = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    if let Ok(freezer) = Freezer::of(container)
        && let Err(error) = freezer.thaw(FENCE_TIMEOUT)
    {
        tracing::debug!(error = chain(&error), "thawing killed tasks");
    }
    Ok(processes.len())
}

fn open_dir(path: &std::path::Path) -> Result<File, CriuError> {
    let opened = File::open(path);
    opened.map_err(|source: io::Error| CriuError::Image { path: path.to_owned(), source })
}
