//! Following real processes: nothing that they write is missed, and they do not notice.

#![expect(clippy::unwrap_used, reason = "a panic is the report")]

use std::io::{self, BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podferry_memory::copier::{Copier, read_exact};
use podferry_memory::range::{PageRange, PageRanges};
use podferry_memory::store::Store;
use podferry_memory::tracker::Tracker;
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
        Self::start(Command::new(env!("CARGO_BIN_EXE_podferry-memory-churn")).args(["/dev/null", &threads.to_string()]))
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

fn copy(tracker: &mut Tracker, ranges: &PageRanges, store: &mut Store) {
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
    let mut page = vec![0; usize::try_from(PAGE_SIZE).unwrap()];
    let mappings = maps::read(process).unwrap();
    for range in &maps::pre_copied(&mappings) {
        for start in (range.start..range.end).step_by(page.len()) {
            if read_exact(process, start, &mut page).is_err() {
                // A guard page, or memory that the process may not read itself.
                continue;
            }
            let kept = store.run(PageRange::new(start, start + PAGE_SIZE));
            if existing.contains(start) {
                let differs = |kept: &[u8]| {
                    (0..page.len()).step_by(8).filter(|at| kept[*at..*at + 8] != page[*at..*at + 8]).collect()
                };
                let words: Option<Vec<usize>> = kept.map(differs);
                assert!(words.as_ref().is_some_and(Vec::is_empty), "page {start:#x} of {range} differs at {words:?}");
            } else {
                assert!(page.iter().all(|byte| *byte == 0), "page {start:#x} was not told and is not zero");
            }
        }
    }
    existing.pages()
}

/// The rounds of a pre-copy, then a stop, the last round, and a look at every byte.
fn follow(victim: &mut Victim, rounds: usize) -> (u64, Vec<u64>) {
    let process = victim.pid();
    let mut tracker = Tracker::attach(process).unwrap();
    let mut store = Store::new(8 << 30).unwrap();
    let mut told = Vec::new();
    for _ in 0..rounds {
        let written = tracker.round().unwrap();
        copy(&mut tracker, &written, &mut store);
        told.push(written.pages());
        std::thread::sleep(Duration::from_millis(30));
    }
    victim.stop();
    let moved = maps::pre_copied(&maps::read(process).unwrap());
    let frozen = tracker.frozen(&moved).unwrap();
    copy(&mut tracker, &frozen.written, &mut store);
    let pages = assert_complete(process, &frozen.existing, &store);
    victim.signal(Signal::SIGCONT);
    (pages, told)
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

/// The kernel hands regions over 512 at a time. With more than that, its word for how far it looked is not the end.
#[test]
fn what_is_written_during_a_round_of_many_regions_is_told_in_that_one_or_the_next() {
    let mut victim = Victim::python(
        "import random\nm = bytearray(os.urandom(64 << 20))\nprint('filled', flush=True)\n\
         while True:\n for _ in range(40): m[random.getrandbits(14) << 12] ^= 1\n time.sleep(0.001)\n",
    );
    assert_eq!(victim.line(), "filled");
    for _ in 0..8 {
        let process = victim.pid();
        let mut tracker = Tracker::attach(process).unwrap();
        let mut store = Store::new(8 << 30).unwrap();
        for _ in 0..3 {
            let written = tracker.round().unwrap();
            copy(&mut tracker, &written, &mut store);
            std::thread::sleep(Duration::from_millis(60));
        }
        victim.stop();
        let frozen = tracker.frozen(&maps::pre_copied(&maps::read(process).unwrap())).unwrap();
        copy(&mut tracker, &frozen.written, &mut store);
        assert_complete(process, &frozen.existing, &store);
        victim.signal(Signal::SIGCONT);
    }
}

#[test]
fn a_round_tells_what_was_written_since_the_last_one() {
    let mut victim = Victim::python(
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n\
         m = bytearray(os.urandom(64 << 20))\nprint('filled', flush=True)\n\
         for line in range(3):\n signal.sigwait([signal.SIGUSR1])\n m[line << 20] ^= 1\n print('wrote', flush=True)\n\
         time.sleep(60)\n",
    );
    assert_eq!(victim.line(), "filled");
    let mut tracker = Tracker::attach(victim.pid()).unwrap();
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
    let mut tracker = Tracker::attach(victim.pid()).unwrap();
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
        let mut tracker = Tracker::attach(victim.pid()).unwrap();
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
    let error = Tracker::attach(victim.pid()).unwrap_err().to_string();
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
