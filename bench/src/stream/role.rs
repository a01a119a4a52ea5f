//! What the measured processes do.

use std::fmt;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use clap::{Subcommand, ValueEnum};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use podferry_common::identity::{Identity, IdentityFiles, Peer};
use podferry_common::tls::PeerInfo;
use podferry_common::{Failure, MigrationId};
use podferry_proto::Version;
use podferry_transfer::{
    Authorize, Compression, Introduction, Object, Options, Owner, PageRun, Sender, Sink, TransferServer,
};
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::sync::oneshot;

use super::{Error, MIB, io_error};

pub(super) const SOURCE: &str = "source";
pub(super) const TARGET: &str = "target";
/// What a receiver says when it listens.
pub(super) const READY: &str = "ready";
/// Names the folder with a process' certificate.
pub(super) const KEYS: &str = "PODFERRY_STREAM_KEYS";

/// How much is handed over at once.
const CHUNK: usize = 1 << 20;
/// How much different data there is: more than the processor's caches hold.
const SOURCE_MIB: usize = 64;

/// One end of a measurement.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// Take everything.
    #[command(hide = true)]
    Receive {
        /// Over what.
        how: How,
        /// Where to listen.
        address: SocketAddr,
    },
    /// Send.
    #[command(hide = true)]
    Send {
        /// Over what.
        how: How,
        /// Where the receiver listens.
        address: SocketAddr,
        /// Whether to pack.
        packing: Pack,
        /// How much.
        mib: u64,
        /// What.
        contents: Contents,
    },
}

/// What is measured.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum How {
    /// A TCP connection and nothing else.
    Raw,
    /// The page stream.
    Stream,
}

/// Whether payloads are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pack {
    /// Never.
    Off,
    /// When it pays.
    Auto,
}

/// What is sent.
#[derive(Debug, Clone, Copy, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Contents {
    /// Incompressible.
    Noise,
    /// Records of text and random numbers, like a key-value store's memory.
    Records,
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Noise => "incompressible",
            Self::Records => "records",
        })
    }
}

/// What one end measured of itself.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) seconds: f64,
    pub(super) cpu_seconds: f64,
    pub(super) wire_bytes: u64,
}

/// From the first byte to the last.
struct Watch {
    begun: Instant,
    cpu: f64,
}

impl Watch {
    fn start() -> Self {
        Self { begun: Instant::now(), cpu: cpu_seconds() }
    }

    fn stop(&self, wire_bytes: u64) -> Measured {
        let seconds = self.begun.elapsed().as_secs_f64();
        Measured { seconds, cpu_seconds: cpu_seconds() - self.cpu, wire_bytes }
    }
}

/// Of all threads of this process, in user and kernel mode.
fn cpu_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("a process may ask for its own usage");
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    super::as_f64(u64::try_from(micros).unwrap_or(0)) / 1e6
}

