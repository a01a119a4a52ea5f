//! A client of Redis that checks every answer, over one connection.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

use super::wait_for;
use crate::error::{Error, FileContext, Result};
use crate::network::netns_file;
use crate::place::Place;

const PORT: u16 = 6379;
/// The longest silence that a connection survives here.
pub const SILENCE: Duration = Duration::from_secs(60);
const COUNTER: &str = "podferry-counter";
/// What a key of the filling holds.
const VALUE_BYTES: usize = 64 << 10;
/// The longest value that is taken from a server.
const LONGEST_VALUE: usize = 1 << 20;

/// Runs `work` on a thread that is in the place's network namespace. Its sockets stay there.
pub fn inside<T: Send>(place: &Place, work: impl FnOnce() -> T + Send) -> Result<T> {
    let path = netns_file(place.netns());
    let namespace = File::open(&path).at("open", &path)?;
    thread::scope(|scope| {
        let entered = move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).at("enter", &path)?;
            Ok(work())
        };
        scope.spawn(entered).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A connection made in a place's network namespace.
pub fn connect(place: &Place, address: SocketAddr) -> io::Result<TcpStream> {
    inside(place, move || TcpStream::connect_timeout(&address, Duration::from_secs(5))).map_err(io::Error::other)?
}

/// A connection to Redis.
#[derive(Debug)]
pub struct Redis {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Redis {
    /// Connects, trying for as long as Redis may need to start.
    pub fn connect(place: &Place, address: Ipv4Addr) -> Result<Self> {
        // One that is just being started answers before it has read what it had on its disk.
        wait_for("Redis to answer", || {
            let mut redis = Self::over(connect(place, (address, PORT).into()).ok()?).ok()?;
            (redis.request(&[b"PING"]).ok()? == "+PONG").then_some(redis)
        })
    }

    fn over(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { lines: BufReader::new(stream.try_clone()?), stream })
    }

    fn request(&mut self, words: &[&[u8]]) -> io::Result<String> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend(format!("${}\r\n", word.len()).into_bytes());
            request.extend_from_slice(word);
            request.extend(b"\r\n");
        }
        self.stream.write_all(&request)?;
        let mut line = String::new();
        match self.lines.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }

    fn get(&mut self, key: &str) -> io::Result<Vec<u8>> {
        let line = self.request(&[b"GET", key.as_bytes()])?;
        let length = line.strip_prefix('$').and_then(|length| length.parse::<usize>().ok());
        let Some(length) = length.filter(|length| *length <= LONGEST_VALUE) else { return Ok(Vec::new()) };
        let mut value = vec![0; length + 2];
        self.lines.read_exact(&mut value)?;
        value.truncate(length);
        Ok(value)
    }

    /// Fills it with bytes that no compression makes smaller.
    pub fn fill(&mut self, mib: usize) -> Result<()> {
        for (number, value) in noise(mib << 20).chunks(VALUE_BYTES).enumerate() {
            let answer =
                self.request(&[b"SET", fill_key(number).as_bytes(), value]).and_then(|answer| match &*answer {
                    "+OK" => Ok(()),
                    _ => Err(io::Error::other(format!("it was answered {answer:?}"))),
                });
            answer.map_err(|source| Error::Client { what: "a SET that fills Redis".to_owned(), source })?;
        }
        Ok(())
    }

    /// How many of the values that [`Redis::fill`] wrote are gone, or are others.
    pub fn count_lost(&mut self, mib: usize) -> Result<usize> {
        let mut lost = 0;
        for (number, value) in noise(mib << 20).chunks(VALUE_BYTES).enumerate() {
            let what = || format!("a GET of {}", fill_key(number));
            let found = self.get(&fill_key(number)).map_err(|source| Error::Client { what: what(), source })?;
            lost += usize::from(found != value);
        }
        Ok(lost)
    }

    fn increment(&mut self) -> io::Result<u64> {
        let answer = self.request(&[b"INCR", COUNTER.as_bytes()])?;
        let number = answer.strip_prefix(':').and_then(|number| number.parse().ok());
        number.ok_or_else(|| io::Error::other(format!("INCR was answered {answer:?}")))
    }
}

fn fill_key(number: usize) -> String {
    format!("fill:{number}")
}

/// Bytes that no compression makes smaller.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64: noise is enough.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Counts on one connection: each answer has to be one more than the last. Two copies that ran, or one that ran on from
/// an older state, would show here.
#[derive(Debug)]
pub struct Counting {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    last: AtomicU64,
    stop: AtomicBool,
    trouble: Mutex<Option<Trouble>>,
}

/// What ended a [`Counting`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// The connection was closed, reset, or silent for too long.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// An answer that cannot be: what was confirmed is gone, or is there twice.
    #[error("{before} was confirmed, and then came {after}")]
    Lost {
        /// The last number that was confirmed.
        before: u64,
        /// The number that came.
        after: u64,
    },
}

impl Counting {
    /// Begins.
    pub fn start(place: &Place, address: Ipv4Addr) -> Result<Self> {
        let mut redis = Redis::connect(place, address)?;
        let shared = Arc::new(Shared::default());
        let first = redis.increment();
        let first = first.map_err(|source| Error::Client { what: "the first INCR".to_owned(), source })?;
        shared.last.store(first, Ordering::Release);
        let counting = Arc::clone(&shared);
        let thread = thread::spawn(move || count(&mut redis, &counting));
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The last number.
    pub fn last(&self) -> u64 {
        self.shared.last.load(Ordering::Acquire)
    }

    /// What ended the connection, or a wrong answer.
    pub fn trouble(&self) -> Option<Trouble> {
        self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the connection counts on.
    pub fn alive(&self) -> Result<(), Trouble> {
        let (begun, before) = (Instant::now(), self.last());
        // The first answers may have been on their way.
        while self.last() < before + 3 {
            if let Some(trouble) = self.trouble() {
                return Err(trouble);
            }
            if begun.elapsed() >= SILENCE {
                return Err(Trouble::Broken(format!("it is silent, still at {before}")));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Counts on over a new connection. Every number that was answered is still there; the one that was under way may be: if
    /// not so, the number that was answered last and the one that came are the trouble.
    pub fn reconnected(self, place: &Place, address: Ipv4Addr) -> Result<(Self, Option<Trouble>)> {
        self.shared.stop.store(true, Ordering::Release);
        let before = self.last();
        let next = Self::start(place, address)?;
        let after = next.last();
        let whole = (before + 1..=before + 2).contains(&after);
        Ok((next, (!whole).then_some(Trouble::Lost { before, after })))
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        // One that waits for an answer that never comes ends by itself.
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            let _ = thread.join();
        }
    }
}

fn count(redis: &mut Redis, shared: &Shared) {
    while !shared.stop.load(Ordering::Acquire) {
        let before = shared.last.load(Ordering::Acquire);
        let trouble = match redis.increment() {
            Ok(next) if next == before + 1 => {
                shared.last.store(next, Ordering::Release);
                thread::sleep(Duration::from_millis(2));
                continue;
            }
            Ok(after) => Trouble::Lost { before, after },
            Err(error) => Trouble::Broken(format!("after {before}: {error}")),
        };
        *shared.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble);
        return;
    }
}
