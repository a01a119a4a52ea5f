//! Work on several processors at once.

use std::num::NonZero;
use std::thread;

/// The most threads: memory has no more bandwidth than for so many.
const MOST_THREADS: usize = 16;

/// As many threads as there are processors, within reason.
pub fn threads() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS)
}

/// Works on all of these at once; gives what comes of it in their order.
pub(crate) fn together<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    if let [one] = all {
        return vec![work(one)];
    }
    let work = &work;
    thread::scope(|scope| {
        let begun: Vec<_> = all.iter().map(|one| scope.spawn(move || work(one))).collect();
        begun.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}
