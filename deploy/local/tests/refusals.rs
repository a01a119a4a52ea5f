//! What cannot be moved is refused with the reason, and what goes wrong on the way is undone: the source runs on with its
//! connection, and the target has nothing of it.

#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

mod faults;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use faults::client::connect;
use faults::leftovers::{difference, settled};
use faults::stage::{NAME, NODES, Stage, agent};
use faults::{options, processes, redis, serial, wait_every, wait_for};
use podferry_common::identity::{IdentityFiles, LocalCa, Peer};
use podferry_common::{MigrationId, tls};
use podferry_local::faults::links::Slow;
use podferry_local::{BindMount, LocalCluster, Node, Output, Workload, workspace_root};
use podferry_proto::Version;
use podferry_proto::v1::agent_service_client::AgentServiceClient;
use podferry_proto::v1::carry_request::Kind;
use podferry_proto::v1::relay_service_client::RelayServiceClient;
use podferry_proto::v1::{CarryBegin, CarryPackets, CarryRequest, FreezeRequest};
use podferry_transfer::{Introduction, Options, Sender};
use serde_json::Value;

/// Exit codes of the command line, as its help lists them.
const FAILED: i32 = 1;
const USAGE: i32 = 2;
const REFUSED: i32 = 3;
const NOT_FOUND: i32 = 4;
const UNREACHABLE: i32 = 5;
const CANCELLED: i32 = 6;
/// What Redis holds, in MiB: on the slow link a transfer of seconds.
const MEMORY: usize = 6;

