//! A process 1 that holds one of every kind of object a container may hold, and looks all the time whether each still is
//! what it was. A test moves it between nodes and then asks.
//!
//! It listens on port 7000. The line `check` is answered with `NAME ok` or `NAME failed: WHY` for each kind, then `end`:
//! looked at just now, and since the start by the watcher (`NAME failed N times, first: WHY`). The words of
//! `PODFERRY_KINDS_SKIP`, separated by commas, name kinds that are not kept.

mod files;
mod identity;
mod ipc;
mod memory;
mod process;
mod threads;
mod timers;

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

/// Where the questions come in.
const PORT: u16 = 7000;
/// Between two looks of the watcher.
const PAUSE: Duration = Duration::from_millis(25);

/// How long a look may hang before it is said.
const HANGS: Duration = Duration::from_secs(20);

type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;
type Maker = fn() -> Outcome<Vec<Kind>>;
type Check = Box<dyn FnMut() -> Outcome + Send>;

/// One kind of object: made once, looked at again and again.
struct Kind {
    name: &'static str,
    check: Check,
}

impl Kind {
    fn new(name: &'static str, check: impl FnMut() -> Outcome + Send + 'static) -> Self {
        Self { name, check: Box::new(check) }
    }
}

/// All kinds, and what the watcher saw of them.
struct Collection {
    kinds: Vec<Kind>,
    failures: BTreeMap<&'static str, (u64, String)>,
}

impl Collection {
    fn look(&mut self) -> Vec<(&'static str, Outcome)> {
        let looked = self.kinds.iter_mut().map(|kind| {
            *name_of_look() = kind.name;
            (kind.name, (kind.check)())
        });
        let outcomes: Vec<_> = looked.collect();
        for (name, outcome) in &outcomes {
            if let Err(error) = outcome {
                let (count, _) = self.failures.entry(name).or_insert_with(|| (0, error.to_string()));
                *count += 1;
            }
        }
        outcomes
    }

    fn answer(&mut self) -> String {
        let mut text = String::new();
        for (name, outcome) in self.look() {
            let words = match (outcome, self.failures.get(name)) {
                (Err(error), _) => format!("failed: {error}"),
                (Ok(()), Some((count, first))) => format!("failed {count} times, first: {first}"),
                (Ok(()), None) => "ok".to_owned(),
            };
            text = format!("{text}{name} {}\n", words.replace('\n', " "));
        }
        text + "end\n"
    }
}

/// Fails unless two values are equal.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: &T, was: &T) -> Outcome {
    if is == was { Ok(()) } else { Err(format!("{what} is {is:?}, not {was:?}").into()) }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let ended = match arguments.get(1).map(String::as_str) {
        None => serve(),
        Some(role) => process::play(role, &arguments[2..]),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podferry-kinds: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Outcome {
    timers::block_pending_signal()?;
    let skipped = std::env::var("PODFERRY_KINDS_SKIP").unwrap_or_default();
    let makers: [(&str, Maker); 7] = [
        ("process", process::make),
        ("memory", memory::make),
        ("files", files::make),
        ("ipc", ipc::make),
        ("timers", timers::make),
        ("threads", threads::make),
        ("identity", identity::make),
    ];
    let mut kinds = Vec::new();
    for (group, make) in makers {
        kinds.extend(make().map_err(|error| format!("{group}: {error}"))?);
    }
    kinds.retain(|kind| !skipped.split(',').any(|name| name == kind.name));
    let collection = Arc::new(Mutex::new(Collection { kinds, failures: BTreeMap::new() }));
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    println!("listening on {PORT}");

    let watched = Arc::clone(&collection);
    thread::Builder::new().name("watcher".to_owned()).spawn(move || {
        loop {
            lock(&watched).look();
            thread::sleep(PAUSE);
        }
    })?;
    for stream in listener.incoming() {
        let collection = Arc::clone(&collection);
        let stream = stream?;
        thread::Builder::new().name("client".to_owned()).spawn(move || converse(stream, &collection))?;
    }
    Ok(())
}

/// What is being looked at.
fn name_of_look() -> MutexGuard<'static, &'static str> {
    static NAME: Mutex<&str> = Mutex::new("");
    NAME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at everything, unless an earlier look hangs.
fn answer(collection: &Mutex<Collection>) -> String {
    let since = Instant::now();
    while since.elapsed() < HANGS {
        match collection.try_lock() {
            Ok(mut collection) => return collection.answer(),
            Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner().answer(),
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
        }
    }
    format!("{} failed: it hangs\nend\n", name_of_look())
}

fn lock(collection: &Mutex<Collection>) -> MutexGuard<'_, Collection> {
    collection.lock().unwrap_or_else(PoisonError::into_inner)
}

fn converse(stream: TcpStream, collection: &Mutex<Collection>) {
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|count| count > 0) {
        let answer = match line.trim() {
            "check" => answer(collection),
            other => format!("cannot {other:?}: the one question is check\nend\n"),
        };
        if lines.get_mut().write_all(answer.as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}
