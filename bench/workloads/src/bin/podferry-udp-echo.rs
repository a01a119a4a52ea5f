//! Sends every datagram that comes to port 7 back to whoever sent it; for tests of what is lost on the way.

use std::net::{Ipv6Addr, UdpSocket};

fn main() -> std::io::Result<()> {
    // Of both families.
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 7))?;
    let mut datagram = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut datagram)?;
        socket.send_to(&datagram[..length], from)?;
    }
}
