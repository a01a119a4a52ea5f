//! Real containers, looked at: found, described, frozen, and what of them cannot be dumped.

#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

mod lab;

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use io_uring::IoUring;
use lab::{COUNTER, Lab, wait_for};
use nix::sys::ptrace;
use podferry_runtime::{
    CgroupPaths, Container, Error, Externals, Finding, FindingKind, Freezer, FreezerState, NetworkKind, Report,
    Severity, Status, discover, find, preflight,
};
use rustix::fs::inotify;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use serde_json::json;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Sleeps, in a process that has the shell's descriptors.
const SLEEPER: &str = "sleep 1000 & wait";

#[test]
fn a_running_container_is_found_and_described() {
    let lab = Lab::new(COUNTER);
    let roots = [PathBuf::from("/nonexistent"), lab.runc.root().to_owned()];
    assert!(discover(&roots).unwrap().is_empty());
    assert!(matches!(find(&roots, &lab.id), Err(Error::NotFound { .. })));
    assert!(matches!(find(&roots, "../t0"), Err(Error::BadId { .. })));
    lab.run();
    // Half-made containers and other files do not disturb.
    fs::create_dir(lab.runc.root().join("half")).unwrap();

    let found = discover(&roots).unwrap();
    assert_eq!(found.len(), 1);
    let container = &found[0];
    assert_eq!((container.id.as_str(), container.status), (lab.id.as_str(), Status::Running));
    assert_eq!(container.bundle, lab.bundle());
    assert_eq!(container.rootfs, lab.rootfs());
    assert_eq!(container.annotations["podferry.dev/test"], "yes");
    assert!(container.is_alive());
    let init = container.init.unwrap();
    wait_for("the program's sleep", || container.processes().unwrap().len() == 2);
    assert!(container.processes().unwrap().contains(&init.pid));
    let memory = container.memory_to_move().unwrap();
    assert!((50_000..100_000_000).contains(&memory), "{memory} bytes for two busybox processes");
    assert!(container.external_descriptors[1].starts_with("pipe:["));
    assert_eq!(container.external_descriptors[0], "/dev/null");

    lab.runc.kill(&lab.id, "KILL").unwrap();
    wait_for("it to stop", || lab.container().status == Status::Stopped);
    assert!(!container.is_alive());
    assert!(matches!(preflight(&lab.container()), Err(Error::NotRunning { .. })));
}

#[test]
fn a_container_that_was_made_and_not_started_says_so() {
    let lab = Lab::new(COUNTER);
    let mut create = Command::new(lab::tools().join("bin/runc"));
    create.arg("--root").arg(lab.runc.root()).args(["create", "--bundle"]).arg(lab.bundle()).arg(&lab.id);
    let status = create.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success());
    assert_eq!(lab.container().status, Status::Created);
}

#[test]
fn a_frozen_container_stands_still_and_goes_on() {
    let lab = Lab::new(COUNTER);
    let container = lab.run();
    wait_for("it to count", || lab.count() > 1);
    let freezer = Freezer::of(&container).unwrap();
    assert_eq!(freezer.state().unwrap(), FreezerState::Thawed);
    freezer.freeze(TIMEOUT).unwrap();
    assert_eq!(freezer.state().unwrap(), FreezerState::Frozen);
    assert_eq!(lab.container().status, Status::Paused);
    let count = lab.count();
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(lab.count(), count);
    assert!(!freezer.holds_killed_tasks().unwrap());
    freezer.thaw(TIMEOUT).unwrap();
    wait_for("it to count again", || lab.count() > count + 1);

    freezer.freeze(TIMEOUT).unwrap();
    let init = rustix::process::Pid::from_raw(container.init.unwrap().pid).unwrap();
    rustix::process::kill_process(init, rustix::process::Signal::KILL).unwrap();
    let version_1 = freezer.dir().join("freezer.state").exists();
    if version_1 {
        assert!(freezer.holds_killed_tasks().unwrap());
        assert!(container.is_alive(), "a v1 freezer holds even killed tasks");
    }
    freezer.thaw(TIMEOUT).unwrap();
    wait_for("it to die", || !container.is_alive());
}

/// A cgroup of version 2, removed when the test ends.
struct UnifiedCgroup(PathBuf);

impl Drop for UnifiedCgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.freeze"), "0");
        let _ = fs::remove_dir(&self.0);
    }
}

