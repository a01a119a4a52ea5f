//! A client, the namespace that a container left and the one that it came to, and a router between them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{Node, eventually, sh};
use podferry_network::relay::{Home, Tun, prepare_away, prepare_home};
use podferry_network::{Capture, Error, MacAddress, Netns, NetworkPlan, Route, create};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

pub(crate) const HOME: [&str; 2] = ["10.2.0.2", "fd02::2"];
pub(crate) const CLIENT: [&str; 2] = ["10.1.0.2", "fd01::2"];

/// A router between three networks, each with one namespace: the client, home, and away. It lets nobody speak with an address
/// of another network.
pub(crate) struct Scene {
    pub(crate) router: Node,
    pub(crate) client: Netns,
    pub(crate) home: Netns,
    pub(crate) away: Netns,
    pub(crate) agent: Runtime,
}

/// Carries packets both ways, as two agents do.
pub(crate) struct Pump {
    tasks: [JoinHandle<()>; 2],
}

impl Scene {
    pub(crate) fn new() -> Self {
        let router = Node::new();
        router.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=1");
        let [client, home, away] = [("pf-client", 1), ("pf-server", 2), ("pf-moved", 3)].map(|(name, number)| {
            let path = router.path(name);
            router.agent(create(&path, &plan(name, number))).unwrap();
            router.sh(&format!(
                "sysctl -qw net.ipv4.conf.{name}.rp_filter=1; ip addr add 10.{number}.0.1/24 dev {name}
                 ip addr add fd0{number}::1/64 dev {name} nodad; ip addr add fe80::1/64 dev {name} nodad
                 ip -6 rule add pref 100 iif {name} from fd0{number}::/64 lookup main
                 ip -6 rule add pref 101 iif {name} from fd00::/8 blackhole"
            ));
            Netns::open(&path).unwrap()
        });
        for netns in [&home, &away] {
            sh(netns, "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1");
        }
        let agent = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Self { router, client, home, away, agent }
    }

    pub(crate) fn addresses() -> Vec<IpAddr> {
        HOME.iter().map(|address| address.parse().unwrap()).collect()
    }

    pub(crate) fn prepare_home(&self) -> (Home, Arc<Tun>) {
        let (home, tun) = prepare_home(&self.home, "eth0", &Self::addresses()).unwrap();
        (home, Arc::new(tun))
    }

    pub(crate) fn prepare_away(&self, home: &Home) -> Arc<Tun> {
        Arc::new(prepare_away(&self.away, &Self::addresses(), home.mtu).unwrap())
    }

    pub(crate) fn pump(&self, home: &Arc<Tun>, away: &Arc<Tun>) -> Pump {
        Pump { tasks: [(home, away), (away, home)].map(|(from, to)| self.agent.spawn(carry(from.clone(), to.clone()))) }
    }

    /// A connection from the client to the server at home, with the server's end, in use.
    pub(crate) fn connection(&self, address: &str) -> (TcpStream, TcpStream) {
        self.connection_by(address, address)
    }

    /// The same with a server that listens at another address.
    pub(crate) fn connection_by(&self, listening: &str, address: &str) -> (TcpStream, TcpStream) {
        let listener = listen(&self.home, listening);
        let mut out = connect(&self.client, SocketAddr::new(address.parse().unwrap(), 80));
        let mut inside = accept(&listener);
        exchange(&mut out, &mut inside, b"first");
        exchange(&mut inside, &mut out, b"reply");
        (out, inside)
    }

    /// What home sends to the client from now on.
    pub(crate) fn capture(&self, address: &str) -> Capture {
        let capture = self.router.run(|| Capture::open(&[address.parse().unwrap()], "pf-client")).unwrap();
        thread::sleep(Duration::from_millis(50));
        capture
    }

    pub(crate) fn repetitions(&self) -> Option<String> {
        let found = sh(&self.client, "ss -Htni state established '( dport = :80 )'");
        assert!(found.contains("bytes_sent"), "{found}");
        found.split_whitespace().find(|word| word.contains("retrans")).map(str::to_owned)
    }

