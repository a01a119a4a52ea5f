//! The pager as processes of its own, which are killed: with real CRIU, on this machine.

#![expect(clippy::unwrap_used, reason = "a panic is the report")]

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use podferry_agent::pager::client;
use podferry_agent::pager::messages::{Holder, PagedContainer, PagerJob, PagerState, PagerStatus};
use podferry_engine_bench::error::{Error, Result};
use podferry_engine_bench::live::{self, Migrated, Paging};
use podferry_engine_bench::tools::built;
use podferry_engine_bench::victim::Victim;
use podferry_memory::handover::Handover;
use podferry_memory::pager::{Kept, Paged};
use podferry_memory::range::PageRanges;
use podferry_memory::store::Store;
use rustix::process::{Pid, Signal, kill_process};

/// Kills holders; it is told where the status is before the restore begins.
type Killer = fn(&Path);

/// The agent's pager.
struct Processes {
    killer: Killer,
    cgroup: PathBuf,
    status: PathBuf,
    killing: Option<JoinHandle<()>>,
    ended: Option<PagerState>,
    runtime: tokio::runtime::Runtime,
}

impl Processes {
    fn killed_by(victim: &mut Victim, killer: Killer) -> Self {
        let cgroup = match victim.cgroup() {
            Some(cgroup) => cgroup.to_owned(),
            None => victim.use_cgroup().unwrap(),
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        Self { killer, cgroup, status: PathBuf::new(), killing: None, ended: None, runtime }
    }
}

impl Paging for Processes {
    fn begin(&mut self, listener: UnixListener, kept: HashMap<i32, Kept>, handover: &Path) -> Result<()> {
        let processes: Vec<(i32, &Store, &PageRanges)> =
            kept.iter().map(|(pid, kept)| (*pid, &kept.store, &kept.lazy)).collect();
        Handover::write(handover, &processes)?;
        let status = handover.join("status.json");
        let container =
            PagedContainer { root: "/nonexistent".into(), id: "none".to_owned(), cgroups: vec![self.cgroup.clone()] };
        let job = PagerJob {
            migration: "test".to_owned(),
            handover: handover.to_owned(),
            status: status.clone(),
            fetch: None,
            container,
        };
        let (program, log) = (built("podferry-pager")?, handover.join("pager.log"));
        let started = self.runtime.block_on(client::start(&program, &job, &handover.join("job.json"), listener, &log));
        started.map_err(|failure| Error::Program { program: "pager", problem: failure.to_string() })?;
        let (killer, path) = (self.killer, status.clone());
        self.status = status;
        self.killing = Some(std::thread::spawn(move || killer(&path)));
        Ok(())
    }

