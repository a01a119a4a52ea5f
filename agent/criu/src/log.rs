use std::fmt;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// The name of the log of a dump, in its work folder.
pub(crate) const DUMP_LOG: &str = "dump.log";
/// The name of the log of a restore, as runc calls it.
const RESTORE_LOG: &str = "restore.log";
/// How much of a long log's end is read: the failing line is never far from it.
const LOG_TAIL: u64 = 1 << 20;

/// Lines that look like errors and are none.
const HARMLESS: &[&str] = &["Can't setup RLIMIT_NOFILE", "Dumping FAILED", "Restoring FAILED", "Pre-dumping FAILED"];

/// What CRIU's words mean, and what to do. The first that fits counts.
const REMEDIES: &[(&str, &str)] = &[
    (
        "io_uring",
        "io_uring cannot be dumped: turn it off in the program (many servers have an option), or forbid it by seccomp or \
         the sysctl kernel.io_uring_disabled",
    ),
    (
        "Can't lookup mount",
        "a descriptor comes from outside the container: give the container pipes as stdio, not files of the host",
    ),
    (
        "Connected TCP socket",
        "connections move along with a network namespace that config.json gives by path: give it one, or close them before",
    ),
    (
        "Can't dump that handle",
        "a watched file (inotify, fanotify) cannot be named on the overlay: let the program watch a volume or a tmpfs, or \
         turn its watching off",
    ),
    (
        "Can't dump ghost file",
        "an open file was deleted and is too large to be carried along: let the program close it or keep its name",
    ),
    (
        "Can't dump half of stream unix connection",
        "a unix socket's peer is outside the container: close it before the migration",
    ),
    ("External socket is used", "a unix socket's peer is outside the container: close it before the migration"),
    (
        "unable to find external",
        "the target's bundle lacks a mount or namespace that the source has: compare the two config.json",
    ),
    ("No mapping for", "the target's bundle lacks a bind mount that the source has: compare the two config.json"),
    ("No space left on device", "give the images' folder (tmpfs) or the disk more room"),
    ("Cannot allocate memory", "free memory on this node, or raise the limits of the cgroup"),
    ("cpu features", "choose a target whose CPU has all features of the source's"),
    ("CPU capabilities", "choose a target whose CPU has all features of the source's"),
    (
        "Can't bind inet socket",
        "the target's network namespace lacks the container's address: is its link made as on the source?",
    ),
    (
        "Can't restore tcp",
        "the target's network namespace lacks the container's address or route: is its link made as on the source?",
    ),
    ("Unable to freeze", "a process does not stop (uninterruptible I/O?): look at its state with ps, and try again"),
    (
        "Timeout reached",
        "a process does not stop in time (uninterruptible I/O?): look at its state with ps, and try again",
    ),
    (
        "File exists",
        "a process id is taken: does the container have a pid namespace of its own, and does its init reap?",
    ),
    ("Can't open file", "a file that the process has open is not the same on the target: is its volume there?"),
    ("has bad size", "a file on a shared volume changed its size during the migration"),
    ("rseq", "the kernel or libc uses rseq in a way that this CRIU does not know: use CRIU 4.2.1 or newer"),
    ("seize", "another process traces it: end the debugger or strace"),
    ("Can't suspend", "the kernel refused to suspend seccomp: the agent needs CAP_SYS_ADMIN outside a user namespace"),
];

/// What to do about words that are not known. The log itself goes with the migration's folder.
const UNKNOWN: &str = "run `criu check --all` on this node, which says what its kernel lacks, and look for the line in CRIU's \
                       issues, https://github.com/checkpoint-restore/criu/issues";

/// A log that CRIU wrote.
#[derive(Clone, Debug)]
pub struct CriuLog {
    path: PathBuf,
}

/// CRIU's own words for what went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CriuFailure {
    /// The failing line of the log, or the message of its answer when the log has none.
    pub line: String,
    /// What to do about it.
    pub remedy: String,
}

impl fmt::Display for CriuFailure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.line, self.remedy)
    }
}

impl CriuLog {
    /// The log of a dump with this work folder.
    pub fn of_dump(work_dir: &Path) -> Self {
        Self { path: work_dir.join(DUMP_LOG) }
    }

    /// The log of a restore with this work folder.
    pub fn of_restore(work_dir: &Path) -> Self {
        Self { path: work_dir.join(RESTORE_LOG) }
    }

    /// Where the log is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The line that says why, when there is one.
    pub fn failure(&self) -> Option<CriuFailure> {
        failing_line(&self.tail()?).map(Self::explain)
    }

    /// The failure that the log tells of; when it tells of none, one with this message.
    pub fn failure_or(&self, message: &str) -> CriuFailure {
        let message = if message.is_empty() { "CRIU gave no reason" } else { message };
        self.failure().unwrap_or_else(|| Self::explain(message.to_owned()))
    }

    fn explain(line: String) -> CriuFailure {
        let known = REMEDIES.iter().find(|(words, _)| line.contains(words));
        CriuFailure { line, remedy: known.map_or(UNKNOWN, |(_, remedy)| remedy).to_owned() }
    }

    fn tail(&self) -> Option<String> {
        let mut file = fs::File::open(&self.path).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL))).ok()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// The first error is the cause, those after it are its consequences.
fn failing_line(log: &str) -> Option<String> {
    log.lines()
        .find(|line| line.contains("Error (") && !HARMLESS.iter().any(|words| line.contains(words)))
        .map(|line| line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_of(text: &str) -> (tempfile::TempDir, CriuLog) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(DUMP_LOG), text).unwrap();
        let log = CriuLog::of_dump(dir.path());
        (dir, log)
    }

    #[test]
    fn the_first_error_is_the_cause_and_gets_its_remedy() {
        let (_dir, log) = log_of(
            "(00.001) Error (criu/rlimit.c:1): Can't setup RLIMIT_NOFILE for self\n(00.004) Dumping fd\n\
             (00.005) Error (criu/files.c:4): Can't lookup mount=27 for fd=10 path=/x\n\
             (00.006) Error (criu/cr-dump.c:9): Dump files (pid: 7) failed with -1\n",
        );
        let failure = log.failure().unwrap();
        assert!(failure.line.contains("Can't lookup mount=27"), "{failure}");
        assert!(failure.remedy.contains("pipes as stdio"), "{failure}");
    }

    #[test]
    fn an_unknown_error_points_at_what_outlives_the_migration() {
        let (dir, log) = log_of("(00.005) Error (criu/x.c:4): something new\n");
        let failure = log.failure().unwrap();
        assert!(failure.remedy.contains("criu check"), "{failure}");
        assert!(!failure.remedy.contains(dir.path().to_str().unwrap()), "the log is wiped: {failure}");
    }

    #[test]
    fn remedies_name_nothing_that_is_not_offered() {
        for (words, remedy) in REMEDIES {
            for absent in ["strategy", "keep-connections", "ghost-limit", "--tcp-established"] {
                assert!(!remedy.contains(absent), "{words}: {remedy}");
            }
        }
    }

    #[test]
    fn a_log_without_errors_gives_none_and_the_answers_words_are_used() {
        let (_dir, log) = log_of("(00.001) all is well\n");
        assert_eq!(log.failure(), None);
        assert_eq!(log.failure_or("refused").line, "refused");
    }
}
