//! What a receiver has been told so far, and whether the next frame may follow. No I/O, no clock: also what is fuzzed.

use std::collections::{HashMap, HashSet};
use std::hash::Hasher as _;

use bytes::Bytes;
use podferry_proto::v1::transfer_request::Kind;
use podferry_proto::v1::{
    TransferBegin, TransferClose, TransferDeltas, TransferEnd, TransferOpen, TransferPages, TransferScattered,
};
use twox_hash::XxHash3_64;

use crate::compression::Unpacker;
use crate::deltas::Deltas;
use crate::frame::{FrameError, Received};
use crate::limits::{MAX_OBJECTS, MAX_OPEN, MAX_REASON_LENGTH, PAGE_SIZE};
use crate::object::Object;
use crate::scatter::{self, Place};
use crate::zero::{self, ZeroMap};

/// A run of pages of one object.
#[derive(Debug, Clone, PartialEq)]
pub struct PageRun {
    /// The object's number in this transfer.
    pub object: u32,
    /// Address of the first page.
    pub vaddr: u64,
    /// How many pages, zero and absent ones included.
    pub count: u64,
    /// CRIU's pagemap flags.
    pub flags: u32,
    /// Which of the pages are zero.
    pub zero: ZeroMap,
    /// The pages that are not zero, in order. Empty also when the run is absent.
    pub bytes: Bytes,
    /// Whether the run has no contents at all.
    pub absent: bool,
}

/// Runs of pages of one object that came in one frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Scattered {
    object: u32,
    places: Vec<Place>,
    zero: ZeroMap,
    bytes: Bytes,
}

impl Scattered {
    /// All of these pages, zero ones included.
    pub(crate) fn of(object: u32, places: Vec<Place>, pages: Vec<u8>) -> Self {
        let zero = ZeroMap::find(&pages);
        if zero.count() == 0 {
            return Self { object, places, zero, bytes: Bytes::from(pages) };
        }
        let mut full = vec![0; pages.len() - zero.count() * PAGE_SIZE];
        zero::gather(&pages, &zero, &mut full);
        Self { object, places, zero, bytes: Bytes::from(full) }
    }

    /// The runs, one by one.
    pub fn runs(mut self) -> impl Iterator<Item = PageRun> {
        let (object, zero, mut first) = (self.object, self.zero, 0);
        self.places.into_iter().map(move |Place { vaddr, count }| {
            // At most as many as a frame has.
            let pages = usize::try_from(count).unwrap_or(usize::MAX);
            let zero = zero.part(first, pages);
            first += pages;
            let bytes = self.bytes.split_to((pages - zero.count()) * PAGE_SIZE);
            PageRun { object, vaddr, count, flags: 0, zero, bytes, absent: false }
        })
    }
}

/// What a frame asks of the receiver. Everything in it has been checked.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Somebody introduces themselves.
    Begin(TransferBegin),
    /// An object begins.
    Open {
        /// Its number.
        id: u32,
        /// What it is.
        object: Object,
    },
    /// The next bytes of an image file or layer.
    Data {
        /// Its number.
        id: u32,
        /// Where they go.
        offset: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// Pages.
    Pages(PageRun),
    /// Pages that lie apart.
    Scattered(Scattered),
    /// Changes of pages that came before.
    Deltas(Deltas),
    /// An object is complete, and is what was sent.
    Close {
        /// Its number.
        id: u32,
        /// Its length in bytes.
        length: u64,
        /// Its digest.
        digest: u64,
    },
    /// Everything is there.
    End {
        /// The sum of the objects' lengths in bytes.
        length: u64,
    },
    /// The sender gave up.
    Abort {
        /// Why, as it says; at most [`MAX_REASON_LENGTH`] bytes.
        reason: String,
    },
}

struct Open {
    pages: bool,
    /// Whether its pages may lie apart, and come as deltas.
    memory: bool,
    length: u64,
    digest: XxHash3_64,
}

/// The state of one transfer, from its first frame to its last.
pub struct Session {
    next: u64,
    ended: bool,
    open: HashMap<u32, Open>,
    numbers: HashSet<u32>,
    objects: HashSet<Object>,
    length: u64,
    unpacker: Unpacker,
}

impl Session {
    /// Before the first frame.
    pub fn new(unpacker: Unpacker) -> Self {
        let (open, numbers, objects) = (HashMap::new(), HashSet::new(), HashSet::new());
        Self { next: 0, ended: false, open, numbers, objects, length: 0, unpacker }
    }

    /// How many frames were taken.
    pub fn frames(&self) -> u64 {
        self.next
    }

