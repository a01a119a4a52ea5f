//! A process 1 that has written much into its file system, goes on writing some of it in every way there is, and knows what each
//! file has to hold.
//!
//! In `/data`: `rest-N`, written once; `log`, which grows line by line; `blocks`, of which blocks are written anew in place; `mapped`,
//! which is written to through a mapping that stays, as is `hot`, but always in the same pages, so that no time tells of it; `touched`,
//! which is opened, mapped, changed and closed again, and has its old modification time then; `sparse`, in which holes come and go;
//! `young`, which is made anew all the time.
//!
//! It listens on port 7000 and answers lines. `count`: the next number, beginning with 1. `check`: `ok`, or `wrong: WHAT`, when all
//! files have been read. `turns`: how often everything has been written to.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use clap::Parser;
use podferry_workloads::ballast::{noise, split_mix};
use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::volatile_memory::VolatileMemory as _;
use vm_memory::{Bytes as _, FileOffset, MmapRegion};

type Region = MmapRegion<()>;

/// Where the questions come in.
const PORT: u16 = 7000;
const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
/// Sizes of the files that are written all the time.
const BLOCKS: usize = 4 * MIB;
const MAPPED: usize = 2 * MIB;
const HOT: usize = MIB / 4;
const TOUCHED: usize = 2 * MIB;
const SPARSE: usize = 8 * MIB;
/// What of the sparse file comes and goes at a time.
const STRETCH: usize = 48 * 1024;

/// Files that are written all the time, and some that are not.
#[derive(Debug, Clone, Parser)]
#[command(name = "podferry-file-load")]
struct Arguments {
    /// What is written once, in MiB.
    #[arg(long, default_value_t = 64)]
    mib: usize,
    /// The files that it is in.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    files: u16,
    /// Milliseconds between two turns of writing.
    #[arg(long, default_value_t = 2)]
    pause: u64,
    /// Where the files are.
    #[arg(long, default_value = "/data")]
    folder: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podferry-file-load: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A file, and what it holds.
struct Known {
    path: PathBuf,
    content: Vec<u8>,
}

impl Known {
    fn make(folder: &Path, name: &str, content: Vec<u8>) -> io::Result<Self> {
        let path = folder.join(name);
        fs::write(&path, &content)?;
        Ok(Self { path, content })
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.content[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn map(&self, file: File) -> io::Result<Region> {
        MmapRegion::from_file(FileOffset::new(file, 0), self.content.len()).map_err(io::Error::other)
    }

    fn open(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.path)
    }

    /// What is wrong with it.
    fn look(&self) -> Option<String> {
        let shown = self.path.display();
        match fs::read(&self.path) {
            Ok(found) if found == self.content => None,
            Ok(found) => {
                let first = found.iter().zip(&self.content).position(|(found, known)| found != known);
                let (found, known) = (found.len(), self.content.len());
                Some(format!("{shown} differs first at {first:?}, of {found} bytes for {known}"))
            }
            Err(error) => Some(format!("{shown}: {error}")),
        }
    }
}

/// All files that are written to.
struct Files {
    /// What is written once: by its seed only, so that it takes no memory.
    rest: Vec<(PathBuf, u64)>,
    rest_length: usize,
    log: Known,
    appending: File,
    blocks: Known,
    writing: File,
    mapped: Known,
    mapping: Region,
    hot: Known,
    hot_mapping: Region,
    touched: Known,
    sparse: Known,
    young: Known,
    random: u64,
    turns: u64,
}

impl Files {
    fn make(arguments: &Arguments) -> io::Result<Self> {
        let folder = &arguments.folder;
        let rest_length = arguments.mib * MIB / usize::from(arguments.files);
        let mut rest = Vec::new();
        for number in 0..arguments.files {
            let known = Known::make(folder, &format!("rest-{number}"), noise(rest_length, number.into()))?;
            rest.push((known.path, number.into()));
        }
        let log = Known::make(folder, "log", Vec::new())?;
        let blocks = Known::make(folder, "blocks", noise(BLOCKS, 1000))?;
        let mapped = Known::make(folder, "mapped", noise(MAPPED, 1001))?;
        let hot = Known::make(folder, "hot", noise(HOT, 1003))?;
        Ok(Self {
            rest,
            rest_length,
            appending: OpenOptions::new().append(true).open(&log.path)?,
            log,
            writing: blocks.open()?,
            blocks,
            mapping: mapped.map(mapped.open()?)?,
            mapped,
            hot_mapping: hot.map(hot.open()?)?,
            hot,
            touched: Known::make(folder, "touched", noise(TOUCHED, 1002))?,
            sparse: Known::make(folder, "sparse", vec![0; SPARSE])?,
            young: Known::make(folder, "young", Vec::new())?,
            random: 7,
            turns: 0,
        })
    }

    /// A number below a limit.
    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(split_mix(&mut self.random) % limit as u64).unwrap_or_default()
    }

