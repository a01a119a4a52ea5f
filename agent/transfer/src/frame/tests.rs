use podferry_proto::v1::{
    PagesObject, TransferClose, TransferData, TransferDeltas, TransferEnd, TransferOpen, TransferPages, pages_object,
    transfer_open,
};
use proptest::prelude::*;

use super::*;
use crate::message::Messages;

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        any::<u64>().prop_map(|offset| Kind::Data(TransferData { offset })),
        (any::<u64>(), any::<u64>(), any::<u32>(), any::<bool>(), proptest::collection::vec(any::<u8>(), 0..32))
            .prop_map(|(vaddr, count, flags, absent, zero)| {
                Kind::Pages(TransferPages { vaddr, count, flags, zero_pages: zero.into(), absent })
            }),
        (proptest::collection::vec(any::<u8>(), 0..32), proptest::collection::vec(any::<u8>(), 0..32), any::<u64>())
            .prop_map(|(runs, lengths, digest)| {
                Kind::Deltas(TransferDeltas { runs: runs.into(), lengths: lengths.into(), digest })
            }),
    ]
}

fn bare_kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        (any::<u64>(), any::<u64>()).prop_map(|(length, digest)| Kind::Close(TransferClose { length, digest })),
        (any::<u32>(), any::<u64>()).prop_map(|(objects, length)| Kind::End(TransferEnd { objects, length })),
        "[a-z.]{0,20}".prop_map(|name| Kind::Open(TransferOpen { object: Some(transfer_open::Object::Layer(name)) })),
        (any::<u64>(), any::<u32>()).prop_map(|(segment, id)| {
            let pages = PagesObject { owner: Some(pages_object::Owner::SharedMemory(segment)), id };
            Kind::Open(TransferOpen { object: Some(transfer_open::Object::Pages(pages)) })
        }),
    ]
}

/// Any valid frame, with the place that it is sent at.
fn frame() -> impl Strategy<Value = (u64, Frame)> {
    let loaded =
        (any::<u32>(), kind(), proptest::collection::vec(any::<u8>(), 0..300)).prop_map(|(object, kind, bytes)| {
            let length = u32::try_from(bytes.len()).unwrap();
            Frame::with_payload(object, kind, TransferCompression::Unspecified, length, bytes.into())
        });
    let bare = (any::<u32>(), bare_kind()).prop_map(|(object, kind)| Frame::bare(object, kind));
    (any::<u64>(), prop_oneof![loaded, bare])
}

fn wire(sequence: u64, frame: Frame) -> Vec<u8> {
    let mut encoded = frame.encode(sequence);
    encoded.copy_to_bytes(encoded.remaining()).to_vec()
}

/// As a receiver does: chunks to messages, the message to a frame. `None` when the frame is not all there.
fn receive(bytes: &[u8], cut: usize) -> Result<Option<Received>, String> {
    let mut messages = Messages::new(MAX_MESSAGE_LENGTH);
    let (front, back) = bytes.split_at(cut.min(bytes.len()));
    for chunk in [front, back] {
        messages.push(Bytes::copy_from_slice(chunk));
    }
    match messages.next().map_err(|error| error.to_string())? {
        None => Ok(None),
        Some(message) => Received::parse(&message).map(Some).map_err(|error| error.to_string()),
    }
}

proptest! {
    #[test]
    fn what_is_sent_is_what_arrives((sequence, frame) in frame(), cut in any::<prop::sample::Index>()) {
        let bytes = wire(sequence, frame.clone());
        let received = receive(&bytes, cut.index(bytes.len() + 1)).unwrap().unwrap();
        prop_assert_eq!(received.sequence, sequence);
        prop_assert_eq!(received.object, frame.head.object);
        prop_assert_eq!(Some(received.kind), frame.head.kind);
        prop_assert_eq!(received.payload_sum, sum(&frame.payload));
        prop_assert_eq!(received.payload, frame.payload);
    }

    #[test]
    fn the_wire_is_plain_protobuf((sequence, frame) in frame()) {
        let bytes = wire(sequence, frame.clone());
        let message = TransferRequest::decode(&bytes[PREFIX_LENGTH..]).unwrap();
        prop_assert_eq!(message.payload.as_ref(), frame.payload.as_ref());
        // Nobody but prost itself would write it otherwise, so other languages' libraries can be senders.
        if message.checksum != 0 {
            prop_assert_eq!(message.encode_to_vec(), &bytes[PREFIX_LENGTH..]);
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed((sequence, frame) in frame()) {
        let bytes = wire(sequence, frame);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let received = receive(&flipped, bit);
            prop_assert!(!matches!(received, Ok(Some(_))), "bit {} of byte {}", bit % 8, bit / 8);
        }
    }

    #[test]
    fn a_cut_off_frame_never_arrives((sequence, frame) in frame()) {
        let bytes = wire(sequence, frame);
        for length in 0..bytes.len() {
            prop_assert_eq!(receive(&bytes[..length], length / 2), Ok(None));
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _whatever_it_is = Received::parse(&bytes.into());
    }
}

fn refused(head: TransferRequest, payload: Vec<u8>) -> FrameError {
    let frame = Frame { head, payload: payload.into() };
    Received::parse(&Bytes::from(wire(0, frame)).slice(PREFIX_LENGTH..)).unwrap_err()
}

fn data() -> TransferRequest {
    TransferRequest { kind: Some(Kind::Data(TransferData { offset: 0 })), ..TransferRequest::default() }
}

#[test]
fn a_bomb_is_refused_by_what_it_says_of_itself() {
    let zstd = TransferCompression::Zstd.into();
    let bomb = TransferRequest { raw_length: u32::MAX, compression: zstd, ..data() };
    assert!(matches!(refused(bomb, vec![1]), FrameError::Length { what: "raw bytes", .. }));
    let grown = TransferRequest { raw_length: 1, compression: zstd, ..data() };
    assert!(matches!(refused(grown, vec![1, 2]), FrameError::Length { what: "a packed payload", .. }));
    assert!(matches!(refused(data(), vec![1]), FrameError::Length { what: "a payload", .. }));
}

#[test]
fn what_this_version_does_not_know_is_refused() {
    assert_eq!(refused(TransferRequest { kind: None, ..data() }, Vec::new()), FrameError::UnknownKind);
    let method = TransferRequest { compression: 7, ..data() };
    assert_eq!(refused(method, Vec::new()), FrameError::UnknownCompression { method: 7 });
}

#[test]
fn frames_that_say_something_carry_nothing() {
    let end = Some(Kind::End(TransferEnd::default()));
    assert!(matches!(
        refused(TransferRequest { kind: end, raw_length: 1, ..data() }, vec![1]),
        FrameError::Length { what: "a payload where none belongs", .. }
    ));
}

#[test]
fn a_payload_sent_twice_is_not_canonical() {
    let good =
        wire(0, Frame::with_payload(1, data().kind.unwrap(), TransferCompression::Unspecified, 1, vec![1].into()));
    let mut twice = good[PREFIX_LENGTH..].to_vec();
    twice.extend([PAYLOAD_TAG, 0]);
    assert!(Received::parse(&twice.into()).is_err());
}
