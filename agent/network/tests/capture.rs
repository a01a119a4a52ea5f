//! What arrives for a container whose link is cut, and how it is handed over. Needs root and iproute2.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, SystemTime};

use podferry_network::{
    Capture, Captured, Error, LinkHandle, LinkState, Netns, Replayer, attach, cut, segments, uncut,
};
use support::{Node, eventually, plan, sh};
use tokio::runtime::Runtime;
use tokio::time::timeout;

const SERVER: [&str; 2] = ["10.77.0.2", "fd77::2"];
const MTU: u32 = 1400;

/// A node with a container, the server, and a link to another namespace, the client's, both at one bridge.
struct Scene {
    node: Node,
    server: Netns,
    client: Netns,
    agent: Runtime,
}

/// A cut, and a time right before it.
struct Cut {
    at: SystemTime,
    state: LinkState,
}

impl Scene {
    fn new() -> Self {
        let node = Node::new();
        let (server, client) = (node.attached("pf-server", 2), node.attached("pf-client", 3));
        // The servers' addresses are known as those of servers are: nothing has to be asked for while the link is cut.
        let mac = plan("", 2).mac;
        for (from, interface) in [(&client, "eth0"), (&node.netns, "br0")] {
            for address in SERVER {
                sh(from, &format!("ip neigh replace {address} lladdr {mac} dev {interface} nud permanent"));
            }
        }
        // A repetition that is due while this machine does something else would spoil what is counted.
        sh(&client, "sysctl -qw net.ipv4.tcp_early_retrans=0");
        for address in SERVER {
            sh(&client, &format!("ip route replace {address} dev eth0 rto_min 20s initcwnd 1000"));
        }
        let agent = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { node, server, client, agent }
    }

    fn capture(&self) -> Capture {
        let addresses: Vec<IpAddr> = SERVER.iter().map(|address| address.parse().unwrap()).collect();
        let capture = self.node.run(|| Capture::open(&addresses, "pf-server")).unwrap();
        // The kernel begins to note the times of packets a moment after it was asked to.
        thread::sleep(Duration::from_millis(100));
        capture
    }

    fn cut(&self) -> Cut {
        let at = SystemTime::now();
        Cut { at, state: self.node.run(|| cut(&LinkHandle::new("pf-server"))).unwrap() }
    }

    fn uncut(&self, cut: &Cut) {
        self.node.run(|| uncut(&cut.state)).unwrap();
    }

    fn replay(&self, host_interface: &str, packets: &[Captured]) {
        let replayer = self.node.run(|| Replayer::open(host_interface, plan("", 2).mac, MTU)).unwrap();
        for captured in packets {
            replayer.deliver(&captured.packet).unwrap();
        }
    }

    /// The next packet.
    fn next(&self, capture: &Capture) -> Captured {
        self.next_within(capture, Duration::from_secs(20)).expect("no packet came")
    }

    /// The next packet but for what neighbours tell the server of their Ethernet addresses.
    fn next_within(&self, capture: &Capture, time: Duration) -> Option<Captured> {
        let is_told_by_neighbours = |captured: &Captured| captured.packet[0] >> 4 == 6 && captured.packet[6] == 58;
        let next = async {
            loop {
                let captured = capture.next().await.unwrap();
                if !is_told_by_neighbours(&captured) {
                    return captured;
                }
            }
        };
        self.agent.block_on(async { timeout(time, next).await }).ok()
    }

    /// So many packets of those that came after the cut.
    fn take(&self, capture: &Capture, cut: &Cut, count: usize) -> Vec<Captured> {
        let packets = std::iter::repeat_with(|| self.next(capture));
        packets.filter(|captured| captured.at >= cut.at).take(count).collect()
    }

    /// That nothing more comes.
    fn nothing_in(&self, capture: &Capture) {
        assert_eq!(self.next_within(capture, Duration::from_millis(200)), None);
    }

    /// A connection from the client to the server, with the server's end, in use.
    fn connection(&self, address: &str) -> (TcpStream, TcpStream) {
        let at = SocketAddr::new(address.parse().unwrap(), 80);
        let listener = self.server.run(|| TcpListener::bind(at)).unwrap().unwrap();
        let mut out = self.client.run(|| TcpStream::connect(at)).unwrap().unwrap();
        let (mut inside, _) = listener.accept().unwrap();
        for end in [&out, &inside] {
            end.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            end.set_nodelay(true).unwrap();
        }
        exchange(&mut out, &mut inside, b"first");
        exchange(&mut inside, &mut out, b"reply");
        (out, inside)
    }