    fn finish(&mut self) -> Result<Paged> {
        let ended = self.runtime.block_on(client::wait_filled(&self.status));
        self.killing.take().unwrap().join().unwrap();
        self.ended = Some(ended.clone());
        match ended {
            PagerState::Done { pages, faults, fill_ms } => {
                Ok(Paged { pages, faults, fill: Duration::from_millis(fill_ms) })
            }
            state => {
                let log = std::fs::read_to_string(self.status.with_file_name("pager.log")).unwrap_or_default();
                Err(Error::Program { program: "pager", problem: format!("{state:?}\n{log}") })
            }
        }
    }
}

/// Waits for a state of the pager; its status then. The last one when it comes first.
fn until(path: &Path, fits: impl Fn(&PagerStatus) -> bool) -> PagerStatus {
    let begun = Instant::now();
    loop {
        if let Ok(status) = client::status(path)
            && (fits(&status) || status.state.is_last())
        {
            return status;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "the pager does not come so far");
        std::thread::yield_now();
    }
}

fn kill(holder: Holder) {
    let _gone_already = kill_process(Pid::from_raw(holder.pid).unwrap(), Signal::KILL);
}

fn runs(status: &PagerStatus) -> bool {
    matches!(status.state, PagerState::Filling { .. })
}

fn kills_nobody(_: &Path) {}

fn kills_the_first_while_it_waits(path: &Path) {
    kill(until(path, |status| status.state == PagerState::Waiting && status.holders.len() == 2).holders[0]);
}

fn kills_the_first_while_it_serves(path: &Path) {
    kill(until(path, |status| status.state == PagerState::Serving).holders[0]);
}

fn kills_the_first_when_the_tasks_run(path: &Path) {
    kill(until(path, runs).holders[0]);
}

fn kills_the_first_in_the_middle(path: &Path) {
    let status = until(path, runs);
    std::thread::sleep(Duration::from_millis(60));
    kill(status.holders[0]);
}

fn kills_every_first(path: &Path) {
    for _ in 0..10 {
        // One without a second is the last that has the memory.
        let status = until(path, |status| status.holders.len() == 2 && status.state != PagerState::Starting);
        if status.state.is_last() {
            return;
        }
        kill(status.holders[0]);
        until(path, |now| now.holders[0] != status.holders[0]);
        std::thread::sleep(Duration::from_millis(15));
    }
}

fn kills_every_second(path: &Path) {
    let mut before = None;
    for _ in 0..4 {
        let status = until(path, |status| status.holders.len() == 2 && before != status.holders.last().copied());
        if status.state.is_last() {
            assert!(before.is_some());
            return;
        }
        before = status.holders.last().copied();
        kill(status.holders[1]);
    }
}

fn kills_both(path: &Path) {
    // At the same moment: whichever is left would start another.
    let status = until(path, runs);
    assert_eq!(status.holders.len(), 2);
    for holder in &status.holders {
        kill_process(Pid::from_raw(holder.pid).unwrap(), Signal::STOP).unwrap();
    }
    status.holders.iter().copied().for_each(kill);
}

fn load(mib: u32) -> Victim {
    Victim::start(&built("podferry-engine-load").unwrap(), &[mib.to_string(), "20".to_owned()]).unwrap()
}

fn churn() -> Victim {
    let victim = Victim::start(&built("podferry-memory-churn").unwrap(), &["2".to_owned(), "1".to_owned()]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    victim
}

fn migrate(victim: &mut Victim, killer: Killer) -> Migrated {
    let mut pager = Processes::killed_by(victim, killer);
    live::migrate_with(victim, false, &mut pager).unwrap()
}

#[test]
fn a_pager_process_gives_a_process_all_its_memory() {
    let mut victim = load(128);
    let migrated = migrate(&mut victim, kills_nobody);
    assert!(migrated.paged.pages >= 128 * 256, "{migrated:?}");
    victim.check().unwrap();
}

#[test]
fn a_pager_that_is_killed_at_any_stage_is_replaced_and_no_byte_is_wrong() {
    let killers: [Killer; 6] = [
        kills_the_first_while_it_waits,
        kills_the_first_while_it_serves,
        kills_the_first_when_the_tasks_run,
        kills_the_first_in_the_middle,
        kills_every_first,
        kills_every_second,
    ];
    let mut victim = load(256);
    for killer in killers {
        migrate_replaced(&mut victim, killer);
        victim.check().unwrap();
    }
}

/// One that is killed just while it takes CRIU's connection costs the restore, as `podferry_memory::pager` says: the process runs on where it
/// was. That is no replacement, and hardly happens twice.
fn migrate_replaced(victim: &mut Victim, killer: Killer) {
    for _ in 0..3 {
        let mut pager = Processes::killed_by(victim, killer);
        let Err(error) = live::migrate_with(victim, false, &mut pager) else { return };
        assert!(matches!(error, Error::Restore(_)) && victim.is_alive(), "{error}");
        eprintln!("the restore was given up: {error}");
    }
    panic!("no pager was replaced");
}

/// Moves and unmappings that a killed pager has read are not lost with it.
#[test]
fn a_process_that_changes_its_mappings_survives_its_pagers() {
    let mut victim = churn();
    for _ in 0..4 {
        migrate_replaced(&mut victim, kills_every_first);
        std::thread::sleep(Duration::from_millis(300));
        assert!(victim.is_alive(), "it ended: {}", victim.errors());
        assert_eq!(victim.errors(), "");
    }
}

#[test]
fn a_process_whose_pagers_are_all_killed_is_ended() {
    for _ in 0..3 {
        let mut victim = load(256);
        let mut pager = Processes::killed_by(&mut victim, kills_both);
        let error = live::migrate_with(&mut victim, false, &mut pager).unwrap_err();
        if matches!(error, Error::Restore(_)) {
            // They were killed before CRIU had let go of all threads: the restore has failed, and the process runs on where it was.
            assert!(victim.is_alive(), "{error}");
            continue;
        }
        assert!(matches!(pager.ended, Some(PagerState::Lost { .. })), "{error}");
        // It leaves its cgroup a moment before it is seen to have ended.
        let begun = Instant::now();
        while victim.is_alive() {
            assert!(begun.elapsed() < Duration::from_secs(5), "it runs on without its memory");
            std::thread::yield_now();
        }
        return;
    }
    panic!("CRIU was never done");
}
