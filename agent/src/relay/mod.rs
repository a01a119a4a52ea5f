//! Connections live on though their pod has another address now: see [`podferry_proto::relay`] and [`podferry_network::relay`].
//!
//! ```text
//!  peer ──▶ old address ──▶ A, the old sandbox: Home ══ agents' stream ══▶ Away: B, the new sandbox ──▶ restored socket
//!  peer ◀── old address ◀── A                       ◀══════════════════ B ◀── its answer
//! ```
//!
//! [`Home`] belongs to the source's part until the commit, and to itself afterwards; [`Away`] to the target's until the resume. What they are is
//! written down below `<runtime_dir>/relays`, so that an agent that was restarted takes them up: their devices outlive it, and while nobody
//! reads them no packet comes to a socket that is not its own. Nothing of it outlives the node.

mod away;
mod batch;
mod home;
mod kept;
mod list;
mod note;
#[cfg(test)]
mod tests;

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podferry_common::MigrationId;
use podferry_common::failure::chain;
use podferry_network::Netns;
use podferry_proto::v1::Relayed;
use podferry_runtime::{Container, NamespaceKind};

use crate::config::Kubernetes;
use crate::context::Context;
use crate::journal::{PartRecord, Standing};
use crate::target::INTERFACE;

pub use away::{Away, Aways, Leaves};
pub use batch::{QUEUE, batch, bytes_of, message};
pub use home::Home;
pub(crate) use home::stays;
pub use list::list;

/// The most addresses of a relay: the pod's own, and those that it had before.
pub const MOST_ADDRESSES: usize = 16;

/// How long one lives at most: so many seconds when somebody has asked for it, and else as this node is set.
fn lifetime(context: &Context, asked_s: u32) -> Duration {
    if asked_s > 0 {
        return Duration::from_secs(asked_s.into());
    }
    context.config.kubernetes.as_ref().map(Kubernetes::relay).unwrap_or_default()
}

/// Where notes of relays are.
fn notes(context: &Context) -> PathBuf {
    context.config.runtime_dir.join("relays")
}

/// What of a pod's connections a relay could carry; none when there is nothing to carry them with. Blocks.
pub fn relayed(context: &Context, container: &Container) -> Option<Relayed> {
    let kubernetes = context.config.kubernetes.as_ref()?;
    if kubernetes.relay_s == 0 || !podferry_network::relay::is_possible() {
        return None;
    }
    let path = container.namespace_paths.get(&NamespaceKind::Network)?;
    let found = Netns::open(path).and_then(|netns| {
        let found = podferry_network::relay::addresses_of(&netns, INTERFACE)?;
        podferry_network::relay::check_home(&netns, INTERFACE, &found.0)?;
        let (mut addresses, mut mtu) = found;
        // It came by a relay, too.
        if let Some(before) = context.aways.of_pod(path) {
            let has_connections = |address: &IpAddr| {
                podferry_network::relay::connections_of(&netns, &[*address]).map_or(true, |count| count > 0)
            };
            addresses = with_older(addresses, before.addresses(), has_connections);
            mtu = mtu.min(before.mtu());
        }
        Ok((addresses, mtu))
    });
    match found {
        Ok((addresses, _)) if addresses.is_empty() => None,
        Ok((addresses, _)) if addresses.len() > MOST_ADDRESSES => {
            tracing::warn!(
                count = addresses.len(),
                id = container.id,
                "a pod's connections are closed when it moves: they are to too many addresses"
            );
            None
        }
        Ok((addresses, mtu)) => {
            Some(Relayed { addresses: addresses.iter().map(ToString::to_string).collect(), mtu, lifetime_s: 0 })
        }
        Err(error) => {
            tracing::warn!(error = chain(&error), id = container.id, "a pod's connections are closed when it moves");
            None
        }
    }
}

/// A pod's own addresses and the older ones; of these, where they are many, only those that still have connections.
fn with_older(mut own: Vec<IpAddr>, older: &[IpAddr], has_connections: impl Fn(&IpAddr) -> bool) -> Vec<IpAddr> {
    let all_fit = own.len() + older.len() <= MOST_ADDRESSES;
    own.extend(older.iter().filter(|address| all_fit || has_connections(address)));
    own
}

/// Takes up what an agent before has left. Those of parts that have not ended are for the parts.
pub async fn recover(context: &Context, records: &[PartRecord]) {
    let found = match note::all(&notes(context)) {
        Ok(found) => found,
        Err(error) => return tracing::error!(%error, "relays of earlier migrations are not taken up"),
    };
    let standing_of =
        |migration| records.iter().find(|record| record.migration == migration).map(|record| record.standing);
    let of = |wanted| found.iter().filter(move |(_, side)| *side == wanted).map(|(migration, _)| *migration);
    // They may be carried on by a home.
    for migration in of(note::Side::Away) {
        away::recover(context, migration, standing_of(migration)).await;
    }
    for migration in of(note::Side::Home) {
        home::recover(context, migration, standing_of(migration)).await;
    }
}

/// Whether the part that a relay belonged to has ended well.
fn has_moved(standing: Option<Standing>) -> bool {
    matches!(standing, Some(Standing::Released | Standing::Resumed))
}

/// Where the note of one side is.
fn note_of(context: &Context, side: note::Side, migration: MigrationId) -> PathBuf {
    note::path(&notes(context), side, migration)
}

fn removed(file: &Path, result: io::Result<()>) {
    if let Err(error) = result
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, file = %file.display(), "the note of a relay that has ended stays");
    }
}
