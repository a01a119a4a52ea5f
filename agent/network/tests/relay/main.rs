//! Connections that are carried from the namespace that has their address to another. Needs root, iproute2 and /dev/net/tun.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod scene;
#[path = "../support/mod.rs"]
mod support;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use podferry_network::Error;
use podferry_network::relay::{
    Connection, End, Home, Tun, addresses_of, check_home, connections_of, dismantle_away, dismantle_home, divert,
    end_connections, intercept, is_diverted, list_connections, not_accepted, opens_connection, prepare_away,
    prepare_home, undivert,
};
use scene::{
    CLIENT, HOME, Scene, accept, captured_flags, connect, exchange, listen, ping, tcp_flags, text, transfer,
    unspecified,
};
use support::{assert_same, eventually, facts, sh};

#[test]
fn a_new_connection_to_the_old_address_reaches_the_other_namespace_and_carries_much_both_ways() {
    let scene = Scene::new();
    let (home, tun) = scene.prepare_home();
    let away = scene.prepare_away(&home);
    divert(&scene.home, &home).unwrap();
    let _pump = scene.pump(&tun, &away);
    let text = text(50 << 20);
    for address in HOME {
        let listener = listen(&scene.away, unspecified(address));
        let out = connect(&scene.client, SocketAddr::new(address.parse().unwrap(), 80));
        let inside = accept(&listener);
        assert_eq!(inside.local_addr().unwrap().ip().to_string(), address);
        for (from, to) in [(&out, &inside), (&inside, &out)] {
            let begin = Instant::now();
            transfer(from, to, &text);
            println!("{address}: {:.0} Mbit/s", 8.0 * 50.0 * 1.048 / begin.elapsed().as_secs_f64());
        }
        println!("{address}: an echo takes {:?}", ping(&scene.client, address));
        assert_eq!(connections_of(&scene.away, &[address.parse().unwrap()]).unwrap(), 1);
        assert_eq!(connections_of(&scene.home, &Scene::addresses()).unwrap(), 0);
    }
}

#[test]
fn a_smaller_mtu_on_the_way_is_found_out_by_who_sends_away() {
    let scene = Scene::new();
    let (home, tun) = scene.prepare_home();
    let away = scene.prepare_away(&home);
    divert(&scene.home, &home).unwrap();
    let _pump = scene.pump(&tun, &away);
    scene.router.sh("ip link set pf-client mtu 1400");
    let text = text(4 << 20);
    for address in HOME {
        let listener = listen(&scene.away, unspecified(address));
        let out = connect(&scene.client, SocketAddr::new(address.parse().unwrap(), 80));
        let inside = accept(&listener);
        transfer(&inside, &out, &text);
        let found = sh(&scene.away, "ss -Htni state established '( sport = :80 )'");
        assert!(found.contains("pmtu:1400"), "{found}");
        drop((out, inside));
    }
}

#[test]
fn what_comes_while_diverted_waits_and_reaches_the_sockets_after_it_without_being_repeated() {
    for address in HOME {
        let scene = Scene::new();
        // A repetition that is due while this machine does something else would spoil what is counted.
        sh(&scene.client, "sysctl -qw net.ipv4.tcp_early_retrans=0");
        sh(
            &scene.client,
            "ip route add 10.2.0.2 via 10.1.0.1 rto_min 20s; ip route add fd02::2 via fd01::1 rto_min 20s",
        );
        let (mut out, mut inside) = scene.connection(address);
        let (home, tun) = scene.prepare_home();
        exchange(&mut out, &mut inside, b"prepared");
        divert(&scene.home, &home).unwrap();
        out.write_all(b"later").unwrap();
        out.write_all(b" and later").unwrap();
        let packets = scene.waiting(&tun);
        assert!(packets.iter().all(|packet| !opens_connection(packet)));
        inside.set_nonblocking(true).unwrap();
        assert!(inside.read(&mut [0; 1]).is_err(), "the socket got something");
        inside.set_nonblocking(false).unwrap();

        undivert(&scene.home, &home).unwrap();
        for packet in &packets {
            tun.send(packet).unwrap();
        }
        let mut buffer = [0; 15];
        inside.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"later and later");
        exchange(&mut inside, &mut out, b"reply");
        exchange(&mut out, &mut inside, b"again");
        assert_eq!(scene.repetitions(), None);
        dismantle_home(&scene.home, &home).unwrap();
        exchange(&mut out, &mut inside, b"in the end");
        out.shutdown(Shutdown::Both).unwrap();
    }
}

