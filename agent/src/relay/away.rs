//! Where the container is: its old addresses are on a device of their own here, and what comes for them is handed to its sockets.
//!
//! When it moves on while old connections live, what comes is handed to the [`Home`](super::Home) that it has here then, which carries it on
//! with what comes for its newer address, and what comes back goes the way that it came.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use podferry_common::MigrationId;
use podferry_common::failure::chain;
use podferry_common::identity::Peer;
use podferry_network::Netns;
use podferry_network::relay::{self, End, Tun};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;

use super::kept::Kept;
use super::note::{self, Side};
use super::{has_moved, note_of, notes, removed};
use crate::context::Context;
use crate::journal::Standing;
use crate::metrics::Relaying;
use crate::target::Relayed;
use crate::worker::record;

/// How long whoever asks for the pod by name may still get its old address, after the container runs there: kube-proxy looks once a
/// second, and clients have names in their own memory for a few.
const OLD_NAMES: Duration = Duration::from_secs(10);
/// How often it is looked whether a connection is left.
const LOOK: Duration = Duration::from_secs(1);
/// How long the last packets of connections that were ended get to go home.
const LAST_WORD: Duration = Duration::from_millis(500);
/// Packets that wait between this relay and the one to where the container has moved on; more are lost, and TCP repeats them.
const ONWARD: usize = 4096;
/// The least with which an interface keeps addresses of IPv6.
const LEAST_MTU: u32 = 1280;

/// What is written down of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AwayNote {
    migration: MigrationId,
    /// Who may send for it.
    home: Peer,
    /// The pod's network namespace.
    netns: PathBuf,
    addresses: Vec<IpAddr>,
    mtu: u32,
    /// For how many seconds it was asked; 0 for as long as the node is set to.
    #[serde(default)]
    lifetime_s: u32,
    /// When its container ran.
    #[serde(default)]
    resumed: Option<SystemTime>,
}

/// Those of this node. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Aways(Arc<Mutex<HashMap<MigrationId, Arc<Away>>>>);

impl Aways {
    /// That of a migration.
    pub fn get(&self, migration: MigrationId) -> Option<Arc<Away>> {
        self.lock().get(&migration).cloned()
    }

    /// That of a pod, by its network namespace.
    pub fn of_pod(&self, netns: &Path) -> Option<Arc<Away>> {
        self.lock().values().find(|away| away.note.netns == netns).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MigrationId, Arc<Away>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has become of a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// The container does not run yet.
    NotYet,
    /// What the container's sockets send goes home.
    Through,
    /// It has moved on: what comes from there does.
    Onward,
    /// It has ended.
    Over,
}

/// One of them.
#[derive(Debug)]
pub struct Away {
    context: Context,
    note: AwayNote,
    netns: Netns,
    tun: Tun,
    door: Mutex<Door>,
    /// When its container ran.
    since: OnceLock<SystemTime>,
    leaves: watch::Sender<Leaves>,
    /// What comes back from where the container has moved on.
    answers: (mpsc::Sender<Vec<u8>>, tokio::sync::Mutex<mpsc::Receiver<Vec<u8>>>),
    counts: Relaying,
    /// Which stream is the newest; only that reads what the sockets send.
    stream: watch::Sender<u64>,
}

#[derive(Debug)]
enum Door {
    /// What comes waits.
    Closed(Kept),
    /// It is handed over; to be reached under its old name until then.
    Open(SystemTime),
    /// It is carried on.
    Onward(mpsc::Sender<Vec<u8>>),
    /// There is nobody behind it.
    Gone,
}

impl Away {
    /// Gives the pod's namespace its old addresses, and expects what comes for them from there; blocks.
    ///
    /// # Errors
    /// When the namespace does not take them; nothing is left then.
    pub(crate) fn prepare(
        context: &Context,
        migration: MigrationId,
        home: Peer,
        netns: PathBuf,
        relayed: Relayed,
    ) -> Result<Arc<Self>, Box<dyn std::error::Error + Send + Sync>> {
        let Relayed { addresses, mtu, lifetime_s } = relayed;
        let note = AwayNote { migration, home, netns, addresses, mtu, lifetime_s, resumed: None };
        note::make_room(&notes(context))?;
        let file = note_of(context, Side::Away, migration);
        record::store(&file, &note)?;
        let made = Netns::open(&note.netns)
            .and_then(|netns| Ok((relay::prepare_away(&netns, &note.addresses, while_restored(mtu))?, netns)));
        match made {
            Ok((tun, netns)) => Ok(Self::enter(context, note, netns, tun)),
            Err(error) => {
                removed(&file, std::fs::remove_file(&file));
                Err(error.into())
            }
        }
    }

