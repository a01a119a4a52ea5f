use bytes::Buf as _;
use podferry_proto::v1::{TransferAbort, TransferCompression, TransferData};

use super::*;
use crate::frame::{Encoder, Frame};
use crate::message::PREFIX_LENGTH;
use crate::object::Owner;
use crate::pool::Pool;

fn session() -> Session {
    Session::new(Unpacker::new(Pool::new(1)).unwrap())
}

fn send(session: &mut Session, frame: Frame) -> Result<Event, FrameError> {
    let next = session.next;
    send_as(session, next, frame)
}

fn send_as(session: &mut Session, sequence: u64, frame: Frame) -> Result<Event, FrameError> {
    let mut wire = frame.encode(sequence);
    let message = wire.copy_to_bytes(wire.remaining()).slice(PREFIX_LENGTH..);
    session.take(&Received::parse(&message).unwrap())
}

fn begin() -> Frame {
    Frame::bare(0, Kind::Begin(TransferBegin::default()))
}

fn open(id: u32, object: &Object) -> Frame {
    Frame::bare(id, Kind::Open(object.into()))
}

fn file(name: &str) -> Object {
    Object::ImageFile(name.to_owned())
}

const MEMORY: Object = Object::Pages { owner: Owner::Process(1), id: 1 };

fn loaded(id: u32, kind: Kind, bytes: Vec<u8>) -> Frame {
    let length = u32::try_from(bytes.len()).unwrap();
    Frame::with_payload(id, kind, TransferCompression::Unspecified, length, bytes.into())
}

fn data(id: u32, offset: u64, bytes: &[u8]) -> Frame {
    loaded(id, Kind::Data(TransferData { offset }), bytes.to_vec())
}

fn pages(pages: TransferPages, full: usize) -> Frame {
    loaded(2, Kind::Pages(pages), vec![1; full * PAGE_SIZE])
}

/// A session with file 1 and pages 2 open.
fn opened() -> Session {
    let mut session = session();
    for frame in [begin(), open(1, &file("a")), open(2, &MEMORY)] {
        send(&mut session, frame).unwrap();
    }
    session
}

#[test]
fn a_whole_transfer_passes_and_nothing_follows_it() {
    let mut session = session();
    let mut encoder = Encoder::default();
    let mut next = |frame| {
        let mut wire = encoder.encode(frame);
        let message = wire.copy_to_bytes(wire.remaining()).slice(PREFIX_LENGTH..);
        session.take(&Received::parse(&message).unwrap())
    };
    for frame in [begin(), open(1, &file("a")), open(2, &MEMORY), data(1, 0, b"ab"), data(1, 2, b"c")] {
        next(frame).unwrap();
    }
    let run = TransferPages { vaddr: 0x1000, count: 3, zero_pages: vec![0b101].into(), ..TransferPages::default() };
    let Event::Pages(run) = next(pages(run, 1)).unwrap() else { panic!("no pages") };
    assert_eq!((run.zero.count(), run.bytes.len()), (2, PAGE_SIZE));
    let length = 3 * PAGE_SIZE as u64;
    for (id, length) in [(1, 3), (2, length)] {
        let closed = next(Frame::bare(id, Kind::Close(TransferClose { length, digest: 0 }))).unwrap();
        assert!(matches!(closed, Event::Close { .. }), "the encoder has put the digest in");
    }
    let end = Kind::End(TransferEnd { objects: 2, length: length + 3 });
    assert_eq!(next(Frame::bare(0, end)), Ok(Event::End { length: length + 3 }));
    assert_eq!(next(data(1, 3, b"d")), Err(out_of_place("a frame", "after the end")));
}

#[test]
fn frames_come_in_order_and_begin_with_begin() {
    assert_eq!(send(&mut session(), open(1, &file("a"))), Err(out_of_place("a frame", "before Begin")));
    assert_eq!(send(&mut opened(), begin()), Err(out_of_place("Begin", "a second time")));
    for sequence in [2, 4] {
        let found = send_as(&mut opened(), sequence, data(1, 0, b"x"));
        assert_eq!(found, Err(FrameError::Sequence { found: sequence, expected: 3 }));
    }
}

#[test]
fn objects_are_opened_once_and_used_as_what_they_are() {
    let refused = [
        open(1, &file("b")),
        open(0, &file("b")),
        open(3, &file("a")),
        open(3, &MEMORY),
        data(2, 0, b"x"),
        data(9, 0, b"x"),
        loaded(1, Kind::Pages(TransferPages { count: 1, ..TransferPages::default() }), vec![1; PAGE_SIZE]),
        Frame::bare(9, Kind::Close(TransferClose::default())),
        Frame::bare(0, Kind::End(TransferEnd { objects: 2, length: 0 })),
    ];
    for frame in refused {
        let shown = format!("{frame:?}");
        assert!(matches!(send(&mut opened(), frame), Err(FrameError::Object { .. })), "{shown}");
    }
}

