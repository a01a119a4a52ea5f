//! What a process is rather than has: rights, limits, names, masks.

use std::fs;

use nix::sys::signal::Signal;
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{Kind, Outcome, same};

/// What the test's seccomp filter answers `chroot` with; nothing else would.
const FILTERED: i32 = nix::libc::EUCLEAN;
/// Lines of `/proc/self/status` that nobody changes. `SigPnd` and `ShdPnd` have a pending signal.
const STATUS: [&str; 16] = [
    "Name",
    "Umask",
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "Seccomp_filters",
];

pub(crate) fn make() -> Outcome<Vec<Kind>> {
    rustix::process::umask(Mode::from_raw_mode(0o027));
    fs::create_dir_all("/data/deep/folder")?;
    std::env::set_current_dir("/data/deep/folder")?;
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(700), maximum: limit.maximum })?;
    nix::sys::prctl::set_child_subreaper(true)?;

    let [status, environment, limits, sysv] =
        [status()?, environment(), fs::read_to_string("/proc/self/limits")?, sysv()?];
    Ok(vec![
        Kind::new("status", move || same("the status", &self::status()?, &status)),
        Kind::new("pending-signal", || {
            // SIGUSR2 is the twelfth.
            let pending = line_of(&fs::read_to_string("/proc/self/status")?, "ShdPnd").unwrap_or_default();
            same("SIGUSR2's bit", &(u64::from_str_radix(&pending, 16)? >> 11 & 1), &1)
        }),
        Kind::new("environment", move || same("the environment", &self::environment(), &environment)),
        Kind::new("limits", move || same("the limits", &fs::read_to_string("/proc/self/limits")?, &limits)),
        Kind::new("working-directory", || {
            fs::write("relative", "here")?;
            same("the content", &fs::read_to_string("/data/deep/folder/relative")?.as_str(), &"here")?;
            same("the folder", &std::env::current_dir()?.to_str(), &Some("/data/deep/folder"))
        }),
        Kind::new("umask", || {
            use std::os::unix::fs::PermissionsExt;
            let _ = fs::remove_file("/data/masked");
            fs::write("/data/masked", "")?;
            same("the mode", &(fs::metadata("/data/masked")?.permissions().mode() & 0o777), &0o640)
        }),
        Kind::new("seccomp", || {
            let answer = rustix::process::chroot("/").err().map(rustix::io::Errno::raw_os_error);
            same("what chroot fails with", &answer, &Some(FILTERED))
        }),
        Kind::new("subreaper", || same("whether it is one", &nix::sys::prctl::get_child_subreaper()?, &true)),
        Kind::new("system-v-ipc", move || same("the objects", &self::sysv()?, &sysv)),
    ])
}

fn line_of(text: &str, name: &str) -> Option<String> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(rest.trim().to_owned())
}

/// The main thread's: this one's name is its own.
fn status() -> Outcome<String> {
    let text = fs::read_to_string("/proc/self/status")?;
    let mut all = String::new();
    for name in STATUS {
        let Some(mut value) = line_of(&text, name) else { continue };
        if name == "SigBlk" {
            // A signal is blocked for as long as it is handled, and two of them come all the time.
            let handled = 1 << (Signal::SIGIO as u32 - 1) | 1 << (Signal::SIGUSR1 as u32 - 1);
            value = format!("{:016x}", u64::from_str_radix(&value, 16)? & !handled);
        }
        all = format!("{all}{name}={value} ");
    }
    Ok(all)
}

fn environment() -> String {
    let mut all: Vec<String> = std::env::vars().map(|(name, value)| format!("{name}={value}")).collect();
    all.sort();
    let own = fs::read("/proc/self/environ").unwrap_or_default();
    format!("{} {}", all.join(" "), String::from_utf8_lossy(&own))
}

/// Key, number, mode and size of segments, semaphores and queues: the first four columns. What follows are processes and
/// times.
fn sysv() -> Outcome<String> {
    let mut all = String::new();
    for kind in ["shm", "sem", "msg"] {
        for line in fs::read_to_string(format!("/proc/sysvipc/{kind}"))?.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().take(4).collect();
            all = format!("{all}{kind} {}; ", words.join(" "));
        }
    }
    Ok(all)
}
