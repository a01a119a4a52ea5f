//! Where the old address is: what comes for it is kept from the sockets that leave, and carried to where the container is.

use std::net::IpAddr;
use std::ops::ControlFlow;
use std::path::PathBuf;
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
use podferry_proto::v1::{CarryBegin, CarryPackets, CarryRequest, CarryResponse};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::away::Away;
use super::kept::{Kept, Passed};
use super::note::{self, Side};
use super::{has_moved, note_of, notes, removed};
use crate::context::Context;
use crate::journal::Standing;
use crate::metrics::Relaying;
use crate::pods::{Fence, Keeping};
use crate::worker::messages::Diverted;
use crate::worker::record;

/// Messages that wait for the connection.
const QUEUE: usize = 64;
/// The most bytes of packets in one message, apart from the last of them.
const MESSAGE: usize = 256 << 10;
/// Packets in one message that is sent again: of 64 KiB each they are as much as one may have.
const AGAIN: usize = 32;
/// The pauses before a stream that broke is begun again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long the kernel gets to hand on what it was given: it does so before it returns, as a rule.
const HAND_ON: Duration = Duration::from_millis(5);

/// What is written down of one; enough to undo it, too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HomeNote {
    migration: MigrationId,
    target: Peer,
    target_address: String,
    /// The old sandbox's network namespace.
    pub netns: PathBuf,
    /// What was changed there.
    pub home: relay::Home,
    /// What keeps the old sandbox.
    fence: Option<Fence>,
    /// The migration by which the container came here, if connections to older addresses live on: they are carried on with it.
    #[serde(default)]
    before: Option<MigrationId>,
    /// When the migration was committed.
    #[serde(default)]
    committed: Option<SystemTime>,
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

/// Why a stream has ended.
enum Ended {
    /// Nothing is left to carry.
    Over,
    /// The link, or the other agent.
    Broken(Box<dyn std::error::Error + Send + Sync>),
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

impl HomeNote {
    /// What the freeze diverts.
    pub(crate) fn diverted(&self) -> Diverted {
        Diverted { netns: self.netns.clone(), home: self.home.clone() }
    }
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
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
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

    /// What has to be diverted at the freeze.
    pub(crate) fn note(&self) -> &HomeNote {
        &self.note
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
            if self.is_late() {
                break;
            }
            let undone = async { heard.wait_for(|word| matches!(word, Word::Undone)).await.map(drop) };
            match tokio::time::timeout(pause, undone).await {
                Ok(Ok(())) => {
                    self.hand_back().await;
                    break;
                }
                // Whoever had the other end will say nothing more.
                Ok(Err(_)) => tokio::time::sleep(pause).await,
                Err(_) => {}
            }
            pause = pause.saturating_mul(2).min(PAUSES.1);
        }
        self.end().await;
    }

