//! A place for real containers: bundle, runc root and cgroup of a test's own, removed when it ends, however it ends.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use podferry_runtime::hook::{HOOK_SOCKET, MIGRATION};
use podferry_runtime::stdio::{ContainerStdio, spawn_keeper};
use podferry_runtime::{CgroupsMode, Container, RestoreRequest, RestoreStdio, Runc, RunningRestore, criu_config};
use rustix::fs::{FileType, Mode};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Nothing here takes longer than this, even on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Counts into its stdout and into a file, ten times a second, beside a second process. It starts nothing while it counts:
/// CRIU waits in vain, for 10 s, for a process that it has caught between `vfork` and `exec`.
pub(crate) const COUNTER: &str = "sleep 1000 & exec 3<>/data/never; i=0; \
    while true; do i=$((i+1)); echo $i; echo $i > /data/count; read -t 0.1 x <&3; done";

static NUMBER: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Lab {
    pub(crate) dir: TempDir,
    pub(crate) id: String,
    pub(crate) runc: Runc,
    cgroup: String,
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Whatever the test was at: the same clean-up that the agent has. It needs nothing but the bundle.
        let cleaned = self.runc.cleanup_killed_restore(&self.id, &self.bundle());
        if !std::thread::panicking() {
            cleaned.unwrap();
        }
        self.remove_cgroup_parent();
    }
}

/// The folder with criu, runc and busybox that `deploy/setup` makes.
pub(crate) fn tools() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.podferry/tools");
    let tools = std::env::var_os("PODFERRY_TOOLS").map_or(own, PathBuf::from);
    for tool in ["bin/runc", "bin/criu", "libexec/busybox"] {
        assert!(tools.join(tool).exists(), "no {tool} in {}: run deploy/setup/setup.sh", tools.display());
    }
    tools.canonicalize().unwrap()
}

impl Lab {
    /// A bundle whose program is this shell script.
    pub(crate) fn new(script: &str) -> Self {
        Self::with_config(script, |_| {})
    }

