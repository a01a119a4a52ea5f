//! `make soak`: a mixed set of workloads under load, moved back and forth by all strategies for long, while memory and open files
//! of agents and coordinator are sampled.

mod curve;

use std::{
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use podferry_local::{
    FIRST_CONTAINER_ADDRESS, ProcessId, Strategy,
    faults::{
        client::{Counting, Redis},
        leftovers::{self, Inventory},
    },
};
use serde::Serialize;

pub use self::curve::{Curve, Quantity};
use crate::{
    chaos,
    clients::{self, LoadProcess},
    error::{Error, Result},
    stage::{Interrupt, NODES, Program, Stage},
    summary::columns,
};

/// The workload that is moved cold. Its client comes again each time.
const COLD: &str = "redis-on-disk";
/// What each Redis holds, in MiB.
const MIB: u64 = 8;
/// How those are moved whose connections have to last.
const WARM: [Strategy; 4] = [Strategy::Warm, Strategy::Live, Strategy::Postcopy, Strategy::Hybrid];
/// All of them move once in so many migrations, and are back after twice as many.
const WORKLOADS: u32 = 4;
/// Between two migrations, so that each finds the workload at work.
const BETWEEN: Duration = Duration::from_millis(100);
/// How often it is told how far it is.
const TELL_EVERY: u32 = 20;
/// How long what is left of the last migration may take to go.
const TIDY: Duration = Duration::from_secs(60);

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Migrations that were asked for.
    pub migrations: u32,
    /// Those that did not succeed.
    pub failed: u32,
    /// Items that were confirmed and are gone, or are there twice.
    pub lost_items: u64,
    /// Requests that got a wrong answer or none.
    pub failed_requests: u64,
    /// Connections that broke, but of the workload that is moved cold.
    pub connection_resets: u64,
    /// What is there at the end that was not there in the beginning, or the other way round.
    pub leaks: Vec<String>,
    /// Whether no process grew.
    pub flat: bool,
    /// What was sampled.
    pub curves: Vec<Curve>,
    /// How long it took.
    pub seconds: u64,
}

impl Summary {
    /// Whether everything moved, nothing was lost, nothing grew and nothing is left.
    pub fn holds(&self) -> bool {
        let faults = self.lost_items + self.failed_requests + self.connection_resets;
        self.migrations > 0 && self.failed == 0 && faults == 0 && self.leaks.is_empty() && self.flat
    }
}

/// Runs it, telling of it on standard output; a table and the sum as JSON come last.
pub fn run(migrations: u32, interrupt: &Interrupt) -> Result<Summary> {
    let began = Instant::now();
    let stage = Stage::up("soak", interrupt)?;
    let played = Soak::begin(&stage).and_then(|soak| soak.play(migrations, interrupt));
    let mut summary = played.inspect_err(|_| println!("logs: {}", stage.logs().display()))?;
    summary.seconds = began.elapsed().as_secs();
    stage.finish(summary.holds())?;
    println!("\n{}", table(&summary));
    println!("{}", serde_json::to_string(&summary)?);
    Ok(summary)
}

struct Soak<'a> {
    stage: &'a Stage,
    loads: Vec<LoadProcess>,
    counting: Option<Counting>,
    /// Of each process each quantity.
    samples: Vec<(String, Quantity, Vec<u64>)>,
    /// On which of [`NODES`] each workload is.
    places: [usize; WORKLOADS as usize],
    failed: u32,
    lost: u64,
}

fn cold_address() -> Ipv4Addr {
    Ipv4Addr::from(u32::from(FIRST_CONTAINER_ADDRESS) + 3)
}

impl<'a> Soak<'a> {
    fn begin(stage: &'a Stage) -> Result<Self> {
        let (cluster, client) = (stage.cluster(), stage.cluster().client());
        for program in Program::ALL {
            stage.start(program, &stage.image(program)?)?;
        }
        clients::fill_redis(client, Program::Redis.address(), MIB)?;
        let cold = chaos::workload(COLD, cold_address(), Strategy::Cold, &stage.image(Program::Redis)?);
        cluster.start_workload(NODES[0], &cold)?;
        cluster.prepare_workload(NODES[1], &cold)?;
        Redis::connect(client, cold_address())?.fill(1)?;
        let mut loads = Vec::new();
        for program in Program::ALL {
            for &(kind, count) in program.clients() {
                loads.push(LoadProcess::start(client, kind, count, program.address())?);
            }
        }
        let counting = Some(Counting::start(client, cold_address())?);
        Ok(Self { stage, loads, counting, samples: Vec::new(), places: Default::default(), failed: 0, lost: 0 })
    }

    fn play(mut self, migrations: u32, interrupt: &Interrupt) -> Result<Summary> {
        // Everything is then where it is in the end, and all has been made that is made only once.
        let stock_at = 2 * WORKLOADS + migrations % (2 * WORKLOADS);
        let mut stock = None;
        for turn in 0..migrations {
            interrupt.check()?;
            if turn == stock_at {
                stock = Some(leftovers::settled(self.stage.cluster())?);
            }
            std::thread::sleep(BETWEEN);
            self.migrate(turn)?;
            self.sample()?;
            if (turn + 1) % TELL_EVERY == 0 {
                println!("{:>4} of {migrations} migrations, {} failed", turn + 1, self.failed);
            }
        }
        let leaks = match stock.filter(|_| self.failed == 0) {
            Some(stock) => self.left(&stock)?,
            None => vec![],
        };
        self.finish(migrations, leaks)
    }

