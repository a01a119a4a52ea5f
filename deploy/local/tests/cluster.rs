//! Real clusters on this machine. They need root and the tools of `deploy/setup/setup.sh`.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

use podferry_local::{Error, FIRST_CONTAINER_ADDRESS, LocalCluster, Options, Place, Signal, Workload, workspace_root};

/// How long anything here may take, also on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);
/// Set for the process that is going to be killed: the folder to bring a cluster up in.
const CREATOR_FOLDER: &str = "PODFERRY_LOCAL_TEST_FOLDER";

/// Options for a cluster without agents. `cargo test` builds this crate's own program only, so the keeper is built here
/// when nobody has yet.
fn options(folder: impl Into<PathBuf>) -> Options {
    static KEEPER: Once = Once::new();
    let options = Options::new(folder).without_agents();
    KEEPER.call_once(|| {
        if options.binaries.join("podferry-stdio-keeper").exists() {
            return;
        }
        let release = options.binaries.ends_with("release").then_some("--release");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "podferry-runtime", "--bins"]).args(release);
        assert!(build.current_dir(workspace_root()).status().unwrap().success());
    });
    options
}

/// What the machine has of a cluster: empty when nothing was left behind.
fn traces(suffix: &str, folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let prefix = format!("pf-{suffix}-");
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    found.extend(names.map(|entry| entry.path().display().to_string()).filter(|path| path.contains(&prefix)));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = |line: &&str| line.contains(&prefix) || line.contains(folder.to_str().unwrap());
    found.extend(mounts.lines().filter(ours).map(str::to_owned));
    let mut find = Command::new("find");
    find.args(["/sys/fs/cgroup", "-maxdepth", "2", "-name"]).arg(format!("podferry-local-{suffix}-*"));
    let output = find.output().unwrap();
    found.extend(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned));
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let command = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        let is_self = entry.file_name().to_str() == Some(&std::process::id().to_string());
        if !is_self && (command.contains(&prefix) || command.contains(folder.to_str().unwrap())) {
            found.push(format!("process {}: {command}", entry.file_name().display()));
        }
    }
    found
}

