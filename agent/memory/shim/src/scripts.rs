//! Runs CRIU's action script where it has something to do, and without a shell.
//!
//! CRIU runs it at eight moments of a restore, each time with system(3): a fork, a shell, and the script, 2 to 5 ms in which the
//! container stands still. `podferry-hook` acts at two of them. At the others it would do nothing, so nothing is started. Any other
//! script is CRIU's own affair.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

/// The environment variable that names `podferry-hook`; `podferry_runtime::hook` has it, too.
const HOOK_VARIABLE: &str = "PODFERRY_CRIU_HOOK";
/// In which CRIU says which moment it is.
const ACTION_VARIABLE: &str = "CRTOOLS_SCRIPT_ACTION";
/// The moments at which `podferry-hook` acts.
const ACTS_AT: [&str; 2] = ["post-restore", "pre-resume"];

/// What is to be done in place of system(3).
#[derive(Debug, PartialEq, Eq)]
enum Instead {
    Nothing,
    Run,
}

/// None where the command is not the hook: then system(3) is not replaced.
fn instead_of(command: &OsStr, hook: Option<&OsStr>, action: Option<&OsStr>) -> Option<Instead> {
    if hook != Some(command) {
        return None;
    }
    let acts = action.is_none_or(|action| ACTS_AT.iter().any(|name| action == *name));
    Some(if acts { Instead::Run } else { Instead::Nothing })
}

/// In place of system(3), with its result; none where that has to be called. The caller has blocked `SIGCHLD`, as system(3) does: CRIU
/// collects every child it hears of.
pub(crate) fn run(command: &CStr) -> Option<i32> {
    let command = OsStr::from_bytes(command.to_bytes());
    let (hook, action) = (std::env::var_os(HOOK_VARIABLE), std::env::var_os(ACTION_VARIABLE));
    match instead_of(command, hook.as_deref(), action.as_deref())? {
        Instead::Nothing => Some(0),
        // The hook has no use for this library.
        Instead::Run => {
            Some(Command::new(command).env_remove("LD_PRELOAD").status().map_or(-1, ExitStatusExt::into_raw))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_runs_where_it_acts_and_other_scripts_are_left_alone() {
        let hook = OsStr::new("/opt/podferry-hook");
        let at = |action: &'static str| instead_of(hook, Some(hook), Some(OsStr::new(action)));
        for action in ["pre-restore", "setup-namespaces", "post-setup-namespaces", "network-unlock", "post-resume"] {
            assert_eq!(at(action), Some(Instead::Nothing), "{action}");
        }
        assert_eq!((at("post-restore"), at("pre-resume")), (Some(Instead::Run), Some(Instead::Run)));
        assert_eq!(instead_of(hook, Some(hook), None), Some(Instead::Run));
        assert_eq!(instead_of(OsStr::new("/opt/other"), Some(hook), Some(OsStr::new("pre-restore"))), None);
        assert_eq!(instead_of(hook, None, Some(OsStr::new("pre-restore"))), None);
    }

    #[test]
    fn the_result_is_that_of_the_program() {
        // The only test here that touches the environment.
        assert_eq!(run(c"/bin/false"), None);
        // SAFETY: no other thread of this test program reads or writes these variables.
        #[expect(unsafe_code, reason = "variables of the process, as CRIU has them")]
        unsafe {
            std::env::set_var(HOOK_VARIABLE, "/bin/false");
            std::env::set_var(ACTION_VARIABLE, "post-restore");
        }
        assert_eq!(run(c"/bin/false"), Some(1 << 8));
    }
}