    /// The same with a configuration of its own.
    pub(crate) fn with_config(script: &str, change: impl FnOnce(&mut Value)) -> Self {
        let tools = tools();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let id = format!("t{number}");
        let dir = tempfile::Builder::new().prefix("podferry-runtime-").tempdir().unwrap();
        let runc = Runc::new(tools.join("bin/runc"), dir.path().join("root")).with_programs(tools.join("bin"));
        let cgroup = format!("podferry-test-{}", std::process::id());
        let lab = Self { dir, id, runc, cgroup };
        let rootfs = lab.rootfs();
        for name in ["bin", "data", "dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        // By another process: a descriptor for writing here may be inherited by what another test starts just now, and the
        // container's program would be "text file busy".
        let copy = Command::new("cp").arg(tools.join("libexec/busybox")).arg(rootfs.join("bin/busybox")).status();
        assert!(copy.unwrap().success());
        for applet in ["sh", "sleep", "cat", "echo", "kill"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        let never = rootfs.join("data/never");
        rustix::fs::mknodat(rustix::fs::CWD, never, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        fs::write(rootfs.join("etc/precious"), "do not lose me").unwrap();
        let mut config = config(script, &format!("/{}/{}", lab.cgroup, lab.id));
        change(&mut config);
        fs::write(lab.bundle().join("config.json"), config.to_string()).unwrap();
        lab
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.bundle().join("rootfs")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    pub(crate) fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.dir.path().join("stdout.log")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.runc.root().join(&self.id)
    }

    pub(crate) fn container(&self) -> Container {
        self.runc.container(&self.id).unwrap()
    }

    pub(crate) fn keeper(&self) -> ContainerStdio {
        spawn_keeper(Path::new(env!("CARGO_BIN_EXE_podferry-stdio-keeper")), &self.log()).unwrap()
    }

    /// A `runc run --detach` of the bundle, to be completed.
    pub(crate) fn run_command(&self) -> Command {
        let mut command = Command::new(tools().join("bin/runc"));
        command.arg("--root").arg(self.runc.root()).args(["run", "--detach", "--bundle"]).arg(self.bundle());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs the container with the keeper's stdio.
    pub(crate) fn run(&self) -> Container {
        let stdio = self.keeper();
        let mut command = self.run_command();
        command.arg(&self.id).stdin(stdio.stdin).stdout(stdio.stdout).stderr(stdio.stderr);
        assert!(command.status().unwrap().success(), "runc run failed");
        self.started()
    }

    /// The container, once its program has taken the place of runc's own first process.
    pub(crate) fn started(&self) -> Container {
        let container = self.container();
        let exe = format!("/proc/{}/exe", container.init.unwrap().pid);
        wait_for("the program to start", || fs::read_link(&exe).is_ok_and(|exe| exe.ends_with("bin/busybox")));
        container
    }

    /// Runs the container, and leaves it as images.
    pub(crate) fn checkpoint(&self) {
        self.run();
        self.checkpoint_running();
    }

    /// Leaves the running container as images.
    pub(crate) fn checkpoint_running(&self) {
        wait_for("the program to count", || self.count() > 2);
        self.try_checkpoint().unwrap();
        wait_for("the state to go", || !self.state_dir().exists());
    }

    /// A plain `runc checkpoint`; what it said, if it failed.
    pub(crate) fn try_checkpoint(&self) -> Result<(), String> {
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", tools().join("bin").display());
        let output = Command::new(tools().join("bin/runc"))
            .env("PATH", path)
            .arg("--root")
            .arg(self.runc.root())
            .args(["checkpoint", "--tcp-established", "--manage-cgroups-mode", "ignore", "--image-path"])
            .arg(self.images())
            .arg("--work-path")
            .arg(self.dir.path().join("dump"))
            .arg(&self.id)
            .output()
            .unwrap();
        let said = || String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(said()) }
    }

    /// Starts restoring the images; the hook asks at `agent`.
    pub(crate) fn restore(&self, agent: &Agent) -> RunningRestore {
        let conf = self.dir.path().join("criu.conf");
        fs::write(&conf, criu_config(Path::new(env!("CARGO_BIN_EXE_podferry-hook")), false)).unwrap();
        let stdio = self.keeper();
        let request = RestoreRequest {
            id: self.id.clone(),
            bundle: self.bundle(),
            image_path: self.images(),
            work_path: self.work(),
            pid_file: Some(self.dir.path().join("pid")),
            stdio: RestoreStdio::Fds { stdin: stdio.stdin, stdout: stdio.stdout, stderr: stdio.stderr },
            tcp_established: true,
            file_locks: true,
            lazy_pages: false,
            cgroups_mode: CgroupsMode::Ignore,
            env: vec![
                ("CRIU_CONFIG_FILE".into(), conf.into()),
                (HOOK_SOCKET.into(), agent.path.clone().into()),
                (MIGRATION.into(), "m-1".into()),
            ],
            detach: true,
            launcher: None,
        };
        self.runc.restore(request).unwrap()
    }

    pub(crate) fn agent(&self) -> Agent {
        Agent::listen(self.dir.path().join("hook.sock"))
    }

    /// The last number that the program wrote.
    pub(crate) fn count(&self) -> u64 {
        fs::read_to_string(self.rootfs().join("data/count")).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// No process, mount, cgroup or state is left, and the root filesystem is whole.
    pub(crate) fn assert_clean(&self) {
        self.assert_rootfs_whole();
        assert!(!self.state_dir().exists(), "runc's state is left");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = self.dir.path().to_str().unwrap();
        assert!(!mounts.contains(dir), "mounts are left:\n{mounts}");
        for hierarchy in ["freezer", "unified", "memory", ""] {
            let cgroup = Path::new("/sys/fs/cgroup").join(hierarchy).join(&self.cgroup).join(&self.id);
            assert!(!cgroup.exists(), "{} is left", cgroup.display());
        }
        let log = fs::read_to_string(self.work().join("restore.log")).unwrap_or_default();
        let roots = log.split("/tmp/.criu.mntns.").nth(1).map(|rest| format!("/tmp/.criu.mntns.{}", &rest[..6]));
        assert!(roots.is_none_or(|roots| !Path::new(&roots).exists()), "CRIU's temporary directory is left");
    }

    pub(crate) fn assert_rootfs_whole(&self) {
        assert_eq!(fs::read_to_string(self.rootfs().join("etc/precious")).unwrap(), "do not lose me");
        assert!(self.rootfs().join("bin/busybox").exists());
    }

    fn remove_cgroup_parent(&self) {
        // The last container of this process takes the parent along; before that it is busy.
        let Ok(hierarchies) = fs::read_dir("/sys/fs/cgroup") else { return };
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.cgroup));
        for hierarchy in hierarchies.flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(&self.cgroup));
        }
    }
}

/// Waits for something that has to come.
pub(crate) fn wait_for(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn config(script: &str, cgroup: &str) -> Value {
    let capabilities = ["CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.2.1",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "test",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}
        ],
        "annotations": {"podferry.dev/test": "yes"},
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}
            ],
            "maskedPaths": ["/proc/keys", "/sys/firmware"]
        }
    })
}

/// The agent's side of the hook's socket.
pub(crate) struct Agent {
    pub(crate) path: PathBuf,
    listener: UnixListener,
}

impl Agent {
    pub(crate) fn listen(path: PathBuf) -> Self {
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { path, listener }
    }

    /// Waits for the hook of this restore.
    pub(crate) fn accept(&self, restore: &mut RunningRestore) -> Hook {
        let start = Instant::now();
        let stream = loop {
            if let Ok((stream, _)) = self.listener.accept() {
                break stream;
            }
            assert!(!restore.try_wait().unwrap(), "the restore ended without its hook");
            assert!(start.elapsed() < PATIENCE, "no hook came");
            std::thread::sleep(Duration::from_millis(2));
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Hook { lines: BufReader::new(stream.try_clone().unwrap()), stream }
    }
}

/// One connection of a hook.
pub(crate) struct Hook {
    lines: BufReader<UnixStream>,
    stream: UnixStream,
}

impl Hook {
    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn say(&mut self, word: &str) {
        self.stream.write_all(format!("{word}\n").as_bytes()).unwrap();
    }

    /// The announcement, checked, with the pid of the held init.
    pub(crate) fn announcement(&mut self, stage: &str) -> i32 {
        let line = self.hear();
        let fields: Vec<&str> = line.split(' ').collect();
        assert_eq!((fields[0], fields[2]), (stage, "m-1"), "{line}");
        fields[1].parse().unwrap()
    }
}