/// A failed request has this exit code, and its words name what, why, and what to do.
fn assert_refused(output: &Output, code: i32, words: &[&str]) {
    let said = format!("{}{}", output.stdout, output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    let error = output.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).next_back();
    let error = error.unwrap_or_else(|| panic!("no error in JSON: {said}"))["error"].clone();
    for word in words {
        assert!(error.to_string().contains(word), "{word:?} is missing in {error}");
    }
    assert!(error["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "no remedy in {error}");
}

fn migrate(cluster: &LocalCluster, workload: &str, target: &str) -> Output {
    let words = ["migrate", workload, "--to", target, "--strategy", "warm", "--wait", "--output", "json"];
    cluster.podferry(words).unwrap()
}

/// The source runs on with its connection, and nothing was left anywhere.
fn assert_untouched(stage: &Stage, when: &str) {
    assert_eq!(stage.at, 0);
    stage.assert_sound(when);
}

fn stage() -> Stage {
    let mut stage = Stage::up_unmoved(MEMORY);
    stage.take_stock();
    stage
}

#[test]
fn what_makes_no_sense_or_cannot_work_on_the_target_is_refused() {
    let _one_at_a_time = serial();
    let mut stage = stage();
    let [source, target] = NODES;
    assert_refused(&migrate(&stage.cluster, "postgres", target), NOT_FOUND, &["postgres", "redis"]);
    assert_refused(&migrate(&stage.cluster, NAME, "node-z"), NOT_FOUND, &["node-z", "node-a", "node-b"]);
    assert_refused(&migrate(&stage.cluster, NAME, source), USAGE, &[source, "runs there already"]);
    assert_untouched(&stage, "after what makes no sense");

    without_criu(&stage);
    without_bundle(&mut stage);
    with_little_room_for_images(&stage);
    with_little_room_for_files(&mut stage);
    stage.migrate();
    stage.assert_alive("after the migration that works");
}

fn without_criu(stage: &Stage) {
    let node = stage.target();
    let config = fs::read_to_string(node.agent_config()).unwrap();
    let criu = podferry_local::default_tools().canonicalize().unwrap().join("criu").display().to_string();
    assert!(config.contains(&criu), "{config}");
    let restart_with = |config: &str| {
        fs::write(node.agent_config(), config).unwrap();
        node.kill_agent(podferry_local::Signal::TERM).unwrap();
        Stage::restart_agent(&node);
    };
    restart_with(&config.replace(&criu, "/nowhere/criu"));
    let nodes: Value = serde_json::from_str(&stage.podferry(&["nodes", "--output", "json"]).stdout).unwrap();
    let unfit = nodes.as_array().unwrap().iter().find(|other| other["name"] == node.name()).unwrap();
    assert_eq!(unfit["fit"], false, "{unfit}");
    assert!(unfit["complaints"].to_string().contains("/nowhere/criu"), "{unfit}");
    assert_refused(&migrate(&stage.cluster, NAME, node.name()), REFUSED, &[node.name(), "/nowhere/criu"]);
    restart_with(&config);
    assert_untouched(stage, "after a target without CRIU");
}

fn without_bundle(stage: &mut Stage) {
    let node = stage.target();
    node.remove_workload(NAME).unwrap();
    assert_refused(&migrate(&stage.cluster, NAME, node.name()), REFUSED, &[node.name(), "config.json", "bundle"]);
    stage.cluster.prepare_workload(node.name(), &redis()).unwrap();
    assert_untouched(stage, "after a target without a bundle");
}

fn with_little_room_for_images(stage: &Stage) {
    let node = stage.target();
    let images = node.images();
    let resize = |size: &str| node.shell(&format!("mount -o remount,size={size} {}", images.display())).map(drop);
    resize("4m").unwrap();
    assert_refused(&migrate(&stage.cluster, NAME, node.name()), REFUSED, &[node.name(), "4 MiB are free"]);
    resize("50%").unwrap();
    assert_untouched(stage, "after a target with little room for images");
}

fn with_little_room_for_files(stage: &mut Stage) {
    let node = stage.target();
    let bundles = node.bundles().display().to_string();
    node.remove_workload(NAME).unwrap();
    node.shell(&format!("mount -t tmpfs -o size=8m tmpfs {bundles}")).unwrap();
    stage.cluster.prepare_workload(node.name(), &redis()).unwrap();
    assert_refused(&migrate(&stage.cluster, NAME, node.name()), REFUSED, &[node.name(), "bytes", &bundles]);
    stage.assert_alive("after a target with little room for files");
    stage.assert_one_copy("after a target with little room for files");
    node.remove_workload(NAME).unwrap();
    node.shell(&format!("umount {bundles}")).unwrap();
    stage.cluster.prepare_workload(node.name(), &redis()).unwrap();
    assert_untouched(stage, "after a target with little room for files");
}

/// Perl is part of every Debian and Ubuntu, and makes any system call.
fn perl_image(folder: &Path) -> PathBuf {
    let mut make = Command::new(workspace_root().join("deploy/setup/image.sh"));
    let status = make.arg("perl").arg(folder).args(["--", "/usr/bin/perl"]).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "deploy/setup/image.sh failed: {status}");
    folder.join("rootfs")
}

#[test]
fn what_criu_cannot_dump_is_refused_with_the_process_that_has_it() {
    let _one_at_a_time = serial();
    let folder = tempfile::tempdir().unwrap();
    let rootfs = perl_image(&folder.path().join("image"));
    let shared = folder.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let daemon = UnixListener::bind(shared.join("daemon.sock")).unwrap();
    let accepting = thread::spawn(move || daemon.accept().unwrap());

    let setup = if cfg!(target_arch = "x86_64") { 206 } else { 0 };
    let mut programs = vec![
        // io_uring_setup(2) has the same number everywhere.
        ("uring", "my $p = \"\\0\" x 120; syscall(425, 4, $p) >= 0 or die $!;".to_owned(), "io-uring"),
        ("aio", format!("my $c = \"\\0\" x 8; syscall({setup}, 8, $c) == 0 or die $!;"), "async-io"),
        (
            "unix",
            "socket(my $s, 1, 1, 0) or die $!; connect($s, pack('Sa108', 1, '/shared/daemon.sock')) or die $!;"
                .to_owned(),
            "external-unix-socket",
        ),
        // IPPROTO_MPTCP of linux/in.h.
        ("mptcp", "socket(my $s, 2, 1, 262) or die $!;".to_owned(), "mptcp"),
    ];
    // Where root has it, CRIU dumps processes of any user.
    if !has_sys_resource() {
        programs.push(("user", "$( = $) = 70; $< = $> = 70; $> == 70 or die $!;".to_owned(), "other-user"));
    }
    let mut options = options(folder.path().join("cluster"));
    options.workloads =
        programs.iter().map(|(name, ..)| (*name).to_owned()).chain(["stdio", "paused"].map(str::to_owned)).collect();
    let cluster = LocalCluster::up(&options).unwrap();
    let (source, target) = (cluster.node(NODES[0]).unwrap(), cluster.node(NODES[1]).unwrap());
    let workload = |name: &str, script: &str, number: u8| {
        let script = format!("$| = 1; {script} print \"ready\\n\"; sleep 1 while 1;");
        let address = Ipv4Addr::new(10, 88, 0, 110 + number);
        let mut workload = Workload::new(name, &rootfs, ["/usr/bin/perl", "-e", &script], address);
        workload.mounts = vec![BindMount { source: shared.clone(), destination: "/shared".into(), read_only: false }];
        workload
    };
    for ((name, script, _), number) in programs.iter().zip(0..) {
        let workload = workload(name, script, number);
        let container = source.start_workload(&workload).unwrap();
        target.prepare_workload(&workload).unwrap();
        wait_for("the program to be ready", || {
            fs::read_to_string(&container.log).ok()?.contains("ready").then_some(())
        });
    }
    let _connection = accepting.join().unwrap();
    let stdio = workload("stdio", "", 9);
    target.prepare_workload(&stdio).unwrap();
    let log = run_onto_a_file(&source, &stdio);
    let paused = workload("paused", "", 10);
    source.start_workload(&paused).unwrap();
    target.prepare_workload(&paused).unwrap();
    source.runc(&["pause", "paused"]).unwrap().success().unwrap();

    let before = settled(&cluster).unwrap();
    for (name, _, kind) in &programs {
        let pid = inner_pid(&source, name);
        assert_refused(&migrate(&cluster, name, target.name()), REFUSED, &[source.name(), kind, &format!("pid {pid}")]);
        assert!(source.container_process(name).unwrap().is_alive());
    }
    let words = [source.name(), "host-stdio", "fd 1", &log.display().to_string()];
    assert_refused(&migrate(&cluster, "stdio", target.name()), REFUSED, &words);
    assert!(source.container_process("stdio").unwrap().is_alive());
    assert_refused(&migrate(&cluster, "paused", target.name()), REFUSED, &[source.name(), "runc", "resume paused"]);
    assert_eq!(status(&source, "paused"), "paused");
    assert_eq!(difference(&before, &settled(&cluster).unwrap()), Vec::<String>::new());
}

fn has_sys_resource() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() & 1 << 24 != 0
}