/// Freezing needs no controller, so the v2 hierarchy of a hybrid machine will do.
#[test]
fn a_cgroup_of_version_2_is_frozen_as_well() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let unified = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("mount a cgroup2 hierarchy");
    let point = PathBuf::from(unified.split(' ').nth(4).unwrap());
    let cgroup = UnifiedCgroup(point.join(format!("podferry-test-v2-{}", std::process::id())));
    fs::create_dir(&cgroup.0).unwrap();
    let child = KillOnDrop(Command::new("sleep").arg("1000").spawn().unwrap());
    fs::write(cgroup.0.join("cgroup.procs"), child.0.id().to_string()).unwrap();

    let paths = CgroupPaths::V2(cgroup.0.clone());
    assert_eq!(paths.processes().unwrap(), [child.0.id().cast_signed()].into());
    let freezer = Freezer::at(paths).unwrap();
    assert_eq!(freezer.state().unwrap(), FreezerState::Thawed);
    freezer.freeze(TIMEOUT).unwrap();
    assert_eq!(freezer.state().unwrap(), FreezerState::Frozen);
    freezer.thaw(TIMEOUT).unwrap();
    assert_eq!(freezer.state().unwrap(), FreezerState::Thawed);
    freezer.freeze(TIMEOUT).unwrap();
    // Unlike version 1 it lets killed tasks die.
    drop(child);
    freezer.thaw(TIMEOUT).unwrap();
    assert!(CgroupPaths::V2(cgroup.0.clone()).processes().unwrap().is_empty());
}

/// Runs the container with descriptors of this process, from 3 on.
fn run_with(lab: &Lab, descriptors: Vec<OwnedFd>) -> Container {
    let count = descriptors.len();
    let mappings = (3..).zip(descriptors).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }).collect();
    let mut command = lab.run_command();
    command.arg("--preserve-fds").arg(count.to_string()).arg(&lab.id).fd_mappings(mappings).unwrap();
    assert!(command.status().unwrap().success());
    lab.started()
}

/// The crate lends only the number. Taking one's own descriptor by a pidfd makes an owned one of it.
fn ring_descriptor(ring: &IoUring) -> OwnedFd {
    let own = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(own, ring.as_raw_fd(), PidfdGetfdFlags::empty()).unwrap()
}

fn finding(report: &Report, kind: FindingKind) -> &Finding {
    report.findings.iter().find(|finding| finding.kind == kind).unwrap_or_else(|| panic!("no {kind:?} in {report:?}"))
}

#[test]
fn an_ordinary_container_has_no_findings() {
    let lab = Lab::with_config(COUNTER, |config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/etc/hostname", "type": "bind", "source": "/etc/hostname", "options": ["bind", "ro"]}));
        mounts.push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}));
        mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}));
        config["linux"]["readonlyPaths"] = json!(["/proc/sys", "/proc/bus"]);
    });
    let container = lab.run();
    for _ in 0..20 {
        assert_eq!(preflight(&container).unwrap().findings, []);
    }
    let report = preflight(&container).unwrap();
    assert!(report.can_be_dumped());
    assert_eq!(report.facts.network, NetworkKind::Own);
    assert_eq!(report.facts.tcp_connections, 0);
    assert!(report.facts.processes >= 1 && report.facts.threads >= 1);
    assert!(report.facts.memory_bytes > 0);
}

#[test]
fn processes_that_come_and_go_are_looked_at_without_complaint() {
    let lab = Lab::new("while :; do (sleep 0.001 | cat); done");
    let container = lab.run();
    for _ in 0..200 {
        assert_eq!(preflight(&container).unwrap().findings, []);
    }
}

#[test]
fn descriptors_that_cannot_be_dumped_are_named() {
    let lab = Lab::new(SLEEPER);
    let ring = IoUring::new(2).unwrap();
    let (inside, _outside) = UnixStream::pair().unwrap();
    let host_file = File::open("/etc/passwd").unwrap();
    let mptcp = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        Some(rustix::net::ipproto::MPTCP),
    )
    .unwrap();
    let ring = ring_descriptor(&ring);
    let container = run_with(&lab, vec![ring, inside.into(), host_file.into(), mptcp]);
    let init = container.init.unwrap().pid;
    let report = preflight(&container).unwrap();
    assert!(!report.can_be_dumped());
    for (fd, kind) in [
        (3, FindingKind::IoUring),
        (4, FindingKind::ExternalUnixSocket),
        (5, FindingKind::HostFile),
        (6, FindingKind::Mptcp),
    ] {
        let finding = finding(&report, kind);
        assert_eq!((finding.pid, finding.fd, finding.severity), (Some(init), Some(fd), Severity::Blocking));
        assert!(!finding.remedy.is_empty());
    }
}

/// A periodic timer that goes off after a millisecond, and then every hour.
fn timer() -> OwnedFd {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::empty()).unwrap();
    let it_interval = Timespec { tv_sec: 3600, tv_nsec: 0 };
    let it_value = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value }).unwrap();
    timer
}