    /// How often the client repeated something, as the kernel has it; it is silent about none.
    fn repetitions(&self) -> Option<String> {
        let found = sh(&self.client, "ss -Htni state established '( dport = :80 )'");
        assert!(found.contains("bytes_sent"), "{found}");
        found.split_whitespace().find(|word| word.contains("retrans")).map(str::to_owned)
    }
}

fn exchange(from: &mut TcpStream, to: &mut TcpStream, text: &[u8]) {
    from.write_all(text).unwrap();
    let mut buffer = vec![0; text.len()];
    to.read_exact(&mut buffer).unwrap();
    assert_eq!(buffer, text);
}

fn udp(netns: &Netns, at: &str, port: u16) -> UdpSocket {
    let at = SocketAddr::new(at.parse().unwrap(), port);
    let socket = netns.run(|| UdpSocket::bind(at)).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket
}

fn unspecified(address: &str) -> &'static str {
    if address.contains(':') { "::" } else { "0.0.0.0" }
}

fn received(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 2048];
    let (length, _) = socket.recv_from(&mut buffer).unwrap();
    buffer[..length].to_vec()
}

fn nothing_at(socket: &UdpSocket) {
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(socket.recv_from(&mut [0; 8]).is_err());
}

#[test]
fn datagrams_sent_while_the_link_is_cut_are_captured_once_and_arrive_after_it() {
    let scene = Scene::new();
    for address in SERVER {
        let inside = udp(&scene.server, address, 9);
        let out = udp(&scene.client, unspecified(address), 0);
        let host = udp(&scene.node.netns, unspecified(address), 0);
        let capture = scene.capture();
        let cut = scene.cut();
        // The same twice: over IPv6 not a bit differs, and it is two datagrams all the same.
        let large = vec![0x5a; 1300];
        for text in [&b"one"[..], b"two", b"two", &large] {
            out.send_to(text, (address, 9)).unwrap();
        }
        let mut packets = scene.take(&capture, &cut, 4);
        // What the node itself sends goes to the bridge without entering the node.
        host.send_to(b"host", (address, 9)).unwrap();
        packets.extend(scene.take(&capture, &cut, 1));
        scene.nothing_in(&capture);

        scene.uncut(&cut);
        scene.replay("pf-server", &packets);
        for text in [&b"one"[..], b"two", b"two", &large, b"host"] {
            assert_eq!(received(&inside), text);
        }
        nothing_at(&inside);
    }
}

#[test]
fn a_connection_goes_on_after_a_cut_without_repeating_anything() {
    let scene = Scene::new();
    for address in SERVER {
        let (mut out, mut inside) = scene.connection(address);
        let capture = scene.capture();
        let cut = scene.cut();
        out.write_all(b"later").unwrap();
        let packets = scene.take(&capture, &cut, 1);
        assert_eq!(capture.try_next().unwrap(), None);
        scene.uncut(&cut);
        scene.replay("pf-server", &packets);
        let mut buffer = [0; 5];
        inside.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"later");
        exchange(&mut inside, &mut out, b"reply");
        exchange(&mut out, &mut inside, b"again");
        assert_eq!(scene.repetitions(), None);
    }
}

#[test]
fn a_large_write_during_the_cut_arrives_whole() {
    const WARM_UP: usize = 16 << 20;
    const WRITTEN: usize = 400_000;
    let scene = Scene::new();
    sh(&scene.server, "sysctl -qw net.ipv4.tcp_rmem='4096 4000000 6000000'");
    sh(&scene.client, "sysctl -qw net.ipv4.tcp_wmem='4096 4000000 6000000'");
    for address in SERVER {
        let (mut out, mut inside) = scene.connection(address);
        let text: Vec<u8> = (0..WRITTEN).map(|place| place.to_le_bytes()[place % 3]).collect();
        // Both windows grow with what is sent.
        let (mut reader, warm_up) = (inside.try_clone().unwrap(), vec![0; WARM_UP]);
        let reads = thread::spawn(move || reader.read_exact(&mut vec![0; WARM_UP]));
        out.write_all(&warm_up).unwrap();
        reads.join().unwrap().unwrap();
        exchange(&mut inside, &mut out, b"reply");
        let before = scene.repetitions();

        let capture = scene.capture();
        let cut = scene.cut();
        out.write_all(&text).unwrap();
        let mut packets = Vec::new();
        let bytes = |packets: &[Captured]| packets.iter().map(|captured| captured.packet.len()).sum::<usize>();
        while bytes(&packets) < 200_000 {
            packets.extend(scene.take(&capture, &cut, 1));
        }
        thread::sleep(Duration::from_millis(50));
        packets.extend(std::iter::from_fn(|| capture.try_next().unwrap()));
        let largest = packets.iter().map(|captured| captured.packet.len()).max().unwrap();
        assert!(largest > 40_000, "the largest of {} packets has {largest} bytes", packets.len());
        assert!(packets.iter().any(|captured| segments(&captured.packet, 1400).len() > 20));

        scene.uncut(&cut);
        scene.replay("pf-server", &packets);
        let mut buffer = vec![0; WRITTEN];
        inside.read_exact(&mut buffer).unwrap();
        assert!(buffer == text, "other bytes than were sent");
        exchange(&mut inside, &mut out, b"reply");
        assert_eq!(scene.repetitions(), before);
    }
}