fn inner_pid(node: &Node, name: &str) -> u64 {
    state(node, name)["pid"].as_u64().unwrap()
}

/// What runc says of the container: `running`, `paused`.
fn status(node: &Node, name: &str) -> String {
    state(node, name)["status"].as_str().unwrap().to_owned()
}

fn state(node: &Node, name: &str) -> Value {
    serde_json::from_str(&node.runc(&["state", name]).unwrap().success().unwrap()).unwrap()
}

/// As somebody may who runs runc by hand: with the container's output in a file of the node.
fn run_onto_a_file(node: &Node, workload: &Workload) -> PathBuf {
    let container = node.start_workload(workload).unwrap();
    node.runc(&["delete", "--force", &workload.name]).unwrap().success().unwrap();
    let log = node.container_logs().join("by-hand.log");
    let mut run = node.command("runc");
    run.args(["--root", podferry_local::RUNC_ROOT, "run", "--detach", "--bundle"]).arg(container.bundle);
    run.arg(&workload.name).stdin(Stdio::null()).stdout(File::create(&log).unwrap()).stderr(Stdio::null());
    assert!(run.status().unwrap().success());
    wait_for("the program to be ready", || fs::read_to_string(&log).ok()?.contains("ready").then_some(()));
    log
}

#[test]
fn strangers_get_nowhere() {
    let _one_at_a_time = serial();
    let mut stage = stage();
    a_client_of_another_authority(&stage);
    an_agent_that_plays_coordinator(&stage);
    an_agent_that_relays_what_nobody_expects(&stage);
    noise_on_the_ports(&stage);
    assert_untouched(&stage, "after strangers");
    an_agent_that_sends_what_another_should(&mut stage);
    stage.migrate();
    stage.assert_alive("after the migration that works");
}

