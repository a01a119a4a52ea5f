//! Suites: which scenarios are run, as a TOML file says by lists that are multiplied.
//!
//! ```toml
//! [[sweep]]
//! question = "How does the downtime grow with memory?"
//! workload = ["redis"]
//! strategy = ["warm", "live"]
//! memory_mib = [16, 256]
//! link_mbit = ["none", 1000]
//! repeats = 3
//! ```
//! Combinations that make no sense are left out, each with a reason.

use std::path::{Path, PathBuf};

use podferry_report::results::{Scenario, Strategy, Workload};
use serde::Deserialize;

use super::scenario;

/// The most memory that a scenario may ask for, in MiB: what the memory of a workload, its images on both nodes and the machine itself
/// fit into on 24 GiB.
const MOST_MIB: u64 = 4096;
/// The link's rates that can be shaped, in Mbit/s: below, nothing comes through in time; above, the kernel's token bucket does not hold them.
const LINK_MBIT: std::ops::RangeInclusive<u64> = 10..=40_000;
/// Round-trip times that can be made, in ms: below, the process between the nodes takes as long.
const RTT_MS: std::ops::RangeInclusive<f64> = 0.5..=1000.0;
/// A workload needs room beside what it holds: its program, buffers and page tables.
const ROOM: (u64, u64) = (5, 4);
/// What clients there may be: each has a connection, all share a processor.
const CLIENTS: std::ops::RangeInclusive<u32> = 1..=256;
/// How often a scenario may be repeated.
const REPEATS: std::ops::RangeInclusive<u32> = 1..=100;

/// Why a suite cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SuiteError {
    /// The file cannot be read.
    #[error("cannot read the suite {}: {source}; those that come with podferry are in bench/suites", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no such document. The message names line and column.
    #[error("the suite {name} cannot be understood: {source}")]
    Document {
        /// The suite's name.
        name: String,
        /// Where, and what is wrong.
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be.
    #[error("sweep {sweep} of the suite {name}, {field}: {problem}")]
    Value {
        /// The suite's name.
        name: String,
        /// The number of the sweep, from 1.
        sweep: usize,
        /// The field.
        field: &'static str,
        /// What is wrong, and what would do.
        problem: String,
    },
}

/// A limit, or none.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(untagged)]
enum Limit<T> {
    Of(T),
    None(Unlimited),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Unlimited {
    #[serde(rename = "none")]
    Word,
}

impl<T: Copy> Limit<T> {
    fn value(self) -> Option<T> {
        match self {
            Self::Of(value) => Some(value),
            Self::None(Unlimited::Word) => None,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    sweep: Vec<Sweep>,
}

/// Lists that are multiplied.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sweep {
    question: String,
    workload: Vec<Workload>,
    strategy: Vec<Strategy>,
    memory_mib: Vec<u64>,
    #[serde(default)]
    dirty_percent: Vec<f64>,
    #[serde(default = "one_client")]
    clients: Vec<u32>,
    /// In ms.
    #[serde(default = "one_ms")]
    think_ms: Vec<u64>,
    #[serde(default = "no_limit")]
    cpu_limit: Vec<Limit<f64>>,
    #[serde(default = "no_limit")]
    memory_limit_mib: Vec<Limit<u64>>,
    #[serde(default = "no_limit")]
    link_mbit: Vec<Limit<u64>>,
    #[serde(default = "no_rtt")]
    link_rtt_ms: Vec<f64>,
    #[serde(default = "once")]
    repeats: u32,
}

fn one_client() -> Vec<u32> {
    vec![1]
}

fn one_ms() -> Vec<u64> {
    vec![1]
}

fn no_limit<T>() -> Vec<Limit<T>> {
    vec![Limit::None(Unlimited::Word)]
}

fn no_rtt() -> Vec<f64> {
    vec![0.0]
}

fn once() -> u32 {
    1
}

/// A scenario, and how often it is run.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// What is run.
    pub scenario: Scenario,
    /// How often.
    pub repeats: u32,
}

/// A combination that is not run.
#[derive(Debug, Clone, PartialEq)]
pub struct LeftOut {
    /// What would have been run.
    pub scenario: Scenario,
    /// Why it makes no sense.
    pub reason: String,
}

/// What a suite asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Suite {
    /// Its name: that of its file.
    pub name: String,
    /// Its file, word by word.
    pub text: String,
    /// What it asks, in the order of its sweeps.
    pub questions: Vec<String>,
    /// What is run. No scenario is there twice.
    pub wanted: Vec<Wanted>,
    /// What is not. No scenario is there twice.
    pub left_out: Vec<LeftOut>,
}

