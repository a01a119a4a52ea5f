//! Packets of every kind that the kernel holds, and what becomes of them.

use std::iter;
use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;

use super::segments;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What a generated packet says of its checksum.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Checksum {
    Complete,
    /// Left to the network card.
    Partial,
}

/// A packet to make.
#[derive(Clone, Debug)]
struct Made {
    is_v6: bool,
    /// IPv4 options, or the number of extension headers and of 8-byte units in each.
    options: (u8, u8),
    identification: u16,
    /// TCP options, in words.
    tcp_options: u8,
    sequence: u32,
    flags: u8,
    payload: Vec<u8>,
    padding: usize,
    checksum: Checksum,
}

/// Where the parts of a packet are, read without the code under test.
struct Found<'a> {
    packet: &'a [u8],
    transport: usize,
}

impl Made {
    fn ip(&self, protocol: u8, transport: &[u8]) -> Vec<u8> {
        let (count, size) = self.options;
        let mut packet = if self.is_v6 {
            let kinds = [0, 43, 60];
            let kinds: Vec<u8> = kinds.into_iter().take(usize::from(count % 4)).collect();
            let mut extensions = Vec::new();
            for number in 0..kinds.len() {
                let next = kinds.get(number + 1).copied().unwrap_or(protocol);
                extensions.extend([next, size % 4, 1, 0, 0, 0, 0, 0]);
                extensions.extend(iter::repeat_n(0, usize::from(size % 4) * 8));
            }
            let length = u16::try_from(extensions.len() + transport.len()).unwrap().to_be_bytes();
            let first = kinds.first().copied().unwrap_or(protocol);
            let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], first, 60];
            packet.extend([0xfd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
            packet.extend([0xfd, 0xff, 0xff, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16]);
            packet.extend(extensions);
            packet
        } else {
            let words = 5 + count % 11;
            let length = u16::try_from(usize::from(words) * 4 + transport.len()).unwrap().to_be_bytes();
            let id = self.identification.to_be_bytes();
            let mut packet = vec![0x40 | words, 0, length[0], length[1], id[0], id[1], 0x40, 0, 64, protocol, 0, 0];
            packet.extend([10, 1, 2, 3, 192, 0, 2, 77]);
            packet.resize(usize::from(words) * 4, 1);
            let sum = !ones_complement(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            packet
        };
        packet.extend(transport);
        packet
    }

    /// The packet with its checksum as wanted, and its padding.
    fn finish(&self, protocol: u8, mut transport: Vec<u8>, at: usize) -> Vec<u8> {
        let packet = self.ip(protocol, &transport);
        let pseudo_header = pseudo_header(&packet, protocol, transport.len());
        let value = match self.checksum {
            Checksum::Partial => ones_complement(&pseudo_header),
            Checksum::Complete => match !ones_complement(&[pseudo_header, transport.clone()].concat()) {
                0 if protocol == UDP => u16::MAX,
                value => value,
            },
        };
        transport[at..at + 2].copy_from_slice(&value.to_be_bytes());
        let mut packet = self.ip(protocol, &transport);
        packet.resize(packet.len() + self.padding, 0xee);
        packet
    }

    fn tcp(&self) -> Vec<u8> {
        let words = 5 + self.tcp_options;
        let mut segment = vec![0x30, 0x39, 0, 80];
        segment.extend(self.sequence.to_be_bytes());
        segment.extend([9, 8, 7, 6, words << 4, self.flags, 0x10, 0, 0, 0, 0, 0]);
        segment.resize(usize::from(words) * 4, 1);
        segment.extend(&self.payload);
        self.finish(TCP, segment, 16)
    }

    fn udp(&self) -> Vec<u8> {
        let length = u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes();
        let mut datagram = vec![0x30, 0x39, 0, 53, length[0], length[1], 0, 0];
        datagram.extend(&self.payload);
        self.finish(UDP, datagram, 6)
    }
}

impl<'a> Found<'a> {
    fn read(packet: &'a [u8], protocol: u8) -> Self {
        let word = |at: usize| usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
        let transport = if packet[0] >> 4 == 4 {
            assert_eq!(word(2), packet.len());
            let header = usize::from(packet[0] & 15) * 4;
            assert_eq!(ones_complement(&packet[..header]), 0xffff);
            header
        } else {
            assert_eq!(40 + word(4), packet.len());
            let (mut next, mut at) = (packet[6], 40);
            while next != protocol {
                next = packet[at];
                at += (usize::from(packet[at + 1]) + 1) * 8;
            }
            at
        };
        let found = Self { packet, transport };
        let whole = [pseudo_header(packet, protocol, found.transport().len()), found.transport().to_vec()].concat();
        assert_eq!(ones_complement(&whole), 0xffff, "the checksum of the transport");
        found
    }

