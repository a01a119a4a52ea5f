//! What of relays is on this node, for whoever asks.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use podferry_common::MigrationId;
use podferry_common::failure::chain;
use podferry_common::identity::Peer;
use podferry_network::Netns;
use podferry_network::relay::{self, Connection};
use podferry_proto::v1::{RelayEnd, RelayedConnection};

use super::{Away, home, note, notes};
use crate::context::Context;

/// The most connections of a relay that are named.
const MOST_NAMED: usize = 256;

/// All of it, in the order of migrations; blocks.
pub fn list(context: &Context) -> Vec<RelayEnd> {
    let found = note::all(&notes(context)).unwrap_or_else(|error| {
        tracing::error!(%error, "relays are not listed");
        Vec::new()
    });
    let mut ends: Vec<_> = found.into_iter().filter_map(|(migration, side)| end(context, migration, side)).collect();
    ends.sort_by(|one, other| (&one.migration_id, one.is_home).cmp(&(&other.migration_id, other.is_home)));
    ends
}

/// One; none when it has ended meanwhile, or has not begun.
fn end(context: &Context, migration: MigrationId, side: note::Side) -> Option<RelayEnd> {
    match side {
        note::Side::Home => home::described(context, migration),
        note::Side::Away => context.aways.get(migration).and_then(|away| away_end(&away)),
    }
}

fn away_end(away: &Arc<Away>) -> Option<RelayEnd> {
    let (since, until) = away.span()?;
    let mut end = RelayEnd {
        migration_id: away.migration().to_string(),
        peer_node: node_of(away.home()),
        addresses: away.addresses().iter().map(ToString::to_string).collect(),
        since_unix_ms: unix_ms(since),
        until_unix_ms: unix_ms(until),
        is_carried_on: away.is_carried_on(),
        ..RelayEnd::default()
    };
    if !end.is_carried_on {
        let all = connections(away.netns(), away);
        end.connections = u32::try_from(all.len()).unwrap_or(u32::MAX);
        end.some = all.iter().take(MOST_NAMED).map(named).collect();
    }
    Some(end)
}

fn connections(netns: &Netns, away: &Away) -> Vec<Connection> {
    relay::list_connections(netns, away.addresses()).unwrap_or_else(|error| {
        tracing::warn!(error = chain(&error), migration = %away.migration(), "old connections are not listed");
        Vec::new()
    })
}

fn named(connection: &Connection) -> RelayedConnection {
    RelayedConnection {
        local: connection.local.to_string(),
        peer: connection.peer.to_string(),
        received_bytes: connection.bytes.map(|(received, _)| received),
        sent_bytes: connection.bytes.map(|(_, sent)| sent),
    }
}

/// A node by the name in its agent's certificate; only agents are at the ends of relays.
pub(super) fn node_of(peer: &Peer) -> String {
    match peer {
        Peer::Agent(node) => node.to_string(),
        _ => String::new(),
    }
}

fn unix_ms(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