    fn migrate(&mut self, turn: u32) -> Result<()> {
        let index = usize::try_from(turn % WORKLOADS).unwrap_or(0);
        let target = 1 - self.places[index];
        let (name, strategy) = match Program::ALL.get(index) {
            Some(program) => {
                let round = usize::try_from(turn / (2 * WORKLOADS)).unwrap_or(0);
                (program.name(), WARM[(round + index) % WARM.len()])
            }
            None => (COLD, Strategy::Cold),
        };
        let moved = match self.stage.ask(name, strategy.words(), NODES[target]) {
            Ok(record) if record.succeeded() => Ok(()),
            Ok(record) => Err(format!("{}: {}", record.phase, record.reason)),
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(error) => Err(error.to_string()),
        };
        match moved {
            Ok(()) => self.places[index] = target,
            Err(words) => {
                self.failed += 1;
                println!("{turn}: {name} {strategy} to {}: FAILED: {words}", NODES[target]);
                self.places[index] = self.stage.place(name).unwrap_or(self.places[index]);
            }
        }
        if name == COLD { self.reconnect() } else { Ok(()) }
    }

    fn reconnect(&mut self) -> Result<()> {
        let Some(counting) = self.counting.take() else { return Ok(()) };
        let (counting, trouble) = counting.reconnected(self.stage.cluster().client(), cold_address())?;
        self.counting = Some(counting);
        if let Some(trouble) = trouble {
            println!("{COLD}: {trouble}");
            self.lost += 1;
        }
        Ok(())
    }

    fn sample(&mut self) -> Result<()> {
        let cluster = self.stage.cluster();
        let mut processes = vec![("coordinator".to_owned(), cluster.coordinator().process())];
        for node in cluster.nodes() {
            processes.push((format!("agent of {}", node.name()), node.agent_pid().and_then(ProcessId::of)));
        }
        for (name, process) in processes {
            let process = process.ok_or_else(|| Error::Misplaced(format!("the {name} does not run any more")))?;
            for (quantity, value) in
                [(Quantity::ResidentKib, resident_kib(process)), (Quantity::Descriptors, descriptors(process))]
            {
                match self.samples.iter_mut().find(|(known, of, _)| *known == name && *of == quantity) {
                    Some((_, _, values)) => values.push(value),
                    None => self.samples.push((name.clone(), quantity, vec![value])),
                }
            }
        }
        Ok(())
    }

    fn left(&self, stock: &Inventory) -> Result<Vec<String>> {
        let since = Instant::now();
        loop {
            let left = leftovers::difference(stock, &leftovers::inventory(self.stage.cluster())?);
            if left.is_empty() || since.elapsed() > TIDY {
                return Ok(left);
            }
            std::thread::sleep(BETWEEN);
        }
    }

    fn finish(self, migrations: u32, leaks: Vec<String>) -> Result<Summary> {
        let curves: Vec<Curve> =
            self.samples.iter().map(|(process, quantity, values)| Curve::of(process, *quantity, values)).collect();
        let mut summary = Summary {
            migrations,
            failed: self.failed,
            lost_items: self.lost,
            failed_requests: 0,
            connection_resets: 0,
            leaks,
            flat: curves.iter().all(|curve| curve.flat),
            curves,
            seconds: 0,
        };
        for load in self.loads {
            let report = load.stop()?;
            report.clients.iter().flat_map(|client| &client.problems).for_each(|problem| println!("client: {problem}"));
            summary.lost_items += report.lost_items();
            summary.failed_requests += report.failed_requests();
            summary.connection_resets += report.connection_resets();
        }
        Ok(summary)
    }
}

/// As the kernel says.
fn resident_kib(process: ProcessId) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn descriptors(process: ProcessId) -> u64 {
    fs::read_dir(format!("/proc/{}/fd", process.pid)).map_or(0, |entries| entries.count() as u64)
}

fn table(summary: &Summary) -> String {
    let titles = ["process", "what", "first third", "second third", "last third", "flat"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(summary.curves.iter().map(|curve| {
        let numbers = [curve.first, curve.second, curve.last].map(|number| number.to_string());
        let mut row = vec![curve.process.clone(), curve.quantity.words().to_owned()];
        row.extend(numbers);
        row.push(if curve.flat { "yes" } else { "NO" }.to_owned());
        row
    }));
    let mut text = columns(&rows);
    for leak in &summary.leaks {
        text.push_str("left: ");
        text.push_str(leak);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        Summary {
            migrations: 500,
            failed: 0,
            lost_items: 0,
            failed_requests: 0,
            connection_resets: 0,
            leaks: vec![],
            flat: true,
            curves: vec![Curve::of("coordinator", Quantity::Descriptors, &[9; 9])],
            seconds: 1,
        }
    }

    #[test]
    fn anything_that_grew_failed_or_is_left_fails_the_soak() {
        assert!(summary().holds());
        assert!(!Summary { flat: false, ..summary() }.holds());
        assert!(!Summary { failed: 1, ..summary() }.holds());
        assert!(!Summary { lost_items: 1, ..summary() }.holds());
        assert!(!Summary { leaks: vec!["mounts".to_owned()], ..summary() }.holds());
        assert!(!Summary { migrations: 0, ..summary() }.holds());
    }

    #[test]
    fn the_table_has_a_row_for_each_curve() {
        assert!(table(&summary()).contains("coordinator  open files            9             9           9   yes"));
    }

    #[test]
    fn this_process_has_memory_and_open_files() {
        let me = ProcessId::of(std::process::id()).unwrap();
        assert!(resident_kib(me) > 0 && descriptors(me) > 2);
    }
}
