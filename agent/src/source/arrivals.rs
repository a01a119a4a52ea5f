//! Keeps what comes for the container while its link is cut, and hands it on: to the target, or back.
//!
//! Nothing of a migration waits for this or fails by it: see [`podferry_proto::delivery`].

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use podferry_common::MigrationId;
use podferry_common::failure::chain;
use podferry_network::{Capture, Captured, ContainerLink, Error, Replayer};
use podferry_proto::v1::deliver_request::Kind;
use podferry_proto::v1::delivery_service_client::DeliveryServiceClient;
use podferry_proto::v1::{DeliverBegin, DeliverPackets, DeliverRequest};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::FreezeOrder;
use crate::context::Context;

/// The most that is kept, in bytes: what 64 connections have under way with windows of 64 KiB.
const MOST_KEPT: usize = 4 << 20;
/// How long packets still go astray when the target has told where the address is: neighbours and switches are told three times,
/// a quarter of a second apart.
const ASTRAY: Duration = Duration::from_secs(1);

/// What has become of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// It is not cut yet.
    Watch,
    /// It was cut.
    Cut(SystemTime),
    /// It is joined again, and the container runs on.
    GiveBack,
    /// The container has left.
    EndSoon,
}

/// Told what becomes of the link; ends when it is dropped.
#[derive(Debug)]
pub(super) struct Arrivals(watch::Sender<Word>);

impl Arrivals {
    /// Begins to look. The link is not cut yet.
    pub(super) fn watch(context: &Context, order: &FreezeOrder, link: &ContainerLink) -> Result<Self, Error> {
        let host_interface = link.peer.clone().unwrap_or_default();
        let addresses: Vec<IpAddr> = link.addresses.iter().map(podferry_network::IpNet::addr).collect();
        let capture = Capture::open(&addresses, &host_interface)?;
        let (words, heard) = watch::channel(Word::Watch);
        let watcher = Watcher {
            context: context.clone(),
            migration: order.migration,
            target: order.target.clone(),
            target_address: order.target_address.clone(),
            link: link.clone(),
            host_interface,
            kept: VecDeque::new(),
            kept_bytes: 0,
            cut_at: None,
            stream: None,
            room: MOST_KEPT,
        };
        tokio::spawn(watcher.run(capture, heard));
        Ok(Self(words))
    }

    /// The link was cut: what came since goes to the target.
    pub(super) fn link_was_cut(&self, at: SystemTime) {
        self.0.send_replace(Word::Cut(at));
    }

    /// The link is joined again: what came in between goes to the container.
    pub(super) fn give_back(&self) {
        self.0.send_replace(Word::GiveBack);
    }

    /// The container has left. What still comes for it goes on for a while.
    pub(super) fn end_soon(&self) {
        self.0.send_replace(Word::EndSoon);
    }
}

struct Watcher {
    context: Context,
    migration: MigrationId,
    target: podferry_common::identity::Peer,
    target_address: String,
    link: ContainerLink,
    host_interface: String,
    /// For the container, should it stay.
    kept: VecDeque<Captured>,
    kept_bytes: usize,
    cut_at: Option<SystemTime>,
    /// To the target.
    stream: Option<mpsc::UnboundedSender<DeliverRequest>>,
    /// Bytes that may still be sent: a target that is not there yet keeps no more, and what waits for the connection is bounded so.
    room: usize,
}

impl Watcher {
    async fn run(mut self, capture: Capture, mut heard: watch::Receiver<Word>) {
        loop {
            tokio::select! {
                biased;
                changed = heard.changed() => {
                    let word = *heard.borrow_and_update();
                    match word {
                        _ if changed.is_err() => return,
                        Word::Watch => {}
                        Word::Cut(at) => self.begin(at),
                        Word::GiveBack => return self.give_back(),
                        Word::EndSoon => return self.end(&capture).await,
                    }
                }
                captured = capture.next() => match captured {
                    Ok(captured) => self.take(captured),
                    Err(error) => return tracing::warn!(error = chain(&error), "what comes in the freeze cannot be kept"),
                },
            }
        }
    }

    /// Opens the way to the target for what has come since the cut.
    fn begin(&mut self, at: SystemTime) {
        self.cut_at = Some(at);
        self.kept.retain(|captured| captured.at >= at);
        self.kept_bytes = self.kept.iter().map(|captured| captured.packet.len()).sum();
        let (sender, receiver) = mpsc::unbounded_channel();
        let (context, target, address) = (self.context.clone(), self.target.clone(), self.target_address.clone());
        tokio::spawn(async move {
            match deliver(&context, &address, &target, receiver).await {
                Ok(delivered) => tracing::debug!(delivered, "packets of the freeze were handed on"),
                Err(error) => tracing::warn!(%error, "packets of the freeze cannot be handed on"),
            }
        });
        let begin = Kind::Begin(DeliverBegin { migration_id: self.migration.to_string() });
        let _gone = sender.send(DeliverRequest { kind: Some(begin) });
        self.stream = Some(sender);
        for captured in std::mem::take(&mut self.kept) {
            self.send(&captured);
            self.kept.push_back(captured);
        }
    }

    /// Packets for which there is no room are lost, as on any link.
    fn send(&mut self, captured: &Captured) {
        let Some(stream) = &self.stream else { return };
        let Some(room) = self.room.checked_sub(captured.packet.len()) else { return };
        self.room = room;
        let packets = DeliverPackets { packets: vec![captured.packet.clone().into()] };
        let _gone = stream.send(DeliverRequest { kind: Some(Kind::Packets(packets)) });
    }

    fn take(&mut self, captured: Captured) {
        // It was seen before the node's firewall: nothing may get through here that would not otherwise.
        if !captured.continues_connection() || self.cut_at.is_some_and(|cut_at| captured.at < cut_at) {
            return;
        }
        self.send(&captured);
        self.kept_bytes += captured.packet.len();
        self.kept.push_back(captured);
        // Before the cut the older ones have reached the container; after it TCP repeats them the sooner.
        while self.kept_bytes > MOST_KEPT {
            let Some(oldest) = self.kept.pop_front() else { return };
            self.kept_bytes -= oldest.packet.len();
        }
    }

    fn give_back(self) {
        if self.cut_at.is_none() || self.kept.is_empty() {
            return;
        }
        let given = Replayer::open(&self.host_interface, self.link.mac, self.link.mtu)
            .and_then(|replayer| self.kept.iter().try_for_each(|captured| replayer.deliver(&captured.packet)));
        if let Err(error) = given {
            tracing::warn!(error = chain(&error), "packets of the freeze cannot be given back to the container");
        }
    }

    async fn end(mut self, capture: &Capture) {
        // The target hands over at once now.
        self.room = MOST_KEPT;
        let _over = tokio::time::timeout(ASTRAY, async {
            while let Ok(captured) = capture.next().await {
                self.take(captured);
            }
        })
        .await;
    }
}

async fn deliver(
    context: &Context,
    address: &str,
    target: &podferry_common::identity::Peer,
    packets: mpsc::UnboundedReceiver<DeliverRequest>,
) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
    let channel = podferry_common::tls::connect(address, &context.identity, target).await?;
    let answer = DeliveryServiceClient::new(channel).deliver(UnboundedReceiverStream::new(packets)).await?;
    Ok(answer.into_inner().delivered)
}
