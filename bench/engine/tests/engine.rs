//! Live migration of single processes and trees with real CRIU, on this machine.

#![expect(clippy::unwrap_used, reason = "a panic is the report")]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use podferry_engine_bench::error::Error;
use podferry_engine_bench::live;
use podferry_engine_bench::observer::Observer;
use podferry_engine_bench::tools::built;
use podferry_engine_bench::tree;
use podferry_engine_bench::victim::Victim;

/// cargo builds only this package's own programs for its tests.
fn other(name: &'static str) -> PathBuf {
    built(name).unwrap()
}

fn churn(threads: u32, children: u32) -> Victim {
    churn_with(threads, children, &[])
}

fn churn_with(threads: u32, children: u32, options: &[&str]) -> Victim {
    let mut arguments = vec![threads.to_string(), children.to_string()];
    arguments.extend(options.iter().map(ToString::to_string));
    let victim = Victim::start(&other("podferry-memory-churn"), &arguments).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    victim
}

fn load(mib: u32, percent: u32) -> Victim {
    Victim::start(&other("podferry-engine-load"), &[mib.to_string(), percent.to_string()]).unwrap()
}

fn assert_is_well(victim: &Victim) {
    // Long enough to look at every page a few times.
    std::thread::sleep(Duration::from_millis(300));
    assert!(victim.is_alive(), "it ended: {}", victim.errors());
    assert_eq!(victim.errors(), "");
}

#[test]
fn a_process_that_changes_its_mappings_all_the_time_is_migrated_again_and_again() {
    let mut victim = churn(2, 0);
    for _ in 0..8 {
        let migrated = live::migrate(&mut victim, true).unwrap();
        assert!(migrated.paged.pages > 0, "{migrated:?}");
        assert_is_well(&victim);
    }
}

#[test]
fn a_tree_of_processes_is_migrated_as_one() {
    let mut victim = churn(1, 3);
    for _ in 0..3 {
        assert_eq!(tree::members(victim.pid()).len(), 4);
        live::migrate(&mut victim, true).unwrap();
        assert_is_well(&victim);
    }
    assert_eq!(tree::members(victim.pid()).len(), 4);
}

#[test]
fn what_is_written_while_it_is_copied_arrives() {
    let mut victim = load(128, 40);
    for _ in 0..6 {
        let migrated = live::migrate(&mut victim, true).unwrap();
        // All of it in the first round, and most of it laid in behind the process.
        assert!(migrated.rounds[0] >= 128 * 256 && migrated.paged.pages >= 128 * 256, "{migrated:?}");
        victim.check().unwrap();
    }
}

#[test]
fn a_restore_that_fails_leaves_the_process_running_with_all_it_has() {
    let mut victim = load(32, 10);
    // In place of the file that CRIU writes the process id to.
    fs::create_dir_all(victim.upcoming_folder().join("restore/pid")).unwrap();
    let error = live::migrate(&mut victim, true).unwrap_err().to_string();
    assert!(error.contains("restore"), "{error}");
    // Ten times: a machine that is busy with other things may let it stand for a second, but not for ten.
    let runs = (0..10).any(|_| {
        let observer = Observer::watch(&victim.sign()).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        observer.longest_gap() < Duration::from_secs(1)
    });
    assert!(runs, "it stands still");
    victim.check().unwrap();
    live::migrate(&mut victim, true).unwrap();
    victim.check().unwrap();
}

#[test]
fn a_process_that_becomes_itself_anew_all_the_time_is_migrated_or_runs_on() {
    let mut victim = churn_with(1, 0, &["--exec", "150"]);
    let mut migrated = 0;
    for _ in 0..8 {
        match live::migrate(&mut victim, true) {
            Ok(_) => migrated += 1,
            // It ran another program after it was decided what CRIU does not see, or while CRIU stopped it.
            Err(Error::Moved(_) | Error::Criu(_)) => {}
            Err(error) => panic!("{error}"),
        }
        assert_is_well(&victim);
    }
    assert!(migrated > 0);
}

#[test]
fn a_process_that_reads_directly_is_left_to_criu() {
    let file = std::env::temp_dir().join(format!("podferry-direct-{}", std::process::id()));
    let mut victim = churn_with(1, 0, &["--direct", file.to_str().unwrap()]);
    for _ in 0..3 {
        let migrated = live::migrate(&mut victim, true).unwrap();
        assert_eq!(migrated.rounds.iter().sum::<u64>(), 0, "{migrated:?}");
        assert_is_well(&victim);
    }
    fs::remove_file(&file).unwrap();
}