#[test]
fn dying_sockets_say_nothing_while_diverted() {
    let scene = Scene::new();
    let (home, tun) = scene.prepare_home();
    for (address, client) in HOME.into_iter().zip(CLIENT) {
        // With IPv4 a socket of IPv6 that serves it.
        let (mut finished, inside_finished) = scene.connection_by("::", address);
        let (mut reset, inside_reset) = scene.connection(address);
        let (mut speaking, mut inside_speaking) = scene.connection(address);
        // A socket that is closed with something unread resets its connection.
        reset.write_all(b"unread").unwrap();
        thread::sleep(Duration::from_millis(50));
        let capture = scene.capture(client);
        divert(&scene.home, &home).unwrap();
        let _ = captured_flags(&capture);
        drop((inside_finished, inside_reset));
        inside_speaking.write_all(b"from the past").unwrap();
        finished.write_all(b"to one that is gone").unwrap();
        reset.write_all(b"to one that is gone").unwrap();
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(captured_flags(&capture), Vec::<u8>::new());
        for stream in [&mut finished, &mut reset] {
            stream.set_nonblocking(true).unwrap();
            assert_eq!(stream.read(&mut [0; 8]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        }
        while tun.try_receive().unwrap().is_some() {}

        // And this test would see it if they did.
        undivert(&scene.home, &home).unwrap();
        let mut buffer = [0; 13];
        speaking.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"from the past");
        exchange(&mut speaking, &mut inside_speaking, b"it goes on");
        exchange(&mut inside_speaking, &mut speaking, b"both ways");
        let has_ended = |stream: &mut TcpStream| match stream.read(&mut [0; 8]) {
            Ok(length) => length == 0,
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
        };
        for stream in [finished, reset] {
            let stream = std::cell::RefCell::new(stream);
            eventually("the peer is told", || has_ended(&mut stream.borrow_mut()));
        }
    }
}

#[test]
fn neighbours_are_answered_while_diverted() {
    let scene = Scene::new();
    let (home, tun) = scene.prepare_home();
    let away = scene.prepare_away(&home);
    divert(&scene.home, &home).unwrap();
    let _pump = scene.pump(&tun, &away);
    // Short lives, so that each side asks the other again and again, also by unicast.
    for (netns, interface) in [(&scene.router.netns, "pf-server"), (&scene.home, "eth0")] {
        for family in ["ipv4", "ipv6"] {
            let base = format!("net.{family}.neigh.{interface}");
            sh(
                netns,
                &format!(
                    "sysctl -qw {base}.base_reachable_time_ms=200 {base}.delay_first_probe_time=1 {base}.retrans_time_ms=200"
                ),
            );
        }
    }
    for netns in [&scene.router.netns, &scene.home] {
        sh(netns, "ip neigh flush all; ip -6 neigh flush all");
    }
    for address in HOME {
        let listener = listen(&scene.away, unspecified(address));
        let mut out = connect(&scene.client, SocketAddr::new(address.parse().unwrap(), 80));
        let mut inside = accept(&listener);
        for _ in 0..60 {
            let begin = Instant::now();
            exchange(&mut out, &mut inside, b"there");
            exchange(&mut inside, &mut out, b"and back");
            assert!(begin.elapsed() < Duration::from_secs(2), "it took {:?}", begin.elapsed());
            thread::sleep(Duration::from_millis(100));
        }
        let state = scene.router.sh(&format!("ip neigh show {address} dev pf-server"));
        assert!(!state.contains("FAILED") && !state.is_empty(), "{state}");
    }
}

#[test]
fn everything_is_undone_and_doing_it_twice_is_no_error() {
    let scene = Scene::new();
    // One that differs from all others, and has to stay so.
    sh(
        &scene.home,
        "ip link add extra type veth peer name other; ip link set extra up; sysctl -qw net.ipv6.conf.extra.forwarding=1",
    );
    sh(&scene.home, "sysctl -qw net.ipv4.conf.eth0.rp_filter=2 net.ipv6.conf.eth0.accept_ra=1");
    let before = [facts(&scene.home), facts(&scene.away)];
    let addresses = Scene::addresses();

    let (home, tun) = scene.prepare_home();
    assert_eq!(sh(&scene.home, "cat /proc/sys/net/ipv6/conf/eth0/accept_ra").trim(), "2");
    assert!(prepare_home(&scene.home, "eth0", &addresses).is_err(), "another one has it");
    drop(tun);
    let (again, tun) = scene.prepare_home();
    assert_eq!(again, home, "what was before the first time");
    let stored = serde_json::to_string(&home).unwrap();
    let home: Home = serde_json::from_str(&stored).unwrap();

    assert!(!is_diverted(&scene.home, &home).unwrap());
    undivert(&scene.home, &home).unwrap();
    for _ in 0..2 {
        divert(&scene.home, &home).unwrap();
        assert!(is_diverted(&scene.home, &home).unwrap());
    }
    drop(tun);
    let (again, tun) = scene.prepare_home();
    assert!(again == home && is_diverted(&scene.home, &home).unwrap(), "preparing changes no diversion");
    for _ in 0..2 {
        undivert(&scene.home, &home).unwrap();
        assert!(!is_diverted(&scene.home, &home).unwrap());
    }
    divert(&scene.home, &home).unwrap();
    let tun = Arc::new(tun);
    let waiting = scene.agent.spawn({
        let tun = Arc::clone(&tun);
        async move { tun.receive().await }
    });
    thread::sleep(Duration::from_millis(50));
    for _ in 0..2 {
        dismantle_home(&scene.home, &home).unwrap();
        assert_same(&before[0], &facts(&scene.home));
    }
    let waited = scene.agent.block_on(async { tokio::time::timeout(Duration::from_secs(5), waiting).await });
    assert!(matches!(waited, Ok(Ok(Err(Error::Relay { .. })))), "who waits for a packet is told: {waited:?}");
    assert!(matches!(tun.try_receive(), Err(Error::Relay { .. })) && tun.send(&[0; 40]).is_err());

    for _ in 0..2 {
        drop(prepare_away(&scene.away, &addresses, 1400).unwrap());
    }
    let found = sh(&scene.away, "ip -o link show podferry-away; ip -o addr show dev podferry-away");
    assert!(found.contains("mtu 1400") && found.contains("10.2.0.2/32") && found.contains("fd02::2/128"), "{found}");
    assert!(!found.contains("fe80"), "{found}");
    for _ in 0..2 {
        dismantle_away(&scene.away, &addresses).unwrap();
        assert_same(&before[1], &facts(&scene.away));
    }
}

#[test]
fn what_was_half_made_is_undone() {
    let scene = Scene::new();
    let addresses = Scene::addresses();
    let before = [facts(&scene.home), facts(&scene.away)];

    // Refused in the middle.
    let others = ["10.9.9.9".parse().unwrap()];
    let error = prepare_home(&scene.home, "eth0", &others).unwrap_err();
    assert!(error.to_string().contains("10.9.9.9"), "{error}");
    assert!(prepare_home(&scene.home, "eth7", &addresses).is_err());
    assert_same(&before[0], &facts(&scene.home));
    assert!(prepare_away(&scene.away, &addresses, 1000).is_err(), "too small for IPv6");
    assert_same(&before[1], &facts(&scene.away));

    // A process that died after each of some steps, as far as the record goes.
    let (home, _) = scene.prepare_home();
    let breaks = [
        "ip rule del pref 10; ip -6 rule del pref 11; ip rule del pref 32000",
        "ip link del podferry-home",
        "ip route flush table 177; ip -6 neigh del proxy fd02::2 dev eth0",
    ];
    for it in breaks {
        sh(&scene.home, it);
        drop(scene.prepare_home());
        divert(&scene.home, &home).unwrap();
        assert!(is_diverted(&scene.home, &home).unwrap(), "{it}");
        sh(&scene.home, it);
        dismantle_home(&scene.home, &home).unwrap();
        assert_same(&before[0], &facts(&scene.home));
        drop(scene.prepare_home());
    }
    // Half of a diversion.
    sh(&scene.home, "ip rule add pref 9 iif lo from 10.2.0.2 ipproto tcp blackhole; ip -6 rule del pref 0");
    assert!(!is_diverted(&scene.home, &home).unwrap());
    undivert(&scene.home, &home).unwrap();
    let rules = sh(&scene.home, "ip rule; ip -6 rule");
    assert!(!rules.contains("blackhole"), "{rules}");
    dismantle_home(&scene.home, &home).unwrap();
    assert_same(&before[0], &facts(&scene.home));

    // A namespace with other ideas.
    sh(&scene.home, "ip rule add pref 100 lookup local; ip rule del pref 0");
    for error in [
        check_home(&scene.home, "eth0", &addresses).unwrap_err(),
        prepare_home(&scene.home, "eth0", &addresses).unwrap_err(),
    ] {
        assert!(matches!(error, Error::NotRelayable { .. }), "{error}");
    }
}

#[test]
fn the_device_outlives_its_process_and_nobody_is_answered_meanwhile() {
    for address in HOME {
        let scene = Scene::new();
        let (mut out, mut inside) = scene.connection(address);
        let (mut dead_out, dead) = scene.connection(address);
        let (home, tun) = scene.prepare_home();
        divert(&scene.home, &home).unwrap();
        drop((tun, dead));
        for stream in [&mut out, &mut dead_out] {
            stream.write_all(b"to nobody").unwrap();
        }
        thread::sleep(Duration::from_millis(600));
        assert!(sh(&scene.home, "ip link").contains(End::Home.device()));
        // Not even without the device.
        sh(&scene.home, &format!("ip link del {}", End::Home.device()));
        thread::sleep(Duration::from_secs(1));
        for stream in [&mut out, &mut dead_out, &mut inside] {
            stream.set_nonblocking(true).unwrap();
            assert_eq!(stream.read(&mut [0; 8]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        }

        let (again, tun) = scene.prepare_home();
        assert_eq!(again.addresses, home.addresses);
        scene.knock(address.parse().unwrap());
        scene.waiting(&tun);
        drop(tun);
        let tun = Tun::open(&scene.home, End::Home).unwrap();
        scene.knock(address.parse().unwrap());
        assert!(scene.waiting(&tun).iter().all(|packet| tcp_flags(&packet[10..]).is_some()));
        // A malformed packet is refused, and nothing else happens.
        assert!(matches!(tun.send(&[0; 14]), Err(Error::RelayedPacket { .. })));
        assert!(matches!(tun.send(&[]), Err(Error::RelayedPacket { .. })));
        scene.knock(address.parse().unwrap());
        scene.waiting(&tun);
    }
}

#[test]
fn connections_of_an_address_are_counted_and_openings_are_told() {
    let scene = Scene::new();
    let (four, six): (IpAddr, IpAddr) = (HOME[0].parse().unwrap(), HOME[1].parse().unwrap());
    let counts = || [vec![four], vec![six], vec![four, six]].map(|of| connections_of(&scene.home, &of).unwrap());
    assert_eq!(counts(), [0, 0, 0]);
    let (mut first, mut inside) = scene.connection(HOME[0]);
    assert_eq!(counts(), [1, 0, 1]);
    let (received, sent) = list_connections(&scene.home, &[four]).unwrap()[0].bytes.unwrap();
    first.write_all(&[7; 3]).unwrap();
    inside.read_exact(&mut [0; 3]).unwrap();
    inside.write_all(&[7; 5]).unwrap();
    first.read_exact(&mut [0; 5]).unwrap();
    let expected = Connection {
        local: inside.local_addr().unwrap(),
        peer: first.local_addr().unwrap(),
        bytes: Some((received + 3, sent + 5)),
    };
    eventually("the bytes are counted", || list_connections(&scene.home, &[four]).unwrap() == [expected]);
    // A socket of IPv6 that serves IPv4, and the listener that counts for nothing.
    let listener = listen(&scene.home, "::");
    let second = connect(&scene.client, SocketAddr::new(four, 80));
    let third = connect(&scene.client, SocketAddr::new(six, 80));
    let (second_inside, third_inside) = (accept(&listener), accept(&listener));
    assert_eq!(counts(), [2, 1, 3]);
    // Closed by the client first, so that home is not the one that waits.
    drop((first, second));
    thread::sleep(Duration::from_millis(50));
    assert_eq!(counts(), [2, 1, 3], "half closed");
    drop((inside, second_inside));
    eventually("the closed ones are gone", || counts() == [0, 1, 1]);
    // Home waits here.
    drop(third_inside);
    drop(third);
    eventually("one that waits does not count", || counts() == [0, 0, 0]);

    let (home, tun) = scene.prepare_home();
    divert(&scene.home, &home).unwrap();
    for address in [four, six] {
        scene.knock(address);
        assert!(scene.waiting(&tun).iter().any(|packet| opens_connection(packet)));
    }
}

#[test]
fn what_is_intercepted_is_handed_over_and_new_connections_can_wait() {
    for address in HOME {
        let scene = Scene::new();
        let (mut out, mut inside) = scene.connection(address);
        let (home, tun) = scene.prepare_home();
        intercept(&scene.home, &home).unwrap();
        assert!(is_diverted(&scene.home, &home).unwrap());
        // What the socket says leaves as ever; what is said to it takes the way by the device.
        exchange(&mut inside, &mut out, b"out");
        out.write_all(b"in").unwrap();
        scene.knock(address.parse().unwrap());
        let (openings, others): (Vec<_>, Vec<_>) =
            scene.waiting(&tun).into_iter().partition(|packet| opens_connection(packet));
        assert!(!openings.is_empty() && !others.is_empty());
        for packet in &others {
            tun.send(packet).unwrap();
        }
        let mut heard = [0; 2];
        inside.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"in");
        // And then it is frozen.
        divert(&scene.home, &home).unwrap();
        undivert(&scene.home, &home).unwrap();
        exchange(&mut out, &mut inside, b"again");
    }
}

#[test]
fn what_no_program_has_taken_is_counted_until_it_is() {
    let scene = Scene::new();
    let count = || not_accepted(&scene.home).unwrap();
    assert_eq!(count(), 0);
    let listeners = ["0.0.0.0", "::"].map(|address| {
        let port = if address == "::" { 81 } else { 80 };
        scene.home.run(|| TcpListener::bind((address.parse::<IpAddr>().unwrap(), port))).unwrap().unwrap()
    });
    let to = |address: &str, port| connect(&scene.client, SocketAddr::new(address.parse().unwrap(), port));
    let _clients = [to(HOME[0], 80), to(HOME[0], 80), to(HOME[1], 81)];
    eventually("they are open", || count() == 3);
    let _first = accept(&listeners[0]);
    assert_eq!(count(), 2);
    let _rest = [accept(&listeners[0]), accept(&listeners[1])];
    assert_eq!(count(), 0);
}

#[test]
fn a_namespace_with_a_connection_that_cannot_be_silenced_is_no_home() {
    let scene = Scene::new();
    let check = || check_home(&scene.home, "eth0", &Scene::addresses());
    let (_out, inside) = scene.connection(HOME[0]);
    check().unwrap();
    let bound = scene.home.run(|| socket2::SockRef::from(&inside).bind_device(Some(b"eth0"))).unwrap();
    bound.unwrap();
    let error = check().unwrap_err();
    assert!(error.to_string().contains("SO_BINDTODEVICE"), "{error}");
    drop(inside);
}

/// Where a container was that came by a relay, and has moved on.
#[test]
fn a_namespace_is_home_and_away_at_once_and_either_ends_first() {
    for home_first in [true, false] {
        let scene = Scene::new();
        let before = facts(&scene.away);
        let (own, mtu) = addresses_of(&scene.away, "eth0").unwrap();
        assert_eq!(
            (own.iter().map(ToString::to_string).collect::<Vec<_>>(), mtu),
            (vec!["10.3.0.2".into(), "fd03::2".into()], 1500)
        );
        let (first, first_tun) = scene.prepare_home();
        let away = scene.prepare_away(&first);
        divert(&scene.home, &first).unwrap();
        let _pump = scene.pump(&first_tun, &away);
        // Both addresses reach the one listener, each its own way.
        let listener = listen(&scene.away, "0.0.0.0");
        check_home(&scene.away, "eth0", &own).unwrap();
        let (second, second_tun) = prepare_home(&scene.away, "eth0", &own).unwrap();
        for address in [HOME[0], "10.3.0.2"] {
            let mut out = connect(&scene.client, SocketAddr::new(address.parse().unwrap(), 80));
            exchange(&mut out, &mut accept(&listener), b"before");
        }
        divert(&scene.away, &second).unwrap();
        let of_own = SocketAddr::new(own[0], 80);
        assert!(scene.client.run(|| TcpStream::connect_timeout(&of_own, Duration::from_millis(200))).unwrap().is_err());
        assert!(scene.waiting(&second_tun).iter().any(|packet| opens_connection(packet)));
        if home_first {
            dismantle_home(&scene.away, &second).unwrap();
            dismantle_away(&scene.away, &Scene::addresses()).unwrap();
        } else {
            dismantle_away(&scene.away, &Scene::addresses()).unwrap();
            assert!(is_diverted(&scene.away, &second).unwrap());
            dismantle_home(&scene.away, &second).unwrap();
        }
        assert_same(&before, &facts(&scene.away));
    }
}

#[test]
fn connections_whose_time_is_over_are_ended_at_both_ends() {
    let scene = Scene::new();
    let (home, tun) = scene.prepare_home();
    let away = scene.prepare_away(&home);
    divert(&scene.home, &home).unwrap();
    let _pump = scene.pump(&tun, &away);
    for address in HOME {
        let (own, of): (IpAddr, IpAddr) = (address.parse().unwrap(), address.parse().unwrap());
        let listener = listen(&scene.away, unspecified(address));
        let mut out = connect(&scene.client, SocketAddr::new(own, 80));
        let mut inside = accept(&listener);
        exchange(&mut out, &mut inside, b"alive");
        assert_eq!(end_connections(&scene.away, &[of]).unwrap(), 1);
        for stream in [&mut out, &mut inside] {
            let error = stream.read(&mut [0; 8]).unwrap_err().kind();
            assert!(
                matches!(error, std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::ConnectionAborted),
                "{error}"
            );
        }
        assert_eq!(end_connections(&scene.away, &[of]).unwrap(), 0);
    }
}
