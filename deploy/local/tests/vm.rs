//! Live migrations between two machines with a kernel each, under emulation, with soft-dirty marks. Run by `make e2e-vm`.
//!
//! The nodes of a cluster without agents give their places to machines, which have the same names, addresses, certificates and
//! configurations; coordinator and client side stay what they are:
//!
//! ```text
//!   pf-S-fabric: bridge br0
//!     ├─ pf-S-coordinator   podferry-coordinator
//!     ├─ pf-S-client        the connection that counts, `podferry`
//!     ├─ tap0 ══ machine node-a: bridge pf0 ── agent, the container
//!     └─ tap1 ══ machine node-b: bridge pf0 ── agent
//! ```
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use podferry_local::{
    FABRIC_BRIDGE, FIRST_CONTAINER_ADDRESS, GATEWAY, LocalCluster, NODE_BRIDGE, Node, Options, PREFIX_LENGTH,
    RUNC_ROOT, Running, Workload, workspace_root,
};
use serde_json::Value;
use support::counter::{Counter, digest};
use support::{Line, NODES, eventually, inside, redis, redis_address, redis_rootfs, serial};

/// Emulated processors are some twenty times slower than the machine's.
const PATIENT: [&str; 4] = ["--strategy", "live", "--downtime-budget", "60000"];
/// From power on until a node's agent answers, on a machine that is busy with other things.
const BOOT: Duration = Duration::from_secs(480);
/// What agents are made of.
const PROGRAMS: [&str; 8] = [
    "libpodferry_criu_shim.so",
    "podferry-agent",
    "podferry-dump-worker",
    "podferry-hook",
    "podferry-node-init",
    "podferry-pager",
    "podferry-stdio-keeper",
    "podferry-tar",
];