/// Waits until nothing is left: killed processes stay for a moment as zombies, without a command line.
fn assert_no_traces(suffix: &str, folder: &Path) {
    let end = Instant::now() + PATIENCE;
    while !traces(suffix, folder).is_empty() && Instant::now() < end {
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(traces(suffix, folder), Vec::<String>::new());
}

fn own_links() -> String {
    let output = Command::new("ip").args(["-oneline", "link"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn redis_rootfs() -> PathBuf {
    let rootfs = workspace_root().join(".podferry/images/redis/rootfs");
    assert!(rootfs.join("usr/bin/redis-server").exists(), "{} is missing: run deploy/setup/setup.sh", rootfs.display());
    rootfs
}

fn redis(name: &str) -> Workload {
    let arguments = ["/bin/redis-server", "--protected-mode", "no", "--save", "", "--dir", "/data"];
    Workload::new(name, redis_rootfs(), arguments, FIRST_CONTAINER_ADDRESS)
}

/// Sends one inline command to the Redis at the first container address and gives its answer.
fn ask_redis(from: &Place, question: &str) -> String {
    let script = format!(
        "for i in $(seq 600); do
           if exec 3<>/dev/tcp/{FIRST_CONTAINER_ADDRESS}/6379; then
             printf '{question}\\r\\n' >&3; read -r -t 30 line <&3; echo \"$line\"; exit 0
           fi 2>/dev/null; sleep 0.05
         done; exit 1"
    );
    from.check(["bash", "-c", &script]).unwrap().trim().to_owned()
}

#[test]
fn nothing_is_left_of_a_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let links = own_links();
    let wanted = options(folder.path());
    let mut cluster = LocalCluster::up(&wanted).unwrap();
    let suffix = cluster.suffix().to_owned();
    assert!(!traces(&suffix, cluster.folder()).is_empty());
    assert!(matches!(LocalCluster::up(&wanted), Err(Error::AlreadyUp { .. })));

    let other = tempfile::tempdir().unwrap();
    let same_names = options(other.path()).with_suffix(&suffix);
    assert!(matches!(LocalCluster::up(&same_names), Err(Error::Invalid(_))));
    // A refused connection comes from the other side, so the way there and back is open.
    let output = cluster.client().exec(["bash", "-c", "exec 3<>/dev/tcp/10.88.0.12/9"]).unwrap();
    assert!(output.stderr.contains("refused"), "{}", output.stderr);

    cluster.down().unwrap();
    cluster.down().unwrap();
    assert_no_traces(&suffix, folder.path());
    assert_eq!(own_links(), links);
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["logs"]);
}

#[test]
fn a_node_has_its_own_namespaces_and_reaps() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = LocalCluster::up(&options(folder.path())).unwrap();
    let node = cluster.node("node-a").unwrap();
    assert_eq!(node.check(["hostname"]).or_else(|_| node.check(["uname", "-n"])).unwrap().trim(), "node-a");
    assert_eq!(node.check(["cat", "/proc/1/comm"]).unwrap().trim(), "podferry-node-i");
    assert!(matches!(cluster.node("node-c"), Err(Error::UnknownNode { .. })));

    // An orphan becomes a child of the node's first process, and is collected when it ends.
    let orphan = node.shell("(sleep 0.2; :) >/dev/null 2>&1 & echo $!").unwrap();
    let end = Instant::now() + PATIENCE;
    while node.exec(["test", "-e", &format!("/proc/{}", orphan.trim())]).unwrap().status.success() {
        assert!(Instant::now() < end, "the orphan was not reaped");
    }

    node.shell("echo secret > /run/mark").unwrap();
    assert!(node.on_machine(Path::new("/run/mark")).exists());
    assert!(!cluster.node("node-b").unwrap().on_machine(Path::new("/run/mark")).exists());
    assert!(!Path::new("/run/mark").exists());

    let mut sleeper = node.spawn(["sleep", "60"]).unwrap();
    let comm = fs::read_to_string(format!("/proc/{}/comm", sleeper.pid())).unwrap();
    assert_eq!(comm.trim(), "sleep");
    assert!(sleeper.signal(Signal::KILL));
    assert!(sleeper.wait(PATIENCE).is_some());

    let failed = node.check(["sh", "-c", "echo why >&2; exit 3"]).unwrap_err().to_string();
    assert!(failed.contains("exit code 3: why"), "{failed}");
    let late = node.exec_within(["sleep", "60"], Duration::from_millis(300));
    assert!(matches!(late, Err(Error::Timeout { .. })));
}

#[test]
fn a_container_answers_the_client_and_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = LocalCluster::up(&options(folder.path())).unwrap();
    let suffix = cluster.suffix().to_owned();
    let (source, target) = (cluster.node("node-a").unwrap(), cluster.node("node-b").unwrap());
    // iptables makes a lock file in /run once.
    cluster.census().unwrap();
    let before = cluster.census().unwrap();

    let workload = redis("redis");
    let container = cluster.start_workload("node-a", &workload).unwrap();
    assert!(container.process.is_alive());
    cluster.register_workloads(["redis"]).unwrap();
    let inventory = fs::read_to_string(cluster.coordinator().inventory()).unwrap();
    assert_eq!(inventory.matches("redis").count(), 1, "{inventory}");
    assert_eq!(ask_redis(cluster.client(), "PING"), "+PONG");
    assert_eq!(ask_redis(&target, "SET a 1"), "+OK");
    assert_eq!(source.container_process("redis").unwrap(), container.process);
    // The keeper writes down what Redis said before it answered.
    let end = Instant::now() + PATIENCE;
    while !fs::read_to_string(&container.log).unwrap().contains("Ready to accept connections") {
        assert!(Instant::now() < end, "{:?}", fs::read_to_string(&container.log));
        thread::sleep(Duration::from_millis(10));
    }
    let streams = |number: u32| fs::read_link(format!("/proc/{}/fd/{number}", container.process.pid)).unwrap();
    assert!(streams(1).to_str().unwrap().starts_with("pipe:"), "{:?}", streams(1));

    let bundle = target.prepare_workload(&workload).unwrap();
    let prepared = target.on_machine(&bundle);
    assert!(prepared.join("config.json").is_file() && prepared.join("lower/usr/bin/redis-server").exists());
    assert!(fs::read_dir(prepared.join("rootfs")).unwrap().next().is_none());

    source.shell("tc qdisc add dev v-redis clsact; tc filter add dev v-redis egress bpf bytecode '1,6 0 0 0'").unwrap();
    let during = before.difference(&cluster.census().unwrap());
    let words = during.to_string();
    for expected in [
        "mounts of node-a",
        "cgroups of node-a",
        "links of node-a: v-redis",
        "traffic control of node-a: clsact: 0 -> 1",
        "traffic control of node-a: filter of clsact egress: 0 -> 1",
        "processes of node-a: redis",
    ] {
        assert!(words.contains(expected), "{expected} is missing in:\n{words}");
    }

    source.remove_workload("redis").unwrap();
    target.remove_workload("redis").unwrap();
    let end = Instant::now() + PATIENCE;
    loop {
        let left = before.difference(&cluster.census().unwrap());
        if left.changes.iter().all(|change| change.area == "tmpfs bytes") {
            break;
        }
        assert!(Instant::now() < end, "{left}");
    }
    cluster.down().unwrap();
    assert_no_traces(&suffix, folder.path());
}