    /// Writes to each of them.
    fn turn(&mut self) -> io::Result<()> {
        self.turns += 1;
        let turn = self.turns;
        let line = format!("{turn} a line of a log that goes on\n");
        self.appending.write_all(line.as_bytes())?;
        self.log.content.extend(line.as_bytes());

        let place = self.below(BLOCKS / PAGE) * PAGE;
        let block = noise(PAGE, turn);
        self.writing.write_all_at(&block, place as u64)?;
        self.blocks.put(place, &block);

        let place = self.below(MAPPED / 8) * 8;
        self.mapping.as_volatile_slice().write_slice(&turn.to_le_bytes(), place).map_err(io::Error::other)?;
        self.mapped.put(place, &turn.to_le_bytes());

        // Seconds pass until a word is written again, and hides that an older one was there.
        let place = HOT / 2 + usize::try_from(turn).unwrap_or_default() * 8 % (4 * PAGE);
        self.hot_mapping.as_volatile_slice().write_slice(&turn.to_le_bytes(), place).map_err(io::Error::other)?;
        self.hot.put(place, &turn.to_le_bytes());

        match turn % 50 {
            10 => self.touch(turn),
            20 | 45 => self.dig(turn),
            30 => self.make_young(turn),
            _ => Ok(()),
        }
    }

    /// Changes a file through a mapping that is gone afterwards, and gives it its time back.
    fn touch(&mut self, turn: u64) -> io::Result<()> {
        let file = self.touched.open()?;
        let before = file.metadata()?.modified()?;
        let mapping = self.touched.map(file.try_clone()?)?;
        let place = self.below(TOUCHED / 8) * 8;
        mapping.as_volatile_slice().write_slice(&turn.to_le_bytes(), place).map_err(io::Error::other)?;
        self.touched.put(place, &turn.to_le_bytes());
        drop(mapping);
        file.set_modified(before)
    }

    /// Makes a hole, and fills another place.
    fn dig(&mut self, turn: u64) -> io::Result<()> {
        let file = self.sparse.open()?;
        let place = self.below(SPARSE - STRETCH);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, flags, place as u64, STRETCH as u64)?;
        self.sparse.content[place..place + STRETCH].fill(0);
        let place = self.below(SPARSE - STRETCH);
        let bytes = noise(STRETCH, turn);
        file.write_all_at(&bytes, place as u64)?;
        self.sparse.put(place, &bytes);
        Ok(())
    }

    /// Puts another file in a file's place, of another size.
    fn make_young(&mut self, turn: u64) -> io::Result<()> {
        let length = self.below(MIB);
        self.young.content = noise(length, turn);
        let beside = self.young.path.with_extension("new");
        fs::write(&beside, &self.young.content)?;
        fs::rename(beside, &self.young.path)
    }

    fn look(&self) -> String {
        let rest = self
            .rest
            .iter()
            .map(|(path, seed)| Known { path: path.clone(), content: noise(self.rest_length, *seed) }.look());
        let known = [&self.log, &self.blocks, &self.mapped, &self.hot, &self.touched, &self.sparse, &self.young];
        let mut wrong = rest.chain(known.into_iter().map(Known::look)).flatten();
        wrong.next().map_or_else(|| "ok".to_owned(), |what| format!("wrong: {what}"))
    }
}

struct Service {
    count: AtomicU64,
    files: Mutex<Files>,
}

impl Service {
    fn with_files<T>(&self, work: impl FnOnce(&mut Files) -> T) -> T {
        work(&mut self.files.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn answer(&self, question: &str) -> String {
        match question {
            "count" => (self.count.fetch_add(1, Ordering::AcqRel) + 1).to_string(),
            "check" => self.with_files(|files| files.look()),
            "turns" => self.with_files(|files| files.turns.to_string()),
            _ => "what?".to_owned(),
        }
    }
}

fn serve(arguments: &Arguments) -> io::Result<()> {
    let files = Mutex::new(Files::make(arguments)?);
    let service = Arc::new(Service { count: AtomicU64::new(0), files });
    let (writer, pause) = (Arc::clone(&service), Duration::from_millis(arguments.pause));
    thread::spawn(move || {
        loop {
            if let Err(error) = writer.with_files(Files::turn) {
                eprintln!("podferry-file-load: {error}");
                std::process::exit(1);
            }
            thread::sleep(pause);
        }
    });
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    for stream in listener.incoming() {
        let (stream, service) = (stream?, Arc::clone(&service));
        // Whoever asks may go at any time.
        thread::spawn(move || converse(&stream, &service));
    }
    Ok(())
}

fn converse(stream: &TcpStream, service: &Service) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut writer = stream;
    for question in BufReader::new(stream).lines() {
        writeln!(writer, "{}", service.answer(question?.trim()))?;
    }
    Ok(())
}
