//! Where the old address is: what comes for it is kept from the sockets that leave, and carried to where the container is.

use std::future::{Future, ready};
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use podferry_common::MigrationId;
use podferry_common::failure::chain;
use podferry_common::identity::Peer;
use podferry_network::Netns;
use podferry_network::relay::{self, End, Tun};
use podferry_proto::v1::carry_request::Kind as Request;
use podferry_proto::v1::carry_response::Kind as Response;
use podferry_proto::v1::relay_service_client::RelayServiceClient;
use podferry_proto::v1::{CarryBegin, CarryPackets, CarryRequest, CarryResponse, RelayEnd};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{self, OwnedPermit};
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::away::Away;
use super::batch::{QUEUE, batch, bytes_of, message};
use super::kept::{Kept, Passed};
use super::note::{self, Side};
use super::{has_moved, note_of, notes, removed};
use crate::context::Context;
use crate::journal::Standing;
use crate::metrics::Relaying;
use crate::pods::{Fence, Keeping};
use crate::worker::messages::Diverted;
use crate::worker::record;

/// Packets in one message that is sent again: of 64 KiB each they are as much as one may have.
const AGAIN: usize = 32;
/// The pauses before a stream that broke is begun again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long the kernel gets to hand on what it was given: it does so before it returns, as a rule.
const HAND_ON: Duration = Duration::from_millis(5);

/// What is written down of one; enough to undo it, too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct HomeNote {
    migration: MigrationId,
    target: Peer,
    target_address: String,
    /// The old sandbox's network namespace.
    netns: PathBuf,
    /// What was changed there.
    home: relay::Home,
    /// What keeps the old sandbox.
    fence: Option<Fence>,
    /// The migration by which the container came here, if connections to older addresses live on: they are carried on with it.
    #[serde(default)]
    before: Option<MigrationId>,
    /// When the migration was committed.
    #[serde(default)]
    committed: Option<SystemTime>,
    /// For how many seconds it was asked; 0 for as long as the node is set to.
    #[serde(default)]
    lifetime_s: u32,
}

/// What becomes of the migration.
#[derive(Clone, Copy, Debug)]
enum Word {
    /// The container runs. What comes is handed to it, but for new connections, which wait.
    Open,
    /// It stands still.
    Frozen,
    /// It has moved.
    Committed(SystemTime),
    /// It stays.
    Undone,
}

/// One of them. It is dropped without harm: a relay has an end of its own.
#[derive(Debug)]
pub struct Home {
    note: HomeNote,
    before: Option<Arc<Away>>,
    word: watch::Sender<Word>,
    over: std::sync::Mutex<Option<oneshot::Receiver<()>>>,
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Why a stream has ended.
enum Ended {
    /// Nothing is left to carry.
    Over,
    /// The link, or the other agent.
    Broken(Failed),
    /// The migration was undone.
    Undone,
}

struct Carrier {
    context: Context,
    note: HomeNote,
    netns: Netns,
    tun: Tun,
    /// For the container, should it stay.
    kept: Kept,
    /// What it was handed while it ran: what it had no time to read goes on, too.
    passed: Passed,
    frozen: bool,
    /// Connections to older addresses, and what comes for them.
    before: Option<(Arc<Away>, mpsc::Receiver<Vec<u8>>)>,
    /// The old sandbox is kept as long as this is there.
    keeping: Option<Keeping>,
    counts: Relaying,
}

impl Home {
    /// Makes the old sandbox ready, and the way to the target. What comes reaches the container as before until it is diverted; blocks.
    ///
    /// # Errors
    /// When the namespace cannot be made ready; nothing is left then.
    pub(crate) fn prepare(
        context: &Context,
        migration: MigrationId,
        netns_path: PathBuf,
        (target, target_address): (Peer, String),
        fence: Option<Fence>,
        lifetime_s: u32,
    ) -> Result<Self, Failed> {
        let netns = Netns::open(&netns_path)?;
        let (addresses, _): (Vec<IpAddr>, u32) = relay::addresses_of(&netns, crate::target::INTERFACE)?;
        let (home, tun) = relay::prepare_home(&netns, crate::target::INTERFACE, &addresses)?;
        let before = context.aways.of_pod(&netns_path);
        let note = HomeNote {
            migration,
            target,
            target_address,
            netns: netns_path,
            home,
            fence,
            before: before.as_ref().map(|before| before.migration()),
            committed: None,
            lifetime_s,
        };
        let written = note::make_room(&notes(context))
            .and_then(|()| record::store(&note_of(context, Side::Home, migration), &note));
        if let Err(error) = written {
            relay::dismantle_home(&netns, &note.home)?;
            return Err(error.into());
        }
        Ok(Self::start(context, note, netns, tun))
    }

