//! One of every kind of object that a container may hold goes there and back, and is what it was.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use podferry_local::oci_spec::runtime::{
    Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompBuilder, LinuxSyscallBuilder,
};
use podferry_local::{FIRST_CONTAINER_ADDRESS, Workload};
use support::{Line, NODES, Stage, image};

/// What `chroot` fails with in the container: an error that it has in no other way.
const FILTERED: u32 = 117;
const WARM: &[&str] = &["--strategy", "warm"];
/// With a budget that two shared cores keep.
const LIVE: &[&str] = &["--strategy", "live", "--downtime-budget", "1000"];
/// The kind that CRIU 4.2.1 does not dump: a watch on a file of an overlay.
const INOTIFY: &str = "inotify";
/// All others, as the program names them.
const KINDS: [&str; 40] = [
    "alarm-clock",
    "appended-file",
    "changing-memfd",
    "deleted-file",
    "environment",
    "epoll-eventfd",
    "extended-attribute",
    "fifo",
    "file-offset",
    "futex",
    "hard-link",
    "heap",
    "inotify-tmpfs",
    "limits",
    "mapped-file",
    "pending-signal",
    "periodic-timerfd",
    "pipe",
    "posix-shared-memory",
    "posix-timer",
    "process-tree",
    "renamed-file",
    "seccomp",
    "shared-anonymous-memory",
    "signal-handler",
    "status",
    "subreaper",
    "system-v-ipc",
    "tcp-listener",
    "tcp-loopback",
    "terminal",
    "threads",
    "timerfd",
    "udp",
    "umask",
    "unix-datagrams",
    "unix-listener",
    "unix-stream-pair",
    "working-directory",
    "zombie",
];

/// Everything but `chroot`, which fails in a way of its own.
fn filter() -> LinuxSeccomp {
    let chroot = LinuxSyscallBuilder::default()
        .names(["chroot".to_owned()])
        .action(LinuxSeccompAction::ScmpActErrno)
        .errno_ret(FILTERED)
        .build()
        .unwrap();
    LinuxSeccompBuilder::default().default_action(LinuxSeccompAction::ScmpActAllow).syscalls([chroot]).build().unwrap()
}

/// What the program says of each kind; panics unless all are there, and `more`.
fn kinds(line: &mut Line, more: &[&str]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut next = line.ask("check");
    while next != "end" {
        let (name, words) = next.split_once(' ').unwrap_or_else(|| panic!("{next:?}"));
        found.insert(name.to_owned(), words.to_owned());
        next = line.line();
    }
    let wanted: BTreeSet<&str> = KINDS.into_iter().chain(more.iter().copied()).collect();
    assert_eq!(found.keys().map(String::as_str).collect::<BTreeSet<_>>(), wanted, "{found:#?}");
    found
}

fn assert_all_ok(line: &mut Line, place: &str, more: &[&str]) {
    let failed: Vec<_> = kinds(line, more).into_iter().filter(|(_, words)| words != "ok").collect();
    assert!(failed.is_empty(), "{place}: {failed:#?}");
}

/// Runs the program on the first node; `skipped` are kinds that it does not hold.
fn start(stage: &Stage, skipped: &str) -> Line {
    let script = "ipcmk -M 8192 && ipcmk -S 3 && ipcmk -Q && exec podferry-kinds";
    let rootfs = image(stage.folder.path(), "kinds", "podferry-kinds", &["/usr/bin/ipcmk"]);
    let mut workload = Workload::new("kinds", rootfs, ["/bin/sh", "-c", script], FIRST_CONTAINER_ADDRESS);
    workload.seccomp = Some(filter());
    workload.capabilities = Some(vec![Capability::Kill, Capability::Chown, Capability::NetBindService]);
    workload.env = vec!["KINDS=all of them, with = and blanks".to_owned(), format!("PODFERRY_KINDS_SKIP={skipped}")];
    stage.start(&workload);
    stage.connect(SocketAddr::new(FIRST_CONTAINER_ADDRESS.into(), 7000))
}

#[test]
fn every_kind_of_object_goes_there_and_back() {
    let stage = Stage::up(&["kinds"]);
    let mut line = start(&stage, INOTIFY);
    assert_all_ok(&mut line, "before the first migration", &[]);
    let hops = [(WARM, 1, "there"), (WARM, 0, "back"), (LIVE, 1, "there, live"), (LIVE, 0, "back, live")];
    for (strategy, target, hop) in hops {
        stage.migrate_with("kinds", NODES[target], strategy);
        // Twice: the first look takes up what was under way, the second what was written after the migration.
        assert_all_ok(&mut line, hop, &[]);
        assert_all_ok(&mut line, hop, &[]);
    }
}

/// CRIU cannot name the file that is watched: overlayfs gives it no handle.
#[test]
fn a_watch_on_the_overlay_is_told_and_everything_goes_on() {
    let stage = Stage::up(&["kinds"]);
    let mut line = start(&stage, "");
    assert_all_ok(&mut line, "before", &[INOTIFY]);
    let told = match stage.try_migrate("kinds", NODES[1]) {
        Ok(record) => {
            assert_eq!(record["phase"].as_str().unwrap().to_ascii_lowercase(), "failed", "{record:#}");
            record["reason"].to_string()
        }
        Err(words) => words,
    };
    assert!(told.contains("notify"), "{told}");
    assert_eq!(stage.places("kinds"), [NODES[0]]);
    assert_all_ok(&mut line, "after", &[INOTIFY]);
    assert_all_ok(&mut line, "after", &[INOTIFY]);
}
