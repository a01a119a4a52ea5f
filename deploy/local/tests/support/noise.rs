//! One connection to Redis that writes to the same values again and again, as fast as they are taken.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use super::Line;

/// Bytes of a value: it and what Redis keeps with it have a page.
const VALUE: usize = 4000;
/// Different values. No value follows itself, so of a page that is sent again all has changed.
const VALUES: usize = 61;
/// Values that are sent before the first answer is read: Redis is to have work all the time, whatever becomes of this thread.
const AT_ONCE: usize = 25;
/// What writes one value. It takes some 100 µs of CPU time: without that, Redis would write 300 MB in a second of it.
const SCRIPT: &str = "for i=1,20000 do end return redis.call('set',KEYS[1],ARGV[1])";

/// One connection that overwrites values of 4000 bytes with noise.
pub(crate) struct Noise {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Noise {
    /// Begins to write to so many values, rounded up to 25, and returns when all have been written to once.
    pub(crate) fn start(line: Line, keys: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let (all_written, all) = mpsc::channel();
        let thread = thread::spawn(move || write_noise(line, keys, &all_written, &told));
        all.recv().expect("the connection that writes broke");
        Self { stop, thread }
    }

    /// Ends; fails when a value was not taken.
    pub(crate) fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the connection that writes broke");
    }
}

fn write_noise(mut line: Line, keys: usize, all_written: &Sender<()>, stop: &AtomicBool) {
    let values = values();
    let script = line.ask_bulk(&format!("SCRIPT LOAD \"{SCRIPT}\""));
    for turn in 0.. {
        for first in (0..keys).step_by(AT_ONCE) {
            let set = |key| format!("EVALSHA {script} 1 noise:{key} {}", values[(key + turn) % VALUES]);
            let sets = (first..first + AT_ONCE).map(set);
            line.post(&sets.collect::<Vec<_>>().join("\r\n"));
            for _ in 0..AT_ONCE {
                assert_eq!(line.line(), "+OK");
            }
            if stop.load(Ordering::Relaxed) {
                return;
            }
        }
        let _nobody_waits = all_written.send(());
    }
}

/// Noise from xorshift64 (Marsaglia 2003).
fn values() -> Vec<String> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut value = || {
        let mut value = String::with_capacity(VALUE);
        while value.len() < VALUE {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            write!(value, "{state:016x}").unwrap();
        }
        value
    };
    (0..VALUES).map(|_| value()).collect()
}