impl Suite {
    /// Reads a suite's file.
    pub fn read(path: &Path) -> Result<Self, SuiteError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| SuiteError::Read { path: path.to_owned(), source })?;
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        Self::parse(&name, &text)
    }

    /// Reads a suite's text.
    pub fn parse(name: &str, text: &str) -> Result<Self, SuiteError> {
        let document: Document = toml::from_str(text)
            .map_err(|source| SuiteError::Document { name: name.to_owned(), source: Box::new(source) })?;
        let mut suite = Self {
            name: name.to_owned(),
            text: text.to_owned(),
            questions: Vec::new(),
            wanted: Vec::new(),
            left_out: Vec::new(),
        };
        for (index, sweep) in document.sweep.iter().enumerate() {
            check(sweep).map_err(|(field, problem)| SuiteError::Value {
                name: name.to_owned(),
                sweep: index + 1,
                field,
                problem,
            })?;
            suite.add(sweep);
        }
        Ok(suite)
    }

    fn add(&mut self, sweep: &Sweep) {
        self.questions.push(sweep.question.clone());
        for scenario in sweep.scenarios() {
            match reason_to_leave_out(&scenario) {
                Some(reason) => self.leave_out(scenario, reason),
                None => self.want(scenario, sweep.repeats),
            }
        }
    }

    /// Of a scenario that is asked for twice the most repeats count.
    fn want(&mut self, scenario: Scenario, repeats: u32) {
        match self.wanted.iter_mut().find(|wanted| wanted.scenario == scenario) {
            Some(wanted) => wanted.repeats = wanted.repeats.max(repeats),
            None => self.wanted.push(Wanted { scenario, repeats }),
        }
    }

    fn leave_out(&mut self, scenario: Scenario, reason: String) {
        if !self.left_out.iter().any(|left_out| left_out.scenario == scenario) {
            self.left_out.push(LeftOut { scenario, reason });
        }
    }
}

impl Sweep {
    /// All combinations.
    fn scenarios(&self) -> Vec<Scenario> {
        let dirty: Vec<Option<f64>> = match self.dirty_percent.as_slice() {
            [] => vec![None],
            rates => rates.iter().copied().map(Some).collect(),
        };
        let mut all = vec![Scenario {
            workload: Workload::Redis,
            strategy: Strategy::Live,
            memory_mib: 0,
            dirty_percent: None,
            clients: 0,
            think_ms: 0,
            cpu_limit: None,
            memory_limit_mib: None,
            link_mbit: None,
            link_rtt_ms: 0.0,
        }];
        // The first list changes slowest.
        all = times(&all, &self.workload, |scenario, value| scenario.workload = *value);
        all = times(&all, &self.memory_mib, |scenario, value| scenario.memory_mib = *value);
        all = times(&all, &dirty, |scenario, value| scenario.dirty_percent = *value);
        all = times(&all, &self.clients, |scenario, value| scenario.clients = *value);
        all = times(&all, &self.think_ms, |scenario, value| scenario.think_ms = *value);
        all = times(&all, &self.cpu_limit, |scenario, value| scenario.cpu_limit = value.value());
        all = times(&all, &self.memory_limit_mib, |scenario, value| scenario.memory_limit_mib = value.value());
        all = times(&all, &self.link_mbit, |scenario, value| scenario.link_mbit = value.value());
        all = times(&all, &self.link_rtt_ms, |scenario, value| scenario.link_rtt_ms = *value);
        times(&all, &self.strategy, |scenario, value| scenario.strategy = *value)
    }
}

fn times<T>(all: &[Scenario], values: &[T], set: impl Fn(&mut Scenario, &T)) -> Vec<Scenario> {
    let with = |scenario: &Scenario, value: &T| {
        let mut scenario = scenario.clone();
        set(&mut scenario, value);
        scenario
    };
    all.iter().flat_map(|scenario| values.iter().map(|value| with(scenario, value)).collect::<Vec<_>>()).collect()
}