#[test]
fn what_is_for_others_or_for_all_is_not_captured() {
    let scene = Scene::new();
    let _other = scene.node.attached("pf-moved", 4);
    for address in SERVER {
        let out = udp(&scene.client, unspecified(address), 0);
        out.set_broadcast(true).unwrap();
        let capture = scene.capture();
        let cut = scene.cut();
        let prefix = address.trim_end_matches('2');
        for other in ["1", "4", "9"] {
            let _ = out.send_to(b"others", (format!("{prefix}{other}"), 9));
        }
        if prefix.ends_with('.') {
            out.send_to(b"all", (format!("{prefix}255"), 9)).unwrap();
            out.send_to(b"group", ("224.0.0.1", 9)).unwrap();
        } else {
            let _ = out.send_to(b"group", ("ff02::1", 9));
        }
        // For the address, but in a frame for every host.
        sh(&scene.client, &format!("ip neigh replace {address} lladdr ff:ff:ff:ff:ff:ff dev eth0 nud permanent"));
        out.send_to(b"to every host", (address, 9)).unwrap();
        let mac = plan("", 2).mac;
        sh(&scene.client, &format!("ip neigh replace {address} lladdr {mac} dev eth0 nud permanent"));
        out.send_to(b"mine", (address, 9)).unwrap();
        let packets = scene.take(&capture, &cut, 1);
        assert!(packets[0].packet.ends_with(b"mine"), "{packets:?}");
        scene.nothing_in(&capture);
        scene.uncut(&cut);
    }
}

#[test]
fn a_packet_says_whether_it_came_before_the_cut() {
    let scene = Scene::new();
    for address in SERVER {
        let inside = udp(&scene.server, address, 9);
        let out = udp(&scene.client, unspecified(address), 0);
        let capture = scene.capture();
        out.send_to(b"before", (address, 9)).unwrap();
        assert_eq!(received(&inside), b"before");
        let cut = scene.cut();
        out.send_to(b"after", (address, 9)).unwrap();
        // Read late, as by an agent that has other things to do.
        thread::sleep(Duration::from_millis(20));
        let (before, after) = (scene.next(&capture), scene.next(&capture));
        assert!(before.at < cut.at && before.packet.ends_with(b"before"), "{before:?}");
        assert!(after.at > cut.at && after.packet.ends_with(b"after"), "{after:?}");
        scene.uncut(&cut);
    }
}

