//! Answers CRIU's question for tracked connections when there are none.
//!
//! CRIU asks for those of the container's network namespace twice while the container stands still, and each time the kernel looks
//! through a table that all namespaces share: 11 to 17 ms with the usual 262144 buckets. The kernel also counts them for each
//! namespace. Where that count is zero, the question is made into one that asks for nothing, which the kernel confirms at once.

use std::fs;

/// Of the network namespace of whoever reads it (`net/netfilter/nf_conntrack_standalone.c`).
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
/// Bytes of `struct nlmsghdr` and `struct nfgenmsg`, which is all that CRIU's question has (`dump_nf_ct` in `criu/net.c`).
pub(crate) const QUESTION: usize = 20;
/// The subsystem `NFNL_SUBSYS_CTNETLINK` with the message `IPCTNL_MSG_CT_GET`.
const GET: u16 = (1 << 8) | 1;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_NOOP: u16 = 1;

/// Whether a message to `NETLINK_NETFILTER` is the question for all connections.
pub(crate) fn asks_for_all(message: &[u8; QUESTION]) -> bool {
    let [l0, l1, l2, l3, t0, t1, f0, f1, ..] = *message;
    u32::from_ne_bytes([l0, l1, l2, l3]) == 20
        && u16::from_ne_bytes([t0, t1]) == GET
        && u16::from_ne_bytes([f0, f1]) & NLM_F_DUMP == NLM_F_DUMP
}

/// The same message, asking for nothing but its confirmation.
pub(crate) fn asking_for_nothing(mut message: [u8; QUESTION]) -> [u8; QUESTION] {
    message[4..6].copy_from_slice(&NLMSG_NOOP.to_ne_bytes());
    message[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message
}

/// Whether the network namespace of the calling thread tracks no connection. Unknown is no.
pub(crate) fn none_is_tracked() -> bool {
    fs::read_to_string(COUNT).is_ok_and(|count| count.trim_end() == "0")
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::process::Command;
    use std::thread;

    use super::*;
    use crate::interposed::ask_netfilter;

    const CRIU_ASKS: u32 = 24680;

    fn question() -> [u8; QUESTION] {
        let mut message = [0; QUESTION];
        message[..4].copy_from_slice(&20_u32.to_ne_bytes());
        message[4..6].copy_from_slice(&GET.to_ne_bytes());
        message[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        message[8..12].copy_from_slice(&CRIU_ASKS.to_ne_bytes());
        message
    }

    fn kind(answer: &[u8]) -> u16 {
        assert_eq!(answer[8..12], CRIU_ASKS.to_ne_bytes(), "an answer to this question");
        u16::from_ne_bytes([answer[4], answer[5]])
    }

    /// In a network namespace that is gone with the thread.
    fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let inside = thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        inside.join().unwrap()
    }

    fn run(command: &[&str]) {
        let output = Command::new(command[0]).args(&command[1..]).output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn only_the_question_for_all_connections_is_one() {
        assert!(asks_for_all(&question()));
        for (at, value) in [(0, 21), (4, 2), (5, 0), (5, 2), (7, 0)] {
            let mut other = question();
            other[at] = value;
            assert!(!asks_for_all(&other), "{at}");
        }
    }

    #[test]
    fn without_connections_the_kernel_confirms_and_without_looking() {
        const NLMSG_ERROR: u16 = 2;
        let answer = elsewhere(|| {
            // What makes the kernel track, and count.
            run(&["iptables", "-A", "OUTPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT"]);
            assert!(none_is_tracked());
            ask_netfilter(&question())
        });
        assert_eq!(kind(&answer), NLMSG_ERROR);
        assert_eq!(answer[16..20], [0; 4], "no error: a confirmation");
    }

    #[test]
    fn a_connection_that_is_tracked_is_told() {
        let answer = elsewhere(|| {
            run(&["ip", "link", "set", "lo", "up"]);
            run(&["iptables", "-A", "OUTPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT"]);
            let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
            UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", receiver.local_addr().unwrap()).unwrap();
            assert!(!none_is_tracked());
            ask_netfilter(&question())
        });
        assert_eq!(kind(&answer), 1 << 8, "IPCTNL_MSG_CT_NEW");
    }
}
