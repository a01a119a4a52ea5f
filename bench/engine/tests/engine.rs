//! Live migration of single processes and trees with real CRIU, on this machine.

#![expect(clippy::unwrap_used, reason = "a panic is the report")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use podferry_engine_bench::error::Error;
use podferry_engine_bench::observer::Observer;
use podferry_engine_bench::restored::Waiting;
use podferry_engine_bench::tools::built;
use podferry_engine_bench::victim::Victim;
use podferry_engine_bench::{live, tools, tree};
use podferry_memory::hide;

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
fn a_restore_that_waits_and_is_given_up_ends_and_leaves_nothing() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::create_dir(folder.path().join("restore")).unwrap();
    // Given up at any moment: before CRIU has come to its images, while it comes, and while it waits.
    for moment in [0, 10, 20, 30, 40] {
        let waiting = Waiting::start(folder.path(), None).unwrap();
        std::thread::sleep(Duration::from_millis(moment));
        drop(waiting);
        assert_eq!(fs::read_dir(folder.path().join("target")).unwrap().count(), 0, "after {moment} ms");
    }
    let mut waiting = Waiting::start(folder.path(), None).unwrap();
    waiting.wait().unwrap();
    drop(waiting);
    assert_eq!(fs::read_dir(folder.path().join("target")).unwrap().count(), 0);
    assert!(!folder.path().join("restore/pid").exists());
}

#[test]
fn criu_is_told_of_mappings_what_is_known_as_long_as_they_are_as_they_were() {
    let mut victim = load(32, 10);
    // It may make its last mappings between the reading and the dump: then it is the kernel that answers.
    let told = (0..10).any(|_| dumped_with(&mut victim, str::to_owned));
    assert!(told, "the kernel was asked each time");
    let own = format!("process {}", victim.pid());
    for _ in 0..2 {
        assert!(!dumped_with(&mut victim, |known| known.replacen("rw-p", "rwxp", 1)));
        assert!(!dumped_with(&mut victim, |known| known.replacen(&own, "process 1", 1)));
        assert!(!dumped_with(&mut victim, |known| format!("{known}x\n")));
    }
    victim.check().unwrap();
}

/// Dumps the process with what is known of its mappings, changed. Says whether CRIU was told that instead of the kernel's word: what
/// is known has a flag more for each of them, which not all have.
fn dumped_with(victim: &mut Victim, change: impl Fn(&str) -> String) -> bool {
    let known = hide::mappings(victim.pid()).unwrap().replace("VmFlags: ", "VmFlags: nr ");
    let folder = victim.next_folder().unwrap();
    fs::write(folder.join("work/mapped"), change(&known)).unwrap();
    let flags = dumped_flags(victim, &folder);
    assert!(flags.len() > 10, "{flags:?}");
    flags.iter().all(|flags| flags & 0x4000 != 0)
}

/// Dumps with the shim and the file of mappings in the folder, and lets the process run on. Gives what CRIU noted as the flags of
/// each mapping (mmap(2)).
fn dumped_flags(victim: &Victim, folder: &Path) -> Vec<u64> {
    let dumped = Command::new(tools::criu().unwrap())
        .args(["dump", "--leave-running", "--manage-cgroups=ignore", "--network-lock", "skip", "-v4"])
        .args(["--log-file", "dump.log", "--tree", &victim.pid().to_string()])
        .arg("--images-dir")
        .arg(folder.join("images"))
        .arg("--work-dir")
        .arg(folder.join("work"))
        .env("LD_PRELOAD", tools::shim().unwrap())
        .env(hide::MAPPINGS_VARIABLE, folder.join("work/mapped"))
        .output()
        .unwrap();
    let log = fs::read(folder.join("work/dump.log")).unwrap();
    let log = String::from_utf8_lossy(&log);
    assert!(dumped.status.success(), "{log}");
    let of_mappings = log.lines().filter(|line| line.contains(" prot ") && line.contains(" fdflags "));
    let flags = of_mappings.filter_map(|line| line.split(" flags 0x").nth(1)?.split(' ').next());
    flags.map(|flags| u64::from_str_radix(flags, 16).unwrap()).collect()
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
            // It ran another program after it was decided what CRIU does not see, or while CRIU stopped it or let its copy go.
            Err(Error::Moved(_) | Error::Criu(_) | Error::Restore(_)) => {}
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
