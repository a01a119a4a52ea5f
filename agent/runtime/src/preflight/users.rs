//! Processes whose limits CRIU may not ask for.
//!
//! CRIU dumps the limits of every process with prlimit(2). The kernel answers whoever has the process's user and group in all three
//! forms, real, effective and saved, or `CAP_SYS_RESOURCE` (`check_prlimit_permission` in `kernel/sys.c`).

use procfs::process::Status;

use super::{Finding, FindingKind};

/// The capability's bit (`include/uapi/linux/capability.h`).
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// Judges a process by its status and by that of the agent, whose user and capabilities CRIU will have.
pub(super) fn judge(process: &Status, agent: &Status) -> Option<Finding> {
    let users = [process.ruid, process.euid, process.suid];
    let groups = [process.rgid, process.egid, process.sgid];
    let same = users.iter().all(|user| *user == agent.ruid) && groups.iter().all(|group| *group == agent.rgid);
    if same || agent.capeff & CAP_SYS_RESOURCE != 0 {
        return None;
    }
    Some(Finding::blocking(
        FindingKind::OtherUser,
        format!(
            "runs as user {} and group {}, and the agent has no CAP_SYS_RESOURCE, without which CRIU may not ask for its limits",
            process.euid, process.egid
        ),
        "give the agent CAP_SYS_RESOURCE",
    ))
}

#[cfg(test)]
mod tests {
    use procfs::process::Process;

    use super::*;

    fn status(user: u32, group: u32, capabilities: u64) -> Status {
        let mut status = Process::myself().unwrap().status().unwrap();
        (status.ruid, status.euid, status.suid) = (user, user, user);
        (status.rgid, status.egid, status.sgid) = (group, group, group);
        status.capeff = capabilities;
        status
    }

    #[test]
    fn the_agents_own_user_needs_no_capability_and_any_other_does() {
        let bare = status(0, 0, !CAP_SYS_RESOURCE);
        assert_eq!(judge(&status(0, 0, 0), &bare), None);
        let another = judge(&status(70, 70, 0), &bare).unwrap();
        assert!(another.message.contains("user 70"), "{another}");
        let mut halfway = status(0, 0, 0);
        halfway.suid = 70;
        assert!(judge(&halfway, &bare).is_some() && judge(&status(0, 5, 0), &bare).is_some());
        assert_eq!(judge(&status(70, 70, 0), &status(0, 0, CAP_SYS_RESOURCE)), None);
    }
}