#[test]
fn a_periodic_timer_whose_tick_was_not_read_is_told() {
    let lab = Lab::new(SLEEPER);
    let (unread, read) = (timer(), timer());
    rustix::io::read(&read, &mut [0; 8]).unwrap();
    let container = run_with(&lab, vec![unread, read]);
    let report = preflight(&container).unwrap();
    let told: Vec<_> = report.findings.iter().map(|found| (found.kind, found.severity, found.pid, found.fd)).collect();
    let init = container.init.unwrap().pid;
    // The shell's child has the same timer.
    assert!(told.contains(&(FindingKind::Timer, Severity::Warning, Some(init), Some(3))), "{report:?}");
    assert!(told.iter().all(|(.., fd)| *fd == Some(3)), "{report:?}");
}

#[test]
fn deleted_files_are_counted_once_with_what_they_take() {
    let lab = Lab::new(
        "exec 3>/data/deleted; busybox dd if=/dev/zero of=/data/deleted bs=1M count=3 2>/dev/null; \
                        busybox rm /data/deleted; exec 5>&3; sleep 1000 & wait",
    );
    let container = lab.run();
    let descriptor = format!("/proc/{}/fd/3", container.init.unwrap().pid);
    wait_for("the file to be deleted", || {
        fs::read_link(&descriptor).is_ok_and(|link| link.to_string_lossy().ends_with("(deleted)"))
    });
    let report = preflight(&container).unwrap();
    let [file] = &report.facts.deleted_files[..] else { panic!("{report:?}") };
    assert_eq!((file.pid, file.fd), (container.init.unwrap().pid, 3));
    assert!((3 << 20..4 << 20).contains(&file.bytes) && file.name.contains("/data/deleted"), "{file:?}");
    assert!(report.can_be_dumped(), "{report:?}");
}

/// An overlay over the root filesystem of a lab.
struct Overlay(PathBuf);

