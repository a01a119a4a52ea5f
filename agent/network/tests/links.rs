//! Real links in network namespaces that these tests make. Needs root and iproute2.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use podferry_network::{
    Announcer, Error, LinkHandle, LinkState, Netns, NetworkPlan, Unmoved, attach, create, cut, destroy, detach,
    discover, hold_new_connections, is_cut, look_at_bridge, probe, set_mtu, uncut, unmoved,
};
use support::{Node, eventually, plan, sh};

/// Answers every datagram until it is dropped.
struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Echo {
    fn start(netns: &Netns) -> Self {
        let socket = netns.run(|| UdpSocket::bind("[::]:7")).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut buffer = [0; 64];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&buffer[..length], from);
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Whether a datagram comes back.
fn reaches(from: &Netns, to: &str) -> bool {
    let to = SocketAddr::new(to.parse::<IpAddr>().unwrap(), 7);
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = from.run(|| UdpSocket::bind(any)).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    (0..3).any(|_| socket.send_to(b"?", to).is_ok() && socket.recv_from(&mut [0; 8]).is_ok())
}

#[test]
fn what_is_created_is_what_is_discovered_and_destroying_leaves_nothing() {
    let node = Node::new();
    let (links, mounts) = (node.links(), node.mounts());
    for _ in 0..3 {
        let server = node.container("pf-server", 2);
        let found = node.agent(discover(&server, "eth0")).unwrap();
        assert_eq!(found.peer.as_deref(), Some("pf-server"));
        let mut again = found.plan("br0", "pf-server");
        // The kernel adds a link-local address to those of the plan.
        again.addresses.retain(|address| !address.to_string().starts_with("fe80"));
        let mut planned = plan("pf-server", 2);
        for routes in [&mut again.routes, &mut planned.routes] {
            routes.sort_by_key(|route| route.destination);
        }
        again.addresses.sort();
        planned.addresses.sort();
        assert_eq!(again, planned);
        assert!(sh(&server, "ip -o link show lo").contains("LOWER_UP"));
        assert!(node.sh("ip -o addr show dev pf-server").is_empty(), "the node has no address on the link");

        node.agent(destroy(&node.path("pf-server"), "pf-server")).unwrap();
        assert_eq!((node.links(), node.mounts()), (links, mounts));
        assert!(!node.path("pf-server").exists());
    }
    node.agent(destroy(&node.path("pf-server"), "pf-server")).unwrap();
}

#[test]
fn nobody_reaches_a_container_before_it_is_attached() {
    let node = Node::new();
    let client = node.attached("pf-client", 3);
    let server = node.container("pf-server", 2);
    let _echo = Echo::start(&server);
    for from in [&client, &node.netns] {
        assert!(!reaches(from, "10.77.0.2") && !reaches(from, "fd77::2"));
    }
    let before = Instant::now();
    node.run(|| attach("pf-server", "br0")).unwrap();
    let took = before.elapsed();
    for from in [&client, &node.netns] {
        eventually("the container is reached", || reaches(from, "10.77.0.2") && reaches(from, "fd77::2"));
    }
    // A bridge that lets a new port wait takes 4 s at the least.
    assert!(took < Duration::from_secs(3), "attaching took {took:?}");
    node.run(|| attach("pf-server", "br0").and_then(|_| detach("pf-server")).and_then(|()| detach("pf-server")))
        .unwrap();
    assert!(!reaches(&client, "10.77.0.2"));
}

const DOWN_AND_UP: &str = "ip link set pf-server down; ip link set pf-server up";

/// Cuts, looks from everywhere, also after a change of the link, and undoes it, twice each.
fn cut_and_uncut(node: &Node, server: &Netns, others: &[&Netns], change: &str) {
    let (_echo, _other) = (Echo::start(server), Echo::start(&node.netns));
    let handle = LinkHandle::new("pf-server");
    for round in 0..2 {
        for from in others {
            let what = format!("round {round}: reached while not cut");
            eventually(&what, || reaches(from, "10.77.0.2") && reaches(from, "fd77::2"));
        }
        let before = Instant::now();
        let state = node.run(|| cut(&handle)).unwrap();
        eprintln!("cut in {:?}, with its thread", before.elapsed());
        assert!(state.made_qdisc);
        // A process that knows nothing of the first cut.
        let state = node.run(|| cut(&handle)).unwrap();
        assert!(state.made_qdisc);
        assert!(node.run(|| is_cut(&state)).unwrap());
        for from in others {
            assert!(!reaches(from, "10.77.0.2") && !reaches(from, "fd77::2"), "in while cut");
        }
        assert!(!reaches(server, "10.77.0.1") && !reaches(server, "fd77::1"), "out while cut");

        // Nothing that happens to the link undoes it.
        node.sh(change);
        thread::sleep(Duration::from_millis(50));
        assert!(node.run(|| is_cut(&state)).unwrap() && !reaches(others[0], "10.77.0.2"), "cut after a change");

        // Another process undoes it.
        let state: LinkState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
        node.run(|| uncut(&state)).unwrap();
        node.run(|| uncut(&state)).unwrap();
        assert!(!node.run(|| is_cut(&state)).unwrap());
    }
    for from in others {
        eventually("reached afterwards", || reaches(from, "10.77.0.2") && reaches(from, "fd77::2"));
    }
    eventually("reaches out afterwards", || reaches(server, "10.77.0.1"));
    assert!(!node.sh("tc qdisc show dev pf-server").contains("clsact"));
}

#[test]
fn a_cut_port_of_a_bridge_passes_nothing_until_it_is_undone() {
    let node = Node::new();
    let (server, client) = (node.attached("pf-server", 2), node.attached("pf-client", 3));
    cut_and_uncut(&node, &server, &[&client, &node.netns], DOWN_AND_UP);
}

#[test]
fn a_link_without_a_bridge_is_cut() {
    let node = Node::new();
    let server = node.container("pf-server", 2);
    node.sh("ip addr del 10.77.0.1/24 dev br0; ip addr del fd77::1/64 dev br0");
    node.sh("ip addr add 10.77.0.1/24 dev pf-server; ip addr add fd77::1/64 dev pf-server nodad");
    cut_and_uncut(&node, &server, &[&node.netns], "ip link set pf-server alias changed");
}

#[test]
fn others_filters_stay() {
    let node = Node::new();
    drop(node.container("pf-server", 2));
    node.sh(
        "tc qdisc add dev pf-server clsact; tc filter add dev pf-server ingress prio 1 bpf da bytecode '1,6 0 0 0'",
    );
    let before = node.sh("tc filter show dev pf-server ingress");
    let state = node.run(|| cut(&LinkHandle::new("pf-server"))).unwrap();
    assert!(!state.made_qdisc);
    node.run(|| uncut(&state)).unwrap();
    assert_eq!(node.sh("tc filter show dev pf-server ingress"), before);

    // The same when the first cut's state was lost.
    node.run(|| cut(&LinkHandle::new("pf-server"))).unwrap();
    let state = node.run(|| cut(&LinkHandle::new("pf-server"))).unwrap();
    node.run(|| uncut(&state)).unwrap();
    assert_eq!(node.sh("tc filter show dev pf-server ingress"), before);
}

#[test]
fn nothing_stays_of_a_cut_whose_maker_was_killed_before_its_first_filter() {
    let node = Node::new();
    drop(node.container("pf-server", 2));
    node.sh("tc qdisc add dev pf-server clsact");
    let state = node.run(|| cut(&LinkHandle::new("pf-server"))).unwrap();
    node.run(|| uncut(&state)).unwrap();
    assert!(!node.sh("tc qdisc show dev pf-server").contains("clsact"));
}

#[test]
fn a_bridge_with_spanning_tree_is_cut_and_not_attached_to() {
    let node = Node::new();
    let server = node.attached("pf-server", 2);
    // Ports that forward already go on forwarding for a moment when the protocol starts.
    node.sh("ip link set br0 type bridge stp_state 1 forward_delay 200");
    eventually("the port forwards", || node.sh("bridge -d link show dev pf-server").contains("state forwarding"));
    cut_and_uncut(&node, &server, &[&node.netns], DOWN_AND_UP);

    drop(node.container("pf-moved", 4));
    let error = node.run(|| attach("pf-moved", "br0")).unwrap_err();
    assert!(matches!(&error, Error::NotForwarding { .. }) && error.to_string().contains("stp_state 0"), "{error}");
}

#[test]
fn a_bridge_that_cannot_be_joined_is_told_beforehand() {
    let node = Node::new();
    let look = |bridge: &str| node.run(|| look_at_bridge(bridge));
    assert!(!look("br0").unwrap().spanning_tree);
    assert!(matches!(look("br1"), Err(Error::NoInterface { interface }) if interface == "br1"));
    assert!(matches!(look("lo"), Err(Error::WrongKind { .. })));
    node.sh("ip link set br0 type bridge stp_state 1");
    assert!(look("br0").unwrap().spanning_tree);
    node.sh("ip link set br0 down");
    let error = look("br0").unwrap_err();
    assert!(matches!(error, Error::BridgeDown { .. }), "{error}");
    // It is the same answer that a link gets.
    drop(node.container("pf-server", 2));
    assert!(matches!(node.run(|| attach("pf-server", "br0")), Err(Error::BridgeDown { .. })));
}

#[test]
fn this_kernel_has_what_is_needed_and_trying_leaves_nothing() {
    let node = Node::new();
    let links = node.links();
    let found = node.run(probe).unwrap();
    assert_eq!(found.iter().map(|one| one.name).collect::<Vec<_>>(), ["bridge", "link_cut", "tcp_repair", "veth"]);
    for one in found {
        assert!(one.missing.is_none(), "{one:?}");
    }
    assert_eq!(node.links(), links);
    assert!(!node.sh("tc qdisc show dev lo").contains("clsact"));
}

#[test]
fn a_small_mtu_is_changed_for_the_restore_without_losing_addresses() {
    let node = Node::new();
    for (mtu, during) in [(1400, 1399), (1280, 1281)] {
        let path = node.path("pf-server");
        node.agent(create(&path, &NetworkPlan { mtu, ..plan("pf-server", 2) })).unwrap();
        let server = Netns::open(&path).unwrap();
        let before = node.agent(discover(&server, "eth0")).unwrap();
        assert_eq!(before.mtu_during_restore(), during);
        for mtu in [during, mtu] {
            set_mtu(&server, "eth0", mtu).unwrap();
            let now = node.agent(discover(&server, "eth0")).unwrap();
            assert_eq!(now.mtu, mtu);
            assert_eq!((now.addresses, now.routes), (before.addresses.clone(), before.routes.clone()), "at {mtu}");
        }
        node.agent(destroy(&path, "pf-server")).unwrap();
    }
}

#[test]
fn what_does_not_move_along_with_the_link_is_found() {
    let node = Node::new();
    let server = node.attached("pf-server", 2);
    let look = || node.agent(unmoved(&server, "eth0")).unwrap();
    assert_eq!(look(), Unmoved::default());
    sh(&server, "ip link add eth1 type veth peer name eth2; ip link set eth2 up");
    sh(&server, "ip addr flush dev eth2; ip addr add 10.99.0.7/24 dev eth1; ip addr add 192.0.2.9/32 dev lo");
    sh(&server, "ip route add 198.51.100.0/24 nexthop via 10.77.0.1 nexthop via 10.77.0.9");
    sh(&server, "ip route add blackhole 203.0.113.0/24; ip route add default via 10.77.0.1 table 177");
    sh(&server, "ip -6 route add fd99::/64 nexthop via fd77::1 nexthop via fd77::9");
    sh(&server, "ip rule add from 10.77.0.2 lookup 177 pref 10; ip -6 rule add fwmark 7 lookup 1777 pref 20");
    let found = look();
    let address = |text: &str| vec![text.parse().unwrap()];
    assert_eq!(found.interfaces, [("eth1".to_owned(), address("10.99.0.7/24"))].into());
    assert_eq!(found.loopback, address("192.0.2.9/32"));
    let routes = [
        "198.51.100.0/24 with several gateways",
        "blackhole 203.0.113.0/24",
        "default in table 177",
        "fd99::/64 with several gateways",
    ];
    let mut sorted = found.routes.clone();
    sorted.sort();
    assert_eq!(sorted, routes);
    assert_eq!(found.rules, ["priority 10 to table 177", "priority 20 to table 1777"]);
}

#[test]
fn a_tcp_connection_outlives_a_cut() {
    let node = Node::new();
    let (server, client) = (node.attached("pf-server", 2), node.attached("pf-client", 3));
    let listener = server.run(|| TcpListener::bind("10.77.0.2:80")).unwrap().unwrap();
    let mut out = client.run(|| TcpStream::connect("10.77.0.2:80")).unwrap().unwrap();
    let (mut inside, _) = listener.accept().unwrap();
    inside.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut buffer = [0; 5];
    out.write_all(b"first").unwrap();
    inside.read_exact(&mut buffer).unwrap();

    let state = node.run(|| cut(&LinkHandle::new("pf-server"))).unwrap();
    out.write_all(b"later").unwrap();
    inside.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    assert!(inside.read_exact(&mut buffer).is_err(), "it came through the cut");
    inside.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    node.run(|| uncut(&state)).unwrap();
    inside.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"later");
    inside.write_all(b"reply").unwrap();
    out.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"reply");
}

