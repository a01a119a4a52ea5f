//! Fetching for a pager the pages that stayed with the source: see [`podferry_proto::fetch`] and [`podferry_memory::fetch`].
//!
//! ```text
//!  pager ──unix socket──▶ fetcher ══ lane of what is awaited ══▶ source's agent
//!                                 ══ lane of the rest ═════════▶
//! ```
//!
//! The pager outlives this agent; the next one listens in its place, and is asked again for all that has not come.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::time::Duration;

use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_common::tls::{self, TlsError};
use podferry_memory::PAGE_SIZE;
use podferry_memory::fetch::{Answer, HEAD, Request};
use podferry_proto::v1::fetch_request::Kind;
use podferry_proto::v1::fetch_service_client::FetchServiceClient;
use podferry_proto::v1::{FetchBegin, FetchPages, FetchRequest, FetchResponse};
use podferry_transfer::Pool;
use podferry_transfer::ZeroMap;
use podferry_transfer::compression::Unpacker;
use podferry_transfer::parcel;
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;

use crate::context::Context;
use crate::journal::{PartDirs, Role};
use crate::pager::client;

/// Between two tries to reach the source.
const AGAIN: Duration = Duration::from_millis(250);
/// A source that says nothing for so long while it is asked is called anew. A request has 256 KiB: a link that takes longer for it is no
/// link to live on.
const SILENCE: Duration = Duration::from_secs(15);
/// Between two looks whether the pager has ended.
const LOOK: Duration = Duration::from_millis(200);
/// How long a pager gets until there is a word of it.
const NO_PAGER: Duration = Duration::from_secs(30);
/// Bytes that may be under way on a connection: what a pager asks for ahead, and as much again. HTTP/2's usual 64 KiB are a quarter of one
/// answer, so each would take four journeys there and back.
const WINDOW: u32 = 8 << 20;
/// Answers that may wait for the pager.
const QUEUE: usize = 8;
/// The most bytes of a response: its pages, and the words around them.
const MOST_BYTES: usize = (1 << 20) + (64 << 10);

/// Where the pages are.
#[derive(Clone, Debug)]
struct Way {
    context: Context,
    migration: MigrationId,
    source: Peer,
    address: String,
}

impl Way {
    /// A channel with room for what the pager asks for ahead.
    async fn connect(&self) -> Result<Channel, TlsError> {
        let endpoint = tls::endpoint(&self.address)?.initial_stream_window_size(WINDOW);
        let endpoint = endpoint.initial_connection_window_size(WINDOW);
        podferry_transfer::connect(endpoint, &self.address, &self.context.identity, &self.source).await
    }
}

/// The agent that has the pages.
#[derive(Clone, Debug)]
pub struct Source {
    peer: Peer,
    address: String,
}

impl Source {
    /// The one of a post-copy's target.
    pub fn of(role: &Role) -> Option<Self> {
        let Role::Target { source_node, fetch_from: Some(address), .. } = role else { return None };
        Some(Self { peer: Peer::Agent(source_node.parse().ok()?), address: address.clone() })
    }
}

/// Begins to fetch for the pager of a part. Ends by itself with the pager.
///
/// # Errors
/// When the socket cannot be made.
pub fn start(context: &Context, migration: MigrationId, source: &Source) -> io::Result<()> {
    let dirs = PartDirs::of(&context.config, migration);
    let listener = listen(&dirs.fetch_socket())?;
    let way = Way { context: context.clone(), migration, source: source.peer.clone(), address: source.address.clone() };
    tokio::spawn(async move {
        tokio::select! {
            () = serve(&way, &listener) => {}
            () = pager_ended(&dirs) => {}
        }
    });
    Ok(())
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(socket)
}

async fn pager_ended(dirs: &PartDirs) {
    let begun = Instant::now();
    loop {
        sleep(LOOK).await;
        match client::status(&dirs.pager_status()) {
            Ok(status) if status.state.is_last() => return,
            Ok(_) => {}
            Err(_) if begun.elapsed() < NO_PAGER => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => tracing::debug!(%error, "the pager's status cannot be read"),
        }
    }
}

