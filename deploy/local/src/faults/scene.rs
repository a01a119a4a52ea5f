//! A workload that is moved, and migrations that stand still in a chosen moment.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use super::halts::{LogTail, Stopped};
use super::journal::{pager_state, standing};
use super::moments::{Moment, Victim};
use super::{links, processes, wait_every, wait_for};
use crate::cluster::LocalCluster;
use crate::error::{Error, Result};
use crate::node::Node;
use crate::place::Running;
use crate::process::ProcessId;
use crate::strategy::Strategy;

/// Both nodes.
pub const NODES: [&str; 2] = ["node-a", "node-b"];
/// How often a process is looked for whose state lasts an instant.
const SHARP: Duration = Duration::from_micros(500);
/// How long who is stopped next needs to hear what has just happened.
const HEARING: Duration = Duration::from_millis(50);
/// A killed process that is still there after this hangs in the kernel.
const DEATH: Duration = Duration::from_secs(10);

/// A workload of a cluster, where it is, and how it is to be moved.
#[derive(Debug, Clone, Copy)]
pub struct Scene<'a> {
    /// The cluster.
    pub cluster: &'a LocalCluster,
    /// The container's name.
    pub workload: &'a str,
    /// On which of [`NODES`] it is.
    pub at: usize,
    /// How it is moved.
    pub strategy: Strategy,
}

/// A migration that was asked for.
#[derive(Debug)]
pub struct Begun {
    /// The coordinator's log from just before.
    pub log: LogTail,
    _asking: Running,
}

impl Begun {
    /// Waits until the coordinator has taken it, and says its id.
    pub fn id(&self) -> Result<String> {
        let line = wait_every(SHARP, "the coordinator to take the migration", || {
            let refused = || self.log.find("migration refused").map(|words| Err(Error::Refused { words }));
            self.log.find("migration accepted").map(Ok).or_else(refused)
        })??;
        let id = line.split("migration=").nth(1).and_then(|rest| rest.split_whitespace().next());
        id.map(str::to_owned).ok_or_else(|| Error::Document {
            what: "the coordinator's log".to_owned(),
            reason: format!("there is no id in {line:?}"),
        })
    }

    /// Waits until it is in a phase. One that has ended, or is being undone, does not come to another.
    pub fn wait_phase(&self, phase: &str) -> Result<()> {
        let wanted = format!("phase={phase} ");
        let come = wait_every(SHARP, &format!("{wanted:?} in the coordinator's log"), || {
            if self.log.find(&wanted).is_some() { Some(true) } else { self.is_over().then_some(false) }
        })?;
        if come { Ok(()) } else { Err(Error::NotRunning { what: format!("the migration, before its {phase},") }) }
    }

    /// Whether it has ended, or is being undone.
    pub fn is_over(&self) -> bool {
        ["rolling_back", "failed", "cancelled", "succeeded"]
            .iter()
            .any(|phase| self.log.find(&format!("phase={phase} ")).is_some())
    }
}

/// A migration that stands still in a moment.
#[derive(Debug)]
pub struct Halted {
    /// Its request, whose client waits for its end.
    pub begun: Begun,
    /// Its id.
    pub id: String,
    /// Who was stopped for that.
    pub stopped: Stopped,
}

