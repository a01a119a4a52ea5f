//! Sessions with the real CRIU, on a process of a pid namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use command_fds::FdMapping;
use podferry_criu::{
    CgroupsMode, Criu, CriuError, CriuLog, DumpRequest, Owner, PAGE_SIZE, PageSetWriter, PageSink, Run, Session,
    Verdict, page_stream,
};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

const PAGE_FD: i32 = 4;
const PATIENCE: Duration = Duration::from_secs(20);

/// The tools that `deploy/setup/setup.sh` made.
fn criu() -> PathBuf {
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.podferry/tools/bin/criu");
    let given = std::env::var_os("PODFERRY_TOOLS").map(|tools| PathBuf::from(tools).join("bin/criu"));
    let found = given.filter(|path| path.exists()).unwrap_or(made);
    assert!(found.exists(), "there is no CRIU at {}: run deploy/setup/setup.sh", found.display());
    found
}

/// Counts in a file, ten thousand times a second at most, and sums up 16 MiB of its memory each time.
const PROGRAM: &str = r#"
    my $data = join '', map { chr(65 + $_ % 23) } 1 .. 4096; $data = $data x 4096;
    for (;;) {
        open(my $out, '>', "$ARGV[0].new") or die; print $out ++$count, ' ', unpack('%32C*', $data); close $out;
        rename "$ARGV[0].new", $ARGV[0]; select(undef, undef, undef, 0.002);
    }
"#;

/// The same with 8 MiB in an open file that is in no folder any more, which are summed up instead.
const DELETED_FILE: &str = r#"
    open(my $file, '+>', "$ARGV[0].deleted") or die; unlink "$ARGV[0].deleted" or die;
    syswrite($file, chr(65 + $_ % 23) x 4096) == 4096 or die for 1 .. 2048;
    for (;;) {
        sysseek($file, 0, 0); sysread($file, my $data, 1 << 24) == 8 << 20 or die;
        open(my $out, '>', "$ARGV[0].new") or die; print $out ++$count, ' ', unpack('%32C*', $data); close $out;
        rename "$ARGV[0].new", $ARGV[0]; select(undef, undef, undef, 0.002);
    }
"#;

/// The victim and its folders; everything of it is gone after the test.
struct Victim {
    launcher: Child,
    pid: i32,
    /// Stays the victim's own when its number is given to another.
    handle: OwnedFd,
    restored: Option<i32>,
    dir: tempfile::TempDir,
}

impl Victim {
    fn start(stdin: Stdio) -> Self {
        Self::running(PROGRAM, stdin)
    }

    fn running(program: &str, stdin: Stdio) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["images", "work", "restore", "target"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let count = dir.path().join("count");
        // Its /proc is not of its pid namespace, so CRIU mounts one in its working directory: not in one that others share.
        // No --kill-child: the signal at a parent's death is restored too, and the restored copy's parent is CRIU.
        let launcher = Command::new("unshare")
            .args(["--pid", "--fork", "setsid", "perl", "-e", program])
            .arg(&count)
            .current_dir(dir.path())
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        until("the victim counts", || count.exists());
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", launcher.id())).unwrap();
        let pid = children.trim().parse().unwrap();
        let handle = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        Self { launcher, pid, handle, restored: None, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn count(&self) -> (u64, String) {
        let text = fs::read_to_string(self.path("count")).unwrap();
        let (count, sum) = text.split_once(' ').unwrap();
        (count.parse().unwrap(), sum.to_owned())
    }

    fn keeps_counting(&self) {
        let (before, sum) = self.count();
        until("it counts on", || self.count().0 > before);
        assert_eq!(self.count().1, sum, "its memory changed");
    }

    fn request(&self) -> DumpRequest {
        DumpRequest {
            pid: self.pid,
            images_dir: self.path("images"),
            work_dir: self.path("work"),
            root: "/".into(),
            external_mounts: Vec::new(),
            externals: Vec::new(),
            tcp_established: true,
            skip_in_flight: false,
            freeze_cgroup: None,
            cgroups: CgroupsMode::Ignore,
            freeze_timeout_s: 10,
        }
    }

    /// Dumps with the page stream into the folder `target`.
    fn dump(&self, on_post_dump: impl FnMut(u32) -> Verdict) -> Result<(), CriuError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut sets = Sets { dir: self.path("target"), next: 1, open: None };
        let pages = thread::spawn(move || {
            page_stream::receive(ours, &mut sets)?;
            sets.close()
        });
        let result = self.dump_to(theirs, on_post_dump);
        let received = pages.join().unwrap();
        result.map(|()| received.unwrap())
    }

    fn dump_to(&self, socket: UnixStream, mut on_post_dump: impl FnMut(u32) -> Verdict) -> Result<(), CriuError> {
        let request = self.request();
        let images = File::open(&request.images_dir).unwrap();
        let work = File::open(&request.work_dir).unwrap();
        let mapping = FdMapping { parent_fd: socket.into(), child_fd: PAGE_FD };
        let session = Session::start(&criu(), vec![mapping]).unwrap();
        let swrk = session.pid();
        let log = CriuLog::of_dump(&request.work_dir);
        let options = request.options(images.as_fd(), work.as_fd(), PAGE_FD);
        session.dump(options, &log, |notification| match notification.name.as_str() {
            "post-dump" => on_post_dump(swrk),
            _ => Verdict::Proceed,
        })
    }

    fn restore(&mut self) {
        let target = self.path("target");
        for entry in fs::read_dir(self.path("images")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, target.join(path.file_name().unwrap())).unwrap();
        }
        let pid_file = self.path("restore/pid");
        let restored = Command::new(criu())
            .args(["restore", "--restore-detached", "--log-file", "restore.log", "--manage-cgroups=ignore"])
            .arg("--pidfile")
            .arg(&pid_file)
            .arg("--images-dir")
            .arg(&target)
            .arg("--work-dir")
            .arg(self.path("restore"))
            .stdin(Stdio::null())
            .status()
            .unwrap();
        let why = CriuLog::of_restore(&self.path("restore")).failure();
        assert!(restored.success(), "{why:?}");
        self.restored = Some(fs::read_to_string(pid_file).unwrap().trim().parse().unwrap());
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        if let Some(restored) = self.restored.and_then(Pid::from_raw) {
            let _gone = kill_process(restored, Signal::KILL);
        }
        let _gone = pidfd_send_signal(&self.handle, Signal::KILL);
        let _gone = self.launcher.kill();
        let _reaped = self.launcher.wait();
    }
}

fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Lays the page stream down as images.
struct Sets {
    dir: PathBuf,
    next: u32,
    open: Option<PageSetWriter>,
}

impl Sets {
    fn close(&mut self) -> Result<(), CriuError> {
        self.open.take().map_or(Ok(()), PageSetWriter::finish)
    }
}

impl PageSink for Sets {
    type Error = CriuError;

    fn open(&mut self, owner: Owner) -> Result<(), CriuError> {
        self.close()?;
        self.open = Some(PageSetWriter::create(&self.dir, owner, self.next)?);
        self.next += 1;
        Ok(())
    }

    fn buffer(&mut self, bytes: usize) -> Vec<u8> {
        vec![0; bytes]
    }

    fn run(&mut self, run: Run, data: Vec<u8>) -> Result<(), CriuError> {
        let is_zero = |index: u64| {
            let at = usize::try_from(index).unwrap() * PAGE_SIZE;
            data[at..at + PAGE_SIZE].iter().all(|byte| *byte == 0)
        };
        let pages: Vec<u8> =
            data.chunks(PAGE_SIZE).filter(|page| page.iter().any(|byte| *byte != 0)).flatten().copied().collect();
        self.open.as_mut().unwrap().add(run, is_zero, &pages)
    }
}

#[test]
fn a_dump_through_the_page_stream_restores_with_its_memory() {
    let mut victim = Victim::start(Stdio::null());
    victim.dump(|_| Verdict::Proceed).unwrap();
    let (count, sum) = victim.count();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(victim.count().0, count, "it runs on after a dump that succeeded");
    victim.restore();
    until("the restored copy counts on", || victim.count().0 > count);
    assert_eq!(victim.count().1, sum, "its memory changed");
}

#[test]
fn a_large_file_that_was_deleted_while_open_moves_along() {
    let mut victim = Victim::running(DELETED_FILE, Stdio::null());
    victim.dump(|_| Verdict::Proceed).unwrap();
    let (count, sum) = victim.count();
    victim.restore();
    until("the restored copy counts on", || victim.count().0 > count);
    assert_eq!(victim.count().1, sum, "the content of the deleted file changed");
}

#[test]
fn a_refused_post_dump_resumes_the_tasks() {
    let victim = Victim::start(Stdio::null());
    let mut frozen_at = 0;
    let result = victim.dump(|_| {
        frozen_at = victim.count().0;
        thread::sleep(Duration::from_millis(50));
        assert_eq!(victim.count().0, frozen_at, "it runs while CRIU waits");
        Verdict::GiveUp
    });
    assert!(matches!(result, Err(CriuError::GivenUp)), "{result:?}");
    victim.keeps_counting();
}

#[test]
fn a_criu_killed_while_it_holds_the_tasks_is_reported_and_the_tasks_run_on() {
    let victim = Victim::start(Stdio::null());
    let result = victim.dump(|swrk| {
        kill_process(Pid::from_raw(swrk.cast_signed()).unwrap(), Signal::KILL).unwrap();
        Verdict::Proceed
    });
    assert!(matches!(result, Err(CriuError::Gone { .. })), "{result:?}");
    victim.keeps_counting();
}

#[test]
fn a_page_stream_that_breaks_fails_the_dump_and_the_tasks_run_on() {
    let victim = Victim::start(Stdio::null());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let reader = thread::spawn(move || {
        let mut bytes = [0; 20];
        ours.read_exact(&mut bytes).unwrap();
    });
    let result = victim.dump_to(theirs, |_| Verdict::Proceed);
    reader.join().unwrap();
    assert!(matches!(result, Err(CriuError::Dump { .. })), "{result:?}");
    victim.keeps_counting();
}

#[test]
fn what_cannot_be_dumped_is_named_by_crius_own_line_and_a_remedy() {
    // The other end of this socket is outside of what is dumped.
    let (_outside, inside) = UnixStream::pair().unwrap();
    let victim = Victim::start(Stdio::from(std::os::fd::OwnedFd::from(inside)));
    let result = victim.dump(|_| Verdict::Proceed);
    let Err(CriuError::Dump { failure, .. }) = result else { panic!("{result:?}") };
    assert!(failure.line.contains("unix"), "{failure}");
    assert!(failure.remedy.contains("unix socket"), "{failure}");
    victim.keeps_counting();
}

#[test]
fn this_criu_and_kernel_are_good_enough() {
    let found = Criu::at(criu()).probe().unwrap();
    assert!(found.version >= podferry_criu::OLDEST_CRIU, "{found:?}");
    assert_eq!(found.complaints, Vec::<String>::new());
    let features = Criu::at(criu()).features().unwrap();
    assert!(features.is_sorted() && features.contains(&"tcp_half_closed"), "{features:?}");
    let asked = Command::new(criu()).args(["check", "--feature", "mem_dirty_track"]).output().unwrap();
    assert_eq!(features.contains(&"mem_dirty_track"), asked.status.success());
}
