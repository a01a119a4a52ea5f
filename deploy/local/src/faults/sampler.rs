//! Looks all the time whether a workload runs on more than one node.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::processes::{may_go_on, of_container};
use crate::node::Node;
use crate::process::ProcessId;

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(10);

/// An idle Redis wakes ten times a second; two that do so in turns run all the same.
const IDLE: Duration = Duration::from_millis(250);

/// Looks until it is dropped.
#[derive(Debug)]
pub struct Sampler {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    looks: u64,
    doubles: Vec<String>,
}

/// Context switches by process (number and start time): of those that execute the program's own instructions.
type Switches = HashMap<(u32, u64), u64>;

impl Sampler {
    /// Watches the processes of this name in the workload's cgroup on each node.
    pub fn start(nodes: &[Node], workload: &str, program: &str) -> Self {
        let (nodes, workload, program) = (nodes.to_vec(), workload.to_owned(), program.to_owned());
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Seen::default())));
        let (ending, noting) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = thread::spawn(move || {
            let look = || -> Vec<Switches> { nodes.iter().map(|node| switches(node, &workload, &program)).collect() };
            let mut before = look();
            let mut ran_at: Vec<HashMap<(u32, u64), Instant>> = vec![HashMap::new(); nodes.len()];
            while !ending.load(Ordering::Acquire) {
                thread::sleep(INTERVAL);
                let now = look();
                for (ran_at, (before, now)) in ran_at.iter_mut().zip(before.iter().zip(&now)) {
                    note_runs(ran_at, before, now);
                }
                let running: Vec<String> = nodes
                    .iter()
                    .zip(&ran_at)
                    .filter_map(|(node, ran_at)| Some(format!("{} {}", node.name(), ran_at.keys().next()?.0)))
                    .collect();
                let mut seen = locked(&noting);
                seen.looks += 1;
                if running.len() > 1 {
                    seen.doubles.push(running.join(" and "));
                }
                before = now;
            }
        });
        Self { stop, seen, thread: Some(thread) }
    }

    /// When two copies ran: where.
    pub fn doubles(&self) -> Vec<String> {
        locked(&self.seen).doubles.clone()
    }

    /// How often it has looked.
    pub fn looks(&self) -> u64 {
        locked(&self.seen).looks
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn locked(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes note of who has been on a processor since the last look: one that is stopped, frozen or held has not. Who is gone
/// or has not run for [`IDLE`] does not run. A source is dead before its target runs, however soon after; or in post-copy stopped, and
/// killed without having run again.
fn note_runs(ran_at: &mut HashMap<(u32, u64), Instant>, before: &Switches, now: &Switches) {
    let advanced = now.iter().filter(|(process, count)| before.get(process).is_some_and(|earlier| earlier < *count));
    ran_at.extend(advanced.map(|(process, _)| (*process, Instant::now())));
    ran_at.retain(|process, ran| now.contains_key(process) && ran.elapsed() < IDLE && may_go_on(process.0));
}

fn switches(node: &Node, workload: &str, program: &str) -> Switches {
    let pids = of_container(node, workload).into_iter();
    let numbered = |pid| {
        let process = ProcessId::of(pid)?;
        Some(((process.pid, process.start_time), count(pid)?))
    };
    pids.filter(|pid| is_program(*pid, program)).filter_map(numbered).collect()
}

/// Whether it has become the program. While CRIU builds it, or dumps it, code of CRIU is mapped that has no file.
fn is_program(pid: u32, program: &str) -> bool {
    let is_it = fs::read_link(format!("/proc/{pid}/exe"))
        .is_ok_and(|exe| Path::new(exe.to_string_lossy().trim_end_matches(" (deleted)")).ends_with(program));
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    is_it && !maps.is_empty() && !maps.lines().any(is_foreign_code)
}

fn is_foreign_code(line: &str) -> bool {
    let mut fields = line.split_whitespace();
    let executable = fields.nth(1).is_some_and(|access| access.contains('x'));
    let name = fields.nth(3).unwrap_or_default();
    executable && !name.starts_with('/') && !name.starts_with('[')
}

fn count(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let lines = status.lines().filter(|line| line.contains("voluntary_ctxt_switches"));
    Some(lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum())
}

/// The copies that run on a node now.
pub fn running(node: &Node, workload: &str, program: &str) -> Vec<u32> {
    let before = switches(node, workload, program);
    thread::sleep(Duration::from_millis(250));
    let now = switches(node, workload, program);
    let advanced = now.iter().filter(|(process, count)| before.get(process).is_some_and(|earlier| earlier < *count));
    advanced.map(|((pid, _), _)| *pid).collect()
}