impl Scene<'_> {
    /// Where the workload is.
    pub fn source(&self) -> Result<Node> {
        self.cluster.node(NODES[self.at])
    }

    /// The other node.
    pub fn target(&self) -> Result<Node> {
        self.cluster.node(NODES[1 - self.at])
    }

    /// Starts to move the workload to the other node.
    pub fn begin(&self) -> Result<Begun> {
        let log = LogTail::of(self.cluster.coordinator().log().to_owned());
        let mut command = self.cluster.podferry_command();
        command.args(["migrate", self.workload, "--to", NODES[1 - self.at], "--wait"]).args(self.strategy.words());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Begun { log, _asking: self.cluster.client().spawn_command(command)? })
    }

    /// The migration as it is now; none while the coordinator does not answer.
    pub fn describe(&self, id: &str) -> Option<Value> {
        let output = self.cluster.podferry(["describe", id, "--output", "json"]).ok()?;
        serde_json::from_str(&output.stdout).ok().filter(|value: &Value| value["phase"].is_string())
    }

    /// The migration when it has ended; none before, and while the coordinator does not answer.
    pub fn outcome(&self, id: &str) -> Option<Value> {
        let ended = |value: &Value| {
            value["phase"].as_str().is_some_and(|phase| ["succeeded", "failed", "cancelled"].contains(&phase))
        };
        self.describe(id).filter(ended)
    }

    /// The processes of the workload are stopped, or have ended.
    pub fn is_stopped(&self) -> Result<bool> {
        let pids = processes::of_container(&self.source()?, self.workload);
        if self.strategy == Strategy::Cold {
            return Ok(pids.is_empty());
        }
        Ok(!pids.is_empty() && pids.iter().all(|pid| matches!(processes::state(*pid), Some('t' | 'T'))))
    }

    /// Limits what goes to the target so that a moment which would pass at once can be met.
    pub fn slow_down(&self) -> Result<links::Slow> {
        links::Slow::down(self.cluster, NODES[1 - self.at], links::TESTS_RATE)
    }

    /// Migrates until the moment, and halts there. The id of a migration that was too quick, or that a busy machine had undone
    /// before, is the inner error: it goes on.
    pub fn halt_at(&self, moment: Moment) -> Result<Result<Halted, String>> {
        let begun = self.begin()?;
        let id = begun.id()?;
        let stopped = Stopped::default();
        let met = self.meet(moment, &begun, &id, &stopped);
        if met.as_ref().is_ok_and(|met| *met) {
            return Ok(Ok(Halted { begun, id, stopped }));
        }
        stopped.all_go_on();
        match met {
            Err(error) if !begun.is_over() => Err(error),
            _ => Ok(Err(id)),
        }
    }

    /// Whether the moment could be met.
    fn meet(&self, moment: Moment, begun: &Begun, id: &str, stopped: &Stopped) -> Result<bool> {
        use Moment::{Committed, Dump, Fill, Filled, Held, PreCopy, Preflight, Prepare, Released, Sealed, Transfer};
        if self.strategy.copies_beforehand() && (Dump..=Released).contains(&moment) {
            // In pre-copy whoever begins to follow a process stops it, too, for an instant.
            begun.wait_phase("freeze")?;
        }
        let next = match moment {
            Preflight => {
                stopped.stop(self.coordinator()?)?;
                "phase=prepare"
            }
            Prepare => {
                begun.wait_phase("prepare")?;
                stopped.stop(self.coordinator()?)?;
                if self.strategy.copies_beforehand() { "phase=precopy" } else { "phase=freeze" }
            }
            PreCopy => {
                begun.wait_phase("precopy")?;
                self.await_first_copies(id)?;
                "phase=freeze"
            }
            Fill | Filled => {
                self.stop_filling(stopped, id)?;
                if self.strategy.may_lose() { "phase=release" } else { "phase=succeeded" }
            }
            Dump | Transfer => {
                self.await_freeze(begun)?;
                if moment == Transfer {
                    self.await_pages(begun, id)?;
                }
                "phase=commit"
            }
            Held | Sealed | Committed | Released => {
                self.halt_before_commit(begun, stopped)?;
                "phase=commit"
            }
        };
        if begun.log.find(next).is_some() {
            return Ok(false);
        }
        if (Held..=Released).contains(&moment) {
            self.await_held()?;
        }
        if (Sealed..=Released).contains(&moment) {
            self.seal(begun, stopped, id)?;
        }
        if (Committed..=Released).contains(&moment) {
            self.commit(begun, stopped)?;
        }
        if moment == Released {
            stopped.stop(agent(&self.target()?)?)?;
            stopped.go_on(self.keeper()?);
            begun.wait_phase("resume")?;
            thread::sleep(HEARING);
        }
        if moment == Filled {
            self.fill(begun, stopped, id)?;
        }
        Ok(true)
    }

    fn coordinator(&self) -> Result<ProcessId> {
        let not_running = || Error::NotRunning { what: "the coordinator".to_owned() };
        self.cluster.coordinator().process().ok_or_else(not_running)
    }

    /// Who has the source's part in its hands: seals it, and releases it.
    fn keeper(&self) -> Result<ProcessId> {
        let source = self.source()?;
        if self.strategy == Strategy::Cold {
            return agent(&source);
        }
        processes::dump_worker(&source)
            .ok_or_else(|| Error::NotRunning { what: format!("the dump worker of {}", source.name()) })
    }

    fn await_freeze(&self, begun: &Begun) -> Result<()> {
        wait_every(SHARP, "the tasks to be stopped", || {
            // A migration that has failed before would never stop them.
            let over = || begun.log.find("phase=commit").is_some() || begun.is_over();
            (self.is_stopped().unwrap_or(true) || over()).then_some(())
        })
    }

    fn halt_before_commit(&self, begun: &Begun, stopped: &Stopped) -> Result<()> {
        if self.strategy == Strategy::Cold {
            // The target has to hear that it is to create; the workload takes a while to end.
            thread::sleep(Duration::from_millis(400));
        } else {
            self.await_freeze(begun)?;
        }
        stopped.stop(self.coordinator()?)
    }

    /// Waits until the target holds what it has made, and its agent knows.
    fn await_held(&self) -> Result<()> {
        let target = self.target()?;
        if self.strategy == Strategy::Cold {
            let created = || {
                let output = target.runc(&["state", self.workload]).ok()?.success().ok()?;
                let state: Value = serde_json::from_str(&output).ok()?;
                (state["status"] == "created").then_some(())
            };
            wait_for("the container to be created", created)?;
            thread::sleep(3 * HEARING);
        } else {
            wait_for("the hook to hold", || processes::hook(&target))?;
        }
        thread::sleep(HEARING);
        Ok(())
    }

    fn await_pages(&self, begun: &Begun, id: &str) -> Result<()> {
        let target = self.target()?;
        let folder = target.on_machine(&target.images().join(id).join("images"));
        wait_for("pages at the target", || {
            let files = fs::read_dir(&folder).into_iter().flatten().flatten();
            let bytes: u64 = files.filter_map(|file| Some(file.metadata().ok()?.len())).sum();
            (bytes > 200 << 10 || begun.log.find("phase=commit").is_some()).then_some(())
        })
    }

    /// Waits until memory, or files, that are sent before the freeze have come to the target.
    fn await_first_copies(&self, id: &str) -> Result<()> {
        let target = self.target()?;
        if self.strategy == Strategy::Cold {
            let seeds = target.on_machine(&target.bundle(self.workload).join("seeds"));
            return wait_for("files at the target", || {
                let mut files = fs::read_dir(&seeds).ok()?;
                files.next().is_some().then_some(())
            });
        }
        let folder = target.on_machine(&target.images().join(id).join("images"));
        wait_for("memory at the target", || {
            let files = fs::read_dir(&folder).ok()?.flatten();
            let stores = files.filter(|file| file.file_name().to_string_lossy().ends_with(".store"));
            // They are as long as the address space, and hold little.
            let blocks: u64 = stores.filter_map(|file| Some(file.metadata().ok()?.blocks())).sum();
            (blocks * 512 > 1 << 20).then_some(())
        })
    }

    /// Stops the pager that works as soon as the restored processes run: what they lack then stays away.
    fn stop_filling(&self, stopped: &Stopped, id: &str) -> Result<()> {
        let target = self.target()?;
        let first = wait_every(Duration::from_millis(1), "a pager", || processes::pagers(&target).0)?;
        wait_every(SHARP, "the restored processes to run", || {
            let state = pager_state(&target, id);
            (["filling", "done"].contains(&state.as_str()) || !first.is_alive()).then_some(())
        })?;
        if first.is_alive() {
            stopped.stop(first)?;
        }
        Ok(())
    }

    /// Lets the coordinator seal both parts, and stops it before it hears of the second.
    fn seal(&self, begun: &Begun, stopped: &Stopped, id: &str) -> Result<()> {
        let (source, target, keeper) = (self.source()?, self.target()?, self.keeper()?);
        let is_sealed = |node: &Node| (standing(node, id).as_deref() == Some("sealed")).then_some(());
        stopped.stop(keeper)?;
        stopped.go_on(self.coordinator()?);
        begun.wait_phase("commit")?;
        wait_for("the target to be sealed", || is_sealed(&target))?;
        thread::sleep(HEARING);
        stopped.stop(self.coordinator()?)?;
        stopped.go_on(keeper);
        wait_for("the source to be sealed", || is_sealed(&source))
    }

    /// Lets the coordinator decide, and has whoever comes next stand still.
    fn commit(&self, begun: &Begun, stopped: &Stopped) -> Result<()> {
        let (next, phase) =
            if self.strategy.may_lose() { (agent(&self.target()?)?, "resume") } else { (self.keeper()?, "release") };
        stopped.stop(next)?;
        stopped.go_on(self.coordinator()?);
        begun.wait_phase(phase)?;
        thread::sleep(HEARING);
        Ok(())
    }

    /// Lets all memory come to the target, and halts before the source hears that it is to go.
    fn fill(&self, begun: &Begun, stopped: &Stopped, id: &str) -> Result<()> {
        let target = self.target()?;
        let coordinator = self.coordinator()?;
        stopped.stop(coordinator)?;
        if let Some(pager) = processes::pagers(&target).0 {
            stopped.go_on(pager);
        }
        wait_for("all memory to be there", || {
            let done = pager_state(&target, id) == "done" || processes::pagers(&target).0.is_none();
            done.then_some(())
        })?;
        stopped.stop(self.keeper()?)?;
        stopped.go_on(coordinator);
        begun.wait_phase("release")?;
        thread::sleep(HEARING);
        Ok(())
    }

    /// The victim's processes: one, or none when it has not come or has gone; of both pagers two.
    pub fn processes_of(&self, victim: Victim) -> Result<Vec<ProcessId>> {
        let (source, target) = (self.source()?, self.target()?);
        let found = match victim {
            Victim::SourceAgent => source.agent_pid().and_then(ProcessId::of),
            Victim::TargetAgent => target.agent_pid().and_then(ProcessId::of),
            Victim::Coordinator => self.cluster.coordinator().process(),
            Victim::DumpWorker => processes::dump_worker(&source),
            Victim::CriuOfDump => processes::criu_of_dump(&source),
            Victim::RuncRestore => processes::runc_restore(&target),
            Victim::CriuOfRestore => processes::criu_of_restore(&target),
            Victim::Hook => processes::hook(&target),
            Victim::FirstPager => processes::pagers(&target).0,
            Victim::SecondPager => processes::pagers(&target).1,
            Victim::BothPagers => {
                let (first, second) = processes::pagers(&target);
                return Ok(first.into_iter().chain(second).collect());
            }
        };
        Ok(found.into_iter().collect())
    }

    /// Kills the victim. Who supervises it, if anybody does, is [`Scene::start_again`].
    pub fn kill(&self, victim: Victim) -> Result<()> {
        match victim {
            Victim::SourceAgent => return self.source()?.kill_agent(Signal::KILL),
            Victim::TargetAgent => return self.target()?.kill_agent(Signal::KILL),
            Victim::Coordinator => return self.cluster.coordinator().kill(Signal::KILL),
            _ => {}
        }
        let processes = self.processes_of(victim)?;
        if processes.len() < if victim == Victim::BothPagers { 2 } else { 1 } {
            return Err(Error::NotRunning { what: format!("the {}", victim.words()) });
        }
        // One pager would put another in the other's place at once, so both are stopped first.
        for signal in [Signal::STOP, Signal::KILL] {
            for process in &processes {
                process.signal(signal);
            }
        }
        match processes.iter().find(|process| !process.wait_gone(DEATH)) {
            Some(_) => Err(Error::LeftBehind { what: format!("the {}", victim.words()), seconds: DEATH.as_secs() }),
            None => Ok(()),
        }
    }

    /// Starts a victim again that somebody supervises. Other threads of a killed process hold its port for a moment longer than
    /// its first one; a supervisor tries again, too.
    pub fn start_again(&self, victim: Victim) -> Result<()> {
        match victim {
            Victim::SourceAgent => restart_agent(&self.source()?),
            Victim::TargetAgent => restart_agent(&self.target()?),
            Victim::Coordinator => restart_coordinator(self.cluster),
            _ => Ok(()),
        }
    }
}

/// Starts an agent again after it was killed.
pub fn restart_agent(node: &Node) -> Result<()> {
    wait_every(HEARING, "the agent to start", || node.start_agent().and_then(|_| node.wait_ready()).ok())
}

/// Starts the coordinator again after it was killed.
pub fn restart_coordinator(cluster: &LocalCluster) -> Result<()> {
    let coordinator = cluster.coordinator();
    wait_every(HEARING, "the coordinator to start", || coordinator.start().and_then(|_| coordinator.wait_ready()).ok())
}

/// The process of an agent.
pub fn agent(node: &Node) -> Result<ProcessId> {
    let not_running = || Error::NotRunning { what: format!("the agent of {}", node.name()) };
    node.agent_pid().and_then(ProcessId::of).ok_or_else(not_running)
}
