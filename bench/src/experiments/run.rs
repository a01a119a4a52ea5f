//! One run: clients at work, a move, clients at work, and what was seen of it.

use std::{path::PathBuf, time::Duration};

use podferry_report::results::{Measurement, Outcome, Scenario, Strategy};

use super::{
    cost::{Costs, Side},
    link::{LinkKind, ShapedLink, Traffic},
    measure::{Facts, Moved, Times},
    peers,
    plan::{Run, needs_new_instance},
    scenario,
    subject::Subject,
    watch::{Arrival, Watch},
};
use crate::{
    clients::LoadProcess,
    error::{Error, Result},
    loads::Footprint,
    stage::{Interrupt, NODES, Stage, unix_ms},
};

/// Load before a move, by which it is compared, and behind it: longer where a program has to start first.
pub(super) const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_secs(1);
const AFTER_START: Duration = Duration::from_secs(3);

/// How long there is load behind a move.
pub(super) fn after(strategy: Strategy) -> Duration {
    if scenario::keeps_memory(strategy) { AFTER } else { AFTER_START }
}

/// The cluster with what is on it.
pub(super) struct Theatre<'a> {
    stage: &'a Stage,
    traffic: Traffic<'a>,
    interrupt: &'a Interrupt,
    /// The subject that runs, as it was filled.
    running: Option<Subject>,
    link: Option<(LinkKind, ShapedLink)>,
}

impl<'a> Theatre<'a> {
    /// A cluster on which nothing runs yet.
    pub(super) fn new(stage: &'a Stage, interrupt: &'a Interrupt) -> Result<Self> {
        Ok(Self { stage, traffic: Traffic::new(stage.cluster())?, interrupt, running: None, link: None })
    }

    /// Makes a run. That the workload could not be moved is a result; an error is that nothing can be measured at all.
    pub(super) fn run(&mut self, run: &Run) -> Result<Measurement> {
        self.interrupt.check()?;
        let Run { scenario, repeat } = run;
        let subject = Subject::of(scenario);
        self.start(&subject)?;
        self.shape(LinkKind { mbit: scenario.link_mbit, rtt_ms: scenario.link_rtt_ms })?;
        let measured = self.measure(&subject, scenario, *repeat);
        let is_well = measured.as_ref().is_ok_and(|measured| measured.outcome == Outcome::Moved);
        if !is_well || needs_new_instance(scenario.strategy) {
            if scenario::is_peer(scenario.strategy) {
                peers::remove(self.stage, subject.name(), scenario.strategy)?;
            }
            self.remove()?;
        }
        measured
    }

    /// Removes what runs.
    pub(super) fn remove(&mut self) -> Result<()> {
        self.link = None;
        match self.running.take() {
            Some(subject) => self.stage.remove_container(subject.name()),
            None => Ok(()),
        }
    }

    fn start(&mut self, subject: &Subject) -> Result<()> {
        if self.running.as_ref() == Some(subject) {
            return Ok(());
        }
        self.remove()?;
        self.running = Some(subject.clone());
        subject.start(self.stage)
    }

    /// The link is as wide as it can be while a workload is filled, and as the scenario says while it is measured.
    fn shape(&mut self, kind: LinkKind) -> Result<()> {
        if self.link.as_ref().is_some_and(|(shaped, _)| *shaped == kind) {
            return Ok(());
        }
        self.link = None;
        if kind.mbit.is_some() || kind.rtt_ms > 0.0 {
            self.link = Some((kind, ShapedLink::new(self.stage.cluster(), kind)?));
        }
        Ok(())
    }

    fn measure(&self, subject: &Subject, scenario: &Scenario, repeat: u32) -> Result<Measurement> {
        let name = subject.name();
        let place = self.stage.place(name).ok_or_else(|| {
            Error::Misplaced(format!("{name} runs on none of the nodes, or on both: it cannot be moved"))
        })?;
        let footprint = Footprint::of(self.stage.cluster(), name)?;
        let process = self.stage.cluster().node(NODES[place])?.container_process(name)?;
        let think = scenario.think_ms.to_string();
        let words = ["--samples", "--think", think.as_str()];
        let client = self.stage.cluster().client();
        let load = LoadProcess::start_with(client, subject.kind()?, scenario.clients, subject.address()?, &words)?;
        let quiet_since = unix_ms();
        std::thread::sleep(BEFORE);
        let sides = [self.side(place, name)?, self.side(1 - place, name)?];
        let arrival = if scenario::keeps_memory(scenario.strategy) { Arrival::Restored } else { Arrival::Started };
        let (wire, costs) = (self.traffic.bytes()?, Costs::start(sides.clone()));
        let watch = Watch::start(process.pid, &sides[1].group, arrival);
        let asked = unix_ms();
        let moved = self.move_it(name, scenario.strategy, place, asked)?;
        let answered = unix_ms();
        let cost = costs.finish();
        let wire_bytes = self.traffic.bytes()?.checked_sub(wire);
        std::thread::sleep(after(scenario.strategy));
        let times = Times { quiet_since, asked, answered, ended: unix_ms() };
        let seen = watch.finish();
        let report = load.stop()?;
        self.interrupt.check()?;
        let resident_bytes = Some(footprint.resident_mib << 20);
        let facts = Facts { scenario, repeat, times, moved, seen, cost, resident_bytes, wire_bytes, report };
        Ok(facts.measurement())
    }

    fn side(&self, place: usize, name: &str) -> Result<Side> {
        let node = self.stage.cluster().node(NODES[place])?;
        let init = node.init().map_or(0, |init| init.pid);
        Ok(Side { init, group: node.cgroups_path(name), images: node.on_machine(&node.images()) })
    }

    fn move_it(&self, name: &str, strategy: Strategy, place: usize, asked: f64) -> Result<Result<Moved, Outcome>> {
        if scenario::is_peer(strategy) {
            return peers::move_it(self.stage, name, strategy, place);
        }
        let (source, target) = (NODES[place], NODES[1 - place]);
        let asked_for = self.stage.ask(name, words(strategy), target);
        self.interrupt.check()?;
        Ok(match asked_for {
            Ok(record) if record.succeeded() => {
                self.stage.check_place(name, source, target)?;
                Ok(Moved::of_record(&record, asked))
            }
            Ok(record) if record.was_frozen() => Err(Outcome::Failed(record.reason)),
            Ok(record) => Err(Outcome::Refused(record.reason)),
            Err(Error::Refused(reason)) => Err(Outcome::Refused(reason)),
            Err(error) => Err(Outcome::Failed(error.to_string())),
        })
    }
}

/// For podferry's command line.
fn words(strategy: Strategy) -> &'static [&'static str] {
    use podferry_local::Strategy as Local;
    match strategy {
        // What does not heed its stop signal takes all of the grace period, 30 s without a word.
        Strategy::Cold => &["--strategy", "cold", "--grace-period", "5"],
        Strategy::Warm => Local::Warm.words(),
        Strategy::Live => Local::Live.words(),
        Strategy::PostCopy => Local::Postcopy.words(),
        Strategy::Hybrid => Local::Hybrid.words(),
        Strategy::Application => &["--strategy", "application"],
        _ => &["--strategy", "auto"],
    }
}

/// Where results of a suite lie unless a folder is named.
pub(super) fn default_folder(suite: &str) -> PathBuf {
    podferry_local::workspace_root().join(".podferry/experiments").join(suite)
}
