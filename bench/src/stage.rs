//! The local cluster with workloads on it, and moves between its nodes.

use std::{
    fs,
    io::{self, Read},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

pub use podferry_local::Strategy;
use podferry_local::{FIRST_CONTAINER_ADDRESS, LocalCluster, Node, Options, Workload};

use crate::{
    error::{Error, Result},
    load::{Kind, milliseconds},
    migration::{Hop, MigrationRecord, parse_record, parse_refusal},
};

/// The nodes that workloads are moved between; they start on the first.
pub const NODES: [&str; 2] = ["node-a", "node-b"];
/// How long a workload may take to listen.
const LISTEN_DEADLINE: Duration = Duration::from_secs(30);
/// How long a move may take before it counts as failed: the largest takes seconds.
const MOVE_DEADLINE: Duration = Duration::from_secs(120);
/// How long the memory of a source that was destroyed may take to be given back.
const EXIT_DEADLINE: Duration = Duration::from_secs(10);
/// How often is looked whether somebody wants the end. Short enough that a move's end is not noticed late.
const POLL: Duration = Duration::from_millis(200);

/// What there is to be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// `podferry_workloads::catalogue`.
    Catalogue,
    /// `podferry_workloads::cart`.
    ShoppingCart,
    /// Debian's `redis-server`.
    Redis,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Catalogue, Self::ShoppingCart, Self::Redis];

    /// Its name, which is the workload's.
    pub fn name(self) -> &'static str {
        match self {
            Self::Catalogue => "catalogue",
            Self::ShoppingCart => "shopping-cart",
            Self::Redis => "redis",
        }
    }

    /// The address it has on every node.
    pub fn address(self) -> SocketAddr {
        let (offset, port) = match self {
            Self::Catalogue => (0, 8080),
            Self::ShoppingCart => (1, 8080),
            Self::Redis => (2, 6379),
        };
        let address = u32::from(FIRST_CONTAINER_ADDRESS) + offset;
        SocketAddr::from((Ipv4Addr::from(address), port))
    }

    /// The clients it has in the demo: what they do, and how many there are.
    pub fn clients(self) -> &'static [(Kind, u32)] {
        match self {
            Self::Catalogue => &[(Kind::Catalogue, 2)],
            Self::ShoppingCart => &[(Kind::Cart, 2), (Kind::Feed, 1)],
            Self::Redis => &[(Kind::Redis, 2)],
        }
    }

    /// Its container, with this root filesystem.
    pub fn container(self, rootfs: &Path) -> Result<Workload> {
        let address = self.address();
        let std::net::IpAddr::V4(ip) = address.ip() else {
            return Err(Error::Misplaced(format!("{address} is no IPv4 address")));
        };
        let mut workload = Workload::new(self.name(), rootfs, self.arguments().iter().copied(), ip);
        workload.env.push(format!("PORT={}", address.port()));
        Ok(workload)
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Catalogue => &["/usr/bin/catalogue"],
            Self::ShoppingCart => &["/usr/bin/shopping-cart"],
            // Nothing is written to disk: what counts here is memory.
            Self::Redis => &[
                "/usr/bin/redis-server",
                "--protected-mode",
                "no",
                "--save",
                "",
                "--appendonly",
                "no",
                "--enable-debug-command",
                "yes",
                "--dir",
                "/data",
            ],
        }
    }
}

/// Reads a stream to its end beside whatever else is done: a full pipe would stop its writer.
fn collect(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A stream that breaks off still shows what came before.
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Becomes true when somebody wants the program to end.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Notes that the end is wanted.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Fails when the end is wanted.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Acquire) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// A cluster of two nodes. Dropping takes it down.
#[derive(Debug)]
pub struct Stage {
    // Dropped before the folder: what runs in it has to end first.
    cluster: LocalCluster,
    folder: Folder,
    interrupt: Interrupt,
}

impl Stage {
    /// Brings the cluster up in a folder of this process's own below `.podferry/NAME`; sweeps what earlier processes that
    /// were killed left there.
    pub fn up(name: &str, interrupt: &Interrupt) -> Result<Self> {
        Self::up_as(name, interrupt, Ok)
    }

