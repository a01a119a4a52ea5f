//! A client of Redis that checks every answer, over one connection.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use podferry_local::Place;

const PORT: u16 = 6379;
/// The longest silence that a connection survives here.
const SILENCE: Duration = Duration::from_secs(60);
const COUNTER: &str = "podferry-counter";

/// Runs `work` on a thread that is in the place's network namespace. Its sockets stay there.
pub fn inside<T: Send>(place: &Place, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/run/netns/{}", place.netns())).unwrap();
    thread::scope(|scope| {
        let entered = move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        };
        scope.spawn(entered).join().unwrap()
    })
}

/// A connection made in a place's network namespace.
pub fn connect(place: &Place, address: SocketAddr) -> io::Result<TcpStream> {
    inside(place, move || TcpStream::connect_timeout(&address, Duration::from_secs(5)))
}

/// A connection to Redis.
pub struct Redis {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Redis {
    /// Connects, trying for as long as Redis may need to start.
    pub fn connect(place: &Place, address: Ipv4Addr) -> Self {
        let stream = super::wait_for("Redis to listen", || connect(place, (address, PORT).into()).ok());
        stream.set_read_timeout(Some(SILENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { lines: BufReader::new(stream.try_clone().unwrap()), stream }
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

    /// Fills it with bytes that no compression makes smaller.
    pub fn fill(&mut self, mib: usize) {
        let bytes = noise(mib << 20);
        for (key, value) in bytes.chunks(64 << 10).enumerate() {
            assert_eq!(self.request(&[b"SET", format!("fill:{key}").as_bytes(), value]).unwrap(), "+OK");
        }
    }

    fn increment(&mut self) -> io::Result<u64> {
        let answer = self.request(&[b"INCR", COUNTER.as_bytes()])?;
        let number = answer.strip_prefix(':').and_then(|number| number.parse().ok());
        number.ok_or_else(|| io::Error::other(format!("INCR was answered {answer:?}")))
    }
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
pub struct Counting {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    last: AtomicU64,
    stop: AtomicBool,
    trouble: Mutex<Option<String>>,
}

impl Counting {
    /// Begins.
    pub fn start(place: &Place, address: Ipv4Addr) -> Self {
        let mut redis = Redis::connect(place, address);
        let shared = Arc::new(Shared::default());
        shared.last.store(redis.increment().unwrap(), Ordering::Release);
        let counting = Arc::clone(&shared);
        let thread = thread::spawn(move || count(&mut redis, &counting));
        Self { shared, thread: Some(thread) }
    }

    /// The last number.
    pub fn last(&self) -> u64 {
        self.shared.last.load(Ordering::Acquire)
    }

    /// What ended the connection, or a wrong answer.
    pub fn trouble(&self) -> Option<String> {
        self.shared.trouble.lock().unwrap().clone()
    }

    /// Waits until the connection counts on.
    pub fn assert_alive(&self, when: &str) {
        let (begun, before) = (Instant::now(), self.last());
        // The first answers may have been on their way.
        while self.last() < before + 3 {
            assert_eq!(self.trouble(), None, "the connection broke {when}");
            assert!(begun.elapsed() < SILENCE, "the connection is silent {when}: still at {before}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Counts on over a new connection. Every number that was answered is still there; the one that was under way may be.
    pub fn reconnected(self, place: &Place, address: Ipv4Addr) -> Self {
        self.shared.stop.store(true, Ordering::Release);
        let last = self.last();
        let next = Self::start(place, address);
        let first = next.last();
        assert!((last + 1..=last + 2).contains(&first), "{last} was answered, and later {first}");
        next
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        // One that waits for an answer that never comes ends by itself.
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            thread.join().unwrap();
        }
    }
}

fn count(redis: &mut Redis, shared: &Shared) {
    while !shared.stop.load(Ordering::Acquire) {
        let last = shared.last.load(Ordering::Acquire);
        match redis.increment() {
            Ok(next) if next == last + 1 => shared.last.store(next, Ordering::Release),
            Ok(other) => return note(shared, format!("after {last} came {other}")),
            Err(error) => return note(shared, format!("after {last}: {error}")),
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn note(shared: &Shared, trouble: String) {
    *shared.trouble.lock().unwrap() = Some(trouble);
}