#[test]
fn criu_works_on_a_node() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = LocalCluster::up(&options(folder.path())).unwrap();
    let node = cluster.node("node-a").unwrap();
    node.start_workload(&redis("redis")).unwrap();
    assert_eq!(ask_redis(cluster.client(), "SET kept yes"), "+OK");
    let (images, bundle) = (node.images(), node.bundle("redis"));
    let images = images.display();
    let checkpoint = format!("runc --root /run/runc checkpoint --tcp-established --image-path {images} redis");
    node.shell(&checkpoint).unwrap();
    assert!(fs::read_dir(node.images()).unwrap().next().is_none(), "images belong into the node's own tmpfs");
    assert!(node.container_process("redis").is_err());
    node.shell(&format!(
        "runc --root /run/runc restore --detach --tcp-established --image-path {images} --bundle {} redis \
           </dev/null >/dev/null 2>&1",
        bundle.display()
    ))
    .unwrap();
    assert_eq!(ask_redis(cluster.client(), "EXISTS kept"), ":1");
    node.remove_workload("redis").unwrap();
}

#[test]
fn a_frozen_container_and_one_on_a_terminal_go_down_with_the_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = LocalCluster::up(&options(folder.path())).unwrap();
    let suffix = cluster.suffix().to_owned();
    let node = cluster.node("node-a").unwrap();
    let script = "echo on $(readlink /proc/self/fd/0); sleep 600";
    let mut shell = Workload::new("shell", redis_rootfs(), ["/bin/sh", "-c", script], FIRST_CONTAINER_ADDRESS);
    shell.terminal = true;
    let container = node.start_workload(&shell).unwrap();
    let end = Instant::now() + PATIENCE;
    while !fs::read_to_string(&container.log).unwrap().contains("on /dev/pts/0") {
        assert!(Instant::now() < end, "{:?}", fs::read_to_string(&container.log));
        thread::sleep(Duration::from_millis(10));
    }
    node.runc(&["pause", "shell"]).unwrap().success().unwrap();
    cluster.down().unwrap();
    assert!(!container.process.is_alive());
    assert_no_traces(&suffix, folder.path());
}

