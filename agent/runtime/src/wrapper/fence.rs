//! The agent's notes of pods that move away: one file each, named by the pod's uid.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// What the note of a pod says whose container is not to be killed, either.
pub const KEEP: &str = "keep";

/// What the note of a pod says that has moved, and whose sandbox is not to be killed: some of its connections live on, and need its address.
pub const STAY: &str = "stay";

/// For how long either holds at most: an agent that is gone for good must not leave a container that nobody can end.
const KEPT_FOR: Duration = Duration::from_secs(900);

/// Where the note of a pod is, if there is one; none for what is no pod's uid, which comes from the API server and is a file's name here.
pub fn fence_of(dir: &Path, uid: &str) -> Option<PathBuf> {
    let plain = !uid.is_empty() && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    plain.then(|| dir.join(uid))
}

/// The note of a pod; none when there is none.
pub(super) fn of_pod(dir: &Path, uid: &str) -> Option<PathBuf> {
    fence_of(dir, uid).filter(|fence| fence.exists())
}

/// A sandbox that was to be killed, and stays for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxEnd {
    /// runc's root folder,
    pub root: PathBuf,
    /// and its id there.
    pub id: String,
}

/// Where that is noted, beside the note of its pod.
pub fn asked(fence: &Path) -> PathBuf {
    fence.with_extension("asked")
}

/// Notes that a sandbox was to be killed.
///
/// # Errors
/// When it cannot be written down.
pub(super) fn ask(fence: &Path, end: &SandboxEnd) -> io::Result<()> {
    let new = fence.with_extension("asked-new");
    fs::write(&new, serde_json::to_vec(end)?)?;
    fs::rename(&new, asked(fence))
}

/// Takes that note back. One that stays is taken away with the note of its pod.
pub(super) fn forget(fence: &Path) {
    let _none_there = fs::remove_file(asked(fence));
}

/// Whether it says that word, and has said so lately.
pub(super) fn says(fence: &Path, wanted: &str) -> bool {
    let kept = fs::read_to_string(fence).is_ok_and(|word| word == wanted);
    let written = fs::metadata(fence).and_then(|metadata| metadata.modified());
    // A clock that was set back keeps it for longer.
    let age = written.map(|written| SystemTime::now().duration_since(written).unwrap_or_default());
    kept && age.is_ok_and(|age| age < KEPT_FOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_kept_by_its_pods_own_note_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        assert!(["u-1", "", ".", "..", "a/b"].into_iter().all(|uid| of_pod(dir.path(), uid).is_none()));
        fs::write(dir.path().join("u-1"), "").unwrap();
        let fence = of_pod(dir.path(), "u-1").unwrap();
        assert!(!says(&fence, KEEP));
        fs::write(&fence, KEEP).unwrap();
        assert!(says(&fence, KEEP) && !says(&fence, STAY));
        let old = SystemTime::now() - KEPT_FOR - Duration::from_secs(1);
        fs::File::options().write(true).open(&fence).unwrap().set_modified(old).unwrap();
        assert!(!says(&fence, KEEP));
        let end = SandboxEnd { root: "/run/runc".into(), id: "s".to_owned() };
        ask(&fence, &end).unwrap();
        assert_eq!(serde_json::from_slice::<SandboxEnd>(&fs::read(asked(&fence)).unwrap()).unwrap(), end);
        assert_eq!(fs::read_to_string(&fence).unwrap(), KEEP);
    }
}
