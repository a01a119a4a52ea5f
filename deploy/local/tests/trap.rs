//! A `runc restore` that hangs and is killed: the trap in which a container's files are lost.
//!
//! runc binds the root filesystem to `ROOT/ID/criu-root` for CRIU. Killed, it leaves the mount, and `runc delete` would
//! empty the root filesystem through it.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use podferry_local::faults::stand_in::folder_with;
use podferry_local::{FIRST_CONTAINER_ADDRESS, Node, ProcessId, Signal};
use support::{NODES, Stage, redis, redis_address, redis_rootfs};

/// While this is on a node, the stand-in there hangs. Every node has a `/run` of its own.
const MARK: &str = "/run/hang";

/// A folder of programs as `programs`, with a stand-in for one of them: it hangs while [`MARK`] is there and `when` holds
/// in its shell, else it becomes the program.
fn with_stand_in(folder: &Path, programs: &Path, name: &str, when: &str) -> PathBuf {
    let hangs = format!("if test -e {MARK} && {when}; then echo hangs >>{MARK}; exec sleep 300; fi");
    folder_with(folder, programs, name, &hangs).unwrap()
}

/// The `runc restore` that runs on a node.
fn restoring(node: &Node) -> Option<ProcessId> {
    let agent = node.agent_pid()?.to_string();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let found = pids.find(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1).map(str::to_owned));
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        parent == Some(agent.clone()) && command.contains("\0restore\0")
    });
    found.and_then(ProcessId::of)
}

/// Names and sizes of all files below a folder.
fn listing(folder: &Path) -> String {
    let output = std::process::Command::new("find").arg(folder).args(["-printf", "%P %s %l\n"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines.join("\n")
}

/// Kills restores on a node that hang, until `ended`; gives how many.
fn kill_what_hangs(target: &Node, ended: impl Fn() -> bool) -> usize {
    let mounted = "/run/runc/redis/criu-root";
    let mut killed = 0;
    while !ended() {
        let hangs = fs::read_to_string(target.on_machine(Path::new(MARK))).unwrap_or_default();
        let found = (hangs.matches("hangs").count() > killed).then(|| restoring(target)).flatten();
        if let Some(restore) = found {
            let mounts = target.check(["cat", "/proc/self/mountinfo"]).unwrap();
            assert!(mounts.contains(mounted), "the trap is not set: {mounted} is not mounted:\n{mounts}");
            assert!(restore.signal(Signal::KILL) && restore.wait_gone(Duration::from_secs(10)));
            killed += 1;
        }
        thread::sleep(Duration::from_millis(20));
    }
    killed
}

/// Moves a Redis whose restore hangs on the target and is killed there, so many times; then moves it for good.
fn a_killed_restore_harms_nothing(stage: &Stage, times: usize) {
    let image = listing(&redis_rootfs());
    stage.start(&redis("redis", FIRST_CONTAINER_ADDRESS));
    let mut line = stage.connect(redis_address());
    assert_eq!(line.ask("SET kept yes"), "+OK");
    let [source, target] = NODES.map(|name| stage.node(name));
    // Back and forth once, for all that is made once and for all, such as the coordinator's connections.
    stage.migrate("redis", NODES[1]);
    stage.migrate("redis", NODES[0]);
    let bundle = target.on_machine(&target.bundle("redis"));
    let process = source.container_process("redis").unwrap();
    let before = stage.settled_census();
    target.shell(&format!(": >{MARK}")).unwrap();

    let record = thread::scope(|scope| {
        let migrating = scope.spawn(|| stage.try_migrate("redis", NODES[1]));
        assert_eq!(kill_what_hangs(&target, || migrating.is_finished()), times);
        migrating.join().unwrap().unwrap()
    });
    assert_eq!(record["phase"].as_str().unwrap().to_ascii_lowercase(), "failed", "{record:#}");

    // The source runs on, with its connection.
    assert!(process.is_alive());
    assert_eq!(stage.places("redis"), [NODES[0]]);
    assert_eq!(line.ask_bulk("GET kept"), "yes");
    // The target has what it had: an image, and a bundle without a container.
    assert_eq!(listing(&redis_rootfs()), image, "the image was harmed");
    assert!(bundle.join("config.json").is_file() && bundle.join("lower/usr/bin/redis-server").exists());
    assert!(target.runc(&["list", "--quiet"]).unwrap().success().unwrap().trim().is_empty());
    target.shell(&format!("rm {MARK}")).unwrap();
    stage.assert_census(&before, |change| change.area == "tmpfs bytes" && change.after < change.before);

    stage.migrate("redis", NODES[1]);
    assert_eq!(line.ask_bulk("GET kept"), "yes");
    assert_eq!(listing(&redis_rootfs()), image, "the image was harmed");
}

#[test]
fn a_restore_killed_while_criu_hangs_harms_nothing() {
    let stage = Stage::up_as(&["redis"], |folder, mut options| {
        // runc asks for the version first, and restores then.
        let second = format!("test $(($(grep -c called <{MARK}) % 2)) = 0");
        let when = format!("test \"$1\" = swrk && {{ echo called >>{MARK}; {second}; }}");
        options.tools = with_stand_in(&folder.join("tools"), &options.tools, "criu", &when);
        options
    });
    // The one that is started early, and the one that is started anew.
    a_killed_restore_harms_nothing(&stage, 2);
}

#[test]
fn a_restore_killed_when_all_processes_exist_harms_nothing() {
    let stage = Stage::up_as(&["redis"], |folder, mut options| {
        let when = "test \"$CRTOOLS_SCRIPT_ACTION\" = post-restore";
        options.binaries = with_stand_in(&folder.join("bin"), &options.binaries, "podferry-hook", when);
        options
    });
    a_killed_restore_harms_nothing(&stage, 1);
}