    /// Its container stands still.
    pub(crate) fn frozen(&self) {
        if let Some(before) = &self.before {
            before.silence();
        }
        self.word.send_if_modified(|word| {
            let first = matches!(word, Word::Open);
            if first {
                *word = Word::Frozen;
            }
            first
        });
    }

    /// That of a part that an agent before had; none when there was none, or its sandbox is gone.
    pub(crate) fn resumed(context: &Context, migration: MigrationId) -> Option<Self> {
        let file = note_of(context, Side::Home, migration);
        let note: HomeNote = match record::load(&file) {
            Ok(note) => note?,
            Err(error) => {
                tracing::error!(%error, %migration, "a relay cannot be taken up");
                return None;
            }
        };
        match Netns::open(&note.netns).and_then(|netns| Ok((Tun::open(&netns, End::Home)?, netns))) {
            Ok((tun, netns)) => Some(Self::start(context, note, netns, tun)),
            Err(error) => {
                tracing::info!(error = chain(&error), %migration, "a relay has ended with its pod");
                removed(&file, std::fs::remove_file(&file));
                None
            }
        }
    }

    fn start(context: &Context, note: HomeNote, netns: Netns, tun: Tun) -> Self {
        let word = watch::Sender::new(note.committed.map_or(Word::Open, Word::Committed));
        let (ending, over) = oneshot::channel();
        let before = note.before.and_then(|before| context.aways.get(before));
        let carrier = Carrier {
            context: context.clone(),
            note: note.clone(),
            netns,
            tun,
            kept: Kept::default(),
            passed: Passed::default(),
            frozen: note.committed.is_some(),
            before: before.clone().map(|before| (Arc::clone(&before), before.carry_on())),
            keeping: None,
            counts: context.metrics.relay(End::Home),
        };
        let heard = word.subscribe();
        tokio::spawn(async move {
            carrier.run(heard).await;
            let _nobody_waits = ending.send(());
        });
        Self { note, before, word, over: std::sync::Mutex::new(Some(over)) }
    }

    /// What the freeze diverts.
    pub(crate) fn diverted(&self) -> Diverted {
        Diverted { netns: self.note.netns.clone(), home: self.note.home.clone() }
    }

    /// The migration is committed and the source has stopped for good: the old sandbox stays for its address alone.
    pub(crate) fn commit(&self) {
        self.word.send_replace(Word::Committed(SystemTime::now()));
    }

