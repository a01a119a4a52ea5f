//! One migration as a pure state machine: `(state, event) -> (state, commands)`.
//!
//! There is no clock, no network and no disk in this module, so every order of events can be tried by tests.
//! [`crate::runner`] owns the clock and the calls, [`crate::store`] the disk.
//!
//! # The path
//!
//! ```text
//! Preflight -> Preparing -> [PreCopying] -> Freezing -> Sealing -> (one durable write)
//!     |            |             |             |          |
//!     |            +-------------+-------------+----------+--> Aborting -> RolledBack -> Aborted
//!     +-------------------------------------------------------------------------------> Aborted
//!
//! (one durable write) -> Releasing -> Resuming -> [Filling] -> Completed
//!                                                     +------> Lost
//! ```
//!
//! What stands in brackets belongs to some strategies only: [`Path`] says to which step of which.
//!
//! * Until the write that enters [`State::Releasing`] is on disk, the source is the truth: any failure, deadline, cancel
//!   or restart leads to [`State::Aborting`].
//! * From that write on the target is the truth: [`Call::Release`], then [`Call::Resume`] and then [`Call::Fill`] are
//!   repeated until they are confirmed, and nothing leads to an abort any more. [`State::Lost`] is no abort: it is where a
//!   committed migration ends whose target says that memory it still needs is gone for good.
//! * A part that has been sealed does not decide for itself; it asks, and [`State::decision`] answers.

mod machine;
#[cfg(test)]
mod properties;

pub use machine::{
    Call, Command, Decision, Durability, Event, Freezing, PartAbort, Path, Phase, Side, SourceAbort, State, Step, Why,
};
