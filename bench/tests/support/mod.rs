//! Real services on loopback, each ended by its process id when its guard is dropped.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use socket2::SockRef;
use tempfile::TempDir;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::broadcast,
};

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A workload's binary, built if need be: cargo builds only this package's own for its tests.
fn workload(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let built = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "--package",
                "podferry-workloads",
                "--bin",
                "catalogue",
                "--bin",
                "shopping-cart",
            ])
            .current_dir(workspace())
            .status()
            .unwrap();
        assert!(built.success(), "the workloads do not build");
        // target/PROFILE/deps/load-HASH
        std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned()
    });
    folder.join(name)
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().try_into().unwrap())
}

/// A running workload.
pub(crate) struct Service {
    child: Child,
    binary: &'static str,
    folder: TempDir,
    pub(crate) address: SocketAddr,
}

impl Service {
    pub(crate) fn catalogue() -> Self {
        Self::start("catalogue")
    }

    pub(crate) fn cart() -> Self {
        Self::start("shopping-cart")
    }

    fn start(binary: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (child, address) = spawn(binary, folder.path(), 0);
        Self { child, binary, folder, address }
    }

    /// Kills it and starts it anew on the same port with the same order log.
    pub(crate) fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        (self.child, _) = spawn(self.binary, self.folder.path(), self.address.port());
    }

    pub(crate) fn freeze(&self) {
        kill(pid(&self.child), Signal::SIGSTOP).unwrap();
    }

    pub(crate) fn thaw(&self) {
        kill(pid(&self.child), Signal::SIGCONT).unwrap();
    }

    /// Waits until the order log has so many lines.
    pub(crate) async fn log_with_orders(&self, orders: usize) -> PathBuf {
        let path = self.folder.path().join("orders.log");
        let since = Instant::now();
        while std::fs::read_to_string(&path).unwrap().lines().count() < orders {
            assert!(since.elapsed() < Duration::from_secs(20), "no orders came");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        path
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(binary: &str, folder: &Path, port: u16) -> (Child, SocketAddr) {
    let mut child = Command::new(workload(binary))
        .env("PORT", port.to_string())
        .env("ORDER_LOG", folder.join("orders.log"))
        .env("TICK_MS", "2")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.find(|line| line.contains("listening on ")).expect("the service tells its address");
    let port = line.split("0.0.0.0:").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
    // Its log goes on being read, so that it never writes into a closed pipe.
    std::thread::spawn(move || lines.for_each(drop));
    (child, SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap())))
}

/// The Redis that the demo migrates, started from its image without a container.
pub(crate) struct Redis {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Redis {
    pub(crate) fn start() -> Self {
        let root = workspace().join(".podferry/images/redis/rootfs");
        assert!(
            root.join("usr/bin/redis-server").exists(),
            "{} has no Redis: run deploy/setup/setup.sh",
            root.display()
        );
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new("chroot")
            .arg(&root)
            .args(["/usr/bin/redis-server", "--save", "", "--bind", "127.0.0.1", "--enable-debug-command", "yes"])
            .args(["--dir", "/", "--port", &port.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let redis = Self { child, address: SocketAddr::from(([127, 0, 0, 1], port)) };
        let since = Instant::now();
        while std::net::TcpStream::connect(redis.address).is_err() {
            assert!(since.elapsed() < Duration::from_secs(20), "Redis does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        redis
    }

    pub(crate) fn freeze(&self) {
        kill(pid(&self.child), Signal::SIGSTOP).unwrap();
    }

    /// Takes away all that clients have written.
    pub(crate) async fn forget_everything(&self) {
        let client = redis::Client::open(format!("redis://{}", self.address)).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        redis::cmd("FLUSHALL").exec_async(&mut connection).await.unwrap();
    }

    /// Does what no client expects.
    pub(crate) async fn increment_all_counters(&self) {
        let client = redis::Client::open(format!("redis://{}", self.address)).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let keys: Vec<String> = redis::cmd("KEYS").arg("load:*:counter").query_async(&mut connection).await.unwrap();
        assert!(!keys.is_empty());
        for key in keys {
            redis::cmd("INCR").arg(key).exec_async(&mut connection).await.unwrap();
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Passes connections on until they are cut.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    cut: broadcast::Sender<()>,
}

impl Proxy {
    pub(crate) async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cut, _) = broadcast::channel(1);
        let cuts = cut.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass_on(client, target, cuts.subscribe()));
            }
        });
        Self { address, cut }
    }

    /// Resets all connections that there are; new ones are passed on again.
    pub(crate) fn cut_all(&self) {
        self.cut.send(()).unwrap();
    }
}

async fn pass_on(mut client: TcpStream, target: SocketAddr, mut cut: broadcast::Receiver<()>) {
    let mut server = TcpStream::connect(target).await.unwrap();
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
    }
    tokio::select! {
        _ = copy_bidirectional(&mut client, &mut server) => {}
        _ = cut.recv() => {
            // A close with a linger time of zero sends a reset instead of an orderly end.
            SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
}
