//! What all transfers from a node may send together: who gets how much of it, as a ratio.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "what other tests look at")]
mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use podferry_transfer::{Compression, Object, Options, Sender, Shares};
use support::{Cluster, agent, noise};

async fn connect(cluster: &Cluster, options: Options) -> Sender {
    let address = cluster.address.to_string();
    let sender = Sender::connect(&address, &cluster.source(), &agent("target"), &cluster.introduction(), options).await;
    sender.unwrap()
}

fn file(name: &str) -> Object {
    Object::ImageFile(name.to_owned())
}

/// How much two senders have sent when one of them has sent `enough`, when they share this many bytes per second; the second one may be
/// in a hurry.
async fn share_a_cap(cap: u64, enough: u64, hurry: bool) -> [u64; 2] {
    let shares = Some(Shares::new(cap));
    // Each has a target of its own.
    let clusters = [Cluster::new().await, Cluster::new().await];
    let mut senders = Vec::new();
    for cluster in &clusters {
        let options = Options { compression: Compression::Off, shares: shares.clone(), ..Options::default() };
        senders.push((connect(cluster, options).await, Bytes::from(noise(1 << 20, 1))));
    }
    if hurry {
        senders[1].0.hurry();
    }
    let sending = senders.iter().map(|(sender, bytes)| async move {
        let mut writer = sender.open(&file("endless")).await.unwrap();
        loop {
            writer.data(bytes.clone()).await.unwrap();
        }
    });
    let watching = async {
        while senders.iter().all(|(sender, _)| sender.stats().wire_bytes < enough) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        _ = futures::future::join_all(sending) => {}
        () = watching => {}
    }
    [0, 1].map(|at: usize| senders[at].0.stats().wire_bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_may_send_is_shared_in_equal_parts_and_who_stands_still_comes_first() {
    let begun = Instant::now();
    let [first, second] = share_a_cap(20 << 20, 10 << 20, false).await;
    assert!(begun.elapsed() > Duration::from_millis(700), "20 MiB in less than a second: {:?}", begun.elapsed());
    assert!(first.abs_diff(second) < 3 << 20, "{first} and {second} are not the same");
    let [other, hurried] = share_a_cap(20 << 20, 10 << 20, true).await;
    assert!(hurried > 4 * other, "{hurried} of the one in a hurry, {other} of the other");
}