    /// Whether the last frame was taken.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes the next frame. After an error the session is not to be used again.
    pub fn take(&mut self, frame: &Received) -> Result<Event, FrameError> {
        if frame.sequence != self.next {
            return Err(FrameError::Sequence { found: frame.sequence, expected: self.next });
        }
        let begins = matches!(frame.kind, Kind::Begin(_));
        match (self.next, begins, self.ended) {
            (_, _, true) => return Err(out_of_place("a frame", "after the end")),
            (0, false, _) => return Err(out_of_place("a frame", "before Begin")),
            (1.., true, _) => return Err(out_of_place("Begin", "a second time")),
            _ => {}
        }
        self.next += 1;
        self.event(frame)
    }

    fn event(&mut self, frame: &Received) -> Result<Event, FrameError> {
        match &frame.kind {
            Kind::Begin(begin) => Ok(Event::Begin(begin.clone())),
            Kind::Open(open) => self.open(frame.object, open),
            Kind::Data(data) => self.data(frame, data.offset),
            Kind::Pages(pages) => self.pages(frame, pages),
            Kind::Scattered(scattered) => self.scattered(frame, scattered),
            Kind::Deltas(deltas) => self.deltas(frame, deltas),
            Kind::Close(close) => self.close(frame.object, *close),
            Kind::End(end) => self.end(*end),
            Kind::Abort(abort) => {
                self.ended = true;
                Ok(Event::Abort { reason: shorten(&abort.reason) })
            }
        }
    }

    fn open(&mut self, id: u32, open: &TransferOpen) -> Result<Event, FrameError> {
        let refuse = |state| Err(FrameError::Object { what: "Open", object: id, state });
        let object = Object::try_from(open.clone())?;
        if self.numbers.len() >= MAX_OBJECTS || self.open.len() >= MAX_OPEN {
            return refuse("one more than allowed");
        }
        if id == 0 || !self.numbers.insert(id) {
            return refuse("no new number");
        }
        if !self.objects.insert(object.clone()) {
            return refuse("sent already under another number");
        }
        let pages = object.has_pages();
        let memory = matches!(object, Object::Memory { .. });
        self.open.insert(id, Open { pages, memory, length: 0, digest: XxHash3_64::new() });
        Ok(Event::Open { id, object })
    }

    fn data(&mut self, frame: &Received, offset: u64) -> Result<Event, FrameError> {
        let object = find(&mut self.open, "Data", frame.object, false)?;
        if offset != object.length {
            return Err(FrameError::Length { what: "an offset", length: offset, expected: object.length });
        }
        let bytes = self.unpacker.unpack(frame)?;
        object.add(frame, bytes.len() as u64)?;
        Ok(Event::Data { id: frame.object, offset, bytes })
    }

    fn pages(&mut self, frame: &Received, pages: &TransferPages) -> Result<Event, FrameError> {
        let object = find(&mut self.open, "Pages", frame.object, true)?;
        let &TransferPages { vaddr, count, flags, absent, .. } = pages;
        let length = span(vaddr, count).ok_or(FrameError::Run { vaddr, count })?;
        let zero = if absent { absent_pages(pages)? } else { zero_pages(pages)? };
        // What the zero map leaves is at most as much as a frame may hold, which has been checked.
        let full = if absent { 0 } else { length - (zero.count() * PAGE_SIZE) as u64 };
        if frame.raw_length as u64 != full {
            return Err(FrameError::Length { what: "raw bytes", length: frame.raw_length as u64, expected: full });
        }
        let bytes = self.unpacker.unpack(frame)?;
        object.add(frame, if absent { 0 } else { length })?;
        Ok(Event::Pages(PageRun { object: frame.object, vaddr, count, flags, zero, bytes, absent }))
    }

    fn scattered(&mut self, frame: &Received, scattered: &TransferScattered) -> Result<Event, FrameError> {
        let object = find_memory(&mut self.open, "Scattered", frame.object)?;
        let most = (crate::limits::MAX_RAW_LENGTH / PAGE_SIZE) as u64;
        let places = scatter::decode(&scattered.runs, most).filter(|places| !places.is_empty());
        let places = places.ok_or(FrameError::NotCanonical)?;
        let count = usize::try_from(places.iter().map(|place| place.count).sum::<u64>()).unwrap_or(usize::MAX);
        let zero = ZeroMap::from_wire(scattered.zero_pages.clone(), count).ok_or(FrameError::NotCanonical)?;
        let full = (count - zero.count()) * PAGE_SIZE;
        if frame.raw_length != full {
            return Err(FrameError::Length {
                what: "raw bytes",
                length: frame.raw_length as u64,
                expected: full as u64,
            });
        }
        let bytes = self.unpacker.unpack(frame)?;
        object.add(frame, (count * PAGE_SIZE) as u64)?;
        Ok(Event::Scattered(Scattered { object: frame.object, places, zero, bytes }))
    }

