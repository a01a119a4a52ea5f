//! Links that are cut and file systems that are full, as the tests of faults and `make chaos` make them: they are what they are
//! said to be, and nothing of them stays.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod faults;

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use faults::client::inside;
use faults::leftovers::{difference, inventory};
use faults::serial;
use podferry_local::faults::links::{Cut, Link, Slow, Way};
use podferry_local::faults::room::{NoRoomForImages, full_state};
use podferry_local::faults::{NODES, Scene, journal};
use podferry_local::{COORDINATOR_ADDRESS, LocalCluster, Options, Place, Strategy};

const PORT: u16 = 9000;

fn cluster(folder: &tempfile::TempDir) -> LocalCluster {
    LocalCluster::up(&Options::new(folder.path()).without_agents()).unwrap()
}

fn bound(place: &Place, address: std::net::Ipv4Addr) -> UdpSocket {
    let socket = inside(place, move || UdpSocket::bind((address, PORT)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    socket
}

/// Whether a datagram comes through.
fn passes(from: &UdpSocket, to: &UdpSocket) -> bool {
    from.send_to(b"x", to.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 8];
    let came = to.recv_from(&mut buffer).ok().map(|(_, sender): (usize, SocketAddr)| sender);
    came == Some(from.local_addr().unwrap())
}

#[test]
fn a_link_is_cut_the_way_that_was_asked_for_and_no_other_is() {
    let _one_at_a_time = serial();
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster(&folder);
    let before = inventory(&cluster).unwrap();
    // The workload is on the second node, so that is the source.
    let scene = Scene { cluster: &cluster, workload: "none", at: 1, strategy: Strategy::Warm };
    let [target, source] = NODES.map(|name| cluster.node(name).unwrap());
    let coordinator = bound(cluster.coordinator().place(), COORDINATOR_ADDRESS);
    let (source, target) = (bound(&source, source.address()), bound(&target, target.address()));
    let links = [
        (Link::Agents, &source, &target),
        (Link::ToSource, &coordinator, &source),
        (Link::ToTarget, &coordinator, &target),
    ];
    for (link, first, second) in links {
        for (way, there, back) in [(Way::Both, false, false), (Way::There, false, true), (Way::Back, true, false)] {
            let cut = Cut::new(&scene, link, way).unwrap();
            assert_eq!((passes(first, second), passes(second, first)), (there, back), "{link:?} {way:?}");
            for (other, first, second) in links.iter().filter(|(other, ..)| *other != link) {
                assert!(passes(first, second) && passes(second, first), "{other:?} with {link:?} cut {way:?}");
            }
            cut.heal().unwrap();
            assert!(passes(first, second) && passes(second, first), "{link:?} healed");
        }
    }
    drop(Cut::new(&scene, Link::Agents, Way::Both).unwrap());
    drop(Slow::down(&cluster, NODES[0], "1mbit").unwrap());
    assert_eq!(difference(&before, &inventory(&cluster).unwrap()), Vec::<String>::new());
}

#[test]
fn a_full_file_system_has_what_it_had_and_takes_no_more() {
    let _one_at_a_time = serial();
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster(&folder);
    let node = cluster.node(NODES[0]).unwrap();
    let before = inventory(&cluster).unwrap();
    let part = node.agent_state().join("parts/0");
    fs::create_dir_all(&part).unwrap();
    fs::write(part.join("part.json"), r#"{"standing": "sealed"}"#).unwrap();
    assert_eq!(journal::open_parts(&node), ["0"]);

    let full = full_state(&node).unwrap();
    let write = |path: &std::path::Path, bytes: usize| fs::write(node.on_machine(path), vec![1; bytes]);
    assert_eq!(fs::read_to_string(node.on_machine(&part).join("part.json")).unwrap().len(), 22);
    assert!(write(&part.join("more"), 8 << 10).is_err());
    full.end().unwrap();
    write(&part.join("part.json"), 1).unwrap();
    assert!(journal::open_parts(&node).is_empty(), "what cannot be read is nobody's part");

    let image = node.images().join("image");
    let small = NoRoomForImages::new(&node).unwrap();
    assert!(write(&image, 4 << 20).is_err());
    drop(small);
    write(&image, 4 << 20).unwrap();
    fs::remove_file(node.on_machine(&image)).unwrap();
    assert_eq!(difference(&before, &inventory(&cluster).unwrap()), Vec::<String>::new());
}