fn a_client_of_another_authority(stage: &Stage) {
    let folder = stage.folder.path().join("other");
    let other = LocalCa::create(&folder.join("authority")).unwrap();
    fs::create_dir_all(folder.join("client")).unwrap();
    let files = IdentityFiles::in_folder(folder.join("client"));
    other.issue(&Peer::client("mallory").unwrap(), Duration::from_secs(3600), &files).unwrap();
    // The cluster's own authority, so that it is the coordinator who refuses.
    fs::copy(stage.cluster.client_identity().ca, &files.ca).unwrap();
    let mut command = stage.cluster.podferry_command();
    command.env("PODFERRY_IDENTITY", folder.join("client"));
    command.args(["migrate", NAME, "--to", NODES[1], "--output", "json"]).stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!([USAGE, REFUSED, UNREACHABLE].contains(&output.status.code().unwrap()), "{said}");
    let error: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert!(error.to_string().contains("certificate"), "{error}");
    assert!(error["error"]["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{error}");
}

fn an_agent_that_plays_coordinator(stage: &Stage) {
    let source = stage.source();
    let target = Peer::Agent(NODES[1].parse().unwrap());
    let identity = stage.identity(&target, "plays-coordinator");
    let address = format!("{}:{}", source.address(), podferry_local::AGENT_PORT);
    let expected = Peer::Agent(source.name().parse().unwrap());
    let refused = stage.run_inside(async {
        let channel = tls::connect(&address, &identity, &expected).await.unwrap();
        let request = FreezeRequest {
            migration_id: MigrationId::new().to_string(),
            workload: NAME.to_owned(),
            target_node: NODES[1].to_owned(),
            target_address: "10.88.0.12:7443".to_owned(),
            deadline_ms: 60_000,
            ..FreezeRequest::default()
        };
        AgentServiceClient::new(channel).freeze(request).await.map(drop).unwrap_err()
    });
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    assert!(refused.message().contains("only the coordinator"), "{refused}");
}

fn an_agent_that_relays_what_nobody_expects(stage: &Stage) {
    let source = stage.source();
    let other = Peer::Agent(NODES[1].parse().unwrap());
    let identity = stage.identity(&other, "relays");
    let address = format!("{}:{}", source.address(), podferry_local::AGENT_PORT);
    let expected = Peer::Agent(source.name().parse().unwrap());
    let begin = Kind::Begin(CarryBegin { migration_id: MigrationId::new().to_string() });
    for (first, code) in
        [(begin, tonic::Code::NotFound), (Kind::Packets(CarryPackets::default()), tonic::Code::InvalidArgument)]
    {
        let refused = stage.run_inside(async {
            let channel = tls::connect(&address, &identity, &expected).await.unwrap();
            let messages = tokio_stream::once(CarryRequest { kind: Some(first) });
            RelayServiceClient::new(channel).carry(messages).await.map(drop).unwrap_err()
        });
        assert_eq!(refused.code(), code, "{refused}");
    }
}

fn noise_on_the_ports(stage: &Stage) {
    let port = podferry_local::AGENT_PORT;
    let mut addresses: Vec<SocketAddr> =
        stage.cluster.nodes().iter().map(|node| (node.address(), port).into()).collect();
    addresses.push(stage.cluster.coordinator().address().parse().unwrap());
    let mut open = Vec::new();
    for address in addresses {
        let noise: Vec<u8> = (0..64_u32 << 10).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let hello = b"\x16\x03\x01\xff\xff\x01\x00";
        for text in [&noise[..], b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", hello, b""] {
            let mut stream = connect(stage.cluster.client(), address).unwrap();
            // It may hang up in the middle.
            let _ = stream.write_all(text);
            open.push(stream);
        }
    }
    // While they are all open, everybody else is served.
    let nodes = stage.podferry(&["nodes", "--output", "json"]);
    let nodes: Value = serde_json::from_str(&nodes.stdout).unwrap();
    assert!(nodes.as_array().unwrap().iter().all(|node| node["fit"] == true), "{nodes}");
    for mut stream in open {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // An alert at most, and then the end: nobody is let stay.
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        let reset = ended.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        assert!(ended.is_ok() || reset, "{ended:?} after {} bytes", answer.len());
        assert!(answer.len() < 1024, "{} bytes for a stranger", answer.len());
    }
}

fn an_agent_that_sends_what_another_should(stage: &mut Stage) {
    let target = stage.target();
    let slow = stage.slow_down(&target);
    let begun = stage.begin();
    let id = begun.id();
    begun.wait_phase("freeze");
    let stranger = Peer::Agent("node-c".parse().unwrap());
    let identity = stage.identity(&stranger, "stranger");
    let address = format!("{}:{}", target.address(), podferry_local::AGENT_PORT);
    let expected = Peer::Agent(target.name().parse().unwrap());
    for migration in [id.parse::<MigrationId>().unwrap(), MigrationId::new()] {
        let introduction =
            Introduction { migration_id: migration, source_node: "node-c".parse().unwrap(), version: Version::OURS };
        let sent = stage.run_inside(async {
            Sender::connect(&address, &identity, &expected, &introduction, Options::default()).await.map(drop)
        });
        let error = podferry_common::chain(&sent.unwrap_err());
        assert!(error.contains("named another source") || error.contains("not expected here"), "{error}");
    }
    drop(slow);
    let (phase, reason) = stage.ended(&id);
    assert_eq!(phase, "succeeded", "a stranger disturbed it: {reason}");
    stage.assert_alive("after a stranger's transfer");
}

#[test]
fn a_migration_that_breaks_or_is_cancelled_on_the_way_is_undone() {
    let _one_at_a_time = serial();
    let mut stage = Stage::up(MEMORY);
    a_second_migration_and_a_cancel(&mut stage);
    a_target_that_fills_up(&mut stage);
    a_link_that_breaks(&mut stage);
    stage.migrate();
    stage.assert_sound("after the migration that works");
}

/// Until pages arrive at the target.
fn in_mid_transfer(stage: &Stage) -> (Slow, faults::stage::Begun, String) {
    let slow = stage.slow_down(&stage.target());
    let begun = stage.begin();
    let id = begun.id();
    wait_every(Duration::from_micros(500), "the tasks to be stopped", || stage.is_stopped().then_some(()));
    let images = stage.target().on_machine(&stage.target().images().join(&id).join("images"));
    wait_for("pages at the target", || {
        let bytes: u64 =
            fs::read_dir(&images).ok()?.flatten().filter_map(|file| Some(file.metadata().ok()?.len())).sum();
        (bytes > 200 << 10).then_some(())
    });
    (slow, begun, id)
}

fn a_second_migration_and_a_cancel(stage: &mut Stage) {
    let target = stage.target();
    let (slow, _begun, id) = in_mid_transfer(stage);
    assert_refused(&migrate(&stage.cluster, NAME, target.name()), REFUSED, &[NAME, &id]);
    let begun = Instant::now();
    let output = stage.podferry(&["cancel", &id, "--output", "json"]);
    assert!(output.status.success(), "{}", output.stderr);
    let (phase, reason) = stage.ended(&id);
    assert_eq!(phase, "cancelled", "{reason}");
    assert!(reason.contains("cancelled by"), "{reason}");
    assert!(begun.elapsed() < Duration::from_secs(15), "a cancel took {:?}", begun.elapsed());
    drop(slow);
    stage.assert_sound("after a cancel");
    let watched = stage.podferry(&["watch", &id]);
    assert_eq!(watched.status.code(), Some(CANCELLED), "{}", watched.stderr);
    let late = stage.podferry(&["cancel", &id, "--output", "json"]);
    assert_eq!(late.status.code(), Some(REFUSED), "{}", late.stderr);
}

fn a_target_that_fills_up(stage: &mut Stage) {
    let target = stage.target();
    let images = target.images();
    let (slow, _begun, id) = in_mid_transfer(stage);
    target.shell(&format!("mount -o remount,size=2m {}", images.display())).unwrap();
    let (phase, reason) = stage.ended(&id);
    target.shell(&format!("mount -o remount,size=50% {}", images.display())).unwrap();
    drop(slow);
    assert_eq!(phase, "failed", "{reason}");
    // Whether the source is told so first or the target says it: where, and what.
    let images = images.display().to_string();
    for word in ["No space left", "cannot write the image", &images, "make room", target.name()] {
        assert!(reason.contains(word), "{word:?} is missing in {reason}");
    }
    let watched = stage.podferry(&["watch", &id]);
    assert_eq!(watched.status.code(), Some(FAILED), "{}", watched.stderr);
    stage.assert_sound("after a target that filled up");
}

fn a_link_that_breaks(stage: &mut Stage) {
    let target = stage.target();
    let (slow, _begun, id) = in_mid_transfer(stage);
    let agent_before = agent(&target);
    let begun = Instant::now();
    let link = |state: &str| stage.cluster.fabric().shell(&format!("ip link set {} {state}", target.name())).unwrap();
    link("down");
    // The source comes back while the target is still away.
    wait_for("the source to run on", || (!stage.is_stopped()).then_some(()));
    stage.assert_alive("while the target is away");
    let (phase, reason) = stage.ended(&id);
    assert_eq!(phase, "failed", "{reason}");
    assert!(reason.contains(target.name()), "{reason}");
    assert!(begun.elapsed() < Duration::from_secs(60), "undone only after {:?}", begun.elapsed());
    eprintln!("a broken link: undone after {:?}: {reason}", begun.elapsed());
    let link = |state: &str| stage.cluster.fabric().shell(&format!("ip link set {} {state}", target.name())).unwrap();
    link("up");
    drop(slow);
    assert_eq!(agent(&target), agent_before, "the target's agent did not survive");
    wait_for("the hook of the target to be gone", || processes::hook(&target).is_none().then_some(()));
    wait_for("the target to be reached again", || {
        let nodes: Value = serde_json::from_str(&stage.podferry(&["nodes", "--output", "json"]).stdout).ok()?;
        nodes.as_array()?.iter().all(|node| node["reachable"] == true).then_some(())
    });
    stage.assert_sound("after a broken link");
}