    fn enter(context: &Context, note: AwayNote, netns: Netns, tun: Tun) -> Arc<Self> {
        let (answers, answered) = mpsc::channel(ONWARD);
        let away = Arc::new(Self {
            context: context.clone(),
            netns,
            tun,
            door: Mutex::new(Door::Closed(Kept::default())),
            since: OnceLock::new(),
            leaves: watch::Sender::new(Leaves::NotYet),
            answers: (answers, tokio::sync::Mutex::new(answered)),
            stream: watch::Sender::new(0),
            counts: context.metrics.relay(End::Away),
            note,
        });
        context.aways.lock().insert(away.note.migration, Arc::clone(&away));
        away
    }

    /// The container comes to run in another pod than the one that this was prepared for: the same is there then, with what has waited. The
    /// stream from home breaks, and is begun again to that. Idempotent; blocks.
    ///
    /// # Errors
    /// When the other pod's namespace does not take the addresses; this one stays then.
    pub(crate) fn move_to(&self, netns: PathBuf) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if self.note.netns == netns {
            return Ok(());
        }
        let AwayNote { migration, home, addresses, mtu, lifetime_s, .. } = self.note.clone();
        let relayed = Relayed { addresses, mtu, lifetime_s };
        let moved = Self::prepare(&self.context, migration, home, netns, relayed)?;
        if let Door::Closed(kept) = std::mem::replace(&mut *self.lock(), Door::Gone) {
            *moved.lock() = Door::Closed(kept);
        }
        let _ends_the_stream = self.take_over();
        if let Err(error) = relay::dismantle_away(&self.netns, &self.note.addresses) {
            tracing::info!(error = chain(&error), %migration, "old addresses go with the pod that stood in for another");
        }
        Ok(())
    }

    /// By which migration it came.
    pub(super) fn migration(&self) -> MigrationId {
        self.note.migration
    }

    /// Who may send for it.
    pub(super) fn home(&self) -> &Peer {
        &self.note.home
    }

    /// The pod's namespace.
    pub(super) fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Since when its container has run here, and until when it lives at most; none before it runs.
    pub(super) fn span(&self) -> Option<(SystemTime, SystemTime)> {
        let since = *self.since.get()?;
        Some((since, since + super::lifetime(&self.context, self.note.lifetime_s)))
    }

    /// Whether this peer may send for it.
    pub fn is_of(&self, peer: Option<&Peer>) -> bool {
        peer == Some(&self.note.home)
    }

    /// Takes a packet from home. It reaches the container's old addresses alone.
    pub fn put(&self, packet: &[u8]) {
        if !relay::destination_of(packet).is_some_and(|address| self.note.addresses.contains(&address)) {
            return tracing::debug!(migration = %self.note.migration, "a packet for somebody else is dropped");
        }
        let mut door = self.lock();
        match &mut *door {
            // Copied: what waits must not keep the message that it came in.
            Door::Closed(kept) => kept.push(packet.to_vec()),
            Door::Open(names_end) if relay::opens_connection(packet) && SystemTime::now() > *names_end => {}
            Door::Open(_) => self.hand_over(packet),
            Door::Onward(on) => drop(on.try_send(packet.to_vec())),
            Door::Gone => {}
        }
    }

    pub(super) fn hand_over(&self, packet: &[u8]) {
        if let Err(error) = self.tun.send(packet) {
            tracing::debug!(error = chain(&error), migration = %self.note.migration, "a packet from home is lost");
        }
    }

