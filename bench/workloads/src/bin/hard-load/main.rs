//! A process 1 with as much memory, as many threads and as many processes as it is told, which are written all the time and checked.
//!
//! It listens on port 7000 and answers lines. `count`: the next number, beginning with 1. `check`: `ok`, or `wrong: N pages` when
//! its workers have come across memory that is not what they wrote; the process itself and one of its children are asked, each in
//! turn. `check-all`: the same when every page of all has been looked at.

mod children;
mod memory;
mod workers;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use clap::Parser;
use rustix::fs::OFlags;

use crate::children::Children;
use crate::memory::Backing;
use crate::workers::{Findings, Plan};

/// open(2)'s flag, as the library that makes the call has it.
const O_DIRECT: i32 = OFlags::DIRECT.bits().cast_signed();
/// Where the questions come in.
const PORT: u16 = 7000;

/// Memory, threads and processes that are written all the time and checked.
#[derive(Debug, Clone, Parser)]
#[command(name = "podferry-hard-load")]
struct Arguments {
    /// Memory of each process, in MiB.
    #[arg(long, default_value_t = 64)]
    mib: usize,
    /// How much of it is written in a second, in percent.
    #[arg(long, default_value_t = 1.0)]
    percent: f64,
    /// How much of it is only looked at in a second, in percent.
    #[arg(long, default_value_t = 5.0)]
    looked_at: f64,
    /// Threads of each process that write.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    /// Processes, this one among them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    processes: u16,
    /// Which memory it is.
    #[arg(long, value_enum, default_value = "private")]
    backing: Backing,
    /// Keep a file open for direct I/O, past which the kernel does not tell who writes to memory.
    #[arg(long)]
    direct: Option<PathBuf>,
    /// The number of a child, which answers on its standard streams; for the process's own use.
    #[arg(long, hide = true)]
    child: Option<u16>,
}

impl Arguments {
    fn plan(&self) -> Plan {
        Plan {
            threads: usize::from(self.threads),
            mib: self.mib,
            percent: self.percent,
            looked_at: self.looked_at,
            backing: self.backing,
            seed: u64::from(self.child.unwrap_or(0)) << 56,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let ended = match arguments.child {
        Some(_) => answer_parent(&arguments),
        None => serve(&arguments),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podferry-hard-load: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the questions are about.
struct Service {
    count: AtomicU64,
    findings: Findings,
    children: Children,
}

impl Service {
    fn answer(&self, question: &str) -> String {
        match question {
            "count" => (self.count.fetch_add(1, Ordering::AcqRel) + 1).to_string(),
            "check" => words(self.children.ask_next().map(|wrong| wrong + self.findings.wrong())),
            "check-all" => words(self.children.ask_all().map(|wrong| wrong + self.findings.look_at_everything())),
            other => format!("cannot {other:?}: there are count, check and check-all"),
        }
    }
}

fn words(wrong: io::Result<u64>) -> String {
    match wrong {
        Ok(0) => "ok".to_owned(),
        Ok(wrong) => format!("wrong: {wrong} pages"),
        Err(error) => format!("wrong: a child does not answer: {error}"),
    }
}

fn serve(arguments: &Arguments) -> io::Result<()> {
    let direct = arguments.direct.as_ref();
    let _open = direct.map(|file| File::options().read(true).custom_flags(O_DIRECT).open(file)).transpose()?;
    let children = Children::start(arguments.processes - 1)?;
    let findings = workers::start(arguments.plan())?;
    let service = Arc::new(Service { count: AtomicU64::new(0), findings, children });
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    for stream in listener.incoming() {
        let (service, stream) = (Arc::clone(&service), stream?);
        thread::Builder::new().name("client".to_owned()).spawn(move || converse(stream, &service))?;
    }
    Ok(())
}

/// Until the client is gone, or does not take its answer.
fn converse(stream: TcpStream, service: &Service) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 {
        let answer = service.answer(line.trim()) + "\n";
        lines.get_mut().write_all(answer.as_bytes())?;
        line.clear();
    }
    Ok(())
}

/// Ends when its parent does.
fn answer_parent(arguments: &Arguments) -> io::Result<()> {
    let findings = workers::start(arguments.plan())?;
    for question in io::stdin().lines() {
        let wrong = if question? == "check-all" { findings.look_at_everything() } else { findings.wrong() };
        println!("{wrong}");
    }
    Ok(())
}