/// Does a role's part and prints what it measured.
pub(super) async fn play(role: Role) -> Result<(), Error> {
    let measured = match role {
        Role::Receive { how: How::Raw, address } => tokio::task::block_in_place(|| receive_raw(address))?,
        Role::Receive { how: How::Stream, address } => receive_stream(address).await?,
        Role::Send { how: How::Raw, address, mib, contents, .. } => {
            let source = source(contents);
            tokio::task::block_in_place(|| send_raw(address, mib, &source))?
        }
        Role::Send { how: How::Stream, address, packing, mib, contents } => {
            send_stream(address, packing, mib, source(contents)).await?
        }
    };
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

fn receive_raw(address: SocketAddr) -> Result<Measured, Error> {
    let listener = TcpListener::bind(address).map_err(io_error("listen"))?;
    println!("{READY}");
    let (mut stream, _) = listener.accept().map_err(io_error("accept"))?;
    let mut buffer = vec![0; CHUNK];
    let watch = Watch::start();
    let mut total = 0;
    loop {
        let read = stream.read(&mut buffer).map_err(io_error("receive"))?;
        total += read as u64;
        if read == 0 {
            break;
        }
    }
    let measured = watch.stop(total);
    stream.write_all(&[1]).map_err(io_error("confirm"))?;
    Ok(measured)
}

fn send_raw(address: SocketAddr, mib: u64, source: &Bytes) -> Result<Measured, Error> {
    let mut stream = TcpStream::connect(address).map_err(io_error("connect"))?;
    SockRef::from(&stream).set_tcp_congestion(b"cubic").map_err(io_error("choose cubic"))?;
    let watch = Watch::start();
    for chunk in chunks(source, mib) {
        stream.write_all(&chunk).map_err(io_error("send"))?;
    }
    stream.shutdown(std::net::Shutdown::Write).map_err(io_error("end"))?;
    // The stream's sender waits for a confirmation too.
    stream.read_exact(&mut [0]).map_err(io_error("hear the confirmation"))?;
    Ok(watch.stop(mib * MIB))
}

async fn receive_stream(address: SocketAddr) -> Result<Measured, Error> {
    let identity = identity()?;
    let listener = tokio::net::TcpListener::bind(address).await.map_err(io_error("listen"))?;
    let (mut server, incoming) = podferry_transfer::server(listener, &identity);
    let (done, measured) = oneshot::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let service = TransferServer::new(Arc::new(Anybody(Mutex::new(Some(done)))));
    let server = server.add_service(service);
    let server = tokio::spawn(server.serve_with_incoming_shutdown(incoming, async {
        // A dropped sender stops it as well.
        let _stopped = stopped.await;
    }));
    println!("{READY}");
    let measured = measured.await.map_err(|_| Error::Process { what: "receiver's transfer".to_owned() })?;
    drop(stop);
    server.await.map_err(|_| Error::Process { what: "receiver's server".to_owned() })??;
    Ok(measured)
}

async fn send_stream(address: SocketAddr, packing: Pack, mib: u64, source: Bytes) -> Result<Measured, Error> {
    let introduction = Introduction {
        migration_id: MigrationId::new(),
        source_node: SOURCE.parse().expect("a constant name"),
        version: Version::OURS,
    };
    let compression = match packing {
        Pack::Off => Compression::Off,
        Pack::Auto => Compression::Auto,
    };
    let options = Options { compression, ..Options::default() };
    let peer = Peer::Agent(TARGET.parse().expect("a constant name"));
    let identity = identity()?;
    let watch = Watch::start();
    let sender = Sender::connect(&address.to_string(), &identity, &peer, &introduction, options).await?;
    let object = Object::Pages { owner: Owner::Process(1), id: 1 };
    // As an agent does: a thread of its own takes the pages from CRIU.
    let thread = tokio::task::spawn_blocking(move || {
        let mut pages = sender.open_blocking(&object)?;
        for (chunk, vaddr) in chunks(&source, mib).zip((0..).step_by(CHUNK)) {
            pages.pages_blocking(vaddr, 0, chunk)?;
        }
        pages.close_blocking()?;
        sender.finish_blocking()
    });
    let stats = thread.await.map_err(|_| Error::Process { what: "sender's thread".to_owned() })??;
    Ok(watch.stop(stats.wire_bytes))
}

fn identity() -> Result<Identity, Error> {
    let folder = std::env::var_os(KEYS).ok_or_else(|| Error::Process { what: format!("role without {KEYS}") })?;
    Ok(Identity::load(IdentityFiles::in_folder(folder))?)
}

/// The source's chunks, again and again until there are `mib`.
fn chunks(source: &Bytes, mib: u64) -> impl Iterator<Item = Bytes> + use<> {
    let source = source.clone();
    let starts = (0..source.len()).step_by(CHUNK).cycle();
    (0..mib).zip(starts).map(move |(_, start)| source.slice(start..start + CHUNK))
}

fn source(contents: Contents) -> Bytes {
    let length = SOURCE_MIB * CHUNK;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(length + 256);
    while bytes.len() < length {
        match contents {
            Contents::Noise => bytes.extend(random().to_le_bytes()),
            Contents::Records => {
                let (id, score) = (random() % 1_000_000_000, random() % 1000);
                let record =
                    format!("{{\"id\":{id},\"name\":\"user-{score}\",\"active\":true,\"token\":\"{:x}\"}}", random());
                bytes.extend(record.as_bytes());
                bytes.resize(bytes.len().next_multiple_of(16), 0);
            }
        }
    }
    bytes.truncate(length);
    Bytes::from(bytes)
}

/// Admits the one transfer and counts what it brings.
struct Anybody(Mutex<Option<oneshot::Sender<Measured>>>);

impl Authorize for Anybody {
    fn admit(&self, _: &PeerInfo, _: &Introduction) -> Result<Box<dyn Sink>, Failure> {
        let done = self.0.lock().ok().and_then(|mut done| done.take());
        Ok(Box::new(Counter { watch: Watch::start(), bytes: 0, done }))
    }
}

struct Counter {
    watch: Watch,
    bytes: u64,
    done: Option<oneshot::Sender<Measured>>,
}

impl Sink for Counter {
    fn open(&mut self, _: u32, _: &Object) -> Result<(), Failure> {
        Ok(())
    }

    fn data(&mut self, _: u32, _: u64, bytes: Bytes) -> Result<(), Failure> {
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn pages(&mut self, run: PageRun) -> Result<(), Failure> {
        self.bytes += run.bytes.len() as u64;
        Ok(())
    }

    fn close(&mut self, _: u32, _: u64, _: u64) -> Result<(), Failure> {
        Ok(())
    }

    fn end(mut self: Box<Self>) -> Result<(), Failure> {
        if let Some(done) = self.done.take() {
            // Nobody waits any more when the bench was stopped.
            let _stopped = done.send(self.watch.stop(self.bytes));
        }
        Ok(())
    }

    fn abort(self: Box<Self>, reason: &Failure) {
        eprintln!("the transfer failed: {reason}");
    }
}
