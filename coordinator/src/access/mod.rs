//! Who may ask for what.
//!
//! [`decide`] is the one function that decides, for every way in by which requests come: it takes a policy, a peer and an
//! action, and says yes or no and why. It knows no clock, no file and no network. [`Gate`] is its shell: it follows the
//! policy's file, and every request passes it.

mod action;
mod decide;
mod gate;
mod pattern;
mod policy;

pub use action::{Action, Verb};
pub use decide::{Denial, Grounds, decide};
pub use gate::Gate;
pub use pattern::Pattern;
pub use policy::{Grant, Policy, Role};