#[test]
fn a_held_link_serves_whom_it_serves_and_lets_nobody_new_in() {
    let node = Node::new();
    let (server, client) = (node.attached("pf-server", 2), node.attached("pf-client", 3));
    let _echo = Echo::start(&server);
    let handle = LinkHandle::new("pf-server");
    for address in ["10.77.0.2:80", "[fd77::2]:80"] {
        let address: SocketAddr = address.parse().unwrap();
        let listening = || server.run(|| TcpListener::bind(address)).unwrap();
        eventually("the address can be listened on", || listening().is_ok());
        let listener = listening().unwrap();
        let dial = || client.run(|| TcpStream::connect_timeout(&address, Duration::from_millis(300))).unwrap();
        eventually("it is reached", || dial().is_ok());
        while listener.set_nonblocking(true).is_ok() && listener.accept().is_ok() {}
        listener.set_nonblocking(false).unwrap();
        let mut out = dial().unwrap();
        let (mut inside, _) = listener.accept().unwrap();

        // Twice is as good as once.
        node.run(|| hold_new_connections(&handle)).unwrap();
        let state = node.run(|| hold_new_connections(&handle)).unwrap();
        assert!(dial().is_err(), "somebody new got in by {address}");
        let mut buffer = [0; 5];
        out.write_all(b"later").unwrap();
        inside.read_exact(&mut buffer).unwrap();
        inside.write_all(b"reply").unwrap();
        out.read_exact(&mut buffer).unwrap();
        assert!(reaches(&client, &address.ip().to_string()), "datagrams pass");
        // What the container itself opens passes, too.
        let back = client.run(|| TcpListener::bind(if address.is_ipv4() { "10.77.0.3:81" } else { "[fd77::3]:81" }));
        let back = back.unwrap().unwrap();
        let to = back.local_addr().unwrap();
        server.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))).unwrap().unwrap();

        let cut_too = node.run(|| cut(&handle)).unwrap();
        assert!(node.run(|| is_cut(&state)).unwrap() && !reaches(&client, &address.ip().to_string()));
        node.run(|| uncut(&cut_too)).unwrap();
        assert!(dial().is_ok(), "{address} is still held");
        assert!(!node.sh("tc qdisc show dev pf-server").contains("clsact"), "what held it is left");
    }
}