    /// The container runs on here: what came for it meanwhile is handed to it, and nothing of the relay is left.
    pub(crate) async fn give_back(&self) {
        self.word.send_replace(Word::Undone);
        let over = self.over.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(over) = over {
            let _ended = over.await;
        }
    }
}

/// A stream to the target that is being made, or used.
struct Way {
    opening: Pin<Box<dyn Future<Output = Result<Streaming<CarryResponse>, Failed>> + Send>>,
    sender: mpsc::Sender<CarryRequest>,
    /// None until it is open.
    answers: Option<Streaming<CarryResponse>>,
    /// The target expects what comes.
    ready: bool,
    /// For one message.
    room: Option<OwnedPermit<CarryRequest>>,
    /// Nobody will say anything more of the migration.
    deaf: bool,
}

/// What a stream waits for.
enum Happening {
    /// Somebody says what becomes of the migration, or will say nothing more.
    Heard,
    /// Its time is over.
    Late,
    Opened(Result<Streaming<CarryResponse>, Failed>),
    Answered(Result<Option<CarryResponse>, Status>),
    /// There is room for a message; none when the stream has ended.
    Room(Option<OwnedPermit<CarryRequest>>),
    /// The container stands still, and may not have read what it was handed last.
    Unread,
    /// Something has come for the old address.
    Came(Result<Vec<u8>, podferry_network::Error>),
}

impl Way {
    fn new(carrier: &Carrier) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let note = &carrier.note;
        let begin = Request::Begin(CarryBegin { migration_id: note.migration.to_string() });
        let _never_full = sender.try_send(CarryRequest { kind: Some(begin) });
        let opening = open(carrier.context.clone(), note.target_address.clone(), note.target.clone(), receiver);
        Self { opening: Box::pin(opening), sender, answers: None, ready: false, room: None, deaf: false }
    }

    /// Sends packets, for which there is room.
    fn send(&mut self, packets: Vec<Vec<u8>>) {
        if let Some(room) = self.room.take() {
            drop(room.send(request(packets)));
        }
    }
}

impl Carrier {
    async fn run(mut self, mut heard: watch::Receiver<Word>) {
        let mut pause = PAUSES.0;
        loop {
            match self.carry(&mut heard).await {
                Ended::Over => break,
                Ended::Undone => {
                    self.hand_back().await;
                    break;
                }
                Ended::Broken(error) => {
                    tracing::warn!(%error, migration = %self.note.migration, "the relay's stream broke; it is begun again");
                }
            }
            if self.left().is_zero() {
                break;
            }
            if self.rest(&mut heard, pause).await.is_break() {
                self.hand_back().await;
                break;
            }
            pause = pause.saturating_mul(2).min(PAUSES.1);
        }
        self.end().await;
    }

    /// Between two streams; what is said of the migration counts meanwhile.
    async fn rest(&mut self, heard: &mut watch::Receiver<Word>, pause: Duration) -> ControlFlow<()> {
        let end = Instant::now() + pause;
        while let Ok(Ok(())) = timeout_at(end, heard.changed()).await {
            let word = *heard.borrow_and_update();
            self.hear(word, false)?;
        }
        sleep_until(end).await;
        ControlFlow::Continue(())
    }

    /// Until the stream ends, or the migration is undone.
    async fn carry(&mut self, heard: &mut watch::Receiver<Word>) -> Ended {
        heard.mark_changed();
        let mut way = Way::new(self);
        loop {
            let ended = match self.happening(&mut way, heard).await {
                Happening::Heard => {
                    let word = *heard.borrow_and_update();
                    self.hear(word, way.deaf).is_break().then_some(Ended::Undone)
                }
                Happening::Late => Some(Ended::Over),
                Happening::Opened(Ok(answers)) => {
                    way.answers = Some(answers);
                    None
                }
                Happening::Opened(Err(error)) => Some(Ended::Broken(error)),
                Happening::Answered(answer) => self.answered(&mut way, answer),
                Happening::Room(None) => Some(Ended::Broken("the stream has ended".into())),
                Happening::Room(room) => {
                    way.room = room;
                    None
                }
                Happening::Unread => {
                    self.send_unread(&mut way);
                    None
                }
                Happening::Came(packet) => self.came(&mut way, packet),
            };
            if let Some(ended) = ended {
                return ended;
            }
        }
    }

