//! Who uses the machine's processors, noted again and again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use super::result::{Sample, Shares};
use crate::{processor::Snapshot, stage::unix_ms};

/// Between two looks: often enough for pre-copies of half a second, and seldom enough not to be a load itself.
const PERIOD: Duration = Duration::from_millis(100);

/// The processes that are looked at, by their numbers on the machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Watched {
    pub(super) redis: u32,
    pub(super) client: u32,
    /// The first process of the node that Redis is on.
    pub(super) source: u32,
    pub(super) target: u32,
}

impl Watched {
    fn sample(&self) -> Sample {
        let unix_ms = unix_ms();
        let snapshot = Snapshot::take();
        let redis = snapshot.process(self.redis);
        let used = Shares {
            redis,
            client: snapshot.process(self.client),
            source_node: snapshot.node(self.source) - redis,
            target_node: snapshot.node(self.target),
        };
        Sample { unix_ms, used }
    }
}

/// Looks until it is stopped.
#[derive(Debug)]
pub(super) struct Sampler {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Sample>>,
}

impl Sampler {
    pub(super) fn start(watched: Watched) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            let mut samples = Vec::new();
            while !seen.load(Ordering::Acquire) {
                samples.push(watched.sample());
                std::thread::sleep(PERIOD);
            }
            samples
        });
        Self { ended, thread }
    }

    pub(super) fn stop(self) -> Vec<Sample> {
        self.ended.store(true, Ordering::Release);
        self.thread.join().unwrap_or_default()
    }
}
