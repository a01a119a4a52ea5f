//! Measures from outside for how long a process stood still.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Result, file};

/// How often the file is read.
const INTERVAL: Duration = Duration::from_micros(100);

/// Watches the counter that a process writes into a file every half a millisecond.
#[derive(Debug)]
pub struct Observer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Duration>>,
}

impl Observer {
    /// Begins to watch.
    pub fn watch(path: &Path) -> Result<Self> {
        let counter = File::open(path).map_err(file("open", path))?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || longest_gap(&counter, &told));
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends the watch; gives the longest time between two counts.
    pub fn longest_gap(mut self) -> Duration {
        self.stop.store(true, Ordering::Release);
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

fn longest_gap(counter: &File, stop: &AtomicBool) -> Duration {
    let read = || {
        let mut bytes = [0; 8];
        let _short = counter.read_at(&mut bytes, 0);
        u64::from_ne_bytes(bytes)
    };
    let (mut last, mut since) = (read(), Instant::now());
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Acquire) {
        std::thread::sleep(INTERVAL);
        let now = read();
        if now != last {
            longest = longest.max(since.elapsed());
            (last, since) = (now, Instant::now());
        }
    }
    // Without another count it stands still until now.
    longest.max(since.elapsed())
}
