//! A transfer's request stream as HTTP/2 delivers it: any bytes, in any chunks.
//!
//! The first byte says how the rest is cut. What passes for a frame goes on to the session, as in a receiver, so that
//! also orders of valid frames are tried. Checksums would keep a fuzzer out: they are put right first, on every second
//! input.

#![no_main]

use bytes::{Buf as _, Bytes};
use libfuzzer_sys::fuzz_target;
use podferry_proto::v1::{TransferCompression, TransferRequest};
use podferry_transfer::Pool;
use podferry_transfer::compression::Unpacker;
use podferry_transfer::frame::{Frame, Received};
use podferry_transfer::limits::{MAX_MESSAGE_LENGTH, MAX_RAW_LENGTH};
use podferry_transfer::message::{Messages, PREFIX_LENGTH};
use podferry_transfer::session::{Event, Session};
use prost::Message as _;

fuzz_target!(|input: &[u8]| {
    let Some((how, stream)) = input.split_first() else { return };
    let cut = usize::from(how >> 1) + 1;
    let mut messages = Messages::new(MAX_MESSAGE_LENGTH);
    let mut session = Session::new(Unpacker::new(Pool::new(1)).expect("zstd has memory"));
    for chunk in stream.chunks(cut) {
        messages.push(Bytes::copy_from_slice(chunk));
        loop {
            let message = match messages.next() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(_) => return,
            };
            let message = if how & 1 == 0 { message } else { repaired(message) };
            let Ok(received) = Received::parse(&message) else { return };
            assert!(received.raw_length <= MAX_RAW_LENGTH && received.payload.len() <= received.raw_length);
            match session.take(&received) {
                Ok(event) => check(&event, &received),
                Err(_) => return,
            }
        }
    }
});

/// The frame that the message says, encoded as a sender does it.
fn repaired(message: Bytes) -> Bytes {
    let Ok(TransferRequest { sequence, object, raw_length, compression, kind: Some(kind), payload, .. }) =
        TransferRequest::decode(message.clone())
    else {
        return message;
    };
    let Ok(compression) = TransferCompression::try_from(compression) else { return message };
    let mut wire = Frame::with_payload(object, kind, compression, raw_length, payload).encode(sequence);
    wire.copy_to_bytes(wire.remaining()).slice(PREFIX_LENGTH..)
}

/// What a store relies on.
fn check(event: &Event, received: &Received) {
    match event {
        Event::Data { bytes, .. } => assert_eq!(bytes.len(), received.raw_length),
        Event::Pages(run) if run.absent => assert!(run.bytes.is_empty()),
        Event::Pages(run) => {
            let full = run.count - run.zero.count() as u64;
            assert_eq!(run.bytes.len() as u64, full * 4096);
            assert!(run.vaddr.checked_add(run.count * 4096).is_some());
        }
        Event::Scattered(scattered) => {
            let runs = scattered.clone().runs().map(|run| (run.count - run.zero.count() as u64) * 4096 == run.bytes.len() as u64);
            assert!(runs.collect::<Vec<_>>().iter().all(|whole| *whole));
        }
        Event::Deltas(deltas) => {
            // Whatever was sent before: it fits or is refused. The digest rarely does.
            let applied = deltas.apply(|_, page| {
                page.fill(received.sequence.to_le_bytes()[0]);
                true
            });
            assert!(applied.map_or(true, |scattered| scattered.runs().count() > 0));
        }
        Event::Open { object, .. } => assert_eq!(object.check(), Ok(())),
        _ => {}
    }
}