type Problem = (&'static str, String);

fn check(sweep: &Sweep) -> Result<(), Problem> {
    let lists = [
        ("workload", sweep.workload.len()),
        ("strategy", sweep.strategy.len()),
        ("memory_mib", sweep.memory_mib.len()),
        ("clients", sweep.clients.len()),
        ("think_ms", sweep.think_ms.len()),
        ("cpu_limit", sweep.cpu_limit.len()),
        ("memory_limit_mib", sweep.memory_limit_mib.len()),
        ("link_mbit", sweep.link_mbit.len()),
        ("link_rtt_ms", sweep.link_rtt_ms.len()),
    ];
    if let Some((field, _)) = lists.iter().find(|(_, length)| *length == 0) {
        return Err((
            field,
            "the list is empty, so nothing would be run; name a value, or leave the list away".to_owned(),
        ));
    }
    each("memory_mib", &sweep.memory_mib, |mib| (1..=MOST_MIB).contains(mib), &format!("1 to {MOST_MIB} will do"))?;
    each("dirty_percent", &sweep.dirty_percent, |rate| (0.0..=1000.0).contains(rate), "0 to 1000 will do")?;
    each("clients", &sweep.clients, |clients| CLIENTS.contains(clients), "1 to 256 will do")?;
    each("think_ms", &sweep.think_ms, |ms| *ms <= 60_000, "at most a minute will do")?;
    let limits: Vec<f64> = sweep.cpu_limit.iter().filter_map(|limit| limit.value()).collect();
    each("cpu_limit", &limits, |cpus| (0.05..=64.0).contains(cpus), "0.05 to 64 CPUs will do, or \"none\"")?;
    let links: Vec<u64> = sweep.link_mbit.iter().filter_map(|limit| limit.value()).collect();
    each("link_mbit", &links, |mbit| LINK_MBIT.contains(mbit), "10 to 40000 will do, or \"none\"")?;
    each("link_rtt_ms", &sweep.link_rtt_ms, |rtt| *rtt == 0.0 || RTT_MS.contains(rtt), "0, or 0.5 to 1000 will do")?;
    each("repeats", &[sweep.repeats], |repeats| REPEATS.contains(repeats), "1 to 100 will do")
}

fn each<T: std::fmt::Debug>(
    field: &'static str,
    values: &[T],
    will_do: impl Fn(&T) -> bool,
    remedy: &str,
) -> Result<(), Problem> {
    match values.iter().find(|value| !will_do(value)) {
        Some(value) => Err((field, format!("{value:?} will not do; {remedy}"))),
        None => Ok(()),
    }
}

/// Why a combination makes no sense, if it does not.
fn reason_to_leave_out(scenario: &Scenario) -> Option<String> {
    let Scenario { workload, strategy, memory_mib, .. } = scenario;
    if let Some(own) = scenario::own_memory_mib(*workload).filter(|own| own != memory_mib) {
        return Some(format!("its memory is its own matter: it has {own} MiB"));
    }
    match (workload, scenario.dirty_percent) {
        (Workload::Synthetic, None) => return Some("it has to be told a dirty rate".to_owned()),
        (Workload::Synthetic, Some(_)) | (_, None) => {}
        (_, Some(_)) => return Some("what it writes its clients decide, and no rate".to_owned()),
    }
    if let Some(limit) = scenario.memory_limit_mib.filter(|limit| limit * ROOM.1 < memory_mib * ROOM.0) {
        return Some(format!("{memory_mib} MiB and what else it needs do not fit into a limit of {limit} MiB"));
    }
    if *strategy == Strategy::Application && !scenario::has_hooks(*workload) {
        return Some("this application has no means of its own to hand its state over".to_owned());
    }
    if *strategy == Strategy::PeerPodman {
        return Some("podman is not driven by this program".to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert_eq, proptest, sample::subsequence};

    use super::*;

    const SMALL: &str =
        "[[sweep]]\nquestion = \"q\"\nworkload = [\"redis\"]\nstrategy = [\"live\", \"warm\"]\nmemory_mib = [16, 64]\n";

    fn parse(text: &str) -> Result<Suite, SuiteError> {
        Suite::parse("test", text)
    }

    #[test]
    fn lists_are_multiplied_and_the_first_changes_slowest() {
        let suite = parse(&format!("{SMALL}link_mbit = [\"none\", 100]\nrepeats = 4\n")).unwrap();
        let all: Vec<_> = suite.wanted.iter().map(|wanted| &wanted.scenario).collect();
        assert_eq!((all.len(), suite.left_out.len()), (8, 0));
        assert_eq!((all[0].memory_mib, all[0].link_mbit, all[0].strategy), (16, None, Strategy::Live));
        assert_eq!((all[3].memory_mib, all[3].link_mbit, all[3].strategy), (16, Some(100), Strategy::Warm));
        assert_eq!(all[4].memory_mib, 64);
        assert!(suite.wanted.iter().all(|wanted| wanted.repeats == 4));
    }

    #[test]
    fn what_is_asked_for_twice_is_run_once_with_the_most_repeats() {
        let suite = parse(&format!("{SMALL}{SMALL}repeats = 7\n")).unwrap();
        assert_eq!(suite.wanted.len(), 4);
        assert!(suite.wanted.iter().all(|wanted| wanted.repeats == 7));
    }

    #[test]
    fn an_error_names_its_place() {
        let said = |text: &str| parse(text).unwrap_err().to_string();
        let unknown = said(&format!("{SMALL}memory = [1]\n"));
        assert!(unknown.contains("line 6") && unknown.contains("`memory`"), "{unknown}");
        let wrong = said(&SMALL.replace("warm", "wram"));
        assert!(wrong.contains("line 4") && wrong.contains("wram"), "{wrong}");
        let rtt = said(&format!("{SMALL}{SMALL}link_rtt_ms = [0, 0.1]\n"));
        assert!(rtt.starts_with("sweep 2 of the suite test, link_rtt_ms: 0.1 will not do"), "{rtt}");
        let empty = said(&SMALL.replace("[16, 64]", "[]"));
        assert!(empty.contains("memory_mib") && empty.contains("empty"), "{empty}");
        assert!(said(&format!("{SMALL}link_mbit = [1]\n")).contains("link_mbit"));
        assert!(said("").contains("sweep"));
    }

    #[test]
    fn what_makes_no_sense_is_left_out_with_a_reason() {
        let reason = |change: &str| {
            let suite = parse(&format!("[[sweep]]\nquestion = \"\"\n{change}")).unwrap();
            assert_eq!((suite.wanted.len(), suite.left_out.len()), (0, 1), "{change}");
            suite.left_out[0].reason.clone()
        };
        let one = |workload: &str, strategy: &str, mib: u64, more: &str| {
            reason(&format!("workload = [\"{workload}\"]\nstrategy = [\"{strategy}\"]\nmemory_mib = [{mib}]\n{more}"))
        };
        assert!(one("synthetic", "live", 64, "").contains("dirty rate"));
        assert!(one("redis", "live", 64, "dirty_percent = [1.0]").contains("clients decide"));
        assert!(one("redis", "live", 64, "memory_limit_mib = [64]").contains("do not fit"));
        assert!(one("cart", "application", 64, "").contains("no means"));
        assert!(one("node", "live", 64, "").contains("128 MiB"));
        assert!(one("redis", "peer-podman", 64, "").contains("podman"));
    }

    #[test]
    fn the_suites_that_come_along_can_be_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("suites");
        for name in ["quick", "standard"] {
            let suite = Suite::read(&folder.join(format!("{name}.toml"))).unwrap();
            assert_eq!(suite.name, name);
            assert!(!suite.wanted.is_empty() && suite.questions.iter().all(|question| question.ends_with('?')));
        }
    }

    proptest! {
        #[test]
        fn every_combination_is_run_or_left_out_once(
            workloads in subsequence(vec!["redis", "cart", "synthetic", "node", "catalogue"], 1..5),
            strategies in subsequence(vec!["cold", "warm", "application", "peer-runc", "auto"], 1..5),
            sizes in subsequence(vec![16_u64, 64, 128, 512], 1..4),
            dirty in subsequence(vec![1.0, 25.5], 0..2),
            limits in subsequence(vec!["\"none\"", "64", "1024"], 1..3),
        ) {
            let quoted = |words: &[&str]| words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ");
            let text = format!(
                "[[sweep]]\nquestion = \"q\"\nworkload = [{}]\nstrategy = [{}]\nmemory_mib = {sizes:?}\n\
                 dirty_percent = {dirty:?}\nmemory_limit_mib = [{}]\n",
                quoted(&workloads), quoted(&strategies), limits.join(", "),
            );
            let suite = parse(&text).unwrap();
            let combinations = workloads.len() * strategies.len() * sizes.len() * dirty.len().max(1) * limits.len();
            prop_assert_eq!(suite.wanted.len() + suite.left_out.len(), combinations);
            let keys: std::collections::BTreeSet<String> = suite.wanted.iter().map(|wanted| scenario::name(&wanted.scenario))
                .chain(suite.left_out.iter().map(|left_out| scenario::name(&left_out.scenario))).collect();
            prop_assert_eq!(keys.len(), combinations, "each has a name of its own");
        }

        #[test]
        fn no_text_makes_it_panic(text in "[a-z\\[\\]=\"0-9,. \n_-]{0,120}") {
            let _ = parse(&text);
        }
    }
}
