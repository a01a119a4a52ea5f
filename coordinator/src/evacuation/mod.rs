//! Emptying a node: which workload moves next, and how; what could not move, and why.
//!
//! - `record`: an evacuation, as it is kept and shown,
//! - `machine`: what happens to it, pure: `(evacuation, event) -> evacuation`,
//! - `plan`: what is to be done next, pure,
//! - `pace`: how long moving takes, by what was seen,
//! - `driver`: the shell of one evacuation, which looks, asks for migrations, follows them and writes,
//! - `evacuator`: all of them.
//!
//! An evacuation has its own durable record and moves nothing itself: each workload goes through a migration like any other.

mod driver;
mod evacuator;
mod id;
mod machine;
mod pace;
mod plan;
#[cfg(test)]
mod properties;
mod record;
pub(crate) mod selector;

pub use evacuator::{Cordons, Evacuator, Wish};
pub use id::{EvacuationId, InvalidEvacuationId};
pub use machine::{Ending, Event, Found, Outcome};
pub use pace::Pace;
pub use plan::{Command, Room, next};
pub use record::{Entry, Evacuation, Hurried, Manner, Order, Phase, Standing, Terms};