#[test]
fn an_address_moves_to_another_port_with_its_announcement() {
    let node = Node::new();
    let (old, client) = (node.attached("pf-server", 2), node.attached("pf-client", 3));
    let old_echo = Echo::start(&old);
    let is_reached = || reaches(&client, "10.77.0.2") && reaches(&client, "fd77::2");
    eventually("the container is reached", is_reached);
    let mac = plan("", 2).mac.to_string();
    let port =
        || node.sh("bridge fdb show br br0").lines().find(|line| line.starts_with(&mac)).unwrap_or("").to_owned();
    assert!(port().contains("pf-server"), "{}", port());

    // The same addresses once more, off the bridge; the old one is cut for good.
    let moved = node.container("pf-moved", 2);
    let _new_echo = Echo::start(&moved);
    let announcer = Announcer::open(&moved, "eth0").unwrap();
    node.run(|| cut(&LinkHandle::new("pf-server"))).unwrap();
    drop(old_echo);
    // As if the address had moved with another Ethernet address, so that neighbours have to learn, too.
    let stale = "lladdr 02:70:66:00:00:ff dev eth0 nud stale";
    sh(&client, &format!("ip neigh replace 10.77.0.2 {stale}; ip neigh replace fd77::2 {stale}"));

    node.run(|| attach("pf-moved", "br0")).unwrap();
    node.agent(announcer.repeat(2, Duration::from_millis(20))).unwrap();
    eventually("the bridge has learnt the new port", || port().contains("pf-moved"));
    for address in ["10.77.0.2", "fd77::2"] {
        let learnt = || sh(&client, &format!("ip neigh show {address}")).contains(&mac);
        eventually("the client has learnt the Ethernet address", learnt);
    }
    eventually("the container is reached where it is now", is_reached);
}