    /// The container's sockets are whole, and it runs: hands over what has waited, and at once what comes from now on. Idempotent.
    pub(crate) fn open(self: &Arc<Self>) {
        let resumed = *self.since.get_or_init(|| self.note.resumed.unwrap_or_else(SystemTime::now));
        let mut door = self.lock();
        let Door::Closed(kept) = &mut *door else { return };
        kept.take().iter().for_each(|packet| self.hand_over(packet));
        *door = Door::Open(resumed + OLD_NAMES);
        drop(door);
        self.leaves.send_replace(Leaves::Through);
        let away = Arc::clone(self);
        tokio::spawn(async move { away.live(resumed).await });
    }

    /// It runs for good: its sockets may send as much at once as they could, and it is written down. Blocks.
    pub(crate) fn settle(&self) {
        if let Err(error) = podferry_network::set_mtu(&self.netns, End::Away.device(), self.note.mtu) {
            tracing::warn!(error = chain(&error), migration = %self.note.migration, "old connections send small segments");
        }
        let note = AwayNote { resumed: self.since.get().copied(), ..self.note.clone() };
        if let Err(error) = record::store(&self.file(), &note) {
            tracing::warn!(%error, migration = %note.migration, "connections end with this agent: they cannot be written down");
        }
    }

    /// The container there was is gone: what comes waits for another.
    pub(crate) fn close(&self) {
        let mut door = self.lock();
        if matches!(*door, Door::Open(_)) {
            *door = Door::Closed(Kept::default());
            self.leaves.send_replace(Leaves::NotYet);
        }
    }

    /// The old addresses.
    pub(crate) fn addresses(&self) -> &[IpAddr] {
        &self.note.addresses
    }

    /// Bytes of the largest packet.
    pub(crate) fn mtu(&self) -> u32 {
        self.note.mtu
    }

    /// The container is about to move on: from now on what comes is given to whoever has this.
    pub(super) fn carry_on(&self) -> mpsc::Receiver<Vec<u8>> {
        let (on, packets) = mpsc::channel(ONWARD);
        let mut door = self.lock();
        if !matches!(*door, Door::Gone) {
            *door = Door::Onward(on);
        }
        packets
    }

    /// The container stands still here: nothing that its sockets say goes home any more, and what comes from where it goes does.
    pub(super) fn silence(&self) {
        if *self.leaves.borrow() == Leaves::Through {
            self.leaves.send_replace(Leaves::Onward);
        }
    }

    /// It stays: as before.
    pub(super) fn stay(self: &Arc<Self>) {
        let mut door = self.lock();
        if !matches!(*door, Door::Onward(_)) {
            return;
        }
        *door = Door::Closed(Kept::default());
        drop(door);
        self.open();
    }

    /// Takes what comes back from where the container has moved on.
    pub(super) fn answer(&self, packet: Vec<u8>) {
        let _lost_as_on_any_link = self.answers.0.try_send(packet);
    }

    /// What is due with its packets.
    pub fn leaves(&self) -> watch::Receiver<Leaves> {
        self.leaves.subscribe()
    }

    /// So many bytes have gone home.
    pub fn sent(&self, bytes: usize) {
        self.counts.sent(bytes);
    }

    /// A stream from home has begun; it ends when this says that there is another.
    pub fn take_over(&self) -> (u64, watch::Receiver<u64>) {
        self.stream.send_modify(|number| *number += 1);
        let newest = self.stream.subscribe();
        let number = *newest.borrow();
        (number, newest)
    }

    /// Waits for what is to go home.
    ///
    /// # Errors
    /// When the device cannot be read.
    pub async fn next(&self) -> Result<Vec<u8>, podferry_network::Error> {
        if *self.leaves.borrow() != Leaves::Onward {
            return self.tun.receive().await;
        }
        match self.answers.1.lock().await.recv().await {
            Some(packet) => Ok(packet),
            // Its other end is here.
            None => std::future::pending().await,
        }
    }

    /// What of that waits already.
    ///
    /// # Errors
    /// When the device cannot be read.
    pub fn try_next(&self) -> Result<Option<Vec<u8>>, podferry_network::Error> {
        if *self.leaves.borrow() != Leaves::Onward {
            return self.tun.try_receive();
        }
        Ok(self.answers.1.try_lock().ok().and_then(|mut answers| answers.try_recv().ok()))
    }