    async fn happening(&mut self, way: &mut Way, heard: &mut watch::Receiver<Word>) -> Happening {
        let left = self.left();
        let (has_room, opened) = (way.room.is_some(), way.answers.is_some());
        // Without a way to the target yet, the container has to get what comes all the same.
        let takes = has_room || !(way.ready || self.frozen);
        tokio::select! {
            biased;
            said = heard.changed(), if !way.deaf => {
                way.deaf = said.is_err();
                Happening::Heard
            }
            () = tokio::time::sleep(left) => Happening::Late,
            opened = &mut way.opening, if !opened => Happening::Opened(opened),
            answer = next(&mut way.answers) => Happening::Answered(answer),
            room = way.sender.clone().reserve_owned(), if way.ready && !has_room => Happening::Room(room.ok()),
            () = ready(()), if has_room && self.frozen && !self.passed.is_empty() => Happening::Unread,
            packet = came(&self.tun, &mut self.before), if takes => Happening::Came(packet),
        }
    }

    fn answered(&mut self, way: &mut Way, answer: Result<Option<CarryResponse>, Status>) -> Option<Ended> {
        match answer {
            Ok(Some(CarryResponse { kind: Some(Response::Ready(_)) })) => {
                way.ready = true;
                self.send_again(&way.sender);
                None
            }
            Ok(Some(CarryResponse { kind: Some(Response::Packets(packets)) })) => {
                self.take(packets);
                None
            }
            Ok(Some(CarryResponse { kind: None })) => None,
            Ok(None) if self.note.committed.is_some() => Some(Ended::Over),
            Ok(None) => Some(Ended::Broken("the target has ended it before the commit".into())),
            Err(status) => Some(self.refused(status)),
        }
    }

    /// What the container was handed before it stood still, and may not have read.
    fn send_unread(&mut self, way: &mut Way) {
        let unread = self.passed.take();
        if !unread.is_empty() {
            let packets = self.counted(unread);
            way.send(packets);
        }
    }

    fn came(&mut self, way: &mut Way, packet: Result<Vec<u8>, podferry_network::Error>) -> Option<Ended> {
        match packet.and_then(|first| self.gather(first)) {
            Ok(gathered) if gathered.is_empty() => None,
            Ok(gathered) => {
                way.send(gathered);
                None
            }
            // The device is gone, and with it the sandbox.
            Err(error) => {
                tracing::warn!(error = chain(&error), migration = %self.note.migration, "a relay has lost its home");
                Some(Ended::Over)
            }
        }
    }

    /// What an earlier stream may have lost. What comes twice is no harm.
    fn send_again(&self, sender: &mpsc::Sender<CarryRequest>) {
        let kept: Vec<_> = self.kept.iter().cloned().collect();
        for some in kept.chunks(AGAIN) {
            let _lost_as_on_any_link = sender.try_send(request(some.to_vec()));
        }
    }

    /// A part that is gone without a word has not been committed.
    fn hear(&mut self, word: Word, last: bool) -> ControlFlow<()> {
        match word {
            Word::Undone => return ControlFlow::Break(()),
            Word::Committed(at) => {
                self.frozen = true;
                self.note_committed(at);
            }
            Word::Open | Word::Frozen if last => return ControlFlow::Break(()),
            Word::Open => {}
            Word::Frozen => self.frozen = true,
        }
        ControlFlow::Continue(())
    }

    /// Behind the commit a target that knows nothing of it has ended it.
    fn refused(&self, status: Status) -> Ended {
        match status.code() {
            Code::NotFound | Code::PermissionDenied | Code::Unimplemented if self.note.committed.is_some() => {
                Ended::Over
            }
            _ => Ended::Broken(status.into()),
        }
    }

    /// What has come for the old address, as much at once as there is; without what is for the container, which still runs.
    fn gather(&mut self, first: Vec<u8>) -> Result<Vec<Vec<u8>>, podferry_network::Error> {
        if !self.frozen {
            return Ok(self.pass(first).into_iter().collect());
        }
        let gathered = batch(first, || self.try_came())?;
        Ok(self.counted(gathered))
    }

