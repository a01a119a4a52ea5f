//! The cluster's certificates: short-lived, and issued anew while it is up.
//!
//! A keeper of the cluster's own, `podferry-node-init keep-certificates`, replaces each when half of its lifetime is over.
//! Agents and the coordinator look at their files and take new ones without a restart; the command line reads them at
//! each start. The keeper runs in the coordinator's network namespace, so that it goes when the cluster does.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use podferry_common::identity::{Identity, IdentityFiles, LocalCa, Peer};

use crate::daemon::Daemon;
use crate::error::{Error, FileContext, Result};
use crate::node::Node;
use crate::place::Place;
use crate::state::{Layout, State};

/// The user in the client side's certificate.
pub const CLIENT_USER: &str = "local";
/// How long a certificate is valid unless the options say otherwise.
pub(crate) const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The shortest lifetime: agents look at their files every 10 s, and half of it has to be longer than that.
pub(crate) const SHORTEST_LIFETIME: Duration = Duration::from_secs(30);
/// The longest time between two looks of the keeper. It asks the clock, which goes on while the machine sleeps.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// [`LIFETIME`], as serde takes it.
pub(crate) fn lifetime() -> Duration {
    LIFETIME
}

/// Who has a certificate, and where.
fn holders(layout: &Layout, state: &State) -> Result<Vec<(Peer, IdentityFiles)>> {
    let client = Peer::client(CLIENT_USER).map_err(|error| document("the client's name", &error))?;
    let mut holders = vec![
        (client, IdentityFiles::in_folder(layout.client_identity())),
        (Peer::Coordinator, IdentityFiles::in_folder(layout.coordinator_identity())),
    ];
    for node in &state.nodes {
        let name = node.name.parse().map_err(|error| document("the node's name", &error))?;
        holders.push((Peer::Agent(name), IdentityFiles::in_folder(Node::new(layout, state, node).identity())));
    }
    Ok(holders)
}

/// Makes the cluster's authority and the first certificate of everybody.
pub(crate) fn make(layout: &Layout, state: &State) -> Result<()> {
    let authority =
        LocalCa::create(&layout.authority()).map_err(|error| document("the cluster's authority", &error))?;
    holders(layout, state)?.iter().try_for_each(|(peer, files)| issue(&authority, peer, state, files))
}

fn issue(authority: &LocalCa, peer: &Peer, state: &State, files: &IdentityFiles) -> Result<()> {
    authority.issue(peer, state.certificate_lifetime, files).map_err(|error| document("a certificate", &error))
}

/// The authority that [`make`] made.
pub(crate) fn authority(layout: &Layout) -> Result<LocalCa> {
    LocalCa::load(&layout.authority()).map_err(|error| document("the cluster's authority", &error))
}

pub(crate) fn document(what: &str, error: &dyn std::error::Error) -> Error {
    let mut reason = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        reason = format!("{reason}: {cause}");
        source = cause.source();
    }
    Error::Document { what: what.to_owned(), reason }
}

/// Starts the keeper of a cluster, unless it runs.
pub(crate) fn start_keeper(layout: &Layout, state: &State, place: &Place) -> Result<()> {
    let mut command = place.command(state.binaries.join("podferry-node-init"));
    command.arg("keep-certificates").arg(&layout.folder);
    let keeper = Daemon {
        what: "the keeper of certificates".to_owned(),
        pid_file: layout.identity().join("keeper.pid"),
        log: layout.logs().join("certificates.log"),
        port: 0,
        forked: false,
    };
    keeper.start(&mut command).map(drop)
}

/// Replaces certificates of the cluster in this folder when half of their lifetime is over, for as long as there is such a
/// cluster. A second keeper of the same cluster ends at once. What cannot be replaced is reported on standard error and
/// tried again.
pub fn keep_certificates(folder: &Path) -> Result<()> {
    let layout = Layout { folder: folder.canonicalize().at("find the folder", folder)? };
    let state = State::load(&layout.folder)?.ok_or_else(|| Error::NotUp { folder: layout.folder.clone() })?;
    let path = layout.identity().join("keeper.lock");
    let lock = File::create(&path).at("make", &path)?;
    if lock.try_lock().is_err() {
        return Ok(());
    }
    let holders = holders(&layout, &state)?;
    while State::load(&layout.folder)?.is_some_and(|found| found.suffix == state.suffix) {
        for (peer, files) in holders.iter().filter(|(_, files)| is_due(files, state.certificate_lifetime)) {
            match authority(&layout).and_then(|authority| issue(&authority, peer, &state, files)) {
                Ok(()) => eprintln!("issued a new certificate for {peer}"),
                Err(error) => eprintln!("{error}; the old certificate stays"),
            }
        }
        thread::sleep((state.certificate_lifetime / 20).min(LONGEST_PAUSE));
    }
    Ok(())
}

/// Whether half of the certificate's lifetime is over, or it cannot be used at all.
fn is_due(files: &IdentityFiles, lifetime: Duration) -> bool {
    let left = Identity::load(files.clone()).map(|identity| identity.not_after().duration_since(SystemTime::now()));
    left.ok().and_then(Result::ok).is_none_or(|left| left < lifetime / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_due_after_half_of_its_lifetime_or_when_it_is_of_no_use() {
        let folder = tempfile::tempdir().unwrap();
        let files = IdentityFiles::in_folder(folder.path().join("me"));
        let authority = LocalCa::create(folder.path()).unwrap();
        assert!(is_due(&files, LIFETIME), "there is none");
        authority.issue(&Peer::Coordinator, LIFETIME, &files).unwrap();
        assert!(!is_due(&files, LIFETIME));
        authority
            .issue(&Peer::Coordinator, (LIFETIME / 2).checked_sub(Duration::from_secs(1)).unwrap(), &files)
            .unwrap();
        assert!(is_due(&files, LIFETIME), "half is over");
        authority.issue(&Peer::Coordinator, Duration::ZERO, &files).unwrap();
        assert!(is_due(&files, LIFETIME), "it has ended");
        std::fs::write(&files.key, "none").unwrap();
        assert!(is_due(&files, LIFETIME), "it cannot be read");
    }
}