impl Overlay {
    fn over(lab: &Lab) -> Self {
        let (upper, work) = (lab.dir.path().join("upper"), lab.dir.path().join("overlay-work"));
        for dir in [&upper, &work] {
            fs::create_dir(dir).unwrap();
        }
        let root = lab.rootfs();
        let options = format!("lowerdir={},upperdir={},workdir={}", root.display(), upper.display(), work.display());
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("overlay", &root, "overlay", MountFlags::empty(), Some(options.as_c_str())).unwrap();
        Self(root)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn watch(path: &Path) -> OwnedFd {
    let watch = inotify::init(inotify::CreateFlags::empty()).unwrap();
    inotify::add_watch(&watch, path, inotify::WatchFlags::CREATE).unwrap();
    watch
}

fn restore(lab: &Lab) {
    let agent = lab.agent();
    let mut restoring = lab.restore(&agent);
    let mut hook = agent.accept(&mut restoring);
    hook.announcement("post-restore");
    hook.say("go");
    assert!(restoring.wait_until(std::time::Instant::now() + lab::PATIENCE).unwrap(), "the restore does not end");
}

#[test]
fn a_watch_that_criu_cannot_name_is_told_and_one_that_it_can_is_not() {
    let lab = Lab::new("while true; do sleep 0.2; done");
    let overlay = Overlay::over(&lab);
    let root = lab.rootfs();
    // CRIU looks in /etc by itself.
    for (path, is_carried) in [("etc/precious", true), ("etc", true), ("", true), ("data", false)] {
        let container = run_with(&lab, vec![watch(&root.join(path))]);
        let report = preflight(&container).unwrap();
        let told: Vec<_> = report.blocking().map(|found| (found.kind, found.pid, found.fd)).collect();
        let init = container.init.map(|init| init.pid);
        let expected = if is_carried { vec![] } else { vec![(FindingKind::FileWatch, init, Some(3))] };
        // Children have the same descriptor.
        assert_eq!(told.first(), expected.first(), "{path}: {report:?}");
        let dumped = lab.try_checkpoint();
        assert_eq!(dumped.is_ok(), is_carried, "{path}: {dumped:?}");
        if is_carried {
            wait_for("the state to go", || !lab.state_dir().exists());
            restore(&lab);
            let info = fs::read_to_string(format!("/proc/{}/fdinfo/3", lab.container().init.unwrap().pid)).unwrap();
            assert!(info.contains("inotify wd:1 "), "{path}: {info}");
        }
        lab.runc.kill(&lab.id, "KILL").ok();
        wait_for("it to stop", || !lab.container().is_alive());
        lab.runc.delete(&lab.id, true).ok();
        let _ = fs::remove_dir_all(lab.images());
    }
    drop(overlay);
}

#[test]
fn a_host_file_as_stdio_is_named_and_criu_indeed_refuses_it() {
    let lab = Lab::new(COUNTER);
    let log = File::create(lab.log()).unwrap();
    let mut command = lab.run_command();
    assert!(command.arg(&lab.id).stdout(log).status().unwrap().success());
    let container = lab.started();
    let report = preflight(&container).unwrap();
    let finding = finding(&report, FindingKind::HostStdio);
    assert_eq!((finding.pid, finding.fd), (container.init.map(|init| init.pid), Some(1)));
    assert!(finding.message.contains("stdout.log"), "{finding}");
    let refused = lab.try_checkpoint().unwrap_err();
    assert!(refused.contains("stdout.log"), "{refused}");
    assert!(lab.container().is_alive(), "a refused dump leaves the container running");
}

#[test]
fn a_zombie_that_stays_is_told() {
    // The shell's child becomes a program that never reaps its own.
    let lab = Lab::new("sleep 0 & exec sleep 1000");
    let container = lab.run();
    wait_for("the zombie", || {
        let report = preflight(&container).unwrap();
        report.findings.iter().any(|finding| finding.kind == FindingKind::Zombie && finding.message.contains("sleep"))
    });
}

#[test]
fn what_was_put_in_from_outside_is_told() {
    let lab = Lab::new(SLEEPER);
    lab.run();
    let mut exec = Command::new(lab::tools().join("bin/runc"));
    exec.arg("--root").arg(lab.runc.root()).args(["exec", "--detach", &lab.id, "/bin/sleep", "1000"]);
    assert!(exec.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    // runc returns a moment before its own process has become the program.
    let is_program =
        |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("bin/busybox"));
    wait_for("the program to start", || lab.container().processes().unwrap().iter().all(is_program));
    let report = preflight(&lab.container()).unwrap();
    assert_eq!(finding(&report, FindingKind::OutsideTree).severity, Severity::Warning);
    assert!(report.can_be_dumped(), "{report:?}");
    assert_eq!(lab.try_checkpoint(), Ok(()));
}

#[test]
fn sharing_with_the_host_is_told_and_connections_are_counted() {
    let lab = Lab::with_config(SLEEPER, |config| {
        config["linux"]["namespaces"] = json!([{"type": "uts"}, {"type": "mount"}]);
    });
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let container = run_with(&lab, vec![client.into()]);
    let report = preflight(&container).unwrap();
    assert_eq!(report.facts.network, NetworkKind::Host);
    assert_eq!(report.facts.tcp_connections, 1, "the shell's and its child's descriptor are one connection");
    let shared: Vec<_> =
        report.findings.iter().filter(|finding| finding.kind == FindingKind::SharedNamespace).collect();
    assert_eq!(shared.len(), 2, "{report:?}");
    assert!(
        shared.iter().any(|finding| finding.severity == Severity::Blocking && finding.message.contains("process ids"))
    );
}

#[test]
fn a_debugger_is_told() {
    let lab = Lab::new(SLEEPER);
    let container = lab.run();
    let init = container.init.unwrap().pid;
    let traced = nix::unistd::Pid::from_raw(init);
    ptrace::seize(traced, ptrace::Options::empty()).unwrap();
    let report = preflight(&container).unwrap();
    let finding = finding(&report, FindingKind::Traced);
    assert_eq!(finding.pid, Some(init));
    assert!(finding.message.contains("traces it"), "{finding}");
}

struct KillOnDrop(Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_network_namespace_by_path_is_external_and_its_sockets_are_followed() {
    let holder = KillOnDrop(Command::new("unshare").args(["--net", "sleep", "1000"]).spawn().unwrap());
    let path = format!("/proc/{}/ns/net", holder.0.id());
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    wait_for("the namespace", || fs::read_link(&path).is_ok_and(|link| link != own));
    let lab = Lab::with_config(SLEEPER, |config| {
        config["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "network", "path": path}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]);
    });
    // A client of a host's daemon, made inside the namespace: path sockets reach across network namespaces.
    let socket = lab.dir.path().join("daemon.sock");
    let daemon = UnixListener::bind(&socket).unwrap();
    let client = connect_inside(Path::new(&path), &socket);
    let (_accepted, _) = daemon.accept().unwrap();

    let container = run_with(&lab, vec![client.into()]);
    let report = preflight(&container).unwrap();
    assert_eq!(report.facts.network, NetworkKind::Path(PathBuf::from(&path)));
    let finding = finding(&report, FindingKind::ExternalUnixSocket);
    assert_eq!(finding.fd, Some(3));
    assert!(finding.message.contains("daemon.sock"), "{finding}");
    let inode = fs::read_link(&path).unwrap().to_str().unwrap().replace("net:", "net");
    assert_eq!(Externals::of(&container).unwrap().namespaces, [format!("{inode}:extRootNetNS")]);
}

fn connect_inside(namespace: &Path, socket: &Path) -> UnixStream {
    let namespace = File::open(namespace).unwrap();
    let connect = || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        UnixStream::connect(socket).unwrap()
    };
    std::thread::scope(|scope| scope.spawn(connect).join().unwrap())
}
