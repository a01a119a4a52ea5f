//! The other side of `podferry-hook`: how CRIU is told of it, and the names it is spoken to with.

use std::path::Path;

/// Environment variable with the path of the agent's socket.
pub const HOOK_SOCKET: &str = "PODFERRY_HOOK_SOCKET";
/// Environment variable with the migration's id.
pub const MIGRATION: &str = "PODFERRY_MIGRATION";

/// Environment variable with the hook's path, for the library that is preloaded into CRIU.
pub const HOOK_PROGRAM: &str = "PODFERRY_CRIU_HOOK";

/// The content of a CRIU configuration file that makes `hook_path` its action script.
///
/// `network-lock skip`: the container's link is cut and opened by the agent, at a cost of microseconds instead of a
/// firewall's 13 to 70 ms, and without rules that stay behind. `tcp_close`: connections are restored as closed, for a
/// strategy that does not keep them.
pub fn criu_config(hook_path: &Path, tcp_close: bool) -> String {
    let mut text = format!("action-script \"{}\"\nnetwork-lock skip\n", hook_path.display());
    if tcp_close {
        text.push_str("tcp-close\n");
    }
    text
}
