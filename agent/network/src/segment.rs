//! Making packets as the kernel holds them into packets as a link carries them.
//!
//! Inside the kernel a TCP packet may stand for many: a sender leaves it to the network card to split what it writes
//! (GSO), and what arrives from the network is merged (GRO). The checksum of such a packet, and of every packet between
//! virtual interfaces, is left to the card too: its field has the sum of the pseudo header alone, to be completed by whoever
//! sends the packet over a wire. A packet socket shows all that as it is, and sends only what is fit for a wire.

/// The parts of an IP packet that matter here. Offsets count from the packet's first byte.
struct Ip<'a> {
    /// The packet without what pads its Ethernet frame.
    packet: &'a [u8],
    /// Where the transport's header begins.
    header: usize,
    /// The transport's protocol; none when the payload is not a whole transport packet, or cannot be looked into.
    protocol: Option<u8>,
}

const TCP: u8 = 6;
const UDP: u8 = 17;

const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// Where the flags of a TCP header are, and some of them (RFC 9293, section 3.1).
const TCP_FLAGS: usize = 13;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const URG: u8 = 0x20;
const CWR: u8 = 0x80;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// The packets, none larger than `mtu`, that carry what an IP packet carries.
///
/// TCP is split, and checksums that were left to a network card are completed. Empty is the answer for what cannot be
/// carried: what is malformed or was damaged on its way (a wrong checksum is never made right), and what is too large but
/// no TCP. Senders repeat that, or can do without it. A datagram that was merged with others looks like one large
/// datagram.
pub fn segments(packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
    Ip::read(packet).and_then(|ip| ip.segments(mtu)).unwrap_or_default()
}

/// The bytes of an IP packet without what pads its Ethernet frame; none when it is malformed.
pub(crate) fn without_padding(packet: &[u8]) -> Option<&[u8]> {
    Ip::read(packet).map(|ip| ip.packet)
}

/// Whether a packet is a segment of a TCP connection that exists already, as far as can be seen from the packet.
pub(crate) fn continues_connection(packet: &[u8]) -> bool {
    Ip::read(packet).is_some_and(|ip| {
        let flags = ip.packet.get(ip.header + TCP_FLAGS);
        ip.protocol == Some(TCP) && flags.is_some_and(|flags| flags & SYN == 0)
    })
}

/// Whether a packet would open a TCP connection.
pub(crate) fn opens_connection(packet: &[u8]) -> bool {
    Ip::read(packet).is_some_and(|ip| {
        let flags = ip.packet.get(ip.header + TCP_FLAGS);
        ip.protocol == Some(TCP) && flags.is_some_and(|flags| flags & (SYN | ACK) == SYN)
    })
}