/// Which Debian's kernel the machines have.
fn suite() -> String {
    std::env::var("PODFERRY_VM_SUITE").unwrap_or_else(|_| "trixie".to_owned())
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Two machines, and what they are a cluster with. The machines are switched off first.
struct Machines {
    running: Vec<Running>,
    consoles: Vec<PathBuf>,
    cluster: LocalCluster,
    folder: PathBuf,
    _alone: File,
}

impl Machines {
    fn boot(workload: &Workload) -> Self {
        let alone = serial();
        // One place, so that what a killed run left is found. Images of disks lie in it.
        let folder = podferry_local::default_binaries().join("e2e-vm");
        LocalCluster::sweep(&folder.join("cluster")).unwrap();
        let _ = fs::remove_dir_all(&folder);
        let options = Options::new(folder.join("cluster")).without_agents();
        let cluster = LocalCluster::up(&options).unwrap();
        cluster.register_workloads([&workload.name]).unwrap();
        be_patient(&cluster);
        cluster.coordinator().start().unwrap();
        let mut machines = Self { running: vec![], consoles: vec![], cluster, folder, _alone: alone };
        for index in 0..NODES.len() {
            machines.switch_on(index, workload, &options);
        }
        machines.cluster.coordinator().wait_ready().unwrap();
        machines.await_agents();
        machines
    }

    fn switch_on(&mut self, index: usize, workload: &Workload, options: &Options) {
        let node = self.cluster.node(NODES[index]).unwrap();
        let fabric = self.cluster.fabric();
        let (name, tap) = (node.name(), format!("tap{index}"));
        fabric
            .shell(&format!(
                "ip link delete {name}
             ip tuntap add {tap} mode tap
             ip link set {tap} master {FABRIC_BRIDGE} up"
            ))
            .unwrap();
        let folder = self.folder.join(name);
        lay_payload(&folder, &node, workload, options, index == 0);
        let console = self.folder.join(format!("{name}.console"));
        let mut command = fabric.command(workspace_root().join("deploy/vm/machine.sh"));
        command.arg("boot").arg(suite()).arg(&folder);
        command.args(["-netdev", &format!("tap,id=uplink,ifname={tap},script=no,downscript=no")]);
        command.args(["-device", &format!("virtio-net-pci,netdev=uplink,romfile=,mac=02:88:00:00:02:{index:02x}")]);
        let log = File::create(&console).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.running.push(fabric.spawn_command(command).unwrap());
        self.consoles.push(console);
    }

    /// Until both agents answer and call their nodes fit.
    fn await_agents(&self) {
        eventually(BOOT, || {
            thread::sleep(Duration::from_secs(1));
            if let Some(name) =
                NODES.iter().zip(&self.running).find_map(|(name, one)| (!one.is_alive()).then_some(name))
            {
                panic!("the machine {name} is off");
            }
            let output = self.cluster.podferry(["check"]).unwrap();
            output.success().map(drop).map_err(|error| error.to_string())
        });
    }

    fn migrate(&self, workload: &str, target: &str) -> Value {
        let words = [&["migrate", workload, "--to", target, "--wait", "--output", "json"], &PATIENT[..]].concat();
        let output = self.cluster.podferry(words).unwrap();
        let record: Value = serde_json::from_str(output.stdout.trim())
            .unwrap_or_else(|_| panic!("refused: {}{}", output.stdout, output.stderr));
        assert_eq!(record["phase"], "succeeded", "{record:#}");
        record
    }

    fn connect(&self) -> Line {
        let netns = Path::new("/run/netns").join(self.cluster.client().netns());
        let connecting = || std::net::TcpStream::connect_timeout(&redis_address(), Duration::from_secs(2));
        let stream =
            eventually(Duration::from_secs(60), || inside(&netns, connecting).map_err(|error| error.to_string()));
        // The same socket: a downtime under emulation, beside a build, is longer than other tests wait for an answer.
        let socket = stream.try_clone().unwrap();
        let line = Line::new(stream);
        socket.set_read_timeout(Some(Duration::from_secs(600))).unwrap();
        line
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        // Before the cluster removes what they hold.
        self.running.clear();
        if !thread::panicking() {
            let _ = self.cluster.down();
            let _ = fs::remove_dir_all(&self.folder);
            return;
        }
        let coordinator = self.cluster.coordinator().log().to_owned();
        for path in self.consoles.iter().chain([&coordinator]) {
            let text = fs::read(path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("---- {}\n{}", path.display(), lines[lines.len().saturating_sub(120)..].join("\n"));
        }
    }
}

/// The coordinator's deadlines for preparing and undoing are made for real processors.
fn be_patient(cluster: &LocalCluster) {
    let path = cluster.coordinator().config();
    let mut text = fs::read_to_string(&path).unwrap();
    text.push_str(
        "\n[deadlines]\npreflight = 120\nprepare = 120\ncommit = 60\nrelease = 60\nabort = 60\nsurvey = 30\n",
    );
    fs::write(path, text).unwrap();
}

/// What a node's machine is given: its folder, the programs, and a script that makes a node of it.
fn lay_payload(folder: &Path, node: &Node, workload: &Workload, options: &Options, is_home: bool) {
    let part = |name: &str| folder.join(name);
    fs::create_dir_all(part("built")).unwrap();
    for program in PROGRAMS {
        // Debug information would be most of the disk.
        run(Command::new("strip")
            .arg("--strip-debug")
            .arg("-o")
            .arg(part("built").join(program))
            .arg(options.binaries.join(program)));
    }
    lay_bundle(node, workload);
    let text = fs::read_to_string(node.agent_config()).unwrap();
    fs::write(node.agent_config(), format!("tracker = \"soft-dirty\"\n{text}")).unwrap();
    let rootfs = redis_rootfs().canonicalize().unwrap();
    let tools = options.tools.canonicalize().unwrap().parent().unwrap().to_owned();
    let mut mounts = vec![format!("built {}\n", options.binaries.canonicalize().unwrap().display())];
    for (name, source) in [("tools", tools.as_path()), ("node", node.folder()), ("redis", &rootfs)] {
        run(Command::new("cp").arg("--archive").arg(source).arg(part(name)));
        mounts.push(format!("{name} {}\n", source.display()));
    }
    fs::write(part("mounts"), mounts.concat()).unwrap();
    fs::write(part("run"), script(node, workload, options, is_home)).unwrap();
    run(Command::new("chmod").arg("0755").arg(part("run")));
}

/// As [`Node::prepare_workload`] does, but for a node that does not run yet.
fn lay_bundle(node: &Node, workload: &Workload) {
    let bundle = node.bundle(&workload.name);
    for name in ["upper", "work", "rootfs"] {
        fs::create_dir_all(bundle.join(name)).unwrap();
    }
    std::os::unix::fs::symlink(workload.rootfs.canonicalize().unwrap(), bundle.join("lower")).unwrap();
    workload.spec(&node.cgroups_path(&workload.name)).unwrap().save(bundle.join("config.json")).unwrap();
}

/// What the machine runs: the node's bridge, the container where it is at home, and the agent, whose end is the machine's.
fn script(node: &Node, workload: &Workload, options: &Options, is_home: bool) -> String {
    let (name, address, last) = (node.name(), node.address(), node.address().octets()[3]);
    let (built, tools) = (options.binaries.canonicalize().unwrap(), options.tools.canonicalize().unwrap());
    let (built, tools) = (built.display(), tools.display());
    let container = if is_home { start_container(node, workload) } else { String::new() };
    format!(
        "#!/bin/bash
         set -euo pipefail
         export PATH={built}:{tools}:$PATH PODFERRY_LOG=info
         uname -a
         echo {name} >/proc/sys/kernel/hostname
         ip link add {NODE_BRIDGE} address 02:88:00:00:01:{last:02x} type bridge forward_delay 0
         ip link set eth0 master {NODE_BRIDGE} up
         ip address add {address}/{PREFIX_LENGTH} dev {NODE_BRIDGE}
         ip link set {NODE_BRIDGE} up
         mount --bind /run/netns /run/netns
         mount --make-shared /run/netns
         mkdir -p {RUNC_ROOT}
         criu check --feature mem_dirty_track
         {container}
         podferry-agent --config {config}
",
        config = node.agent_config().display()
    )
}

/// As [`Node::start_workload`] does.
fn start_container(node: &Node, workload: &Workload) -> String {
    let (bundle, log, name) = (node.bundle(&workload.name), node.container_logs().join("log"), &workload.name);
    let (bundle, log) = (bundle.display(), log.display());
    format!(
        "mount -t overlay overlay -o lowerdir={bundle}/lower,upperdir={bundle}/upper,workdir={bundle}/work {bundle}/rootfs
         ip netns add {name}
         ip link add v-{name} type veth peer name eth0 netns {name}
         ip link set v-{name} master {NODE_BRIDGE} up
         ip -n {name} link set lo up
         ip -n {name} address add {FIRST_CONTAINER_ADDRESS}/{PREFIX_LENGTH} dev eth0
         ip -n {name} link set eth0 up
         ip -n {name} route add default via {GATEWAY}
         podferry-node-init create --log {log} --keeper $(command -v podferry-stdio-keeper) -- \
             runc --root {RUNC_ROOT} create --bundle {bundle} {name}
         runc --root {RUNC_ROOT} start {name}"
    )
}

#[test]
#[ignore = "boots two machines under emulation: make e2e-vm"]
fn redis_moves_live_between_two_kernels_by_soft_dirty_marks_and_back() {
    let machines = Machines::boot(&redis("redis", FIRST_CONTAINER_ADDRESS));
    let mut line = machines.connect();
    assert_eq!(line.ask("DEBUG POPULATE 20000 key 1000"), "+OK");
    assert_eq!(line.ask("SET counter 0"), "+OK");
    let counter = Counter::start(line);
    let first_digest = counter.between(digest);
    for target in [NODES[1], NODES[0]] {
        let before = counter.between(|_, counted| counted);
        let since = Instant::now();
        let record = machines.migrate("redis", target);
        let (digest, counted) = counter.between(|line, counted| (digest(line, counted), counted));
        assert_eq!(digest, first_digest, "{record:#}");
        assert!(counted > before, "nothing was counted: {record:#}");
        let notes: Vec<&str> = record["notes"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let rounds: Vec<u64> =
            record["rounds"].as_array().unwrap().iter().filter_map(|round| round["pages"].as_u64()).collect();
        println!(
            "to {target} in {:.0} s, downtime {} ms, pages by round {rounds:?}, {} increments; {notes:?}",
            since.elapsed().as_secs_f64(),
            record["downtime_ms"],
            counted - before
        );
        assert!(notes.iter().any(|note| note.contains("soft-dirty marks")), "{record:#}");
        assert!(rounds.len() >= 2 && rounds[0] > 5000, "{record:#}");
    }
    let (counted, longest) = counter.stop();
    println!("{counted} increments, the longest took {} ms", longest.as_millis());
}
