//! A process with memory that changes at a given rate, and a counter that is written every half a millisecond.
//!
//! `podferry-engine-load COUNTER MIB PERCENT`: `COUNTER` is a file of eight bytes; `PERCENT` of the `MIB` are written each second.
//! Every page is checked before it is written; with a file `COUNTER.check` all are, and `COUNTER.checked` says how many were bad.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const WORDS: usize = 512;
/// Between two counts.
const TICK: Duration = Duration::from_micros(500);
/// Between two times that pages are written.
const PAUSE: Duration = Duration::from_millis(1);

struct Memory {
    words: Vec<u64>,
    generations: Vec<u64>,
    bad: u64,
}

fn content(page: usize, generation: u64, word: usize) -> u64 {
    (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ generation.wrapping_mul(0xc2b2_ae3d_27d4_eb4f)
        ^ (word as u64).wrapping_mul(0x1656_67b1_9e37_79f9)
}

impl Memory {
    fn new(mib: usize) -> Self {
        let pages = mib * 256;
        let mut memory = Self { words: vec![0; pages * WORDS], generations: vec![0; pages], bad: 0 };
        (0..pages).for_each(|page| memory.write(page));
        memory
    }

    fn write(&mut self, page: usize) {
        self.generations[page] += 1;
        let generation = self.generations[page];
        for (index, word) in self.words[page * WORDS..(page + 1) * WORDS].iter_mut().enumerate() {
            *word = content(page, generation, index);
        }
    }

    fn check(&mut self, page: usize) {
        let generation = self.generations[page];
        let words = &self.words[page * WORDS..(page + 1) * WORDS];
        let wrong = words.iter().enumerate().find(|(index, word)| **word != content(page, generation, *index));
        if let Some((index, word)) = wrong {
            self.bad += 1;
            let older = (0..generation).rev().find(|older| *word == content(page, *older, index));
            eprintln!(
                "{:?}: {page} of generation {generation} has {word:#x} at {index}, of generation {older:?}",
                words.as_ptr()
            );
        }
    }

    fn check_all(&mut self) {
        (0..self.generations.len()).for_each(|page| self.check(page));
    }
}

fn beside(counter: &Path, ending: &str) -> PathBuf {
    counter.with_extension(ending)
}

fn work(memory: &mut Memory, percent: f64, counter: &Path) -> ! {
    let pages = memory.generations.len();
    #[expect(clippy::cast_precision_loss, reason = "page counts are small")]
    let per_second = percent / 100.0 * pages as f64;
    let (mut since, mut written) = (Instant::now(), 0.0);
    let mut state = 0x853c_49e6_748f_ea9b_u64;
    loop {
        // However long the process stood still: it does not catch up.
        if since.elapsed() > Duration::from_secs(1) {
            (since, written) = (Instant::now(), 0.0);
        }
        while written < since.elapsed().as_secs_f64() * per_second {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let page = usize::try_from(state % pages as u64).unwrap_or(0);
            memory.check(page);
            memory.write(page);
            written += 1.0;
        }
        if beside(counter, "check").exists() {
            memory.check_all();
            let _ = fs::write(beside(counter, "checked.new"), memory.bad.to_string());
            let _ = fs::rename(beside(counter, "checked.new"), beside(counter, "checked"));
            let _ = fs::remove_file(beside(counter, "check"));
        }
        std::thread::sleep(PAUSE);
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, counter, mib, percent] = arguments.as_slice() else {
        eprintln!("usage: podferry-engine-load COUNTER MIB PERCENT");
        return ExitCode::FAILURE;
    };
    let (Ok(mib), Ok(percent)) = (mib.parse(), percent.parse()) else {
        eprintln!("podferry-engine-load: MIB and PERCENT must be numbers");
        return ExitCode::FAILURE;
    };
    let mut memory = Memory::new(mib);
    let path = PathBuf::from(counter);
    let file = match File::create(&path) {
        Ok(file) => file,
        Err(error) => {
            eprintln!("podferry-engine-load: {counter}: {error}");
            return ExitCode::FAILURE;
        }
    };
    std::thread::spawn(move || {
        for count in 1_u64.. {
            let _ = file.write_all_at(&count.to_ne_bytes(), 0);
            std::thread::sleep(TICK);
        }
    });
    work(&mut memory, percent, &path)
}