    fn deltas(&mut self, frame: &Received, said: &TransferDeltas) -> Result<Event, FrameError> {
        let object = find_memory(&mut self.open, "Deltas", frame.object)?;
        let (deltas, length) = Deltas::announced(frame.object, said)?;
        if frame.raw_length != length {
            let (found, expected) = (frame.raw_length as u64, length as u64);
            return Err(FrameError::Length { what: "raw bytes", length: found, expected });
        }
        let deltas = deltas.with(self.unpacker.unpack(frame)?)?;
        object.add(frame, deltas.length())?;
        Ok(Event::Deltas(deltas))
    }

    fn close(&mut self, id: u32, said: TransferClose) -> Result<Event, FrameError> {
        let state = "not open";
        let object = self.open.remove(&id).ok_or(FrameError::Object { what: "Close", object: id, state })?;
        same("length", id, said.length, object.length)?;
        let digest = object.digest.finish();
        same("digest", id, said.digest, digest)?;
        self.length = self.length.saturating_add(object.length);
        Ok(Event::Close { id, length: object.length, digest })
    }

    fn end(&mut self, said: TransferEnd) -> Result<Event, FrameError> {
        if let Some(object) = self.open.keys().next() {
            return Err(FrameError::Object { what: "End", object: *object, state: "still open" });
        }
        same("number", 0, said.objects.into(), self.numbers.len() as u64)?;
        same("length", 0, said.length, self.length)?;
        self.ended = true;
        Ok(Event::End { length: self.length })
    }
}

impl Open {
    fn add(&mut self, frame: &Received, length: u64) -> Result<(), FrameError> {
        let total = self.length.checked_add(length);
        let past = FrameError::Length { what: "an object", length: u64::MAX, expected: self.length };
        self.length = total.ok_or(past)?;
        self.digest.write(&frame.payload_sum.to_le_bytes());
        Ok(())
    }
}

fn find<'a>(
    open: &'a mut HashMap<u32, Open>,
    what: &'static str,
    id: u32,
    pages: bool,
) -> Result<&'a mut Open, FrameError> {
    let refuse = |state| FrameError::Object { what, object: id, state };
    let object = open.get_mut(&id).ok_or_else(|| refuse("not open"))?;
    if object.pages == pages { Ok(object) } else { Err(refuse("of another sort")) }
}

/// As [`find`], of memory of a running process.
fn find_memory<'a>(open: &'a mut HashMap<u32, Open>, what: &'static str, id: u32) -> Result<&'a mut Open, FrameError> {
    let object = find(open, what, id, true)?;
    if object.memory { Ok(object) } else { Err(FrameError::Object { what, object: id, state: "of another sort" }) }
}

/// Bytes of a run of pages, if there can be such a run.
fn span(vaddr: u64, count: u64) -> Option<u64> {
    let length = count.checked_mul(PAGE_SIZE as u64).filter(|length| *length != 0)?;
    vaddr.checked_add(length).and(vaddr.is_multiple_of(PAGE_SIZE as u64).then_some(length))
}

fn zero_pages(pages: &TransferPages) -> Result<ZeroMap, FrameError> {
    let limit = crate::limits::MAX_RAW_LENGTH / PAGE_SIZE;
    let count = usize::try_from(pages.count).ok().filter(|count| *count <= limit);
    let count = count.ok_or(FrameError::Length { what: "pages", length: pages.count, expected: limit as u64 })?;
    ZeroMap::from_wire(pages.zero_pages.clone(), count).ok_or(FrameError::NotCanonical)
}

/// The zero map of a run without contents: there must be none.
fn absent_pages(pages: &TransferPages) -> Result<ZeroMap, FrameError> {
    if pages.zero_pages.is_empty() { Ok(ZeroMap::default()) } else { Err(FrameError::NotCanonical) }
}

fn same(what: &'static str, object: u32, said: u64, found: u64) -> Result<(), FrameError> {
    if said == found { Ok(()) } else { Err(FrameError::Total { what, object, said, found }) }
}

fn out_of_place(what: &'static str, when: &'static str) -> FrameError {
    FrameError::OutOfPlace { what, when }
}

/// A stranger's text, within its limit.
fn shorten(text: &str) -> String {
    let ends = text.char_indices().map(|(at, character)| at + character.len_utf8());
    let end = ends.take_while(|end| *end <= MAX_REASON_LENGTH).last().unwrap_or(0);
    text[..end].to_owned()
}

#[cfg(test)]
mod tests;