    /// Until no connection is left, or it is late.
    async fn live(self: Arc<Self>, since: SystemTime) {
        let lifetime = super::lifetime(&self.context, self.note.lifetime_s);
        loop {
            tokio::time::sleep(LOOK).await;
            if *self.leaves.borrow() != Leaves::Through || self.is_carried_on() {
                return;
            }
            let age = SystemTime::now().duration_since(since).unwrap_or_default();
            let left = self.connections().await;
            self.counts.lives(left);
            if age < lifetime && (age < OLD_NAMES || left > 0) {
                continue;
            }
            if left > 0 {
                self.end_connections().await;
            }
            tracing::info!(migration = %self.note.migration, connections = left, age_s = age.as_secs(), "a relay has ended");
            return self.end().await;
        }
    }

    /// Its time is over: both ends of each connection are told so, while there still is a way.
    async fn end_connections(&self) {
        let (netns, addresses) = (self.netns.clone(), self.note.addresses.clone());
        let ended = spawn_blocking(move || relay::end_connections(&netns, &addresses)).await;
        match ended {
            Ok(Ok(count)) => {
                tracing::warn!(migration = %self.note.migration, connections = count, "the relay's time is over: connections to the pod's old address were reset");
            }
            Ok(Err(error)) => {
                tracing::warn!(error = chain(&error), "connections of a relay whose time is over end without a word");
            }
            Err(error) => tracing::error!(%error, "connections of a relay whose time is over end without a word"),
        }
        tokio::time::sleep(LAST_WORD).await;
    }

    /// Its sockets are no measure then.
    pub(super) fn is_carried_on(&self) -> bool {
        matches!(*self.lock(), Door::Onward(_))
    }

    async fn connections(&self) -> usize {
        let (netns, addresses) = (self.netns.clone(), self.note.addresses.clone());
        let counted = spawn_blocking(move || relay::connections_of(&netns, &addresses)).await;
        match counted {
            Ok(Ok(count)) => count,
            // It lives until its end then.
            Ok(Err(error)) => {
                tracing::warn!(error = chain(&error), "old connections cannot be counted");
                1
            }
            Err(_) => 1,
        }
    }

    /// Ends it: nothing of it is left in the namespace. Idempotent.
    pub(crate) async fn end(&self) {
        *self.lock() = Door::Gone;
        self.leaves.send_replace(Leaves::Over);
        self.context.aways.lock().remove(&self.note.migration);
        let (netns, addresses) = (self.netns.clone(), self.note.addresses.clone());
        if let Ok(Err(error)) = spawn_blocking(move || relay::dismantle_away(&netns, &addresses)).await {
            tracing::warn!(error = chain(&error), netns = %self.note.netns.display(), "old addresses stay in a pod's namespace");
        }
        removed(&self.file(), std::fs::remove_file(self.file()));
    }

    fn file(&self) -> PathBuf {
        note_of(&self.context, Side::Away, self.note.migration)
    }

    fn lock(&self) -> MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Another than it is to have: CRIU restores sockets with small segments, and idle ones keep them until the MTU of their route changes.
const fn while_restored(mtu: u32) -> u32 {
    if mtu > LEAST_MTU { mtu - 1 } else { mtu + 1 }
}

/// Takes up what an agent before has left.
pub(super) async fn recover(context: &Context, migration: MigrationId, standing: Option<Standing>) {
    let file = note_of(context, Side::Away, migration);
    let note: AwayNote = match record::load(&file) {
        Ok(Some(note)) => note,
        Ok(None) => return,
        Err(error) => return tracing::error!(%error, %migration, "a relay cannot be taken up"),
    };
    let opened = Netns::open(&note.netns).and_then(|netns| Ok((Tun::open(&netns, End::Away)?, netns)));
    let (tun, netns) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            tracing::info!(error = chain(&error), %migration, "a relay has ended with its pod");
            return removed(&file, std::fs::remove_file(&file));
        }
    };
    let runs = note.resumed.is_some();
    let away = Away::enter(context, note, netns, tun);
    match standing {
        // The part opens it, or ends it.
        Some(Standing::Open | Standing::Sealed) => {}
        _ if runs && has_moved(standing) => away.open(),
        _ => away.end().await,
    }
}
