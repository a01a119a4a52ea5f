//! What can go wrong with a link, and what to do about it.

use std::io;
use std::path::PathBuf;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a link was not read, made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A network namespace could not be opened, entered or made.
    #[error("cannot {doing} the network namespace {}", .netns.display())]
    Netns {
        /// The operation.
        doing: &'static str,
        /// The namespace's path.
        netns: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel refused a change of, or a question about, an interface.
    #[error("cannot {doing} {interface}")]
    Link {
        /// The operation.
        doing: &'static str,
        /// The interface.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// There is no interface of that name.
    #[error("there is no network interface {interface} here")]
    NoInterface {
        /// The name.
        interface: String,
    },
    /// An interface of that name is there, but not the one that was meant.
    #[error(
        "{interface} is another interface than before (index {found}, not {expected}): it was deleted and made anew"
    )]
    Replaced {
        /// The name.
        interface: String,
        /// The index it had.
        expected: u32,
        /// The index it has.
        found: u32,
    },
    /// An interface is not of the kind that this crate may change.
    #[error("{interface} is {what}")]
    WrongKind {
        /// The name.
        interface: String,
        /// What it is, and what it should be.
        what: &'static str,
    },
    /// A plan holds what no link can have. It came from the other node, so it is checked before anything is made.
    #[error("the plan for {interface:?} is refused: {why}")]
    Plan {
        /// The interface that the plan is for.
        interface: String,
        /// The rule it breaks.
        why: String,
    },
    /// What should be made is there already.
    #[error("{what} is in use: end the container that uses it, or choose another name")]
    InUse {
        /// The namespace's path or the interface.
        what: String,
    },
    /// The kernel lacks what cuts a link.
    #[error(
        "cannot cut {interface}: the kernel has no classifier cls_bpf (load the module, or set CONFIG_NET_CLS_BPF)"
    )]
    NoClassifier {
        /// The interface.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The bridge is there, and switched off.
    #[error("bridge {bridge} is down, so that nothing on it is reached")]
    BridgeDown {
        /// The bridge.
        bridge: String,
    },
    /// The bridge does not forward for its new port.
    #[error("bridge {bridge} does not forward for {interface}: {why}")]
    NotForwarding {
        /// The bridge.
        bridge: String,
        /// The port.
        interface: String,
        /// The reason, and what to do.
        why: &'static str,
    },
    /// An announcement was not sent.
    #[error("cannot announce the addresses of {interface}")]
    Announce {
        /// The interface that announces.
        interface: String,
        /// The system's answer.
        source: io::Error,
    },
    /// What arrives for a container could not be captured.
    #[error("cannot {doing} the socket that captures the packets of a container")]
    Capture {
        /// The operation.
        doing: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A captured packet was not handed to its container.
    #[error("cannot hand captured packets to the container behind {interface}")]
    Replay {
        /// The host interface.
        interface: String,
        /// The system's answer. `ENOBUFS` is that of a link that is cut.
        source: io::Error,
    },
    /// The device that packets are relayed by could not be opened, read or written.
    #[error(
        "cannot {doing} the relay's device {device}: it needs /dev/net/tun (load the module tun), and one process has it at a time"
    )]
    Relay {
        /// The operation.
        doing: &'static str,
        /// The device's name.
        device: &'static str,
        /// The system's answer. `EBUSY`: another process has it.
        source: io::Error,
    },
    /// A relayed packet was not taken by the namespace that it was for. The relay goes on.
    #[error("a relayed packet was not taken")]
    RelayedPacket {
        /// The system's answer. `EINVAL` is that to a malformed one.
        source: io::Error,
    },
    /// A namespace is not such that packets can be relayed from or to it.
    #[error("cannot relay the packets of {interface}: {why}")]
    NotRelayable {
        /// The interface that has the addresses.
        interface: String,
        /// The reason, and what to do.
        why: String,
    },
    /// A setting of the kernel was not read or changed.
    #[error("cannot {doing} the setting /proc/sys/net/{name} (is /proc/sys writable here?)")]
    Setting {
        /// The operation.
        doing: &'static str,
        /// The setting's path.
        name: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The kernel did not say which connections a namespace has.
    #[error("cannot list the TCP connections of the network namespace {}", .netns.display())]
    Connections {
        /// The namespace's path.
        netns: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Turns the kernel's answer about an interface into the error that names it.
pub(crate) fn link_error(doing: &'static str, interface: &str) -> impl FnOnce(io::Error) -> Error {
    move |source| match source.raw_os_error() {
        Some(code) if code == nix::errno::Errno::ENODEV as i32 => Error::NoInterface { interface: interface.into() },
        _ => Error::Link { doing, interface: interface.into(), source },
    }
}