    /// As [`Stage::up`], of a cluster with other options.
    pub fn up_as(name: &str, interrupt: &Interrupt, change: impl FnOnce(Options) -> Result<Options>) -> Result<Self> {
        interrupt.check()?;
        let folder = Folder::claim(&podferry_local::workspace_root().join(".podferry").join(name))?;
        let made = change(options(&folder.path)).and_then(|options| Ok(LocalCluster::up(&options)?));
        let cluster = made.inspect_err(|_| folder.remove_empty())?;
        Ok(Self { cluster, folder, interrupt: interrupt.clone() })
    }

    /// The cluster itself.
    pub fn cluster(&self) -> &LocalCluster {
        &self.cluster
    }

    /// Makes the program's image.
    pub fn image(&self, program: Program) -> Result<PathBuf> {
        self.interrupt.check()?;
        make_image(program, &self.folder.path)
    }

    /// Starts a workload on the first node, prepares the second for it, and waits until it listens.
    pub fn start(&self, program: Program, rootfs: &Path) -> Result<()> {
        self.interrupt.check()?;
        start_workload(&self.cluster, program, rootfs)
    }

    /// Starts any container on the first node, prepares the second for it, and waits until it listens on the port.
    pub fn start_container(&self, workload: &Workload, port: u16, patience: Duration) -> Result<()> {
        self.interrupt.check()?;
        start_container(&self.cluster, workload, port, patience)
    }

    /// Removes a workload from both nodes.
    pub fn remove(&self, program: Program) -> Result<()> {
        self.remove_container(program.name())
    }

    /// Removes the container with this name from both nodes.
    pub fn remove_container(&self, name: &str) -> Result<()> {
        for node in NODES {
            self.cluster.node(node)?.remove_workload(name)?;
        }
        // What is started next at this address has another link address, which the clients would not ask for.
        self.cluster.client().check(["ip", "neighbour", "flush", "dev", "eth0"])?;
        Ok(())
    }

    /// Moves a workload with the command line, as a person would, and looks where it runs then.
    pub fn migrate(&self, program: Program, strategy: Strategy, source: &str, target: &str) -> Result<Hop> {
        self.interrupt.check()?;
        let start_unix_ms = unix_ms();
        let outcome = self.try_migrate(program, strategy, source, target);
        // Ctrl-C at a terminal ends the command line, too: that is no failed migration.
        self.interrupt.check()?;
        Ok(Hop {
            workload: program.name().to_owned(),
            source: source.to_owned(),
            target: target.to_owned(),
            start_unix_ms,
            end_unix_ms: unix_ms(),
            outcome: outcome.map_err(|error| error.to_string()),
        })
    }

    fn try_migrate(&self, program: Program, strategy: Strategy, source: &str, target: &str) -> Result<MigrationRecord> {
        let record = self.ask(program.name(), strategy.words(), target)?;
        if !record.succeeded() {
            return Err(Error::Misplaced(format!("{}: {}", record.phase, record.reason)));
        }
        self.check_place(program.name(), source, target)?;
        Ok(record)
    }

    /// Has a workload moved by the command line, with further words for it, and gives the record of how that ended, well or not.
    /// A refusal is an error in the command line's words.
    pub fn ask(&self, workload: &str, how: &[&str], target: &str) -> Result<MigrationRecord> {
        let words = [&["migrate", workload, "--to", target], how, &["--wait", "--output", "json"]].concat();
        let (stdout, stderr) = self.podferry(&words)?;
        parse_record(&stdout).map_err(|error| {
            let refusal = parse_refusal(&stdout).or_else(|| parse_refusal(&stderr));
            let said = || format!("`podferry migrate` said {:?}: {error}", format!("{stdout}{stderr}").trim());
            refusal.map_or_else(|| Error::Misplaced(said()), Error::Refused)
        })
    }

    /// Runs the command line and gives what it wrote to its two streams. An interrupt ends the wait.
    fn podferry(&self, words: &[&str]) -> Result<(String, String)> {
        let mut command = self.cluster.podferry_command();
        command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = self.cluster.client().spawn_command(command)?;
        let child = running.child();
        let (stdout, stderr) = (child.stdout.take().map(collect), child.stderr.take().map(collect));
        let since = Instant::now();
        while running.wait(POLL).is_none() {
            self.interrupt.check()?;
            if since.elapsed() > MOVE_DEADLINE {
                let (words, seconds) = (words.join(" "), MOVE_DEADLINE.as_secs());
                return Err(Error::Misplaced(format!("`podferry {words}` did not end within {seconds} s")));
            }
        }
        let joined =
            |reader: Option<JoinHandle<String>>| reader.and_then(|reader| reader.join().ok()).unwrap_or_default();
        Ok((joined(stdout), joined(stderr)))
    }