    fn transport(&self) -> &'a [u8] {
        &self.packet[self.transport..]
    }

    fn sequence(&self) -> u32 {
        u32::from_be_bytes(self.transport()[4..8].try_into().unwrap())
    }

    fn flags(&self) -> u8 {
        self.transport()[13]
    }

    fn payload(&self) -> &'a [u8] {
        &self.transport()[usize::from(self.transport()[12] >> 4) * 4..]
    }
}

fn pseudo_header(packet: &[u8], protocol: u8, length: usize) -> Vec<u8> {
    let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
    let length = u32::try_from(length).unwrap().to_be_bytes();
    [addresses, &length, &[0, 0, 0, protocol]].concat()
}

/// The sum with the carry brought round at once, byte by byte.
fn ones_complement(bytes: &[u8]) -> u16 {
    let mut sum = 0_u16;
    for (number, byte) in bytes.iter().enumerate() {
        let value = u16::from(*byte) << if number % 2 == 0 { 8 } else { 0 };
        let (added, carry) = sum.overflowing_add(value);
        sum = added + u16::from(carry);
    }
    sum
}

fn made(length: Range<usize>) -> impl Strategy<Value = Made> {
    let header = (any::<bool>(), any::<(u8, u8)>(), any::<u16>(), 0..=10_u8, any::<u32>());
    let checksum = prop_oneof![Just(Checksum::Complete), Just(Checksum::Partial)];
    let payload = (vec(any::<u8>(), 1..64), length).prop_map(|(pattern, length)| {
        pattern.iter().zip(0_u64..).cycle().map(|(byte, place)| byte ^ place.to_le_bytes()[0]).take(length).collect()
    });
    (header, any::<u8>(), payload, 0..50_usize, checksum).prop_map(|(header, flags, payload, padding, checksum)| {
        let (is_v6, options, identification, tcp_options, sequence) = header;
        Made { is_v6, options, identification, tcp_options, sequence, flags, payload, padding, checksum }
    })
}

/// Neither SYN nor RST nor URG: what may be split.
const SPLITTABLE: u8 = !0x26;
const LAST_ONLY: u8 = 0x09;
const FIRST_ONLY: u8 = 0x80;

proptest! {
    #[test]
    fn tcp_segments_carry_what_the_packet_carried(made in made(0..65_000), mtu in 250..9001_usize) {
        let made = Made { flags: made.flags & SPLITTABLE, ..made };
        let packet = made.tcp();
        let result = segments(&packet, mtu);
        prop_assert!(!result.is_empty());
        let mut payload: Vec<u8> = Vec::new();
        for (number, segment) in result.iter().enumerate() {
            prop_assert!(segment.len() <= mtu);
            let found = Found::read(segment, TCP);
            let carried = u32::try_from(payload.len()).unwrap();
            prop_assert_eq!(found.sequence(), made.sequence.wrapping_add(carried));
            let mut expected = made.flags;
            expected &= if number == 0 { 0xff } else { !FIRST_ONLY };
            expected &= if number + 1 == result.len() { 0xff } else { !LAST_ONLY };
            prop_assert_eq!(found.flags(), expected);
            if !made.is_v6 {
                let id = u16::from_be_bytes([segment[4], segment[5]]);
                prop_assert_eq!(id, made.identification.wrapping_add(u16::try_from(number).unwrap()));
            }
            // Everything else of the headers is as it was: the options, the addresses, the acknowledgement.
            let end = found.transport + 20 + usize::from(made.tcp_options) * 4;
            prop_assert_eq!(segment.len() - found.payload().len(), end);
            let changing = |at: usize| {
                let in_ip: &[usize] = if made.is_v6 { &[4, 5] } else { &[2, 3, 4, 5, 10, 11] };
                in_ip.contains(&at) || [4, 5, 6, 7, 13, 16, 17].iter().any(|offset| found.transport + offset == at)
            };
            for at in (0..end).filter(|at| !changing(*at)) {
                prop_assert_eq!(segment[at], packet[at], "byte {}", at);
            }
            // All but the last are as full as they can be.
            prop_assert!(number + 1 == result.len() || segment.len() == mtu);
            payload.extend(found.payload());
        }
        prop_assert_eq!(payload, made.payload);
    }

    #[test]
    fn what_fits_keeps_its_flags_whatever_they_are(made in made(0..1000)) {
        let result = segments(&made.tcp(), 2000);
        prop_assert_eq!(result.len(), 1);
        let found = Found::read(&result[0], TCP);
        prop_assert_eq!((found.flags(), found.sequence(), found.payload()), (made.flags, made.sequence, &made.payload[..]));
    }

    #[test]
    fn a_datagram_stays_whole_or_is_given_up(made in made(0..3000), mtu in 1280..3000_usize) {
        let packet = made.udp();
        let result = segments(&packet, mtu);
        let fits = packet.len() - made.padding <= mtu;
        prop_assert_eq!(result.len(), usize::from(fits));
        if fits {
            let found = Found::read(&result[0], UDP);
            prop_assert_eq!(&found.transport()[8..], &made.payload);
            prop_assert_ne!(&found.transport()[6..8], &[0, 0]);
        }
    }

    #[test]
    fn a_damaged_packet_is_not_mended(made in made(1..3000), at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let made = Made { checksum: Checksum::Complete, padding: 0, options: (0, 0), ..made };
        for mut packet in [made.tcp(), made.udp()] {
            // Of IPv6 the first bytes are in no sum.
            let first = if made.is_v6 { 8 } else { 0 };
            let at = first + at.index(packet.len() - first);
            let header = if made.is_v6 { 40 } else { 20 };
            packet[at] ^= 1 << bit;
            for segment in segments(&packet, 1280) {
                // A datagram whose checksum became 0 has none any more; one bit can make it so.
                prop_assert_eq!(&segment[header + 6..header + 8], &[0, 0]);
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..200), version in 0..3_u8, mtu in 0..200_usize) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = match version { 0 => 0x45, 1 => 0x60, _ => *first };
        }
        for segment in segments(&bytes, mtu) {
            prop_assert!(segment.len() <= mtu);
        }
    }

    #[test]
    fn a_sound_packet_with_random_changes_never_panics(
        made in made(0..300), changes in vec((0..80_usize, any::<u8>()), 0..4), cut in 0..400_usize, mtu in 0..400_usize
    ) {
        for mut packet in [made.tcp(), made.udp()] {
            for (at, value) in &changes {
                if let Some(byte) = packet.get_mut(*at) {
                    *byte = *value;
                }
            }
            packet.truncate(cut);
            // What is damaged in the header alone is found out before anything else: so that is made right again.
            let header = usize::from(packet.first().copied().unwrap_or(0) & 15) * 4;
            if !made.is_v6 && header >= 20 && header <= packet.len() {
                packet[10..12].copy_from_slice(&[0, 0]);
                let sum = !ones_complement(&packet[..header]);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            for segment in segments(&packet, mtu) {
                prop_assert!(segment.len() <= mtu);
            }
        }
    }
}