    /// Lets the client open a connection that nobody answers.
    pub(crate) fn knock(&self, address: IpAddr) {
        let to = SocketAddr::new(address, 80);
        assert!(self.client.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(200))).unwrap().is_err());
    }

    /// What waits in a device; at least one packet does or comes soon.
    pub(crate) fn waiting(&self, tun: &Tun) -> Vec<Vec<u8>> {
        let first = self.agent.block_on(async { tokio::time::timeout(Duration::from_secs(5), tun.receive()).await });
        thread::sleep(Duration::from_millis(50));
        let rest = std::iter::from_fn(|| tun.try_receive().unwrap());
        std::iter::once(first.expect("a packet comes").unwrap()).chain(rest).collect()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

pub(crate) async fn carry(from: Arc<Tun>, to: Arc<Tun>) {
    while let Ok(packet) = from.receive().await {
        match to.send(&packet) {
            Ok(()) | Err(Error::RelayedPacket { .. }) => {}
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
        }
    }
}

pub(crate) fn plan(name: &str, number: u8) -> NetworkPlan {
    let route = |destination: &str, gateway: String| Route {
        destination: destination.parse().unwrap(),
        gateway: Some(gateway.parse().unwrap()),
    };
    NetworkPlan {
        interface: "eth0".into(),
        mac: MacAddress([2, 0x70, 0x66, 0, 1, number]),
        mtu: 1500,
        addresses: vec![format!("10.{number}.0.2/24").parse().unwrap(), format!("fd0{number}::2/64").parse().unwrap()],
        routes: vec![route("0.0.0.0/0", format!("10.{number}.0.1")), route("::/0", format!("fd0{number}::1"))],
        host_interface: name.into(),
        bridge: "br0".into(),
    }
}

pub(crate) fn listen(netns: &Netns, address: &str) -> TcpListener {
    let at = SocketAddr::new(address.parse().unwrap(), 80);
    let bound = std::cell::RefCell::new(None);
    // A child that another test is just starting may still have the last one.
    eventually("the port is free", || {
        *bound.borrow_mut() = netns.run(|| TcpListener::bind(at)).unwrap().ok();
        bound.borrow().is_some()
    });
    bound.into_inner().unwrap()
}

pub(crate) fn connect(netns: &Netns, to: SocketAddr) -> TcpStream {
    ready(netns.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(10))).unwrap().unwrap())
}

pub(crate) fn accept(listener: &TcpListener) -> TcpStream {
    ready(listener.accept().unwrap().0)
}

pub(crate) fn ready(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

pub(crate) fn exchange(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) {
    from.write_all(text).unwrap();
    let mut buffer = vec![0; text.len()];
    to.read_exact(&mut buffer).unwrap();
    assert_eq!(buffer, text);
}

pub(crate) fn unspecified(address: &str) -> &'static str {
    if address.contains(':') { "::" } else { "0.0.0.0" }
}

/// Bytes that are nowhere the same at another place.
pub(crate) fn text(length: usize) -> Vec<u8> {
    (0..length).map(|place| place.to_le_bytes()[place % 4]).collect()
}

/// How long an ICMP echo takes.
pub(crate) fn ping(from: &Netns, address: &str) -> Duration {
    sh(from, "sysctl -qw net.ipv4.ping_group_range='0 0'");
    let to = SocketAddr::new(address.parse().unwrap(), 0);
    let (domain, protocol, request) = match to {
        SocketAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8),
        SocketAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128),
    };
    let socket = from.run(|| Socket::new(domain, Type::DGRAM, Some(protocol))).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut took = Vec::new();
    for number in 0..9 {
        let begin = Instant::now();
        socket.send_to(&[request, 0, 0, 0, 0, 0, 0, number, 1, 2, 3, 4], &to.into()).unwrap();
        assert_eq!((&socket).read(&mut [0; 64]).unwrap(), 12);
        took.push(begin.elapsed());
    }
    took.sort_unstable();
    took[4]
}

/// Sends much, and checks at the other end that it is the same.
pub(crate) fn transfer(from: &TcpStream, to: &TcpStream, text: &[u8]) {
    let (mut from, mut to) = (from, to);
    thread::scope(|scope| {
        scope.spawn(move || from.write_all(text).unwrap());
        let mut buffer = vec![0; text.len()];
        to.read_exact(&mut buffer).unwrap();
        assert!(buffer == text, "other bytes than were sent");
    });
}

/// The flags of a TCP packet, from its IP header on; none when it is no TCP.
pub(crate) fn tcp_flags(packet: &[u8]) -> Option<u8> {
    match packet[0] >> 4 {
        4 if packet[9] == 6 => Some(packet[usize::from(packet[0] & 0xf) * 4 + 13]),
        6 if packet[6] == 6 => Some(packet[40 + 13]),
        _ => None,
    }
}

pub(crate) fn captured_flags(capture: &Capture) -> Vec<u8> {
    std::iter::from_fn(|| capture.try_next().unwrap()).filter_map(|captured| tcp_flags(&captured.packet)).collect()
}
