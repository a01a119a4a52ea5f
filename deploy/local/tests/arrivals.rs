//! What comes for a container while it stands still reaches it. Datagrams show that: nobody repeats them.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use podferry_local::{FIRST_CONTAINER_ADDRESS, Workload, workspace_root};
use support::{NODES, Stage, eventually, inside};

const NAME: &str = "echo";
const ADDRESS: (std::net::Ipv4Addr, u16) = (FIRST_CONTAINER_ADDRESS, 7);
/// Between two datagrams.
const PACE: Duration = Duration::from_millis(2);
/// Of those that come in one freeze so many may be missing: what is on the link at the moment of the cut, or of the switch.
const ON_THE_WAY: usize = 5;

fn image(folder: &Path) -> PathBuf {
    let image = folder.join("image");
    let program = podferry_local::default_binaries().join("podferry-udp-echo");
    assert!(program.exists(), "{} is missing: run `cargo build --workspace --bins` first", program.display());
    let mut script = Command::new(workspace_root().join("deploy/setup/image.sh"));
    let output = script.arg(NAME).arg(&image).arg("--").arg(program).output().unwrap();
    assert!(output.status.success(), "image.sh: {}", String::from_utf8_lossy(&output.stderr));
    image.join("rootfs")
}

/// Sends numbered datagrams all the time, and looks which come back.
struct Caller {
    stop: Arc<AtomicBool>,
    sending: JoinHandle<u64>,
    hearing: JoinHandle<BTreeSet<u64>>,
}

impl Caller {
    fn start(stage: &Stage) -> Self {
        let socket = inside(&Path::new("/run/netns").join(stage.cluster.client().netns()), || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect(SocketAddr::from(ADDRESS)).unwrap();
            socket
        });
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (mouth, told) = (socket.try_clone().unwrap(), Arc::clone(&stop));
        let sending = thread::spawn(move || {
            let mut number = 0_u64;
            while !told.load(Ordering::Relaxed) {
                // A neighbour that is looked for just now is an error, and a lost datagram.
                let _lost = mouth.send(&number.to_le_bytes());
                number += 1;
                thread::sleep(PACE);
            }
            number
        });
        let told = Arc::clone(&stop);
        let hearing = thread::spawn(move || {
            let mut heard = BTreeSet::new();
            let mut last = Instant::now();
            while !told.load(Ordering::Relaxed) || last.elapsed() < Duration::from_secs(1) {
                let mut datagram = [0; 8];
                if socket.recv(&mut datagram).is_ok() {
                    heard.insert(u64::from_le_bytes(datagram));
                    last = Instant::now();
                }
            }
            heard
        });
        Self { stop, sending, hearing }
    }

    /// Gives how many were sent, and how many of those did not come back.
    fn stop(self) -> (u64, usize) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sending.join().unwrap();
        let heard = self.hearing.join().unwrap();
        (sent, (0..sent).filter(|number| !heard.contains(number)).count())
    }
}

fn answered(stage: &Stage) {
    eventually(Duration::from_secs(30), || {
        let (sent, lost) = {
            let caller = Caller::start(stage);
            thread::sleep(Duration::from_millis(100));
            caller.stop()
        };
        if lost == 0 { Ok(()) } else { Err(format!("{lost} of {sent} datagrams were not answered")) }
    });
}

#[test]
fn datagrams_that_come_in_the_freeze_reach_the_container_on_the_other_node() {
    let stage = Stage::up(&[NAME]);
    let program = ["/bin/podferry-udp-echo"];
    stage.start(&Workload::new(NAME, image(stage.folder.path()), program, FIRST_CONTAINER_ADDRESS));
    answered(&stage);
    let live: &[&str] = &["--strategy", "live", "--downtime-budget", "1000"];
    let warm: &[&str] = &["--strategy", "warm"];
    for (hop, strategy) in [live, warm, live, warm].into_iter().enumerate() {
        let caller = Caller::start(&stage);
        let record = stage.migrate_with(NAME, NODES[(hop + 1) % 2], strategy);
        let downtime = Duration::from_secs_f64(record["downtime_ms"].as_f64().unwrap() / 1e3);
        thread::sleep(Duration::from_millis(500));
        let (sent, lost) = caller.stop();
        println!("{strategy:?}: {sent} datagrams, {lost} lost, down {} ms", downtime.as_millis());
        let in_the_freeze = downtime.as_millis() / PACE.as_millis() / 2;
        assert!(in_the_freeze > 4 * ON_THE_WAY as u128, "hardly any came in the freeze: {record:#}");
        assert!(lost <= ON_THE_WAY, "{lost} of {sent} datagrams are lost: {record:#}");
    }
}

#[test]
fn datagrams_that_come_in_a_freeze_that_is_undone_reach_the_container_where_it_was() {
    let stage = Stage::up(&[NAME]);
    let program = ["/bin/podferry-udp-echo"];
    stage.start(&Workload::new(NAME, image(stage.folder.path()), program, FIRST_CONTAINER_ADDRESS));
    answered(&stage);
    // The target lacks what the container has open: the restore fails.
    let node = stage.node(NODES[1]);
    let lower = node.on_machine(&node.bundle(NAME)).join("lower");
    let empty = stage.folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    fs::remove_file(&lower).unwrap();
    symlink(&empty, &lower).unwrap();
    let caller = Caller::start(&stage);
    let record = stage.try_migrate_with(NAME, NODES[1], &["--strategy", "warm"]).unwrap();
    thread::sleep(Duration::from_millis(500));
    let (sent, lost) = caller.stop();
    assert_ne!(record["phase"], "succeeded", "{record:#}");
    assert!(record["timings"]["dump"].as_f64().unwrap_or_default() > 0.0, "it was not frozen: {record:#}");
    println!("{sent} datagrams, {lost} lost");
    assert!(lost <= ON_THE_WAY, "{lost} of {sent} datagrams are lost: {record:#}");
}
