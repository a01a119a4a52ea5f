//! Following real processes: nothing that they write is missed, and they do not notice.

#![expect(clippy::unwrap_used, reason = "a panic is the report")]

use std::io::{self, BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podferry_memory::copier::{Copier, read_exact};
use podferry_memory::hazard::{self, HazardKind};
use podferry_memory::range::{PageRange, PageRanges};
use podferry_memory::store::Store;
use podferry_memory::tracker::{self, Preference, SoftDirtyTracker, TrackError, UserfaultfdTracker, WriteTracker};
use podferry_memory::{PAGE_SIZE, inject, maps};

/// How long anything here may take, also on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);

/// A process that is killed when the test is done with it.
struct Victim {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Victim {
    fn start(command: &mut Command) -> Self {
        let mut victim = Self::spawn(command);
        assert_eq!(victim.line(), "ready");
        victim
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    fn churn(threads: u32) -> Self {
        Self::churn_with(threads, &[])
    }

    fn churn_with(threads: u32, options: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_podferry-memory-churn"));
        Self::start(command.args(["/dev/null", &threads.to_string()]).args(options))
    }

    fn python(script: &str) -> Self {
        let mut victim = Self::spawn_python(script);
        assert_eq!(victim.line(), "ready");
        victim
    }

    fn spawn_python(script: &str) -> Self {
        let start = "import os, select, signal, socket, sys, time, ctypes\nprint('ready', flush=True)\n";
        Self::spawn(Command::new("/usr/bin/python3").arg("-uc").arg(format!("{start}{script}")))
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Stops all threads, and waits until each stands still.
    fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let since = Instant::now();
        while !self.all_threads_are("T") {
            assert!(since.elapsed() < PATIENCE, "the victim does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn all_threads_are(&self, state: &str) -> bool {
        std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().all(|thread| {
            let stat = std::fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with(state)
        })
    }

    /// Waits until its only thread stays in a system call.
    fn await_system_call(&self) {
        let call = || std::fs::read_to_string(format!("/proc/{}/syscall", self.pid())).unwrap();
        let since = Instant::now();
        let (mut last, mut same_since) = (call(), Instant::now());
        while last.starts_with("running") || same_since.elapsed() < Duration::from_millis(100) {
            assert!(since.elapsed() < PATIENCE, "the victim does not wait");
            std::thread::sleep(Duration::from_millis(1));
            let now = call();
            if now != last {
                (last, same_since) = (now, Instant::now());
            }
        }
    }

    fn assert_is_well(&mut self) {
        let ended = self.child.try_wait().unwrap();
        assert_eq!(ended, None, "the victim ended");
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn copy(tracker: &mut dyn WriteTracker, ranges: &PageRanges, store: &mut Store) {
    let copied = Copier::new(tracker.process(), 1 << 20)
        .read::<io::Error>(ranges, |batch| {
            let mut rest = batch.contents;
            for range in batch.ranges {
                let (pages, later) = rest.split_at(usize::try_from(range.length()).unwrap());
                store.put(*range, pages).map_err(io::Error::other)?;
                rest = later;
            }
            Ok(())
        })
        .unwrap();
    tracker.tell_again(&copied.vanished);
}

/// Compares all of a stopped process's moved memory with the store; gives how many pages there were.
fn assert_complete(process: Pid, existing: &PageRanges, store: &Store) -> u64 {
    const SPAN: u64 = 2 << 20;
    let mut contents = vec![0; usize::try_from(SPAN).unwrap()];
    for range in &maps::followable(process).unwrap().intersection(&readable(process)) {
        for start in (range.start..range.end).step_by(contents.len()) {
            let span = PageRange::new(start, range.end.min(start + SPAN));
            let contents = &mut contents[..usize::try_from(span.length()).unwrap()];
            if read_exact(process, start, contents).is_ok() {
                span.single_pages()
                    .zip(contents.chunks(4096))
                    .for_each(|(at, page)| assert_kept(at, page, existing, store));
                continue;
            }
            // Somewhere is a guard page.
            for (at, page) in span.single_pages().zip(contents.chunks_mut(4096)) {
                if read_exact(process, at.start, page).is_ok() {
                    assert_kept(at, page, existing, store);
                }
            }
        }
    }
    existing.pages()
}

/// What the process may read itself. Asking for each page of the rest takes minutes on an emulated processor.
fn readable(process: Pid) -> PageRanges {
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let readable = maps.lines().filter_map(|line| line.split_once(" r")?.0.split_once('-'));
    let address = |text| u64::from_str_radix(text, 16).unwrap();
    readable.map(|(start, end)| PageRange::new(address(start), address(end))).collect()
}

/// Slices are compared as wholes: debug builds, and emulated processors more so, are slow with single bytes.
fn assert_kept(at: PageRange, page: &[u8], existing: &PageRanges, store: &Store) {
    if existing.contains(at.start) {
        let kept = store.run(at);
        let differs = |kept: &[u8]| (0..page.len()).step_by(8).find(|at| kept[*at..*at + 8] != page[*at..*at + 8]);
        assert!(kept == Some(page), "page {at} differs at {:?}", kept.map(differs));
    } else {
        assert!(page == [0; 4096], "page {at} was not told and is not zero");
    }
}

/// The rounds of a pre-copy, then a stop, the last round, and a look at every byte.
fn follow(victim: &mut Victim, rounds: usize) -> (u64, Vec<u64>) {
    let mut tracker = UserfaultfdTracker::attach(victim.pid()).unwrap();
    follow_by(&mut tracker, victim, rounds)
}

fn follow_by(tracker: &mut dyn WriteTracker, victim: &mut Victim, rounds: usize) -> (u64, Vec<u64>) {
    let mut store = Store::new(8 << 30).unwrap();
    let mut told = Vec::new();
    for _ in 0..rounds {
        let written = tracker.round().unwrap();
        copy(tracker, &written, &mut store);
        told.push(written.pages());
        std::thread::sleep(Duration::from_millis(30));
    }
    (freeze(tracker, victim, &mut store), told)
}

/// A stop, the last round, and a look at every byte; gives how many pages there were. The process runs on.
fn freeze(tracker: &mut dyn WriteTracker, victim: &Victim, store: &mut Store) -> u64 {
    victim.stop();
    let frozen = tracker.frozen(&maps::followable(victim.pid()).unwrap()).unwrap();
    copy(tracker, &frozen.written, store);
    let pages = assert_complete(victim.pid(), &frozen.existing, store);
    victim.signal(Signal::SIGCONT);
    pages
}

#[test]
fn no_write_is_missed_whatever_a_process_does_with_its_mappings() {
    let mut victim = Victim::churn(3);
    std::thread::sleep(Duration::from_millis(500));
    for rounds in [0, 1, 2, 3, 5, 8, 3, 3] {
        let (pages, _) = follow(&mut victim, rounds);
        assert!(pages > 0, "the victim holds next to nothing");
        victim.assert_is_well();
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Fills 64 MiB, then writes here and there all the time.
const SCATTERED_WRITES: &str = "import random\nm = bytearray(os.urandom(64 << 20))\nprint('filled', flush=True)\n\
     while True:\n for _ in range(40): m[random.getrandbits(14) << 12] ^= 1\n time.sleep(0.001)\n";

/// The kernel hands regions over 512 at a time. With more than that, its word for how far it looked is not the end.
#[test]
fn what_is_written_during_a_round_of_many_regions_is_told_in_that_one_or_the_next() {
    let mut victim = Victim::python(SCATTERED_WRITES);
    assert_eq!(victim.line(), "filled");
    for _ in 0..8 {
        let process = victim.pid();
        let mut tracker = UserfaultfdTracker::attach(process).unwrap();
        let mut store = Store::new(8 << 30).unwrap();
        for _ in 0..3 {
            let written = tracker.round().unwrap();
            copy(&mut tracker, &written, &mut store);
            std::thread::sleep(Duration::from_millis(60));
        }
        victim.stop();
        let frozen = tracker.frozen(&maps::followable(process).unwrap()).unwrap();
        copy(&mut tracker, &frozen.written, &mut store);
        assert_complete(process, &frozen.existing, &store);
        victim.signal(Signal::SIGCONT);
    }
}

/// Fills 64 MiB, then writes to one page at each of three SIGUSR1.
const THREE_WRITES: &str = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n\
     m = bytearray(os.urandom(64 << 20))\nprint('filled', flush=True)\n\
     for line in range(3):\n signal.sigwait([signal.SIGUSR1])\n m[line << 20] ^= 1\n print('wrote', flush=True)\n\
     time.sleep(60)\n";

#[test]
fn a_round_tells_what_was_written_since_the_last_one() {
    let mut victim = Victim::python(THREE_WRITES);
    assert_eq!(victim.line(), "filled");
    let mut tracker = UserfaultfdTracker::attach(victim.pid()).unwrap();
    let all = tracker.round().unwrap();
    assert!(all.pages() > 16384, "{} pages", all.pages());
    let _ = tracker.round().unwrap();
    for _ in 0..3 {
        victim.signal(Signal::SIGUSR1);
        assert_eq!(victim.line(), "wrote");
        let written = tracker.round().unwrap().pages();
        assert!((1..200).contains(&written), "{written} pages");
    }
}

/// Each waits for three seconds in a system call that an interruption could end, and prints how that ended.
const WAITS: [(&str, &str); 9] = [
    ("sleep", "time.sleep(3); end()"),
    ("epoll_wait", "e = select.epoll(); end(libc.epoll_wait(e.fileno(), buffer, 1, 3000))"),
    ("poll", "p = select.poll(); end(libc.poll(buffer, 0, 3000))"),
    (
        "nanosleep",
        "ctypes.memmove(buffer, (3).to_bytes(8, 'little') + bytes(8), 16); end(libc.nanosleep(buffer, None))",
    ),
    (
        "read",
        "r, w = os.pipe()\nif os.fork() == 0:\n time.sleep(3); os.write(w, b'x'); os._exit(0)\nend(libc.read(r, buffer, 1) - 1)",
    ),
    (
        "recv with a timeout",
        "a, b = socket.socketpair()\na.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, (3).to_bytes(8, 'little') + bytes(8))\nr = libc.recv(a.fileno(), buffer, 1, 0)\nend(0 if r == -1 and ctypes.get_errno() == 11 else r)",
    ),
    (
        "sigtimedwait",
        "s = ctypes.create_string_buffer(128); s[1] = 2\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\nctypes.memmove(buffer, (3).to_bytes(8, 'little') + bytes(8), 16)\nr = libc.sigtimedwait(s, None, buffer)\nend(0 if r == -1 and ctypes.get_errno() == 11 else r)",
    ),
    (
        "wait4",
        "c = os.fork()\nif c == 0:\n time.sleep(3); os._exit(0)\nend(0 if libc.waitpid(c, buffer, 0) == c else -1)",
    ),
    (
        "select",
        "ctypes.memmove(buffer, (3).to_bytes(8, 'little') + bytes(8), 16); end(libc.select(0, None, None, None, buffer))",
    ),
];

#[test]
fn a_waiting_thread_does_not_notice() {
    let start = "libc = ctypes.CDLL(None, use_errno=True)\nbuffer = ctypes.create_string_buffer(64)\n\
                 since = time.monotonic()\n\
                 def end(result=0):\n error = ctypes.get_errno() if result == -1 else 0\n \
                 print(result, error, 2.9 < time.monotonic() - since < 20, flush=True)\n sys.exit()\n";
    // Side by side, and each by itself: the wait of one must not end while another one starts.
    std::thread::scope(|scope| {
        for (name, wait) in WAITS {
            scope.spawn(move || {
                let mut victim = Victim::python(&format!("{start}print('waits', flush=True)\n{wait}\n"));
                assert_eq!(victim.line(), "waits", "{name}");
                victim.await_system_call();
                inject::userfaultfd(victim.pid()).unwrap();
                assert_eq!(victim.line(), "0 0 True", "{name}");
            });
        }
    });
}

#[test]
fn a_signal_that_comes_meanwhile_still_ends_a_wait() {
    let mut victim = Victim::python(
        "libc = ctypes.CDLL(None, use_errno=True)\nbuffer = ctypes.create_string_buffer(64)\ncount = 0\n\
         handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: None)\nlibc.signal(10, handler)\n\
         libc.siginterrupt(10, 1)\ne = select.epoll()\nprint('waiting', flush=True)\n\
         while True:\n r = libc.epoll_wait(e.fileno(), buffer, 1, 20000)\n print(r, ctypes.get_errno(), flush=True)\n",
    );
    assert_eq!(victim.line(), "waiting");
    for _ in 0..20 {
        // A signal that comes before the wait ends nothing.
        victim.await_system_call();
        let process = victim.pid();
        let injecting = std::thread::spawn(move || inject::userfaultfd(process).map(drop));
        victim.signal(Signal::SIGUSR1);
        injecting.join().unwrap().unwrap();
        assert_eq!(victim.line(), "-1 4");
    }
}

#[test]
fn a_storm_of_signals_loses_none() {
    // The handler is Python's, run at its leisure; the kernel counts what was delivered of a real-time signal.
    let mut victim = Victim::python(
        "count = 0\ndef handler(number, frame):\n global count; count += 1\n\
         signal.signal(signal.SIGRTMIN + 3, handler)\nprint('armed', flush=True)\n\
         import threading\n\
         def storm():\n for _ in range(4000):\n  os.kill(os.getpid(), signal.SIGRTMIN + 3)\n  time.sleep(0.0002)\n\
         t = threading.Thread(target=storm); t.start()\n\
         while t.is_alive(): time.sleep(0.001)\nprint(count > 100, flush=True)\ntime.sleep(60)\n",
    );
    assert_eq!(victim.line(), "armed");
    for _ in 0..60 {
        inject::userfaultfd(victim.pid()).unwrap();
    }
    assert_eq!(victim.line(), "True");
    victim.assert_is_well();
}

#[test]
fn a_stopped_process_can_be_followed_and_stays_stopped() {
    let mut victim = Victim::churn(2);
    std::thread::sleep(Duration::from_millis(300));
    victim.stop();
    let mut tracker = UserfaultfdTracker::attach(victim.pid()).unwrap();
    assert!(tracker.round().unwrap().pages() > 0);
    assert!(victim.all_threads_are("T"));
    assert_eq!(tracker.round().unwrap().pages(), 0);
    victim.signal(Signal::SIGCONT);
    let since = Instant::now();
    while tracker.round().unwrap().pages() == 0 {
        assert!(since.elapsed() < PATIENCE, "nothing is written after the stop");
        std::thread::sleep(Duration::from_millis(10));
    }
    victim.assert_is_well();
}

#[test]
fn nothing_is_left_in_a_process_that_was_followed() {
    let mut victim = Victim::churn(1);
    let count = || std::fs::read_dir(format!("/proc/{}/fd", victim.pid())).unwrap().count();
    let before = count();
    for _ in 0..20 {
        let mut tracker = UserfaultfdTracker::attach(victim.pid()).unwrap();
        tracker.round().unwrap();
    }
    assert_eq!(count(), before);
    victim.assert_is_well();
}

#[test]
fn a_process_that_is_gone_is_an_error_that_names_it() {
    let mut victim = Victim::churn(1);
    victim.child.kill().unwrap();
    victim.child.wait().unwrap();
    let error = UserfaultfdTracker::attach(victim.pid()).unwrap_err().to_string();
    assert!(error.contains(&victim.pid().to_string()), "{error}");
}

#[test]
fn a_process_under_seccomp_can_be_followed() {
    // PR_SET_SECCOMP with a filter that kills for userfaultfd (323) and allows the rest.
    let mut victim = Victim::python(
        "import struct\nlibc = ctypes.CDLL(None, use_errno=True)\n\
         code = [(0x20, 0, 0, 0), (0x15, 0, 1, 323), (6, 0, 0, 0x80000000), (6, 0, 0, 0x7fff0000)]\n\
         raw = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *line) for line in code))\n\
         prog = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', len(code), ctypes.addressof(raw)))\n\
         assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, prog, 0, 0) == 0\n\
         print('filtered', flush=True)\nm = bytearray(8 << 20)\nwhile True: m[5 << 20] ^= 1; time.sleep(0.001)\n",
    );
    assert_eq!(victim.line(), "filtered");
    let (pages, _) = follow(&mut victim, 2);
    assert!(pages > 0);
    victim.assert_is_well();
}

/// Fills 64 MiB and prints `filled`; at SIGUSR1, does what `then` says.
fn filled_and_waiting(then: &str) -> Victim {
    let mut victim = Victim::python(&format!(
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\nlibc = ctypes.CDLL(None, use_errno=True)\n\
         m = bytearray(os.urandom(64 << 20))\nprint('filled', flush=True)\n\
         signal.sigwait([signal.SIGUSR1])\n{then}\ntime.sleep(60)\n"
    ));
    assert_eq!(victim.line(), "filled");
    victim
}

/// Another program, which fills 64 MiB again.
const OTHER_PROGRAM: &str = "os.execv('/usr/bin/python3', ['python3', '-uc', \
    'import os, time; m = os.urandom(64 << 20); print(\"filled again\", flush=True); time.sleep(60)'])";

/// Rounds before, then another program.
fn follow_into_another_program(victim: &mut Victim) -> (UserfaultfdTracker, Store) {
    let mut tracker = UserfaultfdTracker::attach(victim.pid()).unwrap();
    let mut store = Store::new(8 << 30).unwrap();
    for _ in 0..2 {
        let written = tracker.round().unwrap();
        copy(&mut tracker, &written, &mut store);
    }
    victim.signal(Signal::SIGUSR1);
    assert_eq!(victim.line(), "filled again");
    (tracker, store)
}

#[test]
fn a_process_that_runs_another_program_has_to_be_followed_anew() {
    let mut victim = filled_and_waiting(OTHER_PROGRAM);
    let (mut tracker, _) = follow_into_another_program(&mut victim);
    for _ in 0..2 {
        let error = tracker.round().unwrap_err();
        assert!(matches!(error, TrackError::Replaced { process } if process == victim.pid()), "{error}");
        assert!(error.is_end_of_following());
    }
    drop(tracker);
    let (pages, _) = follow(&mut victim, 2);
    assert!(pages > 16384, "{pages} pages");
    victim.assert_is_well();
}

#[test]
fn a_freeze_after_another_program_was_run_tells_all_of_that_ones_memory() {
    let mut victim = filled_and_waiting(OTHER_PROGRAM);
    let (mut tracker, mut store) = follow_into_another_program(&mut victim);
    victim.stop();
    let frozen = tracker.frozen(&maps::followable(victim.pid()).unwrap()).unwrap();
    assert_eq!(frozen.written, frozen.existing);
    copy(&mut tracker, &frozen.written, &mut store);
    let pages = assert_complete(victim.pid(), &frozen.existing, &store);
    assert!(pages > 16384, "{pages} pages");
}

/// What the process itself may not read is read in another way, through a file that belongs to the memory of one program.
#[test]
fn a_copier_reads_the_program_that_runs_now() {
    let forbid = "import ctypes; libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p; \
                  libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]; \
                  a = libc.mmap(0x7000000000, 1 << 20, 3, 0x100022, -1, 0); assert a == 0x7000000000; \
                  ctypes.memset(a, VALUE, 1 << 20); libc.mprotect(ctypes.c_void_p(a), 1 << 20, 0); \
                  print(\"there\", flush=True)";
    let (first, second) = (forbid.replace("VALUE", "1"), forbid.replace("VALUE", "2"));
    let mut victim = filled_and_waiting(&format!(
        "{first}\nsignal.sigwait([signal.SIGUSR1])\n\
         os.execv('/usr/bin/python3', ['python3', '-uc', '{second}; import time; time.sleep(60)'])"
    ));
    let pages: PageRanges = [PageRange::new(0x70_0000_0000, 0x70_0010_0000)].into_iter().collect();
    let mut copier = Copier::new(victim.pid(), 1 << 20);
    for value in [1, 2] {
        victim.signal(Signal::SIGUSR1);
        assert_eq!(victim.line(), "there");
        let mut read = 0;
        let copied = copier.read::<io::Error>(&pages, |batch| {
            assert!(batch.contents.iter().all(|byte| *byte == value), "{value}");
            read += batch.contents.len();
            Ok(())
        });
        assert_eq!((read, copied.unwrap().vanished), (1 << 20, PageRanges::new()));
    }
}

#[test]
fn a_process_that_becomes_itself_anew_all_the_time_is_followed_or_said_to_be_replaced() {
    let mut victim = Victim::churn_with(1, &["--exec", "40"]);
    let (mut replaced, mut complete) = (0, 0);
    for round in 0..30 {
        // In the middle of it, there is nothing that could be followed.
        let Ok(mut tracker) = tracker::attach(victim.pid()) else { continue };
        let mut store = Store::new(8 << 30).unwrap();
        let told: Result<(), TrackError> = (0..round % 3).try_for_each(|_| {
            let written = tracker.round()?;
            copy(&mut *tracker, &written, &mut store);
            Ok(())
        });
        match told {
            Ok(()) => {
                std::thread::sleep(Duration::from_millis(round % 7 * 5));
                victim.stop();
                let frozen = tracker.frozen(&maps::followable(victim.pid()).unwrap()).unwrap();
                copy(&mut *tracker, &frozen.written, &mut store);
                assert_complete(victim.pid(), &frozen.existing, &store);
                victim.signal(Signal::SIGCONT);
                complete += 1;
            }
            Err(TrackError::Replaced { .. } | TrackError::Ended { .. }) => replaced += 1,
            Err(error) => panic!("{error}"),
        }
        victim.assert_is_well();
    }
    assert!(complete > 5, "{complete} complete, {replaced} replaced");
}

/// A process of nobody's, which is killed.
struct Orphan(Pid);

impl Drop for Orphan {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
    }
}

/// clone(2) with `CLONE_VM` and `SIGCHLD`: a process that shares the memory and waits.
const SHARING: &str = "stack = ctypes.create_string_buffer(1 << 16)\n\
    top = (ctypes.addressof(stack) + (1 << 16)) & ~63\n\
    wait = ctypes.cast(libc.pause, ctypes.c_void_p)\n\
    print(libc.clone(wait, ctypes.c_void_p(top), 0x100 | 17, None), flush=True)\n\
    signal.sigwait([signal.SIGUSR1])\n";

#[test]
fn memory_that_two_processes_share_is_followed_once_and_not_taken_for_that_of_another_program() {
    let mut victim = filled_and_waiting(&format!("{SHARING}{OTHER_PROGRAM}"));
    victim.signal(Signal::SIGUSR1);
    let sharer = Orphan(Pid::from_raw(victim.line().parse().unwrap()));
    let mut tracker = UserfaultfdTracker::attach(victim.pid()).unwrap();
    let mut store = Store::new(8 << 30).unwrap();
    for _ in 0..2 {
        let written = tracker.round().unwrap();
        copy(&mut tracker, &written, &mut store);
        let error = tracker::attach(sharer.0).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", sharer.0)) && error.contains("shares its memory"), "{error}");
    }
    victim.signal(Signal::SIGUSR1);
    assert_eq!(victim.line(), "filled again");
    // The old memory lives on in the sharer, and can still be registered.
    let error = tracker.round().unwrap_err();
    assert!(matches!(error, TrackError::Replaced { .. }), "{error}");
    victim.stop();
    let frozen = tracker.frozen(&maps::followable(victim.pid()).unwrap()).unwrap();
    copy(&mut tracker, &frozen.written, &mut store);
    assert!(assert_complete(victim.pid(), &frozen.existing, &store) > 16384);
    drop(tracker);
    // Nobody follows the sharer's any more.
    UserfaultfdTracker::attach(sharer.0).unwrap();
}

#[test]
fn a_process_that_forks_and_runs_other_programs_in_children_is_followed() {
    let mut victim = Victim::churn_with(1, &["--fork", "--spawn"]);
    std::thread::sleep(Duration::from_millis(200));
    for rounds in [0, 1, 2, 4, 6] {
        follow(&mut victim, rounds);
        victim.assert_is_well();
    }
}

#[test]
fn a_process_that_ends_meanwhile_is_said_to_have_ended() {
    let mut victim = Victim::churn(1);
    let mut tracker = UserfaultfdTracker::attach(victim.pid()).unwrap();
    tracker.round().unwrap();
    victim.child.kill().unwrap();
    // A zombie first.
    while !victim.all_threads_are("Z") {
        std::thread::sleep(Duration::from_millis(1));
    }
    let error = tracker.round().unwrap_err();
    assert!(matches!(error, TrackError::Ended { .. }), "{error}");
    victim.child.wait().unwrap();
    let error = tracker.round().unwrap_err();
    assert!(matches!(error, TrackError::Ended { .. }), "{error}");
}

/// A file that is gone after the test.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn assert_refused_for(victim: &Victim, what: &str) {
    let error = tracker::attach(victim.pid()).unwrap_err().to_string();
    assert!(error.contains(what) && error.contains(&format!("process {} ", victim.pid())), "{error}");
}

#[test]
fn direct_reads_are_a_hazard() {
    let file = Scratch::new("direct");
    let path = file.0.to_str().unwrap().to_owned();
    let victim = Victim::churn_with(1, &["--direct", &path]);
    std::thread::sleep(Duration::from_millis(200));
    let hazard = hazard::of(victim.pid()).unwrap().unwrap();
    assert!(matches!(&hazard.kind, HazardKind::DirectIo { fd, path: named } if *fd > 2 && *named == path), "{hazard}");
    assert_refused_for(&victim, &format!("{path} open for direct I/O"));
}

#[test]
fn asynchronous_input_is_a_hazard() {
    let victim = Victim::churn_with(1, &["--aio"]);
    assert_eq!(hazard::of(victim.pid()).unwrap().unwrap().kind, HazardKind::Aio);
    assert_refused_for(&victim, "io_setup");
}

#[test]
fn a_ring_of_io_uring_is_a_hazard_with_and_without_its_descriptor() {
    // io_uring_setup(8, &params), then the mapping of its queue of submissions.
    let ring = "p = ctypes.create_string_buffer(120)\nfd = libc.syscall(425, 8, p)\nassert fd >= 0, ctypes.get_errno()\n\
                print(fd, flush=True)\nsignal.sigwait([signal.SIGUSR1])\nimport mmap\n\
                m2 = mmap.mmap(fd, 4096, offset=0)\nos.close(fd)\nprint('closed', flush=True)\n";
    let mut victim = filled_and_waiting(ring);
    assert_eq!(hazard::of(victim.pid()).unwrap(), None);
    victim.signal(Signal::SIGUSR1);
    let fd = victim.line().parse().unwrap();
    assert_eq!(hazard::of(victim.pid()).unwrap().unwrap().kind, HazardKind::IoUring { fd: Some(fd) });
    victim.signal(Signal::SIGUSR1);
    assert_eq!(victim.line(), "closed");
    let kind = hazard::of(victim.pid()).unwrap().unwrap().kind;
    assert!(matches!(kind, HazardKind::IoUring { .. }), "{kind:?}");
    assert_refused_for(&victim, "io_uring");
}

#[test]
fn a_hazard_that_comes_while_a_process_is_followed_ends_it() {
    let opened = "fd = os.open('/usr/bin/python3', os.O_RDONLY | os.O_DIRECT)\nprint('opened', flush=True)\n";
    let mut victim = filled_and_waiting(opened);
    let mut tracker = tracker::attach(victim.pid()).unwrap();
    tracker.round().unwrap();
    victim.signal(Signal::SIGUSR1);
    assert_eq!(victim.line(), "opened");
    let error = tracker.round().unwrap_err();
    assert!(matches!(error, TrackError::Hazard(_)) && error.is_end_of_following(), "{error}");
}

/// Pipes, sockets, and the same flag on a pipe, where it means something else.
#[test]
fn many_descriptors_are_no_hazard_and_looked_at_in_no_time() {
    let open = "r, w = os.pipe2(os.O_DIRECT)\n\
                kept = [open('/usr/bin/python3') for _ in range(1000)] + [socket.socketpair() for _ in range(100)]\n\
                print('opened', flush=True)\n";
    let mut victim = filled_and_waiting(open);
    victim.signal(Signal::SIGUSR1);
    assert_eq!(victim.line(), "opened");
    let looks: Vec<Duration> = (0..10)
        .map(|_| {
            let since = Instant::now();
            assert_eq!(hazard::of(victim.pid()).unwrap(), None);
            since.elapsed()
        })
        .collect();
    let best = looks.iter().min().unwrap();
    println!("a look at 1200 descriptors: {best:?}");
    assert!(*best < Duration::from_millis(100), "{looks:?}");
    follow(&mut victim, 2);
}

/// Maps 8 MiB with these flags of mmap(2) as `a`, prints the address, and goes on.
fn mapped(flags: u32, then: &str) -> Victim {
    let script = format!(
        "libc.mmap.restype = ctypes.c_void_p\nlibc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]\n\
         a = libc.mmap(None, 8 << 20, 3, {flags}, -1, 0)\nassert a != 2**64 - 1, ctypes.get_errno()\n\
         print(hex(a)[2:], flush=True)\n{then}"
    );
    let victim = filled_and_waiting(&script);
    victim.signal(Signal::SIGUSR1);
    victim
}

fn range_of(victim: &mut Victim) -> PageRanges {
    let start = u64::from_str_radix(&victim.line(), 16).unwrap();
    [PageRange::new(start, start + (8 << 20))].into_iter().collect()
}

const PRIVATE_ANONYMOUS: u32 = 0x22;
const FILL: &str = "ctypes.memset(a, 7, 8 << 20)\nprint('written', flush=True)\n";

#[test]
fn locked_memory_is_left_to_criu_and_found_in_the_freeze() {
    let lock = "signal.sigwait([signal.SIGUSR1])\n\
                assert libc.mlock(ctypes.c_void_p(a + 4096), 4096) == 0\nprint('locked', flush=True)\n\
                signal.sigwait([signal.SIGUSR1])\nassert libc.munlockall() == 0\nprint('free', flush=True)\n";
    let mut victim = mapped(PRIVATE_ANONYMOUS, &format!("{FILL}{lock}"));
    let range = range_of(&mut victim);
    assert_eq!(victim.line(), "written");
    let hidden = maps::followable(victim.pid()).unwrap();
    assert_eq!(hidden.intersection(&range), range);
    let mut tracker = tracker::attach(victim.pid()).unwrap();
    assert_eq!(tracker.round().unwrap().intersection(&range), range);
    assert!(maps::moved(victim.pid(), &hidden).unwrap().pages() > 16384);
    victim.signal(Signal::SIGUSR1);
    assert_eq!(victim.line(), "locked");
    let start = range.as_slice()[0].start;
    let left = range.difference(&maps::followable(victim.pid()).unwrap());
    assert!(left.contains(start + PAGE_SIZE), "{left:?}");
    assert!(!tracker.round().unwrap().contains(start + PAGE_SIZE));
    let error = maps::moved(victim.pid(), &hidden).unwrap_err().to_string();
    assert!(error.contains("locked memory") && error.contains(&format!("{:#x}", start + PAGE_SIZE)), "{error}");
    victim.signal(Signal::SIGUSR1);
    assert_eq!(victim.line(), "free");
    assert!(maps::followable(victim.pid()).unwrap().contains(start + PAGE_SIZE));
    drop(tracker);
    follow(&mut victim, 2);
}

/// `MAP_HUGETLB` with `MAP_NORESERVE`: it can be mapped without any huge pages, though not touched.
#[test]
fn private_huge_pages_of_hugetlb_are_left_to_criu() {
    let mut victim = mapped(PRIVATE_ANONYMOUS | 0x4_0000 | 0x4000, "");
    let range = range_of(&mut victim);
    let followable = maps::followable(victim.pid()).unwrap();
    assert!(followable.intersection(&range).is_empty(), "{followable:?}");
    assert!(maps::moved(victim.pid(), &range).is_err());
    follow(&mut victim, 2);
}

/// `MAP_DROPPABLE` (Linux 6.11) cannot be registered: it is told as written every time.
#[test]
fn droppable_memory_is_told_every_time() {
    let mut victim = mapped(0x28, FILL);
    let range = range_of(&mut victim);
    assert_eq!(victim.line(), "written");
    let mut tracker = tracker::attach(victim.pid()).unwrap();
    for _ in 0..3 {
        assert_eq!(tracker.round().unwrap().intersection(&range), range);
    }
    drop(tracker);
    follow(&mut victim, 2);
}

/// `MADV_GUARD_INSTALL` (Linux 6.13).
#[test]
fn guard_pages_hold_nothing() {
    let guard = "assert libc.madvise(ctypes.c_void_p(a + 8192), 4096, 102) == 0\nprint('guarded', flush=True)\n";
    let mut victim = mapped(PRIVATE_ANONYMOUS, &format!("{FILL}{guard}"));
    let start = range_of(&mut victim).as_slice()[0].start;
    assert_eq!((victim.line(), victim.line()), ("written".to_owned(), "guarded".to_owned()));
    let mut tracker = tracker::attach(victim.pid()).unwrap();
    let written = tracker.round().unwrap();
    assert!(written.contains(start) && !written.contains(start + 2 * PAGE_SIZE));
    drop(tracker);
    follow(&mut victim, 2);
}

#[test]
fn the_choice_of_a_tracker_is_told() {
    let victim = Victim::churn(1);
    let tracker = tracker::attach(victim.pid()).unwrap();
    let expected = if UserfaultfdTracker::try_kernel().is_ok() { "userfaultfd" } else { "soft-dirty marks" };
    assert_eq!(tracker.choice().tracker, expected, "{}", tracker.choice());
    assert_eq!(tracker.process(), victim.pid());
}

#[test]
fn the_tracker_that_is_asked_for_follows_or_none_does() {
    let victim = Victim::churn(1);
    let has_marks = SoftDirtyTracker::try_kernel().unwrap();
    match tracker::attach_as(victim.pid(), Preference::SoftDirty) {
        Ok(tracker) => assert!(has_marks && tracker.choice().tracker == "soft-dirty marks", "{}", tracker.choice()),
        Err(error) => assert!(!has_marks && error.to_string().contains("CONFIG_MEM_SOFT_DIRTY"), "{error}"),
    }
    let has_protection = UserfaultfdTracker::try_kernel().is_ok();
    match tracker::attach_as(victim.pid(), Preference::Userfaultfd) {
        Ok(tracker) => assert!(has_protection && tracker.choice().tracker == "userfaultfd", "{}", tracker.choice()),
        Err(error) => assert!(!has_protection && !error.to_string().contains("soft-dirty"), "{error}"),
    }
}

// What follows needs a kernel with soft-dirty marks, which `make e2e-vm` boots.

fn by_marks(victim: &Victim) -> SoftDirtyTracker {
    SoftDirtyTracker::attach(victim.pid(), "a test wants it".to_owned()).unwrap()
}

#[test]
#[ignore = "needs CONFIG_MEM_SOFT_DIRTY: make e2e-vm"]
fn soft_dirty_marks_miss_no_write_whatever_a_process_does_with_its_mappings() {
    let mut victim = Victim::churn(3);
    std::thread::sleep(Duration::from_millis(500));
    for rounds in [0, 1, 2, 5] {
        let (pages, _) = follow_by(&mut by_marks(&victim), &mut victim, rounds);
        assert!(pages > 0, "the victim holds next to nothing");
        victim.assert_is_well();
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "needs CONFIG_MEM_SOFT_DIRTY: make e2e-vm"]
fn soft_dirty_marks_follow_a_process_that_forks_and_runs_other_programs_in_children() {
    let mut victim = Victim::churn_with(1, &["--fork", "--spawn"]);
    std::thread::sleep(Duration::from_millis(200));
    for rounds in [0, 1, 3] {
        follow_by(&mut by_marks(&victim), &mut victim, rounds);
        victim.assert_is_well();
    }
}

#[test]
#[ignore = "needs CONFIG_MEM_SOFT_DIRTY: make e2e-vm"]
fn soft_dirty_marks_in_many_regions_are_all_told() {
    let mut victim = Victim::python(SCATTERED_WRITES);
    assert_eq!(victim.line(), "filled");
    for _ in 0..2 {
        follow_by(&mut by_marks(&victim), &mut victim, 3);
    }
}

#[test]
#[ignore = "needs CONFIG_MEM_SOFT_DIRTY: make e2e-vm"]
fn a_soft_dirty_round_tells_what_was_written_since_the_beginning() {
    let mut victim = Victim::python(THREE_WRITES);
    assert_eq!(victim.line(), "filled");
    let mut tracker = by_marks(&victim);
    let all = tracker.round().unwrap();
    assert!(all.pages() > 16384, "{} pages", all.pages());
    let mut before = PageRanges::new();
    for _ in 0..3 {
        victim.signal(Signal::SIGUSR1);
        assert_eq!(victim.line(), "wrote");
        let written = tracker.round().unwrap();
        // A page of 2 MiB has one mark.
        assert!((1..5 * 512).contains(&written.pages()), "{} pages", written.pages());
        assert!(before.difference(&written).pages() < 16, "what was told once was not told again");
        before = written;
    }
}

#[test]
#[ignore = "needs CONFIG_MEM_SOFT_DIRTY: make e2e-vm"]
fn soft_dirty_marks_tell_all_of_another_programs_memory() {
    let mut victim = filled_and_waiting(OTHER_PROGRAM);
    let mut tracker = by_marks(&victim);
    let mut store = Store::new(8 << 30).unwrap();
    let first = tracker.round().unwrap();
    copy(&mut tracker, &first, &mut store);
    victim.signal(Signal::SIGUSR1);
    assert_eq!(victim.line(), "filled again");
    assert!(freeze(&mut tracker, &victim, &mut store) > 16384);
    follow_by(&mut tracker, &mut victim, 2);
}

#[test]
#[ignore = "needs CONFIG_MEM_SOFT_DIRTY: make e2e-vm"]
fn soft_dirty_marks_of_memory_that_two_processes_share_are_followed_once() {
    let mut victim = filled_and_waiting(SHARING);
    victim.signal(Signal::SIGUSR1);
    let sharer = Orphan(Pid::from_raw(victim.line().parse().unwrap()));
    let tracker = by_marks(&victim);
    let error = SoftDirtyTracker::attach(sharer.0, String::new()).unwrap_err();
    assert!(matches!(error, TrackError::Shared { process } if process == sharer.0), "{error}");
    drop(tracker);
    SoftDirtyTracker::attach(sharer.0, String::new()).unwrap();
}

/// The page of zeros, small or huge, comes to where memory is read that was given back. It has no mark, and must be told all the
/// same: what was there before has been told.
#[test]
#[ignore = "needs CONFIG_MEM_SOFT_DIRTY: make e2e-vm"]
fn soft_dirty_marks_or_not_what_was_given_back_and_then_only_read_is_zero() {
    for kind in ["15", "14"] {
        let script = format!(
            "assert libc.madvise(ctypes.c_void_p(a), 8 << 20, {kind}) == 0\n{FILL}signal.sigwait([signal.SIGUSR1])\n\
             assert libc.madvise(ctypes.c_void_p(a), 4 << 20, 4) == 0\n\
             assert ctypes.string_at(a, 4 << 20) == bytes(4 << 20)\nprint('read', flush=True)\n"
        );
        for rounds_after in [0, 1] {
            let mut victim = mapped(PRIVATE_ANONYMOUS, &script);
            let range = range_of(&mut victim);
            assert_eq!(victim.line(), "written");
            let mut tracker = by_marks(&victim);
            let mut store = Store::new(8 << 30).unwrap();
            let written = tracker.round().unwrap();
            assert_eq!(written.intersection(&range), range);
            copy(&mut tracker, &written, &mut store);
            victim.signal(Signal::SIGUSR1);
            assert_eq!(victim.line(), "read");
            for _ in 0..rounds_after {
                let written = tracker.round().unwrap();
                copy(&mut tracker, &written, &mut store);
            }
            freeze(&mut tracker, &victim, &mut store);
        }
    }
}