    /// Until the stream ends, or the migration is undone.
    async fn carry(&mut self, heard: &mut watch::Receiver<Word>) -> Ended {
        heard.mark_changed();
        let (sender, receiver) = mpsc::channel(QUEUE);
        let begin = Request::Begin(CarryBegin { migration_id: self.note.migration.to_string() });
        let _never_full = sender.try_send(CarryRequest { kind: Some(begin) });
        let opening = open(self.context.clone(), self.note.target_address.clone(), self.note.target.clone(), receiver);
        tokio::pin!(opening);
        let mut answers: Option<Streaming<CarryResponse>> = None;
        let (mut deaf, mut ready, mut room) = (false, false, None);
        loop {
            let lateness = self.left();
            tokio::select! {
                biased;
                changed = heard.changed(), if !deaf => {
                    deaf = changed.is_err();
                    let word = *heard.borrow_and_update();
                    if self.hear(word, deaf).is_break() {
                        return Ended::Undone;
                    }
                }
                () = tokio::time::sleep(lateness) => return Ended::Over,
                opened = &mut opening, if answers.is_none() => match opened {
                    Ok(stream) => answers = Some(stream),
                    Err(error) => return Ended::Broken(error),
                },
                answer = next(&mut answers) => match answer.map(|answer| answer.map(|answer| answer.kind)) {
                    Ok(Some(Some(Response::Ready(_)))) => {
                        ready = true;
                        self.send_again(&sender);
                    }
                    Ok(Some(Some(Response::Packets(packets)))) => self.take(packets),
                    Ok(Some(None)) => {}
                    Ok(None) if self.note.committed.is_some() => return Ended::Over,
                    Ok(None) => return Ended::Broken("the target has ended it before the commit".into()),
                    Err(status) => return self.refused(status),
                },
                permit = sender.reserve(), if ready && room.is_none() => match permit {
                    Ok(permit) => room = Some(permit),
                    Err(_) => return Ended::Broken("the stream has ended".into()),
                },
                () = std::future::ready(()), if room.is_some() && self.frozen && !self.passed.is_empty() => {
                    let unread = self.passed.take();
                    if let Some(permit) = room.take_if(|_| !unread.is_empty()) {
                        permit.send(packets(self.counted(unread)));
                    }
                }
                // Without a way to the target yet, the container has to get what comes all the same.
                packet = came(&self.tun, &mut self.before), if room.is_some() || !(ready || self.frozen) => match packet.and_then(|first| self.gather(first)) {
                    Ok(gathered) if gathered.is_empty() => {}
                    Ok(gathered) => {
                        if let Some(permit) = room.take() {
                            permit.send(packets(gathered));
                        }
                    }
                    // The device is gone, and with it the sandbox.
                    Err(error) => {
                        tracing::warn!(error = chain(&error), migration = %self.note.migration, "a relay has lost its home");
                        return Ended::Over;
                    }
                },
            }
        }
    }

    /// What an earlier stream may have lost. What comes twice is no harm.
    fn send_again(&self, sender: &mpsc::Sender<CarryRequest>) {
        let kept: Vec<_> = self.kept.iter().cloned().collect();
        for some in kept.chunks(AGAIN) {
            let _lost_as_on_any_link = sender.try_send(packets(some.to_vec()));
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
        let (mut bytes, mut gathered) = (first.len(), vec![first]);
        while bytes < MESSAGE
            && let Some(packet) = self.try_came()?
        {
            bytes += packet.len();
            gathered.push(packet);
        }
        Ok(self.counted(gathered))
    }

    /// What goes to the target, and is kept as long as it may have to be given back.
    fn counted(&mut self, packets: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        self.counts.sent(packets.iter().map(Vec::len).sum());
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
                Some(before) => before.answer(packet.into()),
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
        let lifetime = super::lifetime(&self.context);
        // The target counts from later on, and has the say; this is for one that says nothing any more.
        let end = self.note.committed.map(|at| at + lifetime + PAUSES.1 * 5);
        end.map_or(Duration::from_secs(24 * 3600), |end| end.duration_since(SystemTime::now()).unwrap_or_default())
    }

    fn is_late(&self) -> bool {
        self.left().is_zero()
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
                Some(before) => before.put(packet),
                None => self.hand_over(&packet),
            }
        }
        tokio::time::sleep(HAND_ON).await;
    }

    /// Nothing of it is left, and the old sandbox may go.
    async fn end(mut self) {
        if let Err(error) = relay::dismantle_home(&self.netns, &self.note.home) {
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
            before.end();
        }
        if let Some(fence) = &self.note.fence {
            let (fence, context) = (fence.clone(), self.context.clone());
            let ended = tokio::task::spawn_blocking(move || fence.end_sandbox(&context)).await;
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

fn packets(packets: Vec<Vec<u8>>) -> CarryRequest {
    let packets = CarryPackets { packets: packets.into_iter().map(Into::into).collect() };
    CarryRequest { kind: Some(Request::Packets(packets)) }
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
) -> Result<Streaming<CarryResponse>, Box<dyn std::error::Error + Send + Sync>> {
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

/// Whether a pod's old address stays here, as it is written down.
pub(crate) fn stays(context: &Context, migration: MigrationId) -> bool {
    note_of(context, Side::Home, migration).exists()
}