#[test]
fn totals_must_be_what_arrived() {
    let empty = XxHash3_64::new().finish();
    for close in [TransferClose { length: 1, digest: empty }, TransferClose { length: 0, digest: empty ^ 1 }] {
        assert!(matches!(send(&mut opened(), Frame::bare(1, Kind::Close(close))), Err(FrameError::Total { .. })));
    }
    let mut session = opened();
    for id in [1, 2] {
        send(&mut session, Frame::bare(id, Kind::Close(TransferClose { length: 0, digest: empty }))).unwrap();
    }
    let end = Kind::End(TransferEnd { objects: 1, length: 0 });
    assert!(matches!(send(&mut session, Frame::bare(0, end)), Err(FrameError::Total { .. })));
}

#[test]
fn data_follows_data() {
    for offset in [1, u64::MAX] {
        let found = send(&mut opened(), data(1, offset, b"x"));
        assert_eq!(found, Err(FrameError::Length { what: "an offset", length: offset, expected: 0 }));
    }
}

#[test]
fn runs_that_cannot_be_are_refused() {
    let run = TransferPages { vaddr: 0x1000, count: 2, ..TransferPages::default() };
    let refused = [
        (TransferPages { vaddr: 0x1001, ..run.clone() }, 2),
        (TransferPages { vaddr: u64::MAX - 0xfff, ..run.clone() }, 2),
        (TransferPages { count: 0, ..run.clone() }, 0),
        (TransferPages { count: u64::MAX, ..run.clone() }, 2),
        (TransferPages { count: 257, ..run.clone() }, 256),
        (TransferPages { count: 3, ..run.clone() }, 2),
        (TransferPages { zero_pages: vec![1].into(), ..run.clone() }, 2),
        (TransferPages { zero_pages: vec![4].into(), ..run.clone() }, 1),
        (TransferPages { zero_pages: vec![1].into(), absent: true, ..run.clone() }, 0),
        (TransferPages { absent: true, ..run.clone() }, 2),
    ];
    for (run, full) in refused {
        let shown = format!("{run:?}");
        assert!(send(&mut opened(), pages(run, full)).is_err(), "{shown}");
    }
    assert!(send(&mut opened(), pages(run.clone(), 2)).is_ok());
    assert!(send(&mut opened(), pages(TransferPages { count: 1 << 30, absent: true, ..run }, 0)).is_ok());
}

#[test]
fn a_long_reason_is_cut() {
    let abort = Kind::Abort(TransferAbort { reason: "ä".repeat(1_500) });
    let Ok(Event::Abort { reason }) = send(&mut opened(), Frame::bare(0, abort)) else { panic!("no abort") };
    assert!(reason.len() <= MAX_REASON_LENGTH && reason.len() > MAX_REASON_LENGTH - 2);
}

fn scattered(places: &[Place], zero: Vec<u8>, full: usize) -> Frame {
    let kind = TransferScattered { runs: scatter::encode(places), zero_pages: zero.into() };
    loaded(
        3,
        Kind::Scattered(kind),
        (0..full).flat_map(|page| vec![u8::try_from(page % 200 + 1).unwrap(); PAGE_SIZE]).collect(),
    )
}

#[test]
fn pages_that_lie_apart_come_as_runs() {
    let mut session = opened();
    send(&mut session, open(3, &Object::Memory { owner: Owner::Process(1), round: 1 })).unwrap();
    let places = [Place { vaddr: 0x3000, count: 2 }, Place { vaddr: 0x9000, count: 3 }];
    // The second page of each run is zero.
    let Event::Scattered(event) = send(&mut session, scattered(&places, vec![0b1010], 3)).unwrap() else {
        panic!("none")
    };
    let runs: Vec<PageRun> = event.runs().collect();
    assert_eq!(runs.iter().map(|run| (run.vaddr, run.count)).collect::<Vec<_>>(), [(0x3000, 2), (0x9000, 3)]);
    assert_eq!([runs[0].bytes.len(), runs[1].bytes.len()], [PAGE_SIZE, 2 * PAGE_SIZE]);
    assert_eq!((runs[0].bytes[0], runs[1].bytes[0], runs[1].bytes[PAGE_SIZE]), (1, 2, 3));
    assert!(runs[0].zero.is_zero(1) && !runs[0].zero.is_zero(0) && runs[1].zero.is_zero(1) && !runs[1].zero.is_zero(2));
    let length = 5 * PAGE_SIZE as u64;
    let close = Frame::bare(3, Kind::Close(TransferClose { length: length + 1, digest: 0 }));
    assert!(matches!(send(&mut session, close), Err(FrameError::Total { found, .. }) if found == length));
}