#[test]
fn a_failure_halfway_leaves_nothing_and_what_is_in_use_is_left_alone() {
    let node = Node::new();
    let (links, mounts) = (node.links(), node.mounts());
    let mut broken = plan("pf-server", 2);
    // A gateway that is the container itself: sound to look at, and refused by the kernel.
    broken.routes[2].gateway = Some("fd77::2".parse().unwrap());
    let path = node.path("pf-server");
    let error = node.agent(create(&path, &broken)).unwrap_err();
    assert!(matches!(&error, Error::Link { interface, .. } if interface == "eth0"), "{error}");
    assert_eq!((node.links(), node.mounts(), path.exists()), (links, mounts, false));

    let _server = node.container("pf-server", 2);
    let again = node.agent(create(&path, &plan("pf-moved", 4))).unwrap_err();
    assert!(matches!(again, Error::InUse { .. }), "{again}");
    let other = node.path("pf-moved");
    let again = node.agent(create(&other, &plan("pf-server", 4))).unwrap_err();
    assert!(matches!(again, Error::InUse { .. }), "{again}");
    assert!(!other.exists());
    assert_eq!((node.links(), node.mounts()), (links + 1, mounts + 1));
}

#[test]
fn what_is_not_there_is_named() {
    let node = Node::new();
    assert!(matches!(node.run(|| cut(&LinkHandle::new("nowhere"))), Err(Error::NoInterface { .. })));
    assert!(matches!(node.run(|| attach("br0", "lo")), Err(Error::WrongKind { .. })));
    assert!(matches!(node.agent(discover(&node.netns, "nowhere")), Err(Error::NoInterface { .. })));
    assert!(matches!(node.agent(destroy(&node.path("x"), "br0")), Err(Error::WrongKind { .. })));

    drop(node.attached("pf-server", 2));
    let state = node.run(|| cut(&LinkHandle::new("pf-server"))).unwrap();
    node.agent(destroy(&node.path("pf-server"), "pf-server")).unwrap();
    assert!(node.run(|| is_cut(&state)).unwrap(), "no frame passes a link that is gone");
    node.run(|| uncut(&state)).unwrap();
    drop(node.attached("pf-server", 2));
    assert!(matches!(node.run(|| is_cut(&state)), Err(Error::Replaced { .. })));
}

