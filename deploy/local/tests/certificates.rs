//! Certificates that end within the test: everybody has new ones in time, and nobody restarts for them.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use podferry_common::identity::{Identity, Peer};
use podferry_common::tls;
use podferry_local::{AGENT_PORT, FIRST_CONTAINER_ADDRESS, LocalCluster, Options, ProcessId, Signal};
use support::{NODES, Stage, eventually, redis};

/// Half of it is longer than the 10 s after which agents and the coordinator look at their files.
const LIFETIME: Duration = Duration::from_secs(40);

/// Everybody who listens: who it is, where, and as which process.
fn listeners(stage: &Stage) -> Vec<(Peer, String, Option<ProcessId>)> {
    let coordinator = stage.cluster.coordinator();
    let mut found = vec![(Peer::Coordinator, coordinator.address(), coordinator.process())];
    for node in stage.cluster.nodes() {
        let address = format!("{}:{AGENT_PORT}", node.address());
        let process = node.agent_pid().and_then(ProcessId::of);
        found.push((Peer::Agent(node.name().parse().unwrap()), address, process));
    }
    found
}

/// The certificate that a listener shows to somebody who dials now, which is valid now, or why there is none.
fn shown(stage: &Stage, peer: &Peer, address: &str) -> Result<Vec<u8>, String> {
    let identity = Identity::load(stage.cluster.client_identity()).unwrap();
    let namespace = File::open(Path::new("/run/netns").join(stage.cluster.client().netns())).unwrap();
    let dial = || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let stream = runtime.block_on(tls::dial(address, &identity, peer));
        let stream = stream.map_err(|error| podferry_common::chain(&error))?;
        Ok(stream.get_ref().1.peer_certificates().unwrap()[0].to_vec())
    };
    thread::scope(|scope| scope.spawn(dial).join().unwrap())
}

#[test]
fn certificates_are_replaced_before_they_end_and_nobody_restarts() {
    let stage = Stage::up_as(&["redis"], |_, options| Options { certificate_lifetime: LIFETIME, ..options });
    let up = Instant::now();
    let listeners = listeners(&stage);
    let first: Vec<_> = listeners.iter().map(|(peer, address, _)| shown(&stage, peer, address).unwrap()).collect();
    let client = std::fs::read(stage.cluster.client_identity().certificate).unwrap();
    stage.start(&redis("redis", FIRST_CONTAINER_ADDRESS));

    thread::sleep((LIFETIME + Duration::from_secs(2)).saturating_sub(up.elapsed()));
    for ((peer, address, _), first) in listeners.iter().zip(first) {
        let now =
            shown(&stage, peer, address).unwrap_or_else(|error| panic!("{peer} has no valid certificate: {error}"));
        assert_ne!(now, first, "the certificate of {peer} ought to have ended by now");
    }
    assert_ne!(std::fs::read(stage.cluster.client_identity().certificate).unwrap(), client);
    // Agents dial each other and the coordinator dials them, with what they have now.
    stage.migrate("redis", NODES[1]);
    assert_eq!(self::listeners(&stage), listeners, "somebody was restarted");
}

#[test]
fn whoever_finds_a_cluster_without_its_keeper_starts_another() {
    let mut stage = Stage::up(&[]);
    let pid_file = stage.cluster.folder().join("identity/keeper.pid");
    let keeper = || {
        let words = std::fs::read_to_string(&pid_file).unwrap();
        ProcessId::of(words.split_whitespace().next().unwrap().parse().unwrap())
    };
    let first = keeper().expect("a cluster with agents has a keeper");
    let again = LocalCluster::attach(stage.cluster.folder()).unwrap();
    assert_eq!(keeper(), Some(first), "one is enough");
    assert!(first.signal(Signal::KILL) && first.wait_gone(Duration::from_secs(10)));
    drop(again);
    LocalCluster::attach(stage.cluster.folder()).unwrap();
    let second = eventually(Duration::from_secs(10), || keeper().ok_or_else(|| "no new keeper".to_owned()));
    assert_ne!(second, first);
    stage.cluster.down().unwrap();
    assert!(!second.is_alive(), "the keeper outlives its cluster");
}

#[test]
fn certificates_that_would_end_before_anybody_takes_new_ones_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let short = Duration::from_secs(20);
    let options = Options { certificate_lifetime: short, ..Options::new(folder.path().join("cluster")) };
    let refused = LocalCluster::up(&options).unwrap_err().to_string();
    assert!(refused.contains("certificates for 20s"), "{refused}");
    assert!(!options.folder.exists());
}
