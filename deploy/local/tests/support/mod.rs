//! What the tests of whole migrations share: a cluster that runs alone, moves by the command line, connections from the
//! client side.
#![allow(dead_code, reason = "every test file uses its own part of it")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

pub(crate) mod churn;
pub(crate) mod counter;
pub(crate) mod noise;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use podferry_local::{
    Census, Change, Container, Difference, FIRST_CONTAINER_ADDRESS, LocalCluster, Node, Options, Place, Workload,
    workspace_root,
};
use tempfile::TempDir;

/// The nodes of a [`Stage`].
pub(crate) const NODES: [&str; 2] = ["node-a", "node-b"];

/// Holds all other heavy tests off, in whatever process they are: two clusters at once starve each other of two cores.
pub(crate) fn serial() -> File {
    let lock = File::create(std::env::temp_dir().join("podferry-local-tests.lock")).unwrap();
    lock.lock().unwrap();
    lock
}

/// A cluster of two nodes with agents and coordinator. Goes down before its folder and its lock do; the ends of its logs
/// are shown when the test fails.
pub(crate) struct Stage {
    pub(crate) cluster: LocalCluster,
    pub(crate) folder: TempDir,
    _alone: File,
}

impl Stage {
    /// Waits for its turn, then brings a cluster up whose inventory has these workloads.
    pub(crate) fn up(workloads: &[&str]) -> Self {
        Self::up_as(workloads, |_, options| options)
    }

    /// The same with changed options; the closure is given the folder, too.
    pub(crate) fn up_as(workloads: &[&str], change: impl FnOnce(&Path, Options) -> Options) -> Self {
        let alone = serial();
        let folder = tempfile::tempdir().unwrap();
        let mut options = Options::new(folder.path().join("cluster"));
        options.workloads = workloads.iter().map(ToString::to_string).collect();
        check_programs(&options.binaries);
        let cluster = LocalCluster::up(&change(folder.path(), options)).unwrap();
        Self { cluster, folder, _alone: alone }
    }

    /// The node of this name.
    pub(crate) fn node(&self, name: &str) -> Node {
        self.cluster.node(name).unwrap()
    }

    /// Runs a workload on the first node and prepares the second for it.
    pub(crate) fn start(&self, workload: &Workload) -> Container {
        let container = self.cluster.start_workload(NODES[0], workload).unwrap();
        self.cluster.prepare_workload(NODES[1], workload).unwrap();
        container
    }

    /// `podferry migrate --wait`: the record of a migration that ended, however it did, or the words of a refusal.
    pub(crate) fn try_migrate(&self, workload: &str, target: &str) -> Result<serde_json::Value, String> {
        self.try_migrate_with(workload, target, &["--strategy", "warm"])
    }

    /// The same with further words for the command line.
    pub(crate) fn try_migrate_with(
        &self,
        workload: &str,
        target: &str,
        more: &[&str],
    ) -> Result<serde_json::Value, String> {
        let words = [&["migrate", workload, "--to", target, "--wait", "--output", "json"], more].concat();
        let output = self.cluster.podferry(words).unwrap();
        let record = serde_json::from_str::<serde_json::Value>(output.stdout.trim()).ok();
        match record.filter(|record| record.get("phase").is_some()) {
            Some(record) => Ok(record),
            None => Err(format!("{}{}", output.stdout, output.stderr)),
        }
    }

    /// A migration that has to succeed; gives its record. There is one copy then, on the target.
    pub(crate) fn migrate(&self, workload: &str, target: &str) -> serde_json::Value {
        self.migrate_with(workload, target, &["--strategy", "warm"])
    }

    /// The same with further words for the command line.
    pub(crate) fn migrate_with(&self, workload: &str, target: &str, more: &[&str]) -> serde_json::Value {
        let record = self.try_migrate_with(workload, target, more).unwrap_or_else(|words| panic!("refused: {words}"));
        assert_eq!(record["phase"].as_str().unwrap().to_ascii_lowercase(), "succeeded", "{record:#}");
        assert_eq!(self.places(workload), [target], "{record:#}");
        record
    }

    /// On which nodes a workload runs.
    pub(crate) fn places(&self, workload: &str) -> Vec<&str> {
        NODES.into_iter().filter(|name| self.node(name).container_process(workload).is_ok()).collect()
    }

    /// A census in which the links that agents make have one name: theirs are their migrations' own.
    pub(crate) fn census(&self) -> Census {
        let mut census = self.cluster.census().unwrap();
        for links in census.links.values_mut() {
            let made = |name: &str| name.len() == 14 && name.starts_with("pf");
            let count: u64 = links.iter().filter(|(name, _)| made(name)).map(|(_, count)| count).sum();
            links.retain(|name, _| !made(name));
            if count > 0 {
                links.insert("made by an agent".to_owned(), count);
            }
        }
        census
    }

    /// The census once it does not change any more for a second.
    pub(crate) fn settled_census(&self) -> Census {
        let end = Instant::now() + Duration::from_secs(60);
        let mut last = self.census();
        loop {
            thread::sleep(Duration::from_secs(1));
            let next = self.census();
            let drift = last.difference(&next);
            if drift.is_empty() {
                return next;
            }
            assert!(Instant::now() < end, "the cluster does not come to rest:\n{drift}");
            last = next;
        }
    }

    /// Fails unless the cluster comes to hold what it held before within a minute. `meant` are changes that may be.
    pub(crate) fn assert_census(&self, before: &Census, meant: impl Fn(&Change) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let changes = before.difference(&self.census()).changes;
            let left = Difference { changes: changes.into_iter().filter(|change| !meant(change)).collect() };
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "something was left:\n{left}");
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// A connection from the client side, retried until somebody listens, at most a minute.
    pub(crate) fn connect(&self, address: SocketAddr) -> Line {
        let connecting = || connect_from(self.cluster.client(), address);
        let stream = eventually(Duration::from_secs(60), || {
            connecting().map_err(|error| format!("{address} does not answer: {error}"))
        });
        Line::new(stream)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        for entry in std::fs::read_dir(self.cluster.logs()).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(60)..].join("\n");
            eprintln!("---- {}\n{tail}", entry.path().display());
        }
    }
}

