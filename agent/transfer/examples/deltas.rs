//! How fast deltas are made and applied, and how small they are: `cargo run --release -p podferry-transfer --example deltas`.
//!
//! The pages are made up: as a key-value store and a set of counters would leave them. The numbers are in `docs/performance.md`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use podferry_transfer::Pool;
use podferry_transfer::compression::{Level, Packer};
use podferry_transfer::delta::{self, Page};

/// Pages of one measurement: more than the processor's caches hold.
const PAGES: usize = 32 << 10;
/// Pages of one frame.
const FRAME: usize = 256;
/// How often each is measured; the median counts.
const RUNS: usize = 9;

/// Numbers without any order, the same ones each time.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap_or(0)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&self.next().to_le_bytes()[..word.len()]));
    }
}

/// What is in a page at first, and what happens to it between two rounds.
type Write = fn(&mut Page, &mut Noise);

/// 512 numbers below a million.
fn numbers(page: &mut Page, noise: &mut Noise) {
    page.chunks_mut(8).for_each(|word| word.copy_from_slice(&(noise.next() % 1_000_000).to_le_bytes()));
}

/// Twenty records of text.
fn records(page: &mut Page, noise: &mut Noise) {
    (0..20).for_each(|place| put_record(page, place, noise));
}

fn put_record(page: &mut Page, place: usize, noise: &mut Noise) {
    let (id, seen) = (noise.next(), noise.next());
    let text = format!("{{\"user\":{id:016x},\"name\":\"somebody\",\"city\":\"somewhere\",\"seen\":{seen:016x}}}");
    page[place * 200..][..200].iter_mut().zip(text.bytes().cycle()).for_each(|(byte, new)| *byte = new);
}

/// A counter somewhere goes up.
fn counter(page: &mut Page, noise: &mut Noise) {
    let at = noise.below(512) * 8;
    let word: [u8; 8] = std::array::from_fn(|index| page[at + index]);
    let more = u64::from_le_bytes(word).wrapping_add(1 + noise.next() % 100);
    page[at..at + 8].copy_from_slice(&more.to_le_bytes());
}

/// Eight counters go up.
fn counters(page: &mut Page, noise: &mut Noise) {
    (0..8).for_each(|_| counter(page, noise));
}

/// A record of 200 bytes of text is written anew.
fn record(page: &mut Page, noise: &mut Noise) {
    put_record(page, noise.below(20), noise);
}

/// A quarter of the page, in one piece, is replaced by what nothing packs.
fn quarter(page: &mut Page, noise: &mut Noise) {
    let at = noise.below(3072);
    noise.fill(&mut page[at..at + 1024]);
}

/// Nothing of the page stays.
fn everything(page: &mut Page, noise: &mut Noise) {
    noise.fill(page);
}

const WRITES: [(&str, Write, Write); 5] = [
    ("one counter of 512", numbers, counter),
    ("eight counters of 512", numbers, counters),
    ("one record of twenty", records, record),
    ("1 KiB of noise", everything, quarter),
    ("everything, noise", everything, everything),
];

/// The delta of each page; none for those that are sent whole.
fn encode(previous: &[Page], now: &[Page], deltas: &mut Vec<u8>, ends: &mut Vec<Option<usize>>) {
    for (previous, now) in previous.iter().zip(now) {
        let worth = delta::encode(previous, now, deltas);
        ends.push(worth.then_some(deltas.len()));
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[expect(clippy::cast_precision_loss, reason = "a report")]
fn gibs(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / f64::from(1 << 30)
}

/// The deltas with the words as they are now, instead of what has changed in them: what was decided against.
fn literal(now: &[Page], deltas: &[u8], ends: &[Option<usize>]) -> Vec<u8> {
    let mut literal = deltas.to_vec();
    let number = |at: &mut usize| {
        let low = usize::from(deltas[*at]);
        let long = low >= 0x80;
        let number = if long { low - 0x80 + usize::from(deltas[*at + 1]) * 0x80 } else { low };
        *at += 1 + usize::from(long);
        number
    };
    let mut at = 0;
    for (page, end) in now.iter().zip(ends) {
        let (end, mut word) = (end.unwrap_or(at), 0);
        while at < end {
            word += number(&mut at);
            let count = number(&mut at);
            literal[at..at + count * 8].copy_from_slice(&page[word * 8..][..count * 8]);
            (at, word) = (at + count * 8, word + count);
        }
    }
    literal
}

/// Bytes of whole pages and deltas after packing, frame by frame, and how long that took.
fn pack(now: &[Page], deltas: &[u8], ends: &[Option<usize>]) -> (usize, Duration) {
    let mut packer = Packer::new(Pool::new(2)).expect("memory for zstd");
    let (mut length, mut start, mut took) = (0, 0, Duration::ZERO);
    for (frame, ends) in now.chunks(FRAME).zip(ends.chunks(FRAME)) {
        let whole: Vec<u8> =
            frame.iter().zip(ends).filter(|(_, end)| end.is_none()).flat_map(|(page, _)| *page).collect();
        let end = ends.iter().flatten().last().copied().unwrap_or(start);
        for part in [&whole[..], &deltas[start..end]].into_iter().filter(|part| !part.is_empty()) {
            let (_, packing) = packer.pack(part, Level::Fast).expect("memory for zstd");
            length += packing.packed;
            took += packing.took;
        }
        start = end;
    }
    (length, took)
}

fn measure(name: &str, first: Write, write: Write) {
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let mut previous = vec![[0; 4096]; PAGES];
    for page in &mut previous {
        first(page, &mut noise);
    }
    let mut now = previous.clone();
    for page in &mut now {
        write(page, &mut noise);
    }
    let (mut deltas, mut ends) = (Vec::with_capacity(PAGES * 2048), Vec::with_capacity(PAGES));
    let (mut encoding, mut applying) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        deltas.clear();
        ends.clear();
        let begun = Instant::now();
        encode(black_box(&previous), black_box(&now), &mut deltas, &mut ends);
        encoding.push(begun.elapsed());
        let mut pages = previous.clone();
        let mut start = 0;
        let begun = Instant::now();
        for (page, end) in pages.iter_mut().zip(&ends) {
            let Some(end) = *end else { continue };
            delta::decode(page, &deltas[start..end]).expect("what was encoded");
            start = end;
        }
        applying.push(begun.elapsed());
        assert!(pages.iter().zip(&now).zip(&ends).all(|((page, now), end)| end.is_none() || page == now));
    }
    let raw = PAGES * 4096;
    let whole = ends.iter().filter(|end| end.is_none()).count();
    let length = deltas.len() + whole * 4096;
    let (packed, took) = pack(&now, &deltas, &ends);
    let (other, _) = pack(&now, &literal(&now, &deltas, &ends), &ends);
    println!(
        "| {name} | {} | {} | {} | {} | {:.1} | {:.1} | {:.1} |",
        length / PAGES,
        packed / PAGES,
        other / PAGES,
        whole * 100 / PAGES,
        gibs(raw, median(encoding.clone())),
        // Nothing is applied where all is sent whole.
        if whole == PAGES { 0.0 } else { gibs(raw, median(applying)) },
        gibs(raw, median(encoding) + took),
    );
}

fn main() {
    println!(
        "| written | bytes a page | with zstd -1 | literal | % sent whole | made, GiB/s | applied | made and packed |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|");
    for (name, first, write) in WRITES {
        measure(name, first, write);
    }
}