    /// What goes to the target, and is kept as long as it may have to be given back.
    fn counted(&mut self, packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        self.counts.sent(bytes_of(&packets));
        if self.note.committed.is_none() {
            for packet in &packets {
                self.kept.push(packet.clone());
            }
        }
        packets
    }

    /// Hands a packet to the container, unless it opens a connection.
    fn pass(&mut self, packet: Vec<u8>) -> Option<Vec<u8>> {
        if relay::opens_connection(&packet) {
            self.kept.push(packet.clone());
            return Some(packet);
        }
        match self.before_of(relay::destination_of(&packet)) {
            Some(before) => before.hand_over(&packet),
            None => self.hand_over(&packet),
        }
        self.passed.push(packet);
        None
    }

    fn try_came(&mut self) -> Result<Option<Vec<u8>>, podferry_network::Error> {
        let waits = self.before.as_mut().and_then(|(_, packets)| packets.try_recv().ok());
        waits.map_or_else(|| self.tun.try_receive(), |packet| Ok(Some(packet)))
    }

    /// What the container's sockets answer goes out as if it were still here, or to where its older addresses are. Nobody there can say
    /// anything in the name of others.
    fn take(&self, packets: CarryPackets) {
        for packet in packets.packets {
            let source = relay::source_of(&packet);
            match self.before_of(source) {
                Some(before) => before.answer(packet.to_vec()),
                None if source.is_some_and(|source| self.note.home.addresses.contains(&source)) => {
                    self.hand_over(&packet);
                }
                None => {
                    tracing::debug!(?source, migration = %self.note.migration, "a packet of another sender is dropped");
                }
            }
        }
    }

    /// Who has that address, when it is an older one.
    fn before_of(&self, address: Option<IpAddr>) -> Option<&Arc<Away>> {
        let (before, _) = self.before.as_ref()?;
        before.addresses().contains(&address?).then_some(before)
    }

    fn hand_over(&self, packet: &[u8]) {
        if let Err(error) = self.tun.send(packet) {
            tracing::debug!(error = chain(&error), migration = %self.note.migration, "a packet of a relay is lost");
        }
    }

    fn note_committed(&mut self, at: SystemTime) {
        if self.note.committed.is_some() && self.keeping.is_some() {
            return;
        }
        self.note.committed = Some(at);
        let _no_use_any_more = self.kept.take();
        if let Err(error) = record::store(&note_of(&self.context, Side::Home, self.note.migration), &self.note) {
            tracing::warn!(%error, migration = %self.note.migration, "connections end with this agent: they cannot be written down");
        }
        self.keeping = match self.note.fence.as_ref().map(Fence::go_on_staying) {
            Some(Ok(keeping)) => Some(keeping),
            Some(Err(error)) => {
                tracing::warn!(%error, "the old sandbox cannot be kept: its connections end with it");
                None
            }
            None => None,
        };
    }

    fn left(&self) -> Duration {
        let lifetime = super::lifetime(&self.context, self.note.lifetime_s);
        // The target counts from later on, and has the say; this is for one that says nothing any more.
        let end = self.note.committed.map(|at| at + lifetime + PAUSES.1 * 5);
        end.map_or(Duration::from_secs(24 * 3600), |end| end.duration_since(SystemTime::now()).unwrap_or_default())
    }

    async fn hand_back(&mut self) {
        if let Err(error) = relay::undivert(&self.netns, &self.note.home) {
            tracing::error!(error = chain(&error), netns = %self.note.netns.display(), "what comes for a pod does not reach it");
        }
        while let Ok(Some(packet)) = self.try_came() {
            self.kept.push(packet);
        }
        if let Some((before, _)) = &self.before {
            before.stay();
        }
        for packet in self.kept.take() {
            match self.before_of(relay::destination_of(&packet)) {
                Some(before) => before.put(&packet),
                None => self.hand_over(&packet),
            }
        }
        tokio::time::sleep(HAND_ON).await;
    }

