//! On what is measured.

use std::{fs, path::Path, process::Command};

use podferry_report::results::Environment;

use crate::stage::unix_ms;

/// Looks around. What cannot be found out is left away, or said to be unknown.
pub(super) fn look() -> Environment {
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Environment {
        began_unix_ms: unix_ms(),
        podferry: format!("{} ({})", env!("CARGO_PKG_VERSION"), commit()),
        kernel: said("uname", &["-r"]).unwrap_or_else(|| "unknown".to_owned()),
        processor: value(&processors, "model name").unwrap_or("unknown").to_owned(),
        cpus: std::thread::available_parallelism().map_or(0, |cpus| u32::try_from(cpus.get()).unwrap_or(0)),
        memory_bytes: value(&memory, "MemTotal").and_then(kib).unwrap_or(0),
        versions: versions(),
        notes: notes(&processors),
    }
}

/// What a program says on its standard output.
fn said(program: impl AsRef<std::ffi::OsStr>, words: &[&str]) -> Option<String> {
    let output = Command::new(program).args(words).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The commit of the source tree, with a word when it has been changed since.
fn commit() -> String {
    let root = podferry_local::workspace_root().display().to_string();
    let git = |words: &[&str]| said("git", &[&["-C", root.as_str()], words].concat());
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "commit unknown".to_owned() };
    let is_changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|changes| !changes.is_empty());
    format!("commit {commit}{}", if is_changed { ", changed" } else { "" })
}

/// `NAME : VALUE` of the first line that has it.
fn value<'a>(table: &'a str, name: &str) -> Option<&'a str> {
    let line = table.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim())
}

fn kib(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn versions() -> Vec<(String, String)> {
    let tools = podferry_local::default_tools();
    let redis = podferry_local::workspace_root().join(".podferry/images/redis/rootfs");
    let redis = redis.display().to_string();
    let first_line = |text: String| text.lines().next().unwrap_or_default().to_owned();
    let all = [
        ("CRIU", said(tools.join("criu"), &["--version"])),
        ("runc", said(tools.join("runc"), &["--version"])),
        ("Redis", said("chroot", &[redis.as_str(), "/usr/bin/redis-server", "--version"])),
    ];
    all.into_iter().filter_map(|(name, version)| Some((name.to_owned(), first_line(version?)))).collect()
}

fn notes(processors: &str) -> Vec<String> {
    let is_unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let root = podferry_local::workspace_root().display().to_string();
    let file_system = said("stat", &["--file-system", "--format=%T", root.as_str()]);
    let congestion = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    vec![
        format!("cgroup {}", if is_unified { "v2" } else { "v1, or both" }),
        format!("file system: {}", file_system.unwrap_or_else(|| "unknown".to_owned())),
        format!("virtual machine: {}", if has_flag(processors, "hypervisor") { "yes" } else { "no" }),
        format!("build: {}", if cfg!(debug_assertions) { "debug, slower than a release" } else { "release" }),
        format!("TCP congestion control of the machine: {}", congestion.trim()),
        format!("load average when it began: {}", load.split_whitespace().next().unwrap_or("unknown")),
        "both nodes, the coordinator and the clients share this machine".to_owned(),
    ]
}

fn has_flag(processors: &str, flag: &str) -> bool {
    value(processors, "flags").is_some_and(|flags| flags.split_whitespace().any(|word| word == flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let processors = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu hypervisor lm\n";
        assert_eq!(value(processors, "model name"), Some("Some CPU @ 2 GHz"));
        assert!(has_flag(processors, "hypervisor") && !has_flag(processors, "visor"));
        assert_eq!(value("MemTotal:   1024 kB\n", "MemTotal").and_then(kib), Some(1 << 20));
    }

    #[test]
    fn this_machine_has_a_kernel_and_memory() {
        let environment = look();
        assert!(environment.kernel.starts_with(|first: char| first.is_ascii_digit()), "{environment:?}");
        assert!(environment.memory_bytes > 0 && environment.cpus > 0 && environment.notes.len() > 4);
    }
}