    /// Fails unless there is one copy, and it is on the target. Behind a post-copy the source is destroyed last, and its kernel still
    /// gives memory back when the migration has ended.
    pub fn check_place(&self, name: &str, source: &str, target: &str) -> Result<()> {
        self.cluster.node(target)?.container_process(name)?;
        let since = Instant::now();
        while let Ok(process) = self.cluster.node(source)?.container_process(name) {
            if since.elapsed() > EXIT_DEADLINE {
                let words = format!("{name} still runs on {source}, too, as process {}", process.pid);
                return Err(Error::Misplaced(words));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// On which of [`NODES`] a workload runs; `None` when it runs on none, or on both.
    pub fn place(&self, workload: &str) -> Option<usize> {
        let runs = |name: &str| self.cluster.node(name).and_then(|node| node.container_process(workload)).is_ok();
        match NODES.map(runs) {
            [true, false] => Some(0),
            [false, true] => Some(1),
            _ => None,
        }
    }

    /// Takes the cluster down and removes its folder, its logs too.
    pub fn down(mut self) -> Result<()> {
        self.cluster.down()?;
        self.folder.remove()
    }

    /// The end of a measurement: as [`Stage::down`] when all was well; otherwise the logs stay, and it is said where.
    pub fn finish(self, well: bool) -> Result<()> {
        if well {
            return self.down();
        }
        println!("logs: {}", self.logs().display());
        Ok(())
    }

    /// Where the logs are that explain a failure.
    pub fn logs(&self) -> PathBuf {
        self.cluster.logs()
    }
}

/// A cluster in this folder whose coordinator knows all programs.
pub fn options(folder: &Path) -> Options {
    let mut options = Options::new(folder);
    options.workloads = Program::ALL.map(|program| program.name().to_owned()).into();
    options
}

/// Makes the program's root filesystem; our own programs' below `folder`.
pub fn make_image(program: Program, folder: &Path) -> Result<PathBuf> {
    let setup = podferry_local::workspace_root().join("deploy/setup");
    if program == Program::Redis {
        run_script(Command::new(setup.join("redis-image.sh")).env("PODFERRY_QUIET", "1"))?;
        return Ok(podferry_local::workspace_root().join(".podferry/images/redis/rootfs"));
    }
    let image = folder.join("images").join(program.name());
    fs::create_dir_all(&image).map_err(fail("create", &image))?;
    let binary = podferry_local::default_binaries().join(program.name());
    run_script(Command::new(setup.join("image.sh")).arg(program.name()).arg(&image).arg("--").arg(binary))?;
    Ok(image.join("rootfs"))
}

/// Runs a script of `deploy/setup` that makes an image.
pub fn run_script(command: &mut Command) -> Result<()> {
    let text = command.get_program().to_string_lossy().into_owned();
    let status = command.stdout(Stdio::null()).status().map_err(fail("run", Path::new(&text)))?;
    if status.success() { Ok(()) } else { Err(Error::Image { command: text, status }) }
}

/// Starts a workload on the first node, prepares the second for it, and waits until it listens.
pub fn start_workload(cluster: &LocalCluster, program: Program, rootfs: &Path) -> Result<()> {
    start_container(cluster, &program.container(rootfs)?, program.address().port(), LISTEN_DEADLINE)
}

fn start_container(cluster: &LocalCluster, workload: &Workload, port: u16, patience: Duration) -> Result<()> {
    let [first, second] = NODES;
    let first = cluster.node(first)?;
    first.start_workload(workload)?;
    cluster.node(second)?.prepare_workload(workload)?;
    wait_until_it_listens(&first, &workload.name, port, patience)
}

/// Looked up in the container's own table: a try to connect would be a connection of its own.
fn wait_until_it_listens(node: &Node, name: &str, port: u16, patience: Duration) -> Result<()> {
    let since = Instant::now();
    let port = format!(":{port:04X}");
    while since.elapsed() < patience {
        let process = node.container_process(name)?;
        let table = |kind: &str| fs::read_to_string(format!("/proc/{}/net/{kind}", process.pid)).unwrap_or_default();
        if listens(&table("tcp"), &port) || listens(&table("tcp6"), &port) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(Error::Misplaced(format!("{name} does not listen on its port after {} s", patience.as_secs())))
}

/// Whether a table of `/proc/net/tcp`'s form has a socket in state LISTEN (0A) on the port.
fn listens(table: &str, port: &str) -> bool {
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next().is_some_and(|address| address.ends_with(port));
        local && fields.nth(1) == Some("0A")
    })
}

/// Now, in ms since 1970.
pub(crate) fn unix_ms() -> f64 {
    milliseconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// A folder of this process's own.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
}

impl Folder {
    fn claim(parent: &Path) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        fs::create_dir_all(parent).map_err(fail("create", parent))?;
        let lock = parent.with_file_name("stage.lock");
        let file = fs::File::create(&lock).map_err(fail("create", &lock))?;
        // Two that sweep the same would be in each other's way.
        file.lock().map_err(fail("lock", &lock))?;
        for entry in fs::read_dir(parent).map_err(fail("list", parent))?.flatten() {
            if is_abandoned(&entry.file_name().to_string_lossy()) {
                LocalCluster::sweep(&entry.path())?;
                fs::remove_dir_all(entry.path()).map_err(fail("remove", &entry.path()))?;
            }
        }
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let started = start_time(pid).unwrap_or_default();
        let path = parent.join(format!("{pid}-{started}-{count}"));
        // Whoever was last may have removed the folder above it meanwhile.
        fs::create_dir_all(&path).map_err(fail("create", &path))?;
        Ok(Self { path })
    }

    fn remove(&self) -> Result<()> {
        fs::remove_dir_all(&self.path).map_err(fail("remove", &self.path))?;
        self.remove_empty();
        Ok(())
    }

    /// Removes the folder and the one above it unless something is in them: logs, or another process's folder.
    fn remove_empty(&self) {
        for folder in self.path.ancestors().take(2) {
            let _ = fs::remove_dir(folder);
        }
    }
}

fn fail(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::File { action, path, source }
}

/// Whether a folder was made by a process that is not there any more. A number alone does not tell a process: numbers
/// are used again, so the time at which it started is in the name, too.
fn is_abandoned(name: &str) -> bool {
    let mut parts = name.split('-').map(str::parse::<u64>);
    let (Some(Ok(pid)), Some(Ok(started)), Some(Ok(_))) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    u32::try_from(pid).ok().and_then(start_time) != Some(started)
}

/// When a process started, in clock ticks since boot: field 22 of `/proc/PID/stat` (proc(5)). The fields are counted from
/// behind the name, which may hold anything.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_differ() {
        let addresses: std::collections::BTreeSet<_> = Program::ALL.map(Program::address).into();
        assert_eq!(addresses.len(), Program::ALL.len());
    }

    #[test]
    fn a_listening_socket_is_found_and_a_connected_one_is_not() {
        let table = "  sl  local_address rem_address   st tx_queue\n   0: 6400580A:1F90 00000000:0000 0A 0\n   \
                     1: 6400580A:18EB 0300580A:A001 01 0\n";
        assert!(listens(table, ":1F90"));
        assert!(!listens(table, ":18EB"));
        assert!(!listens(table, ":0050"));
    }

    #[test]
    fn folders_of_processes_that_have_gone_are_abandoned() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let name = format!("{}-{}-0", child.id(), start_time(child.id()).unwrap());
        let alive = is_abandoned(&name);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!alive && is_abandoned(&name));
        assert!(is_abandoned(&format!("{}-1-0", std::process::id())), "an earlier process of the same number");
        assert!(!is_abandoned("images") && !is_abandoned("1") && !is_abandoned("a-b-c"));
    }

    #[test]
    fn a_claim_sweeps_what_is_abandoned_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let parent = parent.path().join("demo");
        let first = Folder::claim(&parent).unwrap();
        fs::create_dir_all(parent.join("4000000000-1-0/logs")).unwrap();
        fs::create_dir(parent.join("mine")).unwrap();
        let second = Folder::claim(&parent).unwrap();
        assert!(first.path.exists() && second.path.exists() && first.path != second.path);
        assert!(!parent.join("4000000000-1-0").exists() && parent.join("mine").exists());
        fs::remove_dir(parent.join("mine")).unwrap();
        first.remove().unwrap();
        assert!(parent.exists());
        second.remove().unwrap();
        assert!(!parent.exists());
    }

    #[test]
    fn an_interrupt_is_seen_by_all() {
        let interrupt = Interrupt::default();
        interrupt.check().unwrap();
        interrupt.clone().set();
        assert!(matches!(interrupt.check(), Err(Error::Interrupted)));
    }
}