/// Running one crate's tests does not build the programs of others.
fn check_programs(folder: &Path) {
    let needed = ["podferry", "podferry-agent", "podferry-coordinator", "podferry-dump-worker", "podferry-hook"];
    for name in needed.into_iter().chain([
        "podferry-stdio-keeper",
        "podferry-pager",
        "podferry-tar",
        "libpodferry_criu_shim.so",
    ]) {
        let path = folder.join(name);
        assert!(path.exists(), "{} is missing: run `cargo build --workspace --lib --bins` first", path.display());
    }
}

/// A root filesystem in this folder with one of our programs, and more of this machine's.
pub(crate) fn image(folder: &Path, name: &str, program: &str, more: &[&str]) -> PathBuf {
    let image = folder.join("image");
    let program = podferry_local::default_binaries().join(program);
    assert!(program.exists(), "{} is missing: run `cargo build --workspace --bins` first", program.display());
    let mut script = Command::new(workspace_root().join("deploy/setup/image.sh"));
    let output = script.arg(name).arg(&image).arg("--").arg(program).args(more).output().unwrap();
    assert!(output.status.success(), "image.sh: {}", String::from_utf8_lossy(&output.stderr));
    image.join("rootfs")
}

/// How many bytes the notes of a migration say that were compared.
pub(crate) fn verified(record: &serde_json::Value) -> u64 {
    let mut notes = record["notes"].as_array().unwrap().iter().filter_map(serde_json::Value::as_str);
    let note = notes.find_map(|note| note.strip_prefix("verified: ")).unwrap_or_else(|| panic!("{record:#}"));
    println!("{note}; downtime {} ms", record["downtime_ms"]);
    note.split_once(' ').unwrap().0.parse().unwrap()
}

/// A socket made in a side's network namespace stays in it; only the thread that makes it has to enter.
fn connect_from(place: &Place, address: SocketAddr) -> std::io::Result<TcpStream> {
    let connecting = move || TcpStream::connect_timeout(&address, Duration::from_secs(2));
    inside(&Path::new("/run/netns").join(place.netns()), connecting)
}

/// Runs `work` on a thread that is in this network namespace.
pub(crate) fn inside<T: Send>(namespace: &Path, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(namespace).unwrap();
    thread::scope(|scope| {
        let entered = move || {
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        scope.spawn(entered).join().unwrap()
    })
}

/// One connection of question and answer in lines. It is never opened again: a reset fails the test.
pub(crate) struct Line {
    reader: BufReader<TcpStream>,
}

impl Line {
    pub(crate) fn new(stream: TcpStream) -> Self {
        // Far beyond any migration here, so that a lost connection fails the test instead of hanging it.
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { reader: BufReader::new(stream) }
    }

    /// Asks one line and gives the first line of the answer, without its end.
    pub(crate) fn ask(&mut self, question: &str) -> String {
        self.reader.get_mut().write_all(format!("{question}\r\n").as_bytes()).unwrap();
        self.line()
    }

    /// The next line, without its end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        let count = self.reader.read_line(&mut line).unwrap();
        assert!(count > 0, "the connection was closed");
        line.trim_end().to_owned()
    }

    /// Asks, and does not wait for the answer.
    pub(crate) fn post(&mut self, question: &str) {
        self.reader.get_mut().write_all(format!("{question}\r\n").as_bytes()).unwrap();
    }

    /// Fails unless the other side closes the connection, by an end or a reset, within this time.
    pub(crate) fn assert_closed(&mut self, within: Duration) {
        self.reader.get_mut().set_read_timeout(Some(within)).unwrap();
        match self.reader.read_to_end(&mut Vec::new()) {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("it hangs: {error}"),
            _ => {}
        }
    }

    /// Asks Redis something whose answer is a bulk string.
    pub(crate) fn ask_bulk(&mut self, question: &str) -> String {
        let head = self.ask(question);
        let length = head.strip_prefix('$').and_then(|word| word.parse().ok());
        let length: usize = length.unwrap_or_else(|| panic!("{head}"));
        let mut bytes = vec![0; length + 2];
        self.reader.read_exact(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }
}

/// Repeats until something holds; fails after the deadline with what it said last.
pub(crate) fn eventually<T>(deadline: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + deadline;
    loop {
        match look() {
            Ok(value) => return value,
            Err(words) => assert!(Instant::now() < end, "{words}"),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Redis's root filesystem, which `deploy/setup` makes.
pub(crate) fn redis_rootfs() -> PathBuf {
    let rootfs = podferry_local::workspace_root().join(".podferry/images/redis/rootfs");
    assert!(rootfs.join("usr/bin/redis-server").exists(), "{} is missing: run deploy/setup/setup.sh", rootfs.display());
    rootfs
}

/// A Redis that keeps everything in memory and answers `DEBUG`.
pub(crate) fn redis(name: &str, ip: Ipv4Addr) -> Workload {
    let mut arguments: Vec<&str> = vec!["/bin/redis-server", "--protected-mode", "no", "--save", ""];
    arguments.extend(["--enable-debug-command", "yes", "--dir", "/data"]);
    Workload::new(name, redis_rootfs(), arguments, ip)
}

/// Where [`redis`] at the first address listens.
pub(crate) fn redis_address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(FIRST_CONTAINER_ADDRESS), 6379)
}
