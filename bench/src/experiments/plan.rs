//! In which order runs are made, how long they are likely to take, and what a person is shown of that first.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use podferry_report::results::{Scenario, Strategy, Workload};

use super::{
    run::{BEFORE, after},
    scenario,
    subject::Subject,
    suite::{LeftOut, Suite, Wanted},
};
use crate::moves::whole;

/// Seconds that starting and ending clients takes beside the load before and after a move. Measured on two cores.
const AROUND_S: f64 = 1.0;
/// Seconds of a move that carries next to nothing, and of one in which another instance has to catch up.
const MOVE_S: f64 = 0.7;
const CATCH_UP_S: f64 = 6.0;
/// Seconds until a workload listens that holds next to nothing, and how much of it is filled in a second, in MiB.
const START_S: f64 = 1.5;
const FILL_MIB_PER_S: f64 = 150.0;
/// What a virtual machine of a language, or a database, takes on top of that.
const RUNTIME_S: f64 = 6.0;
/// MiB that are moved in a second when the link does not decide.
const MOVE_MIB_PER_S: f64 = 350.0;
/// The share of a link's rate that reaches the memory.
const OF_LINK: f64 = 0.9;
/// Seconds until the cluster is up, and until it is taken down.
const CLUSTER_S: f64 = 4.0;

/// One run that is to be made.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Run {
    /// What is run.
    pub scenario: Scenario,
    /// Its number among the repeats.
    pub repeat: u32,
}

/// Runs that move the same subject, one behind the other.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Group {
    /// What they move.
    pub subject: Subject,
    /// The runs.
    pub runs: Vec<Run>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// In the order in which it is done.
    pub(super) groups: Vec<Group>,
    /// Runs that are there already.
    pub(super) done: usize,
}

impl Plan {
    /// What of a suite is not among the runs that are `done` (a scenario's name and the number of the repeat).
    pub(super) fn of(suite: &Suite, done: &BTreeSet<(String, u32)>) -> Self {
        let mut plan = Self { groups: Vec::new(), done: 0 };
        for Wanted { scenario, repeats } in &suite.wanted {
            let name = scenario::name(scenario);
            let (there, missing): (Vec<u32>, Vec<u32>) =
                (0..*repeats).partition(|repeat| done.contains(&(name.clone(), *repeat)));
            plan.done += there.len();
            plan.add(missing.into_iter().map(|repeat| Run { scenario: scenario.clone(), repeat }));
        }
        plan.groups.iter_mut().for_each(order);
        plan
    }

    fn add(&mut self, runs: impl Iterator<Item = Run>) {
        for run in runs {
            let subject = Subject::of(&run.scenario);
            match self.groups.iter_mut().find(|group| group.subject == subject) {
                Some(group) => group.runs.push(run),
                None => self.groups.push(Group { subject, runs: vec![run] }),
            }
        }
    }

    /// How many runs there are.
    pub(super) fn runs(&self) -> usize {
        self.groups.iter().map(|group| group.runs.len()).sum()
    }

    /// How long all of it is likely to take.
    pub(super) fn estimate(&self) -> Duration {
        let seconds: f64 = self.groups.iter().map(group_seconds).sum();
        Duration::from_secs_f64(if self.groups.is_empty() { 0.0 } else { seconds + CLUSTER_S })
    }
}

/// Repeats of one scenario do not follow each other: whatever changes on the machine in the course of time is then in all scenarios alike. What
/// needs a new instance comes last, so that the others share one.
fn order(group: &mut Group) {
    group.runs.sort_by_key(|run| {
        (
            run.scenario.link_mbit,
            micros(run.scenario.link_rtt_ms),
            needs_new_instance(run.scenario.strategy),
            run.repeat,
        )
    });
}

/// Whole µs, which have an order.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a suite has at most 1000 ms")]
fn micros(ms: f64) -> u64 {
    (ms * 1e3) as u64
}

/// Whether the workload does not hold what it was filled with behind such a move, or cannot be moved by podferry any more.
pub(super) fn needs_new_instance(strategy: Strategy) -> bool {
    !scenario::keeps_memory(strategy) || scenario::is_peer(strategy)
}

fn group_seconds(group: &Group) -> f64 {
    let start = start_seconds(&group.subject);
    let anew = group.runs.iter().filter(|run| needs_new_instance(run.scenario.strategy)).count();
    start + start * whole(anew as u64) + group.runs.iter().map(|run| run_seconds(&run.scenario)).sum::<f64>()
}

fn start_seconds(subject: &Subject) -> f64 {
    let runtime = matches!(subject.workload, Workload::Java | Workload::Node | Workload::Go | Workload::Postgres);
    START_S + whole(subject.memory_mib) / FILL_MIB_PER_S + if runtime { RUNTIME_S } else { 0.0 }
}

/// How long one run is likely to take.
pub(super) fn run_seconds(scenario: &Scenario) -> f64 {
    let link = scenario.link_mbit.map_or(f64::INFINITY, |mbit| OF_LINK * whole(mbit) * 1e6 / 8.0 / f64::from(1 << 20));
    let mib = match scenario.strategy {
        Strategy::Cold => 0.0,
        _ => whole(scenario.memory_mib),
    };
    let moving = mib / link.min(MOVE_MIB_PER_S);
    let least = if scenario.strategy == Strategy::Application { CATCH_UP_S } else { MOVE_S };
    (BEFORE + after(scenario.strategy)).as_secs_f64() + AROUND_S + least + moving
}