    /// Nothing of it is left, and the old sandbox may go.
    async fn end(mut self) {
        let (netns, home) = (self.netns.clone(), self.note.home.clone());
        if let Ok(Err(error)) = spawn_blocking(move || relay::dismantle_home(&netns, &home)).await {
            tracing::error!(error = chain(&error), netns = %self.note.netns.display(), "something of a relay stays in a pod's namespace");
        }
        let file = note_of(&self.context, Side::Home, self.note.migration);
        removed(&file, std::fs::remove_file(&file));
        if let Some(keeping) = self.keeping.take() {
            keeping.end().await;
        }
        if self.note.committed.is_none() {
            return;
        }
        if let Some((before, _)) = &self.before {
            before.end().await;
        }
        if let Some(fence) = &self.note.fence {
            let (fence, context) = (fence.clone(), self.context.clone());
            let ended = spawn_blocking(move || fence.end_sandbox(&context)).await;
            if let Ok(Err(error)) = ended {
                tracing::warn!(%error, "the kubelet ends the old sandbox when it tries again");
            }
        }
        tracing::info!(migration = %self.note.migration, "the old sandbox of a pod that has moved may go");
    }
}

/// The next that comes, for this address or an older one.
async fn came(
    tun: &Tun,
    before: &mut Option<(Arc<Away>, mpsc::Receiver<Vec<u8>>)>,
) -> Result<Vec<u8>, podferry_network::Error> {
    let Some((_, packets)) = before else { return tun.receive().await };
    tokio::select! {
        packet = tun.receive() => packet,
        Some(packet) = packets.recv() => Ok(packet),
    }
}

fn request(packets: Vec<Vec<u8>>) -> CarryRequest {
    CarryRequest { kind: Some(Request::Packets(message(packets))) }
}

async fn next(answers: &mut Option<Streaming<CarryResponse>>) -> Result<Option<CarryResponse>, tonic::Status> {
    match answers {
        Some(answers) => answers.message().await,
        None => std::future::pending().await,
    }
}

async fn open(
    context: Context,
    address: String,
    target: Peer,
    requests: mpsc::Receiver<CarryRequest>,
) -> Result<Streaming<CarryResponse>, Failed> {
    let channel = podferry_common::tls::connect(&address, &context.identity, &target).await?;
    Ok(RelayServiceClient::new(channel).carry(ReceiverStream::new(requests)).await?.into_inner())
}

/// Takes up what an agent before has left. That of a part that has not ended is found by the part.
pub(super) async fn recover(context: &Context, migration: MigrationId, standing: Option<Standing>) {
    if matches!(standing, Some(Standing::Open | Standing::Sealed)) {
        return;
    }
    let Some(home) = Home::resumed(context, migration) else { return };
    match home.note.committed {
        Some(_) => home.frozen(),
        None if has_moved(standing) => {
            home.frozen();
            home.commit();
        }
        None => home.give_back().await,
    }
}

/// One as it is listed; none when nothing of it is written down.
pub(super) fn described(context: &Context, migration: MigrationId) -> Option<RelayEnd> {
    let note: Option<HomeNote> = record::load(&note_of(context, Side::Home, migration)).unwrap_or_else(|error| {
        tracing::error!(%error, %migration, "a relay is not listed");
        None
    });
    let note = note?;
    Some(RelayEnd {
        migration_id: migration.to_string(),
        is_home: true,
        peer_node: super::list::node_of(&note.target),
        addresses: note.home.addresses.iter().map(ToString::to_string).collect(),
        ..RelayEnd::default()
    })
}

/// Whether a pod's old address stays here, as it is written down.
pub(crate) fn stays(context: &Context, migration: MigrationId) -> bool {
    note_of(context, Side::Home, migration).exists()
}
