//! Whose memory is whose (`kcmp(2)`).

use std::io;

use nix::errno::Errno;
use nix::unistd::Pid;

/// `KCMP_VM` of `enum kcmp_type` (`include/uapi/linux/kcmp.h`).
const VM: libc::c_int = 1;

/// Whether two processes have the same memory: children of vfork(2), and of clone(2) with `CLONE_VM`.
pub(crate) fn is_shared(one: Pid, other: Pid) -> io::Result<bool> {
    // SAFETY: takes no pointers: for `KCMP_VM` both indices are ignored.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one.as_raw(), other.as_raw(), VM, 0_usize, 0_usize) };
    Ok(Errno::result(order)? == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_shares_its_memory_with_itself_and_not_with_its_parent() {
        assert!(is_shared(Pid::this(), Pid::this()).unwrap());
        assert!(!is_shared(Pid::this(), Pid::parent()).unwrap());
    }
}