/// What a person is shown before anything is done.
pub(super) fn describe(suite: &Suite, plan: &Plan) -> String {
    let mut text = format!("suite {}, which asks:\n", suite.name);
    // Writing into a string cannot fail.
    for question in &suite.questions {
        let _ = writeln!(text, "  {question}");
    }
    for group in &plan.groups {
        let seconds = group_seconds(group);
        let (first, runs) = (&group.runs[0].scenario, group.runs.len());
        let workload = scenario::workload_name(first.workload);
        let rate = first.dirty_percent.map(|rate| format!(", {rate} %/s written")).unwrap_or_default();
        let _ = writeln!(text, "{workload} {} MiB{rate}: {runs} runs, about {seconds:.0} s", first.memory_mib);
        let names: BTreeSet<String> = group.runs.iter().map(|run| scenario::name(&run.scenario)).collect();
        for name in names {
            let repeats = group.runs.iter().filter(|run| scenario::name(&run.scenario) == name).count();
            let _ = writeln!(text, "  {repeats} x {name}");
        }
    }
    left_out(suite, &mut text);
    let minutes = plan.estimate().as_secs_f64() / 60.0;
    let _ = writeln!(
        text,
        "{} scenarios; {} runs to be made, {} are there; about {minutes:.1} minutes",
        suite.wanted.len(),
        plan.runs(),
        plan.done
    );
    text
}

/// One line for each reason.
fn left_out(suite: &Suite, text: &mut String) {
    let reasons: BTreeSet<(&str, &str)> = suite.left_out.iter().map(why).collect();
    for reason in reasons {
        let all: Vec<&LeftOut> = suite.left_out.iter().filter(|left_out| why(left_out) == reason).collect();
        let more = if all.len() > 1 { format!(" and {} like it", all.len() - 1) } else { String::new() };
        let _ = writeln!(text, "left out: {}{more}: {}", scenario::name(&all[0].scenario), reason.1);
    }
}

fn why(left_out: &LeftOut) -> (&'static str, &str) {
    (scenario::workload_name(left_out.scenario.workload), &left_out.reason)
}

#[cfg(test)]
mod tests {
    use Strategy::{Cold, Live, Warm};

    use super::*;

    fn suite() -> Suite {
        let text = "[[sweep]]\nquestion = \"How?\"\nworkload = [\"redis\", \"synthetic\"]\nstrategy = [\"cold\", \"live\", \"warm\"]\n\
                    memory_mib = [16]\nlink_mbit = [\"none\", 100]\nrepeats = 2\n";
        Suite::parse("test", text).unwrap()
    }

    #[test]
    fn repeats_take_turns_and_what_needs_a_new_instance_comes_last_of_its_link() {
        let plan = Plan::of(&suite(), &BTreeSet::new());
        assert_eq!((plan.groups.len(), plan.runs()), (1, 12), "synthetic has no rate and is left out");
        let order: Vec<(Option<u64>, Strategy, u32)> =
            plan.groups[0].runs.iter().map(|run| (run.scenario.link_mbit, run.scenario.strategy, run.repeat)).collect();
        let once = |link| {
            [(link, Live, 0), (link, Warm, 0), (link, Live, 1), (link, Warm, 1), (link, Cold, 0), (link, Cold, 1)]
        };
        assert_eq!(order, [once(None), once(Some(100))].concat());
    }

    #[test]
    fn what_is_there_is_not_run_again() {
        let all = Plan::of(&suite(), &BTreeSet::new());
        let key = |run: &Run| (scenario::name(&run.scenario), run.repeat);
        let mut done: BTreeSet<_> = all.groups[0].runs.iter().map(key).collect();
        assert_eq!(Plan::of(&suite(), &done).runs(), 0);
        assert_eq!(Plan::of(&suite(), &done).estimate(), Duration::ZERO);
        let one = key(&all.groups[0].runs[3]);
        done.remove(&one);
        let rest = Plan::of(&suite(), &done);
        assert_eq!((rest.runs(), rest.done, key(&rest.groups[0].runs[0])), (1, 11, one));
    }

    #[test]
    fn a_slow_link_takes_longer() {
        let plan = Plan::of(&suite(), &BTreeSet::new());
        let seconds = |link| {
            let run = plan.groups[0]
                .runs
                .iter()
                .find(|run| run.scenario.link_mbit == link && run.scenario.strategy == Strategy::Warm);
            run_seconds(&run.unwrap().scenario)
        };
        assert!(seconds(Some(100)) > seconds(None) + 1.0);
    }

    #[test]
    fn the_plan_says_what_is_left_out_and_how_long_it_takes() {
        let suite = suite();
        let text = describe(&suite, &Plan::of(&suite, &BTreeSet::new()));
        assert!(text.contains("How?") && text.contains("2 x redis live 16 MiB"), "{text}");
        assert_eq!(text.matches("left out: ").count(), 1, "{text}");
        assert!(
            text.contains("left out: synthetic cold") && text.contains("and 5 like it: it has to be told a dirty rate"),
            "{text}"
        );
        assert!(text.contains("6 scenarios; 12 runs to be made, 0 are there; about"), "{text}");
    }

    /// The suites' promises: at most 60 and at most 6 minutes.
    #[test]
    fn the_suites_that_come_along_keep_to_their_time() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("suites");
        for (name, minutes) in [("quick", 6), ("standard", 60)] {
            let suite = Suite::read(&folder.join(format!("{name}.toml"))).unwrap();
            let estimate = Plan::of(&suite, &BTreeSet::new()).estimate();
            assert!(estimate < Duration::from_secs(minutes * 60), "{name}: {estimate:?}");
        }
    }
}
