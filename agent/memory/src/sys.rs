//! System calls that no library wraps, each behind a function that is safe to call.

#![expect(unsafe_code, reason = "system calls with pointers or raw requests; the only such code of this crate")]

pub(crate) mod counter;
pub(crate) mod lease;
pub(crate) mod memory;
pub(crate) mod pagemap;
pub(crate) mod ptrace;
pub mod slot;
pub(crate) mod sparse;
pub(crate) mod userfaultfd;