#[test]
fn namespaces_keep_to_their_threads() {
    let here = Netns::current().unwrap();
    let other = Netns::anonymous().unwrap();
    let inside = other.run(Netns::current).unwrap().unwrap();
    assert!(other.is_same(&inside).unwrap() && !other.is_same(&here).unwrap());
    assert!(here.is_same(&Netns::of_process(std::process::id()).unwrap()).unwrap());
    assert!(here.is_same(&Netns::current().unwrap()).unwrap());
    assert!(matches!(Netns::open("/nowhere".as_ref()), Err(Error::Netns { .. })));
}

#[test]
fn a_cut_takes_well_under_a_millisecond() {
    let node = Node::new();
    drop(node.attached("pf-server", 2));
    let handle = LinkHandle::new("pf-server");
    let once = |_| {
        let before = Instant::now();
        let state = cut(&handle).unwrap();
        let took = before.elapsed();
        uncut(&state).unwrap();
        took
    };
    // Other tests may run on the same processors, and hold the kernel's one lock for links: in a calm moment it is quick.
    eventually("no cut is that quick", || {
        let mut times = node.run(|| (0..50).map(once).collect::<Vec<_>>());
        times.sort();
        eprintln!("cut: median {:?}, worst {:?}", times[25], times[49]);
        times[10] < Duration::from_millis(1)
    });
}
