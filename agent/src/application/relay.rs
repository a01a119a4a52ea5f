//! Lets hooks of the new instance, and itself, reach the old one: see [`podferry_proto::application`].

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use podferry_common::MigrationId;
use podferry_common::identity::Peer;
use podferry_common::tls;
use podferry_network::Netns;
use podferry_proto::v1::application_service_client::ApplicationServiceClient;
use podferry_proto::v1::relay_request::Kind;
use podferry_proto::v1::{RelayBegin, RelayRequest, RelayResponse};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, Streaming};

use crate::context::Context;

/// Connections at once.
const CONNECTIONS: usize = 64;
/// Read at once.
const CHUNK: usize = 64 << 10;
/// Pieces that may wait for the other side.
const QUEUE: usize = 8;

/// What of an error of the relay's is said.
type Broken = Box<dyn std::error::Error + Send + Sync>;

/// Listens in the new instance's network, until it is dropped.
#[derive(Debug)]
pub struct Relay {
    port: u16,
    _ends: DropGuard,
}

/// Where connections go.
#[derive(Clone, Debug)]
struct Way {
    context: Context,
    migration: MigrationId,
    source: Peer,
    address: String,
}

impl Relay {
    /// Begins to listen on a port of its own of that network's loopback, for the source at `address`.
    ///
    /// # Errors
    /// When the network cannot be entered, or has no loopback.
    pub async fn start(
        context: &Context,
        migration: MigrationId,
        (source, address): (Peer, String),
        netns: &Netns,
    ) -> Result<Self, io::Error> {
        let bound = netns.spawn(|| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let listener = bound.await.map_err(io::Error::other)??;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let port = listener.local_addr()?.port();
        let ended = CancellationToken::new();
        let way = Way { context: context.clone(), migration, source, address };
        tokio::spawn(ended.clone().run_until_cancelled_owned(accept(way, listener, ended.clone())));
        Ok(Self { port, _ends: ended.drop_guard() })
    }

    /// On which port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

async fn accept(way: Way, listener: TcpListener, ended: CancellationToken) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection to the old instance cannot be accepted");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (way, ended) = (way.clone(), ended.clone());
        tokio::spawn(async move {
            let _place = place;
            let Some(relayed) = ended.run_until_cancelled(carry(&way, stream)).await else { return };
            if let Err(error) = relayed {
                tracing::warn!(migration = %way.migration, error, "a connection to the old instance broke off");
            }
        });
    }
}

/// One connection, from its beginning to its end.
async fn carry(way: &Way, stream: TcpStream) -> Result<(), Broken> {
    stream.set_nodelay(true)?;
    let channel = tls::connect(&way.address, &way.context.identity, &way.source).await?;
    let (from, mut to) = stream.into_split();
    let (requests, outgoing) = mpsc::channel(QUEUE);
    let begin = Kind::Begin(RelayBegin { migration_id: way.migration.to_string() });
    requests.send(RelayRequest { kind: Some(begin) }).await?;
    let answers = ApplicationServiceClient::new(channel).relay(ReceiverStream::new(outgoing)).await?;
    let mut answers = answers.into_inner();
    let there = pump(from, requests, |data| RelayRequest { kind: Some(Kind::Data(data)) });
    let back = async {
        while let Some(answer) = answers.message().await? {
            to.write_all(&answer.data).await?;
        }
        to.shutdown().await.map_err(Broken::from)
    };
    tokio::try_join!(there, back).map(drop)
}

/// Reads until the end, and hands on; ends early when nobody takes it. That it ends is seen by who takes it.
async fn pump<T>(mut from: OwnedReadHalf, to: mpsc::Sender<T>, wrap: impl Fn(Bytes) -> T) -> Result<(), Broken> {
    let mut buffer = BytesMut::with_capacity(CHUNK);
    while from.read_buf(&mut buffer).await? > 0 {
        if to.send(wrap(buffer.split().freeze())).await.is_err() {
            break;
        }
        buffer.reserve(CHUNK);
    }
    Ok(())
}

/// The source's end of one connection: to the old instance, until both directions have ended.
pub fn answer(
    stream: TcpStream,
    requests: Streaming<RelayRequest>,
    ended: CancellationToken,
) -> ReceiverStream<Result<RelayResponse, Status>> {
    let (answers, outgoing) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let (from, to) = stream.into_split();
        let back = pump(from, answers, |data| Ok(RelayResponse { data }));
        let both = async { tokio::try_join!(take(requests, to), back).map(drop) };
        if let Some(Err(error)) = ended.run_until_cancelled(both).await {
            tracing::debug!(error, "a relayed connection broke off");
        }
    });
    ReceiverStream::new(outgoing)
}

async fn take(mut requests: Streaming<RelayRequest>, mut to: OwnedWriteHalf) -> Result<(), Broken> {
    while let Some(request) = requests.message().await? {
        let Some(Kind::Data(data)) = request.kind else { return Err("only data may follow Begin".into()) };
        to.write_all(&data).await?;
    }
    Ok(to.shutdown().await?)
}