fn plain(is_v6: bool, payload: usize) -> Made {
    Made {
        is_v6,
        options: (0, 0),
        identification: 7,
        tcp_options: 0,
        sequence: 1,
        flags: 0x10,
        payload: vec![0x5a; payload],
        padding: 0,
        checksum: Checksum::Partial,
    }
}

#[test]
fn a_datagram_without_a_checksum_stays_without() {
    for is_v6 in [false, true] {
        let mut packet = plain(is_v6, 100).udp();
        let at = if is_v6 { 40 } else { 20 } + 6;
        packet[at..at + 2].copy_from_slice(&[0, 0]);
        assert_eq!(segments(&packet, 1500), [packet]);
    }
}

#[test]
fn fragments_and_other_protocols_pass_as_they_are_when_they_fit() {
    let icmp = plain(false, 0).ip(1, &[8, 0, 1, 2, 3, 4, 5, 6]);
    let mut fragment = plain(false, 0).ip(UDP, &[0xaa; 64]);
    fragment[6..8].copy_from_slice(&[0x20, 3]);
    let sum = !ones_complement(&[&fragment[..10], &fragment[12..20]].concat());
    fragment[10..12].copy_from_slice(&sum.to_be_bytes());
    let fragment_v6 = plain(true, 0).ip(44, &[UDP, 0, 0, 1, 1, 2, 3, 4, 0xaa, 0xaa]);
    // On its way by other stops, with a checksum for the last of them.
    let routed = plain(true, 0).ip(43, &[TCP, 0, 0, 1, 0, 0, 0, 0, 0xaa]);
    for packet in [icmp, fragment, fragment_v6, routed] {
        assert_eq!(segments(&packet, packet.len()), std::slice::from_ref(&packet));
        assert!(segments(&packet, packet.len() - 1).is_empty());
    }
}

#[test]
fn what_cannot_be_split_is_given_up() {
    for flags in [0x02, 0x04, 0x20] {
        let packet = Made { flags, ..plain(false, 3000) }.tcp();
        assert!(segments(&packet, 1500).is_empty());
        assert_eq!(segments(&packet, 4000).len(), 1);
    }
    let packet = plain(false, 3000).tcp();
    assert!(segments(&packet, 40).is_empty(), "no room for a single byte");
    assert_eq!(segments(&packet, 41).len(), 3000);
}
