//! Pipes, sockets, event descriptors and terminals, with data under way.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::{Kind, Outcome, same};

/// Bytes under way: more than half of a pipe's room.
const UNREAD: usize = 40_000;
/// What a call that should be answered at once may take.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn make() -> Outcome<Vec<Kind>> {
    let (reader, writer) = std::io::pipe()?;
    let (one, other) = UnixStream::pair()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    Ok(vec![
        under_way("pipe", reader, writer)?,
        fifo()?,
        under_way("unix-stream-pair", one, other)?,
        under_way("tcp-loopback", near, far)?,
        datagrams()?,
        unix_listener()?,
        tcp_listener(listener),
        udp()?,
        epoll()?,
        terminal()?,
    ])
}

fn bytes(turn: u8) -> Vec<u8> {
    (0..UNREAD).map(|index| u8::try_from(index % 253).unwrap_or_default().wrapping_add(turn)).collect()
}

/// Data that was written and is not read until the next look, which writes new data.
fn under_way(
    name: &'static str,
    mut reader: impl Read + Send + 'static,
    mut writer: impl Write + Send + 'static,
) -> Outcome<Kind> {
    let mut turn = 0;
    writer.write_all(&bytes(turn))?;
    Ok(Kind::new(name, move || {
        let mut got = vec![0; UNREAD];
        reader.read_exact(&mut got)?;
        let expected = bytes(turn);
        turn = turn.wrapping_add(1);
        writer.write_all(&bytes(turn))?;
        if got == expected { Ok(()) } else { Err("what was read is not what was written".into()) }
    }))
}

fn fifo() -> Outcome<Kind> {
    mknodat(CWD, "/data/fifo", FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    // Both directions, so that opening does not wait for another side.
    let both = File::options().read(true).write(true).open("/data/fifo")?;
    under_way("fifo", both.try_clone()?, both)
}

fn datagrams() -> Outcome<Kind> {
    let (one, other) = UnixDatagram::pair()?;
    one.set_read_timeout(Some(PATIENCE))?;
    let send =
        move |turn: u64| (0..3).try_for_each(|part| other.send(&[turn, part].map(u64::to_le_bytes).concat()).map(drop));
    send(0)?;
    let mut turn = 0;
    Ok(Kind::new("unix-datagrams", move || {
        for part in 0..3 {
            let mut got = [0; 64];
            let length = one.recv(&mut got)?;
            same("the datagram", &got[..length].to_vec(), &[turn, part].map(u64::to_le_bytes).concat())?;
        }
        turn += 1;
        Ok(send(turn)?)
    }))
}

fn unix_listener() -> Outcome<Kind> {
    let listener = UnixListener::bind("/data/listener")?;
    Ok(Kind::new("unix-listener", move || {
        let mut client = UnixStream::connect("/data/listener")?;
        let (mut server, _) = listener.accept()?;
        client.write_all(b"question")?;
        let mut got = [0; 8];
        server.read_exact(&mut got)?;
        same("what came", &&got, &b"question")
    }))
}

fn tcp_listener(listener: TcpListener) -> Kind {
    Kind::new("tcp-listener", move || {
        let mut client = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?;
        let (mut server, _) = listener.accept()?;
        server.write_all(b"answer")?;
        let mut got = [0; 6];
        client.read_exact(&mut got)?;
        same("what came", &&got, &b"answer")
    })
}

fn udp() -> Outcome<Kind> {
    let (one, other) = (UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?, UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?);
    other.connect(one.local_addr()?)?;
    one.set_read_timeout(Some(PATIENCE))?;
    let address = other.local_addr()?;
    let mut turn = 0_u64;
    Ok(Kind::new("udp", move || {
        turn += 1;
        other.send(&turn.to_le_bytes())?;
        let mut got = [0; 8];
        let (_, from) = one.recv_from(&mut got)?;
        same("the sender", &from, &address)?;
        same("the datagram", &u64::from_le_bytes(got), &turn)
    }))
}

/// A set with an event descriptor that has something and one that has nothing.
fn epoll() -> Outcome<Kind> {
    let (full, empty) = (EventFd::from_value(7)?, EventFd::from_value(0)?);
    let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    set.add(&full, EpollEvent::new(EpollFlags::EPOLLIN, 71))?;
    set.add(&empty, EpollEvent::new(EpollFlags::EPOLLIN, 72))?;
    let mut value = 7;
    Ok(Kind::new("epoll-eventfd", move || {
        let mut events = [EpollEvent::empty(); 4];
        let count = loop {
            match set.wait(&mut events, 5000_u16) {
                Err(nix::errno::Errno::EINTR) => {}
                other => break other?,
            }
        };
        let ready: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
        same("what is ready", &ready, &vec![71])?;
        same("the event count", &full.read()?, &value)?;
        value = value % 1000 + 1;
        full.write(value)?;
        // Nothing was ever written to the other: it must stay open and silent.
        same("the other", &nix::unistd::write(empty.as_fd(), &0_u64.to_ne_bytes())?, &8)
    }))
}

/// A pair of which both ends are held, with settings of its own.
fn terminal() -> Outcome<Kind> {
    let pair = nix::pty::openpty(None, None)?;
    let mut settings: Termios = tcgetattr(&pair.slave)?;
    settings.make_raw();
    tcsetattr(&pair.slave, OptionalActions::Now, &settings)?;
    let settings = format!("{:?}", tcgetattr(&pair.slave)?);
    let (mut master, mut slave) = (File::from(pair.master), File::from(pair.slave));
    let mut turn = 0_u64;
    Ok(Kind::new("terminal", move || {
        turn += 1;
        for _ in 0..2 {
            master.write_all(&turn.to_le_bytes())?;
            let mut got = [0; 8];
            slave.read_exact(&mut got)?;
            same("what came", &u64::from_le_bytes(got), &turn)?;
            std::mem::swap(&mut master, &mut slave);
        }
        same("its settings", &format!("{:?}", tcgetattr(&slave)?), &settings)
    }))
}