#[test]
fn a_container_that_cannot_start_says_why_and_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = LocalCluster::up(&options(folder.path())).unwrap();
    let node = cluster.node("node-a").unwrap();
    let broken = Workload::new("broken", redis_rootfs(), ["/bin/no-such-program"], FIRST_CONTAINER_ADDRESS);
    let error = node.start_workload(&broken).unwrap_err().to_string();
    assert!(error.contains("no-such-program"), "{error}");
    assert!(!node.on_machine(&node.bundle("broken")).exists());
    assert!(node.runc(&["list", "--quiet"]).unwrap().success().unwrap().trim().is_empty());
}

/// Not only a test: the next one runs it in a process of its own and kills that.
#[test]
fn creator() {
    let Some(folder) = std::env::var_os(CREATOR_FOLDER) else {
        let folder = tempfile::tempdir().unwrap();
        let cluster = LocalCluster::up(&options(folder.path())).unwrap();
        let suffix = cluster.suffix().to_owned();
        drop(cluster);
        assert_no_traces(&suffix, folder.path());
        return;
    };
    let cluster = LocalCluster::up(&options(folder)).unwrap();
    cluster.node("node-a").unwrap().start_workload(&redis("redis")).unwrap();
    let _sleeper = cluster.client().spawn(["sleep", "600"]).unwrap();
    println!("up {}", cluster.suffix());
    thread::sleep(Duration::from_secs(600));
}

#[test]
fn mounts_and_run_are_as_before() {
    options("/nowhere");
    // A mount namespace with a /run of its own: nobody else on this machine adds to it meanwhile.
    // Names that others keep under /run/netns leave every mount namespace when they are removed,
    // also a copy that is covered: so this one lets go of them first.
    let script = "while umount --lazy /run/netns; do :; done
        mount -t tmpfs tmpfs /run
        before=$(cat /proc/self/mountinfo)
        \"$0\" creator --exact
        test \"$before\" = \"$(cat /proc/self/mountinfo)\"
        ls -A /run; test -z \"$(ls -A /run)\"";
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-euxc", script])
        .arg(std::env::current_exe().unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}

#[test]
fn a_cluster_whose_creator_was_killed_is_used_and_swept() {
    let folder = tempfile::tempdir().unwrap();
    let mut creator = Command::new(std::env::current_exe().unwrap())
        .args(["creator", "--exact", "--nocapture"])
        .env(CREATOR_FOLDER, folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(creator.stdout.take().unwrap()).lines();
    let suffix = lines.map_while(Result::ok).find_map(|line| line.split_once("up ").map(|(_, word)| word.to_owned()));
    creator.kill().unwrap();
    creator.wait().unwrap();
    let suffix = suffix.expect("the creator ended before its cluster was up");

    let cluster = LocalCluster::attach(folder.path()).unwrap();
    assert_eq!(cluster.suffix(), suffix);
    assert_eq!(ask_redis(cluster.client(), "PING"), "+PONG");
    drop(cluster);
    assert!(!traces(&suffix, folder.path()).is_empty(), "an attached cluster must outlive its handle");

    LocalCluster::sweep(folder.path()).unwrap();
    assert_no_traces(&suffix, folder.path());
    LocalCluster::sweep(folder.path()).unwrap();
    assert!(matches!(LocalCluster::attach(folder.path()), Err(Error::NotUp { .. })));
}

#[test]
fn options_that_cannot_work_are_refused_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let good = options(folder.path().join("cluster"));
    let refused = |options: Options| LocalCluster::up(&options).unwrap_err().to_string();
    assert!(refused(good.clone().with_suffix("Not/good")).contains("suffix"));
    assert!(refused(Options { nodes: vec!["a".into(), "a".into()], ..good.clone() }).contains("taken"));
    assert!(refused(Options { nodes: Vec::new(), ..good.clone() }).contains("0 nodes"));
    let missing = Options { tools: "/nowhere".into(), ..good.clone() };
    assert!(refused(missing).contains("deploy/setup/setup.sh"));
    assert!(!good.folder.exists());
}