#[test]
fn what_the_node_forwards_is_captured_once() {
    let scene = Scene::new();
    let node = &scene.node;
    node.sh("ip link set pf-client nomaster; sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    node.sh("ip addr add 10.88.0.1/24 dev pf-client; ip addr add fd88::1/64 dev pf-client nodad");
    let client = &scene.client;
    sh(client, "ip addr flush dev eth0 scope global; ip -6 route flush dev eth0 root fd77::/64");
    sh(client, "ip addr add 10.88.0.3/24 dev eth0; ip addr add fd88::3/64 dev eth0 nodad");
    sh(client, "ip route replace default via 10.88.0.1; ip -6 route replace default via fd88::1");
    for address in SERVER {
        let inside = udp(&scene.server, address, 9);
        let out = udp(client, unspecified(address), 0);
        eventually("the way is found", || {
            out.send_to(b"?", (address, 9)).unwrap();
            inside.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            inside.recv_from(&mut [0; 8]).is_ok()
        });
        while inside.recv_from(&mut [0; 8]).is_ok() {}
        let capture = scene.capture();
        let cut = scene.cut();
        out.send_to(b"routed", (address, 9)).unwrap();
        let packets = scene.take(&capture, &cut, 1);
        scene.nothing_in(&capture);
        scene.uncut(&cut);
        scene.replay("pf-server", &packets);
        assert_eq!(received(&inside), b"routed");
        nothing_at(&inside);
    }
}

#[test]
fn a_packet_that_is_seen_three_times_is_captured_once() {
    let scene = Scene::new();
    // Sent to the bridge itself, as to a router: seen at the port, at the bridge, and where it leaves the bridge again.
    scene.node.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    let link = scene.node.sh("ip -o link show br0");
    let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();
    for address in SERVER {
        sh(&scene.client, &format!("ip neigh replace {address} lladdr {mac} dev eth0 nud permanent"));
        let inside = udp(&scene.server, address, 9);
        let out = udp(&scene.client, unspecified(address), 0);
        let capture = scene.capture();
        out.send_to(b"before", (address, 9)).unwrap();
        assert_eq!(received(&inside), b"before");
        let cut = scene.cut();
        for text in [b"one", b"two", b"two"] {
            out.send_to(text, (address, 9)).unwrap();
        }
        let packets = scene.take(&capture, &cut, 3);
        scene.nothing_in(&capture);
        scene.uncut(&cut);
        scene.replay("pf-server", &packets);
        for text in [b"one", b"two", b"two"] {
            assert_eq!(received(&inside), text);
        }
    }
}

#[test]
fn one_of_many_addresses_on_one_of_many_bridges_is_found() {
    let scene = Scene::new();
    let node = &scene.node;
    for number in 1..=40 {
        node.sh(&format!("ip link add br{number} type bridge"));
    }
    let others = (10..40_u8)
        .flat_map(|number| [[10, 77, 0, number].into(), IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, number.into()])]);
    let mut addresses: Vec<IpAddr> = others.collect();
    for (place, address) in SERVER.iter().enumerate() {
        addresses.insert(20 + 20 * place, address.parse().unwrap());
    }
    let capture = node.run(|| Capture::open(&addresses, "pf-server")).unwrap();
    for address in SERVER {
        udp(&scene.client, unspecified(address), 0).send_to(b"client", (address, 9)).unwrap();
        assert!(scene.next(&capture).packet.ends_with(b"client"));
        let host = udp(&node.netns, unspecified(address), 0);
        host.send_to(b"host", (address, 9)).unwrap();
        let captured = scene.next(&capture);
        assert!(captured.packet.ends_with(b"host"), "{captured:?}");
        // Out of an interface that is no bridge.
        node.sh(&format!(
            "ip route add {address} dev pf-client; ip neigh add {address} lladdr 02:00:00:00:00:09 dev pf-client"
        ));
        host.send_to(b"elsewhere", (address, 9)).unwrap();
        scene.nothing_in(&capture);
    }
}

#[test]
fn what_came_for_the_old_place_is_delivered_at_the_new_one() {
    let scene = Scene::new();
    let moved = scene.node.container("pf-moved", 2);
    for address in SERVER {
        let (old, new) = (udp(&scene.server, address, 9), udp(&moved, address, 9));
        let out = udp(&scene.client, unspecified(address), 0);
        let capture = scene.capture();
        let cut = scene.cut();
        out.send_to(b"late", (address, 9)).unwrap();
        let packets = scene.take(&capture, &cut, 1);
        scene.node.run(|| attach("pf-moved", "br0")).unwrap();
        scene.replay("pf-moved", &packets);
        assert_eq!(received(&new), b"late");
        nothing_at(&old);
        scene.node.sh("ip link set pf-moved nomaster");
        scene.uncut(&cut);
    }
}

#[test]
fn what_cannot_be_done_is_told() {
    let scene = Scene::new();
    let node = &scene.node;
    assert!(matches!(node.run(|| Capture::open(&[], "nowhere")), Err(Error::NoInterface { .. })));
    let mac = plan("", 2).mac;
    assert!(matches!(node.run(|| Replayer::open("nowhere", mac, MTU)), Err(Error::NoInterface { .. })));
    // Delivered too early: into a link that is cut.
    let capture = scene.capture();
    let cut = scene.cut();
    udp(&scene.client, "0.0.0.0", 0).send_to(b"early", (SERVER[0], 9)).unwrap();
    let packets = scene.take(&capture, &cut, 1);
    let replayer = node.run(|| Replayer::open("pf-server", mac, MTU)).unwrap();
    let error = replayer.deliver(&packets[0].packet).unwrap_err();
    assert!(matches!(&error, Error::Replay { source, .. } if source.raw_os_error() == Some(105)), "{error:?}");
    scene.uncut(&cut);
    replayer.deliver(&packets[0].packet).unwrap();
    // Nothing to send of what is no packet.
    replayer.deliver(b"").unwrap();
    replayer.deliver(b"no packet").unwrap();
    // Without an address nothing is captured.
    let none = node.run(|| Capture::open(&[], "pf-server")).unwrap();
    udp(&scene.client, "0.0.0.0", 0).send_to(b"unasked", (SERVER[0], 9)).unwrap();
    scene.nothing_in(&none);
}