/// One pager after the other: the second takes over when the first is gone.
async fn serve(way: &Way, listener: &UnixListener) {
    loop {
        match listener.accept().await {
            Ok((pager, _)) => {
                if let Err(error) = converse(way, pager).await {
                    tracing::debug!(%error, "a pager has hung up");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a pager cannot be accepted");
                sleep(AGAIN).await;
            }
        }
    }
}

async fn converse(way: &Way, pager: UnixStream) -> io::Result<()> {
    let (mut from, to) = pager.into_split();
    let (awaited_answers, awaited_answered) = mpsc::channel(QUEUE);
    let (answers, answered) = mpsc::channel(QUEUE);
    let awaited = Lane::open(way, true, &awaited_answers);
    let rest = Lane::open(way, false, &answers);
    let asking = async {
        let mut head = [0; HEAD];
        loop {
            from.read_exact(&mut head).await?;
            let request = Request::decode(&head).ok_or(io::ErrorKind::InvalidData)?;
            let lane = if request.awaited { &awaited } else { &rest };
            lane.ask(request);
        }
    };
    tokio::select! {
        ended = asking => ended,
        ended = pass_on(awaited_answered, answered, to) => ended,
    }
}

/// Writes answers to the pager, those that are awaited first. Ends when none can come any more.
async fn pass_on(
    mut awaited: mpsc::Receiver<Vec<u8>>,
    mut rest: mpsc::Receiver<Vec<u8>>,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    loop {
        let next = tokio::select! {
            biased;
            Some(answer) = awaited.recv() => Some(answer),
            Some(answer) = rest.recv() => Some(answer),
            else => None,
        };
        let Some(answer) = next else { return Ok(()) };
        to.write_all(&answer).await?;
    }
}

/// A connection to the source, opened again when it breaks. Ends when it is dropped.
struct Lane {
    asked: mpsc::UnboundedSender<Request>,
    task: JoinHandle<()>,
}

impl Lane {
    fn open(way: &Way, awaited: bool, answers: &mpsc::Sender<Vec<u8>>) -> Self {
        let (asked, requests) = mpsc::unbounded_channel();
        let fetching = Fetching {
            way: way.clone(),
            awaited,
            requests,
            open: VecDeque::new(),
            answers: answers.clone(),
            broken: None,
        };
        Self { asked, task: tokio::spawn(fetching.run()) }
    }

    fn ask(&self, request: Request) {
        let _ended = self.asked.send(request);
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A lane at work.
struct Fetching {
    way: Way,
    awaited: bool,
    requests: mpsc::UnboundedReceiver<Request>,
    /// What was asked for and did not come, in that order.
    open: VecDeque<Request>,
    answers: mpsc::Sender<Vec<u8>>,
    /// Since when the source does not answer.
    broken: Option<Instant>,
}

impl Fetching {
    async fn run(mut self) {
        loop {
            if self.open.is_empty() {
                let Some(request) = self.requests.recv().await else { return };
                self.open.push_back(request);
            }
            let Err(failure) = self.call().await else { return };
            let first = self.broken.is_none();
            let since = *self.broken.get_or_insert_with(Instant::now);
            let patience = self.way.context.config.post_copy.recover_within();
            if first {
                tracing::warn!(migration = %self.way.migration, %failure, "pages cannot be fetched; trying again");
            }
            if failure.code == FailureCode::DataLoss || since.elapsed() > patience {
                tracing::error!(migration = %self.way.migration, %failure, "pages are given up for lost");
                let Some(request) = self.open.front() else { return };
                let _gone = self.answers.send(Answer::Lost.encode(request.process, request.range).to_vec()).await;
                return;
            }
            sleep(AGAIN).await;
        }
    }

    /// Calls the source, and passes on what it answers until nobody asks any more.
    async fn call(&mut self) -> Result<(), Failure> {
        let way = self.way.clone();
        let unreachable = |error: &(dyn std::error::Error + 'static)| {
            way.context.failure(FailureCode::Unavailable, "the source cannot be reached", error).in_phase("fill")
        };
        let channel = timeout(SILENCE, way.connect()).await.map_err(|error| unreachable(&error))?;
        let channel = channel.map_err(|error| unreachable(&error))?;
        let (calls, said) = mpsc::unbounded_channel();
        let begin = FetchBegin { migration_id: way.migration.to_string(), awaited: self.awaited };
        let _open = calls.send(FetchRequest { kind: Some(Kind::Begin(begin)) });
        self.open.iter().for_each(|request| say(&calls, request));
        let mut client = FetchServiceClient::new(channel).max_decoding_message_size(MOST_BYTES);
        let calling = client.fetch(UnboundedReceiverStream::new(said));
        let answers = timeout(SILENCE, calling).await.map_err(|error| unreachable(&error))?;
        let mut answers = answers.map_err(|status| Failure::from_status(&status))?.into_inner();
        let mut unpacker =
            Unpacker::new(Pool::new(2)).map_err(|error| way.context.failure(FailureCode::Internal, "zstd", &error))?;
        loop {
            let silence = if self.open.is_empty() { Duration::MAX } else { SILENCE };
            tokio::select! {
                request = self.requests.recv() => {
                    let Some(request) = request else { return Ok(()) };
                    self.open.push_back(request);
                    say(&calls, &request);
                }
                answer = timeout(silence, answers.message()) => {
                    let answer = answer.map_err(|error| unreachable(&error))?;
                    let answer = answer.map_err(|status| Failure::from_status(&status))?;
                    let Some(answer) = answer else {
                        return Err(way.context.refusal(FailureCode::Unavailable, "the source has hung up").in_phase("fill"));
                    };
                    self.take(&answer, &mut unpacker).await?;
                }
            }
        }
    }

    /// Passes on what has come, which has to be what was asked for first.
    async fn take(&mut self, answer: &FetchResponse, unpacker: &mut Unpacker) -> Result<(), Failure> {
        let wrong = |error: &(dyn std::error::Error + 'static)| {
            let what = "what the source answers is not what it was asked for";
            self.way.context.failure(FailureCode::Unavailable, what, error).in_phase("fill")
        };
        let asked = self.open.front().copied().filter(|asked| message(asked) == asked_by(answer));
        let Some(asked) = asked else { return Err(wrong(&io::Error::from(io::ErrorKind::InvalidData))) };
        let (zero, contents) = parcel::unpack(answer, unpacker).map_err(|error| wrong(&error))?;
        // The pager has ended when nobody takes it.
        let _ended = self.answers.send(encode(&asked, &zero, &contents)).await;
        self.open.pop_front();
        self.broken = None;
        Ok(())
    }
}

fn say(calls: &mpsc::UnboundedSender<FetchRequest>, request: &Request) {
    let _broken = calls.send(FetchRequest { kind: Some(Kind::Pages(message(request))) });
}

fn message(request: &Request) -> FetchPages {
    FetchPages {
        process: request.process.unsigned_abs(),
        address: request.range.start,
        count: u32::try_from(request.range.pages()).unwrap_or(u32::MAX),
    }
}

fn asked_by(answer: &FetchResponse) -> FetchPages {
    FetchPages { process: answer.process, address: answer.address, count: answer.count }
}

/// As the pager takes it: in one piece, with the pages that are zero.
fn encode(asked: &Request, zero: &ZeroMap, contents: &[u8]) -> Vec<u8> {
    let pages = usize::try_from(asked.range.pages()).unwrap_or(0);
    if zero.count() == pages {
        return Answer::Zeros.encode(asked.process, asked.range).to_vec();
    }
    let mut bytes = Vec::with_capacity(HEAD + pages * PAGE);
    bytes.extend_from_slice(&Answer::Contents.encode(asked.process, asked.range));
    let mut full = contents.chunks_exact(PAGE);
    for page in 0..pages {
        let contents = if zero.is_zero(page) { None } else { full.next() };
        match contents {
            Some(contents) => bytes.extend_from_slice(contents),
            None => bytes.resize(bytes.len() + PAGE, 0),
        }
    }
    bytes
}

#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: usize = PAGE_SIZE as usize;

#[cfg(test)]
mod tests {
    use podferry_memory::range::PageRange;

    use super::*;

    #[tokio::test]
    async fn what_is_awaited_does_not_stand_behind_what_waits_for_the_pager() {
        let (awaited, awaited_answered) = mpsc::channel(QUEUE);
        let (rest, answered) = mpsc::channel(QUEUE);
        // The pager takes nothing at first.
        let (to, mut pager) = tokio::io::duplex(1);
        let passing = tokio::spawn(pass_on(awaited_answered, answered, to));
        for _ in 0..QUEUE {
            rest.send(b"rest".to_vec()).await.unwrap();
        }
        tokio::task::yield_now().await;
        awaited.send(b"awaited".to_vec()).await.unwrap();
        drop((awaited, rest));
        let mut said = String::new();
        pager.read_to_string(&mut said).await.unwrap();
        passing.await.unwrap().unwrap();
        // One was being written.
        assert_eq!(said, format!("restawaited{}", "rest".repeat(QUEUE - 1)));
    }

    #[test]
    fn pages_that_are_zero_stand_among_the_others() {
        let (zero, one, two) = ([0; PAGE], [1; PAGE], [2; PAGE]);
        let range = |pages: u64| PageRange::new(PAGE_SIZE, (pages + 1) * PAGE_SIZE);
        for pages in [vec![one, zero, two], vec![zero, two, zero], vec![one]] {
            let whole = pages.concat();
            let message = parcel::pack(7, PAGE_SIZE, &whole, None).unwrap();
            let asked = Request { process: 7, awaited: true, range: range(pages.len() as u64) };
            assert_eq!(super::message(&asked), asked_by(&message));
            let (zero, contents) = parcel::unpack(&message, &mut Unpacker::new(Pool::new(1)).unwrap()).unwrap();
            let bytes = encode(&asked, &zero, &contents);
            let (head, sent) = bytes.split_first_chunk().unwrap();
            assert_eq!(Answer::decode(head), Some((Answer::Contents, 7, asked.range)));
            assert!(sent == whole);
        }
        let asked = Request { process: 7, awaited: false, range: range(2) };
        let bytes = encode(&asked, &ZeroMap::find(&[0; 2 * PAGE]), &[]);
        assert_eq!(bytes, Answer::Zeros.encode(7, asked.range));
    }
}
