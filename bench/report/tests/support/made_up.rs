//! Results that nobody measured: FOR TESTS ONLY. They have the shape of those of the standard suite, so that every figure has something to
//! draw, and come out the same each time.

use std::{fmt::Write as _, fs, path::Path};

use fastrand::Rng;
use podferry_report::results::{
    Clients, Cost, Environment, Latency, Measurement, Outcome, Phase, Round, Scenario, Slice, Strategy, Workload,
};

const MIB: f64 = (1 << 20) as f64;
const OWN: [Strategy; 5] = [Strategy::Warm, Strategy::Live, Strategy::PostCopy, Strategy::Hybrid, Strategy::Auto];

/// Writes a results folder.
pub(crate) fn write(folder: &Path) {
    let mut made = MadeUp { random: Rng::with_seed(7), lines: String::new(), at: 1_796_000_000_000.0 };
    made.suite();
    fs::write(folder.join("results.jsonl"), made.lines).unwrap();
    fs::write(folder.join("suite.toml"), "# made up, for tests only\n[[sweep]]\nworkload = [\"redis\"]\n").unwrap();
    fs::write(folder.join("environment.json"), serde_json::to_string_pretty(&environment()).unwrap()).unwrap();
}

fn environment() -> Environment {
    Environment {
        began_unix_ms: 1_796_000_000_000.0,
        podferry: "0.0.0 (MADE UP, for tests only)".into(),
        kernel: "6.18.0-made-up".into(),
        processor: "Made-up processor".into(),
        cpus: 2,
        memory_bytes: 8 << 30,
        versions: vec![("CRIU".into(), "4.2".into()), ("runc".into(), "1.3".into())],
        notes: vec!["nothing of this was measured".into()],
    }
}

struct MadeUp {
    random: Rng,
    lines: String,
    at: f64,
}

fn scenario(workload: Workload, strategy: Strategy, memory_mib: u64) -> Scenario {
    Scenario {
        workload,
        strategy,
        memory_mib,
        dirty_percent: None,
        clients: 4,
        think_ms: 0,
        cpu_limit: None,
        memory_limit_mib: None,
        link_mbit: None,
        link_rtt_ms: 0.0,
    }
}

impl MadeUp {
    fn suite(&mut self) {
        for memory in [16, 64, 256, 1024] {
            for strategy in OWN.into_iter().chain([Strategy::PeerRunc, Strategy::PeerCriu, Strategy::PeerPodman]) {
                self.runs(&scenario(Workload::Redis, strategy, memory), 5);
            }
        }
        for link in [100, 1_000, 10_000] {
            for strategy in OWN.into_iter().chain([Strategy::PeerRunc]) {
                let link_mbit = Some(link);
                self.runs(&Scenario { link_mbit, ..scenario(Workload::Redis, strategy, 64) }, 5);
            }
        }
        for rtt in [1.0, 20.0] {
            for strategy in OWN {
                self.runs(&Scenario { link_rtt_ms: rtt, ..scenario(Workload::Redis, strategy, 64) }, 3);
            }
        }
        for percent in [0.0, 1.0, 10.0, 50.0, 100.0, 200.0] {
            for strategy in OWN {
                let dirty_percent = Some(percent);
                self.runs(&Scenario { dirty_percent, clients: 2, ..scenario(Workload::Synthetic, strategy, 256) }, 5);
            }
        }
        for workload in [Workload::Catalogue, Workload::Cart] {
            for strategy in OWN.into_iter().chain([Strategy::Cold, Strategy::Application, Strategy::PeerRunc]) {
                self.runs(&scenario(workload, strategy, 64), 5);
            }
        }
        for workload in [Workload::Java, Workload::Node, Workload::Go, Workload::Postgres] {
            for strategy in OWN.into_iter().chain([Strategy::Cold]) {
                self.runs(&scenario(workload, strategy, 256), 2);
            }
        }
    }

    fn runs(&mut self, scenario: &Scenario, repeats: u32) {
        for repeat in 0..repeats {
            let run = self.run(scenario, repeat);
            writeln!(self.lines, "{}", serde_json::to_string(&run).unwrap()).unwrap();
        }
    }