impl<'a> Ip<'a> {
    fn read(packet: &'a [u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::read_v4(packet),
            6 => Self::read_v6(packet),
            _ => None,
        }
    }

    /// RFC 791, section 3.1.
    fn read_v4(packet: &'a [u8]) -> Option<Self> {
        const MORE_FRAGMENTS_AND_OFFSET: u16 = 0x3fff;
        let header = usize::from(packet.first()? & 0xf) * 4;
        let packet = packet.get(..usize::from(word(packet, 2)?))?;
        if header < IPV4_HEADER || fold(sum(packet.get(..header)?)) != u16::MAX {
            return None;
        }
        let is_whole = word(packet, 6)? & MORE_FRAGMENTS_AND_OFFSET == 0;
        Some(Self { packet, header, protocol: is_whole.then(|| packet[9]) })
    }

    /// RFC 8200, sections 3 and 4.
    fn read_v6(packet: &'a [u8]) -> Option<Self> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const DESTINATION_OPTIONS: u8 = 60;
        let packet = packet.get(..IPV6_HEADER + usize::from(word(packet, 4)?))?;
        let (mut next, mut header) = (packet[6], IPV6_HEADER);
        let protocol = loop {
            match next {
                HOP_BY_HOP | DESTINATION_OPTIONS => {}
                // Before its last stop a packet's destination is not the one that its checksum has.
                ROUTING if *packet.get(header + 3)? == 0 => {}
                TCP | UDP => break Some(next),
                _ => break None,
            }
            next = *packet.get(header)?;
            header += (usize::from(*packet.get(header + 1)?) + 1) * 8;
        };
        (header <= packet.len()).then_some(Self { packet, header, protocol })
    }

    fn segments(&self, mtu: usize) -> Option<Vec<Vec<u8>>> {
        match self.protocol {
            Some(TCP) => self.tcp(mtu),
            Some(UDP) => self.udp(mtu),
            _ => self.alone(mtu, self.packet.to_vec()),
        }
    }

    fn alone(&self, mtu: usize, packet: Vec<u8>) -> Option<Vec<Vec<u8>>> {
        (self.packet.len() <= mtu).then(|| vec![packet])
    }

    fn udp(&self, mtu: usize) -> Option<Vec<Vec<u8>>> {
        let length = usize::from(word(self.packet, self.header + 4)?);
        let datagram = self.packet.get(self.header..self.header + length).filter(|datagram| datagram.len() >= 8)?;
        let mut packet = self.packet.to_vec();
        // A sender that wants no checksum says so by 0, which no sum of a pseudo header is.
        if word(datagram, UDP_CHECKSUM)? != 0 && self.lacks_checksum(UDP, datagram, UDP_CHECKSUM)? {
            let checksum = self.checksum(UDP, datagram, UDP_CHECKSUM)?;
            put(&mut packet, self.header + UDP_CHECKSUM, if checksum == 0 { u16::MAX } else { checksum })?;
        }
        self.alone(mtu, packet)
    }

    fn tcp(&self, mtu: usize) -> Option<Vec<Vec<u8>>> {
        const HEADER: usize = 20;
        let segment = self.packet.get(self.header..)?;
        let header = usize::from(segment.get(12)? >> 4) * 4;
        let payload = segment.get(header..).filter(|_| header >= HEADER)?;
        let lacks_checksum = self.lacks_checksum(TCP, segment, TCP_CHECKSUM)?;
        if self.packet.len() <= mtu {
            let mut packet = self.packet.to_vec();
            if lacks_checksum {
                put(&mut packet, self.header + TCP_CHECKSUM, self.checksum(TCP, segment, TCP_CHECKSUM)?)?;
            }
            return Some(vec![packet]);
        }
        let flags = segment[TCP_FLAGS];
        let headers = &self.packet[..self.header + header];
        // What counts in other than bytes of the payload is sent by no kernel in a packet that has to be split.
        if flags & (SYN | RST | URG) != 0 || mtu <= headers.len() {
            return None;
        }
        let chunks = payload.chunks(mtu - headers.len());
        let last = chunks.len().checked_sub(1)?;
        let first_byte = u32::from_be_bytes(segment.get(4..8)?.try_into().ok()?);
        let mut sequence = first_byte;
        let one = |(number, chunk): (usize, &[u8])| {
            let mut packet = [headers, chunk].concat();
            packet[self.header + 4..self.header + 8].copy_from_slice(&sequence.to_be_bytes());
            sequence = sequence.wrapping_add(u32::try_from(chunk.len()).ok()?);
            // An end comes at the end; that the window was made smaller is told once.
            let not_here = if number == last { 0 } else { FIN | PSH } | if number == 0 { 0 } else { CWR };
            packet[self.header + TCP_FLAGS] &= !not_here;
            self.set_length(&mut packet, number)?;
            let checksum = self.checksum(TCP, &packet[self.header..], TCP_CHECKSUM)?;
            put(&mut packet, self.header + TCP_CHECKSUM, checksum)?;
            Some(packet)
        };
        chunks.enumerate().map(one).collect()
    }

    /// Sets what the IP header says of a packet's length, in the packet of this number of those that this one is split into.
    fn set_length(&self, packet: &mut [u8], number: usize) -> Option<()> {
        if self.is_v6() {
            return put(packet, 4, u16::try_from(packet.len() - IPV6_HEADER).ok()?);
        }
        let identification = word(self.packet, 4)?.wrapping_add(u16::try_from(number).ok()?);
        put(packet, 2, u16::try_from(packet.len()).ok()?)?;
        put(packet, 4, identification)?;
        put(packet, 10, 0)?;
        // The options of the header were copied: they are part of its sum.
        let checksum = !fold(sum(packet.get(..usize::from(packet[0] & 0xf) * 4)?));
        put(packet, 10, checksum)
    }

    fn is_v6(&self) -> bool {
        self.packet[0] >> 4 == 6
    }

    /// Whether a checksum still has to be completed; none when it is neither complete nor to be completed: then the
    /// packet was damaged.
    fn lacks_checksum(&self, protocol: u8, transport: &[u8], at: usize) -> Option<bool> {
        let pseudo_header = self.pseudo_header(protocol, transport.len())?;
        if fold(pseudo_header + sum(transport)) == u16::MAX {
            return Some(false);
        }
        // Both of the two zeros of this arithmetic may be in the field.
        (word(transport, at)? % u16::MAX == fold(pseudo_header) % u16::MAX).then_some(true)
    }

    /// The checksum of a transport packet, whatever is in its place.
    fn checksum(&self, protocol: u8, transport: &[u8], at: usize) -> Option<u16> {
        let others = sum(transport.get(..at)?) + sum(transport.get(at + 2..)?);
        Some(!fold(self.pseudo_header(protocol, transport.len())? + others))
    }

    fn pseudo_header(&self, protocol: u8, length: usize) -> Option<u64> {
        let addresses = if self.is_v6() { 8..40 } else { 12..20 };
        Some(sum(&self.packet[addresses]) + u64::from(protocol) + u64::try_from(length).ok()?)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn put(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    bytes.get_mut(at..at + 2)?.copy_from_slice(&value.to_be_bytes());
    Some(())
}

/// The words of some bytes added up; a byte that is left over is the upper half of a word (RFC 1071).
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let words: u64 = words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum();
    words + rest.first().map_or(0, |byte| u64::from(*byte) << 8)
}

/// Adds what a sum has above 16 bits to those.
fn fold(mut sum: u64) -> u16 {
    loop {
        match u16::try_from(sum) {
            Ok(folded) => return folded,
            Err(_) => sum = (sum & 0xffff) + (sum >> 16),
        }
    }
}

#[cfg(test)]
mod tests;
