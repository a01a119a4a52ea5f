//! What the coordinator wants of a freeze, and what it is told meanwhile.

use std::time::{Duration, SystemTime};

use podferry_common::MigrationId;
use podferry_common::identity::Peer;
use podferry_network::{ContainerLink, LinkHandle};
use podferry_runtime::Container;

use super::precopy::{PreCopyOrder, Round};
use crate::journal::{FetchedBy, StopNote, TakeOverNote};
use crate::volumes::{MovedFiles, Volume};

/// What becomes of a container's established connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// They are closed.
    Close,
    /// They move along with their address.
    Keep,
    /// Kubernetes: they live on through a relay.
    Relay {
        /// For so many seconds at most; 0 for as long as the node is set to.
        lifetime_s: u32,
    },
}

/// What the coordinator wants of a freeze.
#[derive(Clone, Debug)]
pub struct FreezeOrder {
    /// Of which migration.
    pub migration: MigrationId,
    /// The container, as it was found.
    pub container: Container,
    /// Its link, when it has one that can be cut.
    pub link: Option<ContainerLink>,
    /// Where it goes.
    pub target: Peer,
    /// host:port of the target's agent.
    pub target_address: String,
    /// What becomes of its connections.
    pub connections: Connections,
    /// Whether pages may be compressed.
    pub compress: bool,
    /// The most bytes per second on the link; none for as many as it takes.
    pub bandwidth_limit: Option<u64>,
    /// How to pre-copy; none: freeze at once.
    pub pre_copy: Option<PreCopyOrder>,
    /// Whether memory that pre-copy has not brought below the budget stays here for the target to fetch.
    pub post_copy: bool,
    /// Cold: stop the container, and send its files alone.
    pub stop: Option<StopNote>,
    /// Application-level: a new instance takes its place.
    pub take_over: Option<TakeOverNote>,
    /// The volumes that move along, in the order in which the target expects them.
    pub volumes: Vec<Volume>,
    /// What of its files moves: its layer and these.
    pub files: MovedFiles,
    /// How long after the end of pre-copy an unsealed part undoes itself.
    pub patience: Duration,
}

impl FreezeOrder {
    /// Where to cut the link.
    pub(super) fn link_handle(&self) -> Option<LinkHandle> {
        self.link.as_ref()?.peer.as_ref().map(LinkHandle::new)
    }

    pub(super) fn fetched_by(&self) -> Option<FetchedBy> {
        let Peer::Agent(node) = &self.target else { return None };
        let (node, compress, bandwidth_limit) = (node.clone(), self.compress, self.bandwidth_limit);
        self.post_copy.then_some(FetchedBy { node, compress, bandwidth_limit })
    }

    /// Whether all memory that is sent before the freeze is compared in it.
    pub(super) fn verifies(&self) -> bool {
        self.pre_copy.is_some_and(|pre_copy| pre_copy.verify)
    }

    /// When an unsealed part undoes itself at the latest.
    pub fn deadline(&self) -> SystemTime {
        self.pre_copy.map_or_else(SystemTime::now, |pre_copy| pre_copy.deadline) + self.patience
    }
}

/// What a freeze tells while it goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum FreezeEvent {
    /// A round of pre-copy has ended.
    Round(Round),
    /// Pre-copy has ended; the freeze begins now.
    Converged {
        /// What the memory that is left will add to the downtime, in milliseconds.
        predicted_ms: f64,
        /// What a person should know.
        notes: Vec<String>,
    },
    /// The tasks are frozen, or cold: have ended; application-level: are cut off if they are stateful.
    Frozen {
        /// Milliseconds from the request to the freeze, or cold: from the signal to the end.
        freeze_ms: f64,
        /// Cold: it did not end in its grace period.
        killed: bool,
    },
    /// Bytes so far.
    Progress {
        /// Of the workload.
        raw_bytes: u64,
        /// On the wire.
        wire_bytes: u64,
    },
    /// All is with the target, verified and stored.
    Transferred {
        /// Pages with contents.
        pages: u64,
        /// Bytes of the workload.
        raw_bytes: u64,
        /// Of them zero pages, which were not sent.
        zero_bytes: u64,
        /// Bytes on the wire.
        wire_bytes: u64,
        /// From the freeze until CRIU had written everything.
        dump_ms: f64,
        /// From then until the target confirmed.
        transfer_ms: f64,
        /// What was sent in the freeze, after a pre-copy.
        last_round: Option<Round>,
        /// What the end check came to, if there was one.
        verified: Option<Verified>,
    },
}

/// What an end check came to that found no difference.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verified {
    /// Bytes that were compared, zero pages included.
    pub bytes: u64,
    /// From the first page that was read for it to the target's confirmation.
    pub duration: Duration,
}