    /// A factor around 1.
    fn about(&mut self) -> f64 {
        0.85 + 0.4 * self.random.f64()
    }

    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "made up")]
    fn run(&mut self, of: &Scenario, repeat: u32) -> Measurement {
        self.at += 10_000.0;
        let memory = of.memory_mib as f64;
        let per_ms = of.link_mbit.map_or(1.2, |mbit| mbit as f64 / 8_000.0).min(1.2);
        let copy = memory / per_ms;
        let dirty = of.dirty_percent.unwrap_or(4.0) / 100.0;
        let left = (memory * dirty).min(memory) / per_ms * 0.3;
        let moved_behind = matches!(of.strategy, Strategy::PostCopy | Strategy::Hybrid);
        let copies_before = matches!(of.strategy, Strategy::Live | Strategy::Auto | Strategy::Hybrid);
        let frozen = match of.strategy {
            Strategy::Live | Strategy::Auto => 110.0 + left,
            Strategy::Hybrid => 100.0,
            Strategy::PostCopy => 90.0,
            Strategy::Cold | Strategy::Application => 160.0,
            Strategy::Warm => 150.0 + copy,
            _ => 300.0 + 2.5 * copy,
        };
        let downtime = (frozen + 2.0 * of.link_rtt_ms) * self.about();
        let before = if copies_before { copy * (1.0 + dirty) * self.about() } else { 0.0 };
        let behind = if moved_behind { copy * self.about() } else { 20.0 };
        let total = 70.0 + before + downtime + behind;
        let refused = of.strategy == Strategy::Live && of.dirty_percent.is_some_and(|percent| percent >= 200.0);
        let failed = of.strategy == Strategy::PeerPodman && repeat == 4;
        let outcome = match (refused, failed) {
            (true, _) => {
                Outcome::Refused("memory is written faster than it is sent: 480 MiB/s against 300 MiB/s".into())
            }
            (_, true) => Outcome::Failed("podman container restore: Error: <made up> \"exit status 1\" & more".into()),
            _ => Outcome::Moved,
        };
        let is_moved = outcome == Outcome::Moved;
        let bytes = (memory * MIB) as u64;
        let lost = u64::from(of.strategy == Strategy::Cold && of.workload == Workload::Cart);
        let notes = if of.strategy == Strategy::Auto {
            vec![format!("chose live: {memory} MiB can be followed")]
        } else {
            vec![]
        };
        Measurement {
            scenario: of.clone(),
            repeat,
            began_unix_ms: self.at,
            outcome,
            resident_bytes: Some(bytes),
            downtime_ms: is_moved.then_some(downtime),
            total_ms: is_moved.then_some(total),
            deployment_ms: is_moved.then_some(total - 10.0),
            phases: phases(before, downtime, behind),
            rounds: if copies_before { rounds(memory, dirty) } else { vec![] },
            raw_bytes: is_moved.then_some(bytes),
            wire_bytes: is_moved.then_some((memory * MIB * 0.4 * self.about()) as u64),
            cost: is_moved.then(|| [0.1, 0.08].map(|cpu_s| self.cost(cpu_s, memory))),
            clients: Some(self.clients(of, (downtime, behind, total), lost)),
            notes,
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "made up")]
    fn cost(&mut self, cpu_s: f64, memory: f64) -> Cost {
        let cpu_s = (cpu_s + memory / 1000.0) * self.about();
        Cost { cpu_s, peak_memory_bytes: ((40.0 + memory / 4.0) * MIB * self.about()) as u64 }
    }

    fn clients(&mut self, of: &Scenario, (downtime, behind, total): (f64, f64, f64), lost_items: u64) -> Clients {
        let gaps_ms = (0..of.clients).map(|_| downtime * (0.97 + 0.1 * self.random.f64())).collect();
        let latency =
            |p50_ms: f64, max_ms| Latency { count: 5000, p50_ms, p90_ms: p50_ms * 1.5, p99_ms: p50_ms * 3.0, max_ms };
        let breaks = matches!(of.strategy, Strategy::Cold | Strategy::Application);
        Clients {
            requests: 20_000,
            failed_requests: 0,
            retried_requests: 0,
            connection_resets: if breaks { of.clients.into() } else { 0 },
            lost_items,
            gaps_ms,
            latency: [latency(0.3, 2.0), latency(0.6, downtime), latency(0.3, 3.0)],
            throughput: [Some(21_000.0), Some(17_000.0)],
            timeline: self.timeline(total - behind - 15.0 - downtime, downtime, total),
        }
    }

    fn timeline(&mut self, freeze: f64, downtime: f64, total: f64) -> Vec<Slice> {
        let frozen = freeze..freeze + downtime;
        let slice = |index: i32| {
            let start_ms = f64::from(index) * 20.0;
            let still = frozen.contains(&start_ms);
            let worst = if start_ms > 0.0 && start_ms < total { 1.4 } else { 0.6 };
            Slice { start_ms, worst_ms: (!still).then(|| worst * self.about()), answers: if still { 0 } else { 400 } }
        };
        #[expect(clippy::cast_possible_truncation, reason = "made up")]
        let last = ((total + 500.0) / 20.0) as i32;
        (-20..last).map(slice).collect()
    }
}

fn phases(before: f64, downtime: f64, behind: f64) -> Vec<Phase> {
    let spans = [
        ("preflight", 30.0),
        ("prepare", 25.0),
        ("precopy", before),
        ("freeze", downtime * 0.2),
        ("dump", downtime * 0.3),
        ("restore", downtime * 0.5),
        ("resume", 15.0),
        ("fill", behind),
    ];
    let mut at = 0.0;
    let mut phase = |(name, duration_ms): (&str, f64)| {
        let start_ms = at;
        at += duration_ms;
        Phase { name: name.to_owned(), start_ms, duration_ms }
    };
    spans.into_iter().filter(|(_, duration)| *duration > 0.0).map(&mut phase).collect()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "made up")]
fn rounds(memory: f64, dirty: f64) -> Vec<Round> {
    let size = |round: i32| memory * (dirty * 0.5).clamp(0.002, 0.95).powi(round);
    let round = |of: f64| Round { pages: (of * 256.0) as u64, raw_bytes: (of * MIB) as u64, duration_ms: of * 1.1 };
    (0..9).map(size).take_while(|size| *size > 0.01).map(round).collect()
}