#[test]
fn scattered_pages_that_cannot_be_are_refused() {
    let place = Place { vaddr: 0x3000, count: 2 };
    let refused = [
        scattered(&[], vec![], 0),
        scattered(&[place], vec![], 1),
        scattered(&[place], vec![0b100], 2),
        scattered(&[Place { count: 257, ..place }], vec![], 256),
    ];
    for frame in refused {
        let mut session = opened();
        send(&mut session, open(3, &Object::Memory { owner: Owner::Process(1), round: 1 })).unwrap();
        assert!(send(&mut session, frame.clone()).is_err(), "{frame:?}");
    }
    // CRIU's own pages ascend: they never lie apart in one frame.
    let mut session = opened();
    send(&mut session, open(3, &Object::Pages { owner: Owner::Process(2), id: 2 })).unwrap();
    let found = send(&mut session, scattered(&[place], vec![], 2));
    assert!(matches!(found, Err(FrameError::Object { what: "Scattered", .. })), "{found:?}");
}

fn deltas(places: &[Place], lengths: &[u8], payload: &[u8]) -> Frame {
    let lengths = Bytes::copy_from_slice(lengths);
    loaded(3, Kind::Deltas(TransferDeltas { runs: scatter::encode(places), lengths, digest: 0 }), payload.to_vec())
}

/// The second word changes.
const DELTA: [u8; 10] = [1, 1, 5, 0, 0, 0, 0, 0, 0, 9];

fn with_memory() -> Session {
    let mut session = opened();
    send(&mut session, open(3, &Object::Memory { owner: Owner::Process(1), round: 1 })).unwrap();
    session
}

#[test]
fn deltas_count_as_the_pages_that_they_are_of() {
    let mut session = with_memory();
    let places = [Place { vaddr: 0x3000, count: 2 }, Place { vaddr: 0x9000, count: 1 }];
    let frame = deltas(&places, &[10, 0, 10], &[DELTA, DELTA].concat());
    let Event::Deltas(event) = send(&mut session, frame).unwrap() else { panic!("none") };
    assert_eq!((event.object(), event.length()), (3, 3 * PAGE_SIZE as u64));
    // Pages that are as they were have nothing in the payload.
    assert!(matches!(send(&mut session, deltas(&places[..1], &[0, 0], &[])), Ok(Event::Deltas(_))));
    let close = Frame::bare(3, Kind::Close(TransferClose { length: 0, digest: 0 }));
    let length = 5 * PAGE_SIZE as u64;
    assert!(matches!(send(&mut session, close), Err(FrameError::Total { found, .. }) if found == length));
}

#[test]
fn deltas_that_cannot_be_are_refused() {
    let place = Place { vaddr: 0x3000, count: 1 };
    let long = [DELTA[..2].to_vec(), vec![1; 8 * 255 + 8]].concat();
    let refused = [
        ("no page", deltas(&[], &[], &[])),
        ("no length", deltas(&[place], &[], &[])),
        ("a length too many", deltas(&[place], &[10, 0], &DELTA)),
        ("a length in two bytes", deltas(&[place], &[0x8a, 0], &DELTA)),
        ("half a length", deltas(&[place], &[0x8a], &DELTA)),
        ("a length of more than is sent", deltas(&[place], &[11], &DELTA)),
        ("a length of less", deltas(&[place], &[9], &DELTA)),
        ("too long a delta", deltas(&[place], &[0x82, 0x10], &long)),
        ("too many pages", deltas(&[Place { count: 257, ..place }], &[0; 257], &[])),
        ("what is no delta", deltas(&[place], &[10], &[0; 10])),
        ("one page's delta in the next one's", deltas(&[Place { count: 2, ..place }], &[9, 1], &DELTA)),
    ];
    for (what, frame) in refused {
        assert!(send(&mut with_memory(), frame).is_err(), "{what}");
    }
    assert!(send(&mut with_memory(), deltas(&[place], &[10], &DELTA)).is_ok());
    for object in [Object::Pages { owner: Owner::Process(2), id: 2 }, file("b")] {
        let mut session = opened();
        send(&mut session, open(3, &object)).unwrap();
        let found = send(&mut session, deltas(&[place], &[10], &DELTA));
        assert!(matches!(found, Err(FrameError::Object { what: "Deltas", .. })), "{found:?}");
    }
    let closed = send(&mut opened(), deltas(&[place], &[10], &DELTA));
    assert!(matches!(closed, Err(FrameError::Object { state: "not open", .. })), "{closed:?}");
}

#[test]
fn packed_deltas_are_looked_at_too() {
    let places = [Place { vaddr: 0x3000, count: 100 }];
    for (payload, fits) in [(DELTA.repeat(100), true), ([DELTA.repeat(99), vec![0; 10]].concat(), false)] {
        let packed = Bytes::from(zstd::bulk::compress(&payload, 1).unwrap());
        let kind = TransferDeltas { runs: scatter::encode(&places), lengths: vec![10; 100].into(), digest: 0 };
        let frame = Frame::with_payload(3, Kind::Deltas(kind), TransferCompression::Zstd, 1000, packed);
        assert_eq!(send(&mut with_memory(), frame).is_ok(), fits);
    }
}
