//! Compression that chooses by itself, on a link that is slow: mutual TLS over a loopback of its own that carries 200 Mbit/s.

#![expect(clippy::unwrap_used, reason = "tests")]

mod support;

use std::process::Command;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use nix::sched::{CloneFlags, unshare};
use podferry_transfer::{Compression, Object, Options, Owner, Sender, SenderStats};
use support::{Call, Cluster, agent, noise};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
/// As much below what one core packs as a network is; the burst is more than one packet of a loopback.
const SLOW: &str = "ip link set lo up && tc qdisc add dev lo root tbf rate 200mbit burst 256kb latency 200ms";

/// Runs asynchronous work in a new network namespace with a slow loopback. It goes with its threads.
fn on_a_slow_link<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let alone = move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(Command::new("sh").args(["-euc", SLOW]).status().unwrap().success());
        // The runtime's threads are in it, too.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(work)
    };
    std::thread::spawn(alone).join().unwrap()
}

/// Bytes that have left through this namespace's loopback, all headers included.
fn carried() -> u64 {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table.lines().find_map(|line| line.trim().strip_prefix("lo:")).unwrap();
    line.split_whitespace().nth(8).unwrap().parse().unwrap()
}

/// What was sent as one process' memory.
struct Sent {
    stats: SenderStats,
    /// Bytes that the link carried.
    carried: u64,
    /// Whether the sender packed when it was done.
    packs: bool,
}

/// Sends memory and compares what arrives, byte for byte.
async fn send(memory: Vec<u8>) -> Sent {
    let cluster = Cluster::new().await;
    cluster.store.keep_bytes.store(true, Ordering::Relaxed);
    let options = Options { compression: Compression::Auto, ..Options::default() };
    let (address, identity) = (cluster.address.to_string(), cluster.source());
    let introduction = cluster.introduction();
    let sender = Sender::connect(&address, &identity, &agent("target"), &introduction, options).await.unwrap();
    let before = carried();
    let object = Object::Pages { owner: Owner::Process(1), id: 1 };
    let mut writer = sender.open(&object).await.unwrap();
    let whole = Bytes::from(memory);
    // As CRIU brings them: run by run.
    for start in (0..whole.len()).step_by(MIB) {
        let run = whole.slice(start..whole.len().min(start + MIB));
        writer.pages(0x7000_0000 + start as u64, 0, run).await.unwrap();
    }
    writer.close().await.unwrap();
    let packs = sender.level().is_some();
    let stats = sender.finish().await.unwrap();
    assert_eq!(cluster.store.end(), Call::End);
    assert!(received(&cluster.store.calls()) == whole, "what arrived is not what was sent");
    Sent { stats, carried: carried() - before, packs }
}

/// The memory that the sink was given.
fn received(calls: &[Call]) -> Vec<u8> {
    let mut memory = Vec::new();
    for call in calls {
        let Call::Pages(run) = call else { continue };
        assert_eq!(run.vaddr, 0x7000_0000 + memory.len() as u64);
        let mut full = run.bytes.chunks_exact(PAGE);
        for page in 0..usize::try_from(run.count).unwrap() {
            memory.extend_from_slice(if run.zero.is_zero(page) { &[0; PAGE] } else { full.next().unwrap() });
        }
        assert_eq!(full.next(), None);
    }
    memory
}

/// Memory as programs have it: zstd makes a fraction of it.
fn text(length: usize) -> Vec<u8> {
    let lines =
        (0_u64..).flat_map(|line| format!("{{\"cart\": {line}, \"price\": {}}}\n", line * 7919 % 9973).into_bytes());
    lines.take(length).collect()
}

#[test]
fn zeros_are_left_out_and_what_packs_well_is_packed() {
    // Zeros between it, in runs and as single pages; noise behind it, when packing has long begun.
    let mut memory = text(4 * MIB).repeat(16);
    memory[20 * MIB..24 * MIB].fill(0);
    memory.chunks_mut(PAGE).step_by(7).for_each(|page| page.fill(0));
    let hole = memory.chunks(PAGE).filter(|page| page.iter().all(|byte| *byte == 0)).count() * PAGE;
    memory.extend(noise(4 * MIB, 3));
    let raw = memory.len() as u64;

    let sent = on_a_slow_link(send(memory));
    let stats = sent.stats;
    assert_eq!((stats.raw_bytes, stats.zero_bytes), (raw, hole as u64));
    let full = raw - stats.zero_bytes;
    // The beginning goes as it is: by the time that the link is known, windows and buffers are full of it.
    assert!(stats.wire_bytes < full * 3 / 4, "{} bytes of {full} were sent: {stats:?}", stats.wire_bytes);
    assert!(stats.wire_bytes > 4 << 20, "noise cannot be packed: {stats:?}");
    // TLS, TCP and acknowledgements come on top.
    assert!(sent.carried > stats.wire_bytes, "{} bytes carried, {stats:?}", sent.carried);
    assert!(sent.carried < full * 4 / 5, "{} bytes carried of {full}", sent.carried);
}

#[test]
fn noise_goes_as_it_is() {
    let sent = on_a_slow_link(send(noise(12 * MIB, 5)));
    let stats = sent.stats;
    assert!(!sent.packs, "it packs noise");
    let overhead = stats.wire_bytes.checked_sub(stats.raw_bytes);
    assert!(overhead.is_some_and(|bytes| bytes < 4096), "{stats:?}");
    assert!(sent.carried < stats.raw_bytes * 103 / 100, "{} bytes carried: {stats:?}", sent.carried);
}
