//! Faults in the middle of migrations, made and watched from outside: for the tests of this crate and for `make chaos`.
//!
//! A [`Scene`] is one workload that is about to be moved. [`Scene::halt_at`] moves it until a chosen [`Moment`] and has the
//! migration stand still there; then something is killed, stopped, cut off or filled up, and everything goes on. A
//! [`Sampler`](sampler::Sampler) looks all the while whether two copies run, [`Counting`](client::Counting) whether each answer
//! of the workload is the one that is due, and [`leftovers`] says what is there afterwards that was not there before.

pub mod client;
pub mod halts;
pub mod journal;
pub mod leftovers;
pub mod links;
pub mod moments;
pub mod processes;
pub mod room;
pub mod sampler;
pub mod scene;
pub mod stand_in;

use std::thread;
use std::time::{Duration, Instant};

pub use halts::{LogTail, Stopped};
pub use moments::{Moment, Victim};
pub use scene::{Begun, Halted, NODES, Scene};

use crate::error::{Error, Result};

/// Nothing that is waited for here takes longer, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for something that has to come within [`PATIENCE`], looking `every` so often.
pub fn wait_every<T>(every: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if begun.elapsed() >= PATIENCE {
            return Err(Error::Waited { what: what.to_owned(), seconds: PATIENCE.as_secs() });
        }
        thread::sleep(every);
    }
}

/// Waits for something that has to come.
pub fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> Result<T> {
    wait_every(Duration::from_millis(10), what, look)
}
