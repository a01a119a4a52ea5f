//! A relay's end away, in a namespace of its own. Needs root and /dev/net/tun.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use podferry_common::MigrationId;
use podferry_common::identity::Peer;
use podferry_network::Netns;

use super::Away;
use crate::context::Context;
use crate::target::Relayed;
use crate::target::tests::context;

const OLD: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const OWN: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 3);
const PORT: u16 = 7;

/// A pod's namespace that has an address of its own, kept by a name.
struct Pod {
    netns: Netns,
    name: String,
}

impl Pod {
    fn new() -> Self {
        let name = format!("pf-relay-{}", MigrationId::new());
        let made = Command::new("ip").args(["netns", "add", &name]).status().unwrap();
        assert!(made.success());
        let netns = Netns::open(format!("/run/netns/{name}").as_ref()).unwrap();
        let pod = Self { netns, name };
        pod.sh(&format!("ip link set lo up; ip addr add {OWN}/32 dev lo"));
        pod
    }

    fn sh(&self, script: &str) -> String {
        let output = self.netns.run(|| Command::new("sh").args(["-ec", script]).output()).unwrap().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn away(&self, context: &Context) -> Arc<Away> {
        let home = Peer::Agent("n2".parse().unwrap());
        let addresses: Vec<IpAddr> = vec![OLD.into()];
        let relayed = Relayed { addresses, mtu: 1500, lifetime_s: 0 };
        Away::prepare(context, MigrationId::new(), home, self.netns.path().to_owned(), relayed).unwrap()
    }

    fn listens(&self, address: Ipv4Addr) -> UdpSocket {
        let socket = self.netns.run(|| UdpSocket::bind((address, PORT))).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        socket
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _gone_already = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// A datagram with one byte, as a device gives it.
fn datagram(to: Ipv4Addr, word: u8) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0, 10, 1, 0, 9];
    ip.extend(to.octets());
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&folded.to_be_bytes());
    [&[0; 10][..], &ip, &PORT.to_be_bytes(), &PORT.to_be_bytes(), &[0, 9, 0, 0, word]].concat()
}

fn heard(socket: &UdpSocket) -> Vec<u8> {
    let mut byte = [0; 8];
    std::iter::from_fn(|| socket.recv(&mut byte).is_ok().then_some(byte[0])).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_waits_for_the_container_and_reaches_its_old_addresses_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (context, pod) = (context(folder.path()), Pod::new());
    let away = pod.away(&context);
    let (old, own) = (pod.listens(OLD), pod.listens(OWN));
    away.put(&datagram(OLD, 1));
    away.put(&datagram(OWN, 2));
    assert_eq!(heard(&old), Vec::<u8>::new(), "it does not run yet");
    away.open();
    away.put(&datagram(OLD, 3));
    away.put(&datagram(OWN, 4));
    away.put(&[0; 64]);
    assert_eq!((heard(&old), heard(&own)), (vec![1, 3], Vec::<u8>::new()));
    // The container there was has died, and another is restored.
    away.close();
    away.put(&datagram(OLD, 5));
    assert_eq!(heard(&old), Vec::<u8>::new());
    away.open();
    assert_eq!(heard(&old), [5]);
    away.end().await;
    away.put(&datagram(OLD, 6));
    assert_eq!(heard(&old), Vec::<u8>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_pod_that_stands_in_comes_to_the_one_that_takes_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let (context, stands_in, named) = (context(folder.path()), Pod::new(), Pod::new());
    let before = stands_in.sh("ip -o addr; ip rule");
    let away = stands_in.away(&context);
    let (_, mut newest) = away.take_over();
    newest.mark_unchanged();
    away.put(&datagram(OLD, 1));
    away.move_to(named.netns.path().to_owned()).unwrap();
    assert!(newest.has_changed().unwrap(), "the stream from home has to be begun again");
    assert_eq!(stands_in.sh("ip -o addr; ip rule"), before);
    let moved = context.aways.get(away.migration()).unwrap();
    moved.move_to(named.netns.path().to_owned()).unwrap();
    assert!(!Arc::ptr_eq(&away, &moved) && moved.is_of(Some(&Peer::Agent("n2".parse().unwrap()))));
    let old = named.listens(OLD);
    moved.put(&datagram(OLD, 2));
    assert_eq!(heard(&old), Vec::<u8>::new(), "it does not run yet");
    moved.open();
    assert_eq!(heard(&old), [1, 2]);
    moved.end().await;
    assert_eq!(std::fs::read_dir(super::notes(&context)).unwrap().count(), 0);
}

#[test]
fn of_many_older_addresses_those_with_connections_are_kept() {
    let address = |last: u8| IpAddr::from([10, 0, 0, last]);
    let older: Vec<IpAddr> = (1..=15).map(address).collect();
    assert_eq!(super::with_older(vec![address(99)], &older, |_| false).len(), super::MOST_ADDRESSES);
    let more: Vec<IpAddr> = (1..=16).map(address).collect();
    let kept = super::with_older(vec![address(99)], &more, |older| *older == address(3));
    assert_eq!(kept, [address(99), address(3)]);
    assert!(super::with_older(vec![address(99)], &more, |_| true).len() > super::MOST_ADDRESSES);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_was_named_may_send_and_what_has_ended_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (context, pod) = (context(folder.path()), Pod::new());
    let before = pod.sh("ip -o addr; ip rule");
    let away = pod.away(&context);
    let peer = |name: &str| Peer::Agent(name.parse().unwrap());
    assert!(away.is_of(Some(&peer("n2"))) && !away.is_of(Some(&peer("n3"))) && !away.is_of(Some(&Peer::Coordinator)));
    assert!(!away.is_of(None));
    assert!(context.aways.of_pod(pod.netns.path()).is_some());
    assert!(pod.sh("ip -o addr").contains("10.9.0.2/32"));
    assert_eq!(std::fs::read_dir(super::notes(&context)).unwrap().count(), 1);
    for _ in 0..2 {
        away.end().await;
        assert!(context.aways.of_pod(pod.netns.path()).is_none());
        assert_eq!(pod.sh("ip -o addr; ip rule"), before);
        assert_eq!(std::fs::read_dir(super::notes(&context)).unwrap().count(), 0);
    }
}
