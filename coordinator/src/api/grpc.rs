//! `CoordinatorService` over mutual TLS, with health and reflection.

use std::pin::Pin;

use futures::{Stream, StreamExt as _};
use podferry_common::identity::Peer;
use podferry_common::tls::{self, Incoming};
use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::coordinator_service_server::{CoordinatorService, CoordinatorServiceServer};
use podferry_proto::{DESCRIPTORS, Version, v1};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::states::{evacuation_states, states};
use super::{Core, Current};
use crate::access::{Action, Verb};
use crate::evacuation::Evacuation;
use crate::store::Record;

/// The largest message that is taken, in bytes: the protocol's limit.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Requests that one connection may have open at a time.
const MAX_STREAMS: u32 = 256;

/// The gRPC front of the core.
pub struct GrpcService {
    core: Current,
    stop: CancellationToken,
}

impl GrpcService {
    /// The front of that core. Watches end when `stop` is cancelled.
    pub fn new(core: Current, stop: CancellationToken) -> Self {
        Self { core, stop }
    }

    /// The core and the caller, if the caller may do this.
    async fn admit<T: Sync>(&self, request: &Request<T>, action: &Action<'_>) -> Result<(Core, Peer), Status> {
        Ok(self.core.admit(request.extensions().get(), action).await?)
    }
}

/// Serves on these connections until `stop` is cancelled; then finishes the requests under way.
pub async fn serve(core: Current, incoming: Incoming, stop: CancellationToken) -> Result<(), ServeError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<CoordinatorServiceServer<GrpcService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let service = CoordinatorServiceServer::new(GrpcService::new(core, stop.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    Server::builder()
        .http2_keepalive_interval(Some(tls::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(tls::KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(MAX_STREAMS)
        .add_service(health)
        .add_service(reflection)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await?;
    Ok(())
}

/// Why serving ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The protocol's own description is broken: a fault of the build.
    #[error("the protocol's description cannot be offered by reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The server failed.
    #[error("the gRPC server failed")]
    Transport(#[from] tonic::transport::Error),
}

type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchMigrationResponse, Status>> + Send>>;
type WatchEvacuationStream = Pin<Box<dyn Stream<Item = Result<v1::WatchEvacuationResponse, Status>> + Send>>;

fn shown(record: &Record) -> v1::WatchMigrationResponse {
    v1::WatchMigrationResponse { migration: Some(record.to_wire()) }
}

fn listed(records: &[Record]) -> v1::ListMigrationsResponse {
    v1::ListMigrationsResponse { migrations: records.iter().map(Record::to_list_entry).collect() }
}

#[tonic::async_trait]
impl CoordinatorService for GrpcService {
    async fn hello(&self, request: Request<v1::HelloRequest>) -> Result<Response<v1::HelloResponse>, Status> {
        self.admit(&request, &Action::new(Verb::Hello)).await?;
        Version::OURS.agree(request.get_ref().version.as_ref()).map_err(|mismatch| {
            let failure = Failure::new(FailureCode::FailedPrecondition, mismatch.to_string());
            Status::from(failure.remedy("use a client of the coordinator's version, or a neighbouring one"))
        })?;
        let coordinator_version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(v1::HelloResponse { version: Some(Version::OURS.into()), coordinator_version }))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let (core, _) = self.admit(&request, &Action::new(Verb::ListNodes)).await?;
        Ok(Response::new(v1::ListNodesResponse { nodes: core.nodes().await }))
    }

    async fn list_workloads(
        &self,
        request: Request<v1::ListWorkloadsRequest>,
    ) -> Result<Response<v1::ListWorkloadsResponse>, Status> {
        let (core, _) = self.admit(&request, &Action::new(Verb::ListWorkloads)).await?;
        let workloads = core.workloads(&request.get_ref().node).await?;
        Ok(Response::new(v1::ListWorkloadsResponse { workloads }))
    }

    async fn list_connections(
        &self,
        request: Request<v1::ListConnectionsRequest>,
    ) -> Result<Response<v1::ListConnectionsResponse>, Status> {
        let (core, _) = self.admit(&request, &Action::new(Verb::ListConnections)).await?;
        let v1::ListConnectionsRequest { workload, node } = request.get_ref();
        Ok(Response::new(core.connections(workload, node).await?))
    }

    async fn migrate(&self, request: Request<v1::MigrateRequest>) -> Result<Response<v1::MigrateResponse>, Status> {
        let wanted = request.get_ref();
        let (core, peer) = self.admit(&request, &Action::migrate(&wanted.workload, &wanted.target)).await?;
        let record = core.migrate(wanted, &peer).await?;
        Ok(Response::new(v1::MigrateResponse { migration: Some(record.to_wire()) }))
    }

    async fn get_migration(
        &self,
        request: Request<v1::GetMigrationRequest>,
    ) -> Result<Response<v1::GetMigrationResponse>, Status> {
        let action = Action::on_migration(Verb::GetMigration, &request.get_ref().id);
        let (core, _) = self.admit(&request, &action).await?;
        let record = core.migration(&request.get_ref().id).await?;
        Ok(Response::new(v1::GetMigrationResponse { migration: Some(record.to_wire()) }))
    }

    async fn list_migrations(
        &self,
        request: Request<v1::ListMigrationsRequest>,
    ) -> Result<Response<v1::ListMigrationsResponse>, Status> {
        let (core, _) = self.admit(&request, &Action::new(Verb::ListMigrations)).await?;
        let v1::ListMigrationsRequest { workload, active_only } = request.into_inner();
        let records = core.migrations(&workload, active_only).await?;
        Ok(Response::new(listed(&records)))
    }

    type WatchMigrationStream = WatchStream;

    async fn watch_migration(
        &self,
        request: Request<v1::WatchMigrationRequest>,
    ) -> Result<Response<WatchStream>, Status> {
        let action = Action::on_migration(Verb::WatchMigration, &request.get_ref().id);
        let (core, _) = self.admit(&request, &action).await?;
        let states = states(&core, &request.get_ref().id, self.stop.clone()).await?;
        let messages = states.map(|state| state.map(|record| shown(&record)).map_err(Status::from));
        Ok(Response::new(Box::pin(messages)))
    }

    async fn cancel_migration(
        &self,
        request: Request<v1::CancelMigrationRequest>,
    ) -> Result<Response<v1::CancelMigrationResponse>, Status> {
        let id = &request.get_ref().id;
        let (core, peer) = self.admit(&request, &Action::on_migration(Verb::CancelMigration, id)).await?;
        let record = core.cancel(id, &peer).await?;
        Ok(Response::new(v1::CancelMigrationResponse { migration: Some(record.to_wire()) }))
    }

    async fn get_decision(
        &self,
        request: Request<v1::GetDecisionRequest>,
    ) -> Result<Response<v1::GetDecisionResponse>, Status> {
        let id = &request.get_ref().migration_id;
        let (core, peer) = self.admit(&request, &Action::on_migration(Verb::GetDecision, id)).await?;
        let decision = core.decision(id).await?;
        tracing::info!(%peer, migration = %id, ?decision, "decision asked for");
        let decision = v1::Decision::from(decision).into();
        Ok(Response::new(v1::GetDecisionResponse { decision }))
    }

    async fn evacuate(&self, request: Request<v1::EvacuateRequest>) -> Result<Response<v1::EvacuateResponse>, Status> {
        let wanted = request.get_ref();
        let (core, peer) = self.admit(&request, &Action::evacuate(&wanted.node)).await?;
        let evacuation = core.evacuate(wanted, &peer).await?;
        Ok(Response::new(v1::EvacuateResponse { evacuation: Some(evacuation.to_wire()) }))
    }

    async fn get_evacuation(
        &self,
        request: Request<v1::GetEvacuationRequest>,
    ) -> Result<Response<v1::GetEvacuationResponse>, Status> {
        let id = &request.get_ref().id;
        let (core, _) = self.admit(&request, &Action::on_migration(Verb::GetEvacuation, id)).await?;
        let evacuation = core.evacuation(id).await?;
        Ok(Response::new(v1::GetEvacuationResponse { evacuation: Some(evacuation.to_wire()) }))
    }

    async fn list_evacuations(
        &self,
        request: Request<v1::ListEvacuationsRequest>,
    ) -> Result<Response<v1::ListEvacuationsResponse>, Status> {
        let (core, _) = self.admit(&request, &Action::new(Verb::ListEvacuations)).await?;
        let v1::ListEvacuationsRequest { node, active_only } = request.into_inner();
        let all = core.evacuations(&node, active_only).await?;
        let evacuations = all.iter().map(Evacuation::to_list_entry).collect();
        Ok(Response::new(v1::ListEvacuationsResponse { evacuations }))
    }

    type WatchEvacuationStream = WatchEvacuationStream;

    async fn watch_evacuation(
        &self,
        request: Request<v1::WatchEvacuationRequest>,
    ) -> Result<Response<WatchEvacuationStream>, Status> {
        let id = &request.get_ref().id;
        let (core, _) = self.admit(&request, &Action::on_migration(Verb::WatchEvacuation, id)).await?;
        let states = evacuation_states(&core, id, self.stop.clone()).await?;
        let shown = |evacuation: Evacuation| v1::WatchEvacuationResponse { evacuation: Some(evacuation.to_wire()) };
        let messages = states.map(move |state| state.map(shown).map_err(Status::from));
        Ok(Response::new(Box::pin(messages)))
    }

    async fn cancel_evacuation(
        &self,
        request: Request<v1::CancelEvacuationRequest>,
    ) -> Result<Response<v1::CancelEvacuationResponse>, Status> {
        let id = &request.get_ref().id;
        let (core, peer) = self.admit(&request, &Action::on_migration(Verb::CancelEvacuation, id)).await?;
        let evacuation = core.cancel_evacuation(id, &peer).await?;
        Ok(Response::new(v1::CancelEvacuationResponse { evacuation: Some(evacuation.to_wire()) }))
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::migration::{PartAbort, SourceAbort, State, Why};
    use crate::store::{Progress, Round, Store, Timings};
    use crate::testing;

    /// All that can be long is as long as it can be.
    fn long(number: usize, settled: bool) -> Record {
        let name = |side: &str| format!("{side}{number:0>62}");
        let mut record = testing::record(&name("w"), &name("s"), &name("t"));
        record.requested_by = Some(Peer::client(name("u")).unwrap());
        let text = "ü".repeat(2000);
        let failure = Failure::new(FailureCode::ResourceExhausted, &text).on(&text).in_phase(&text);
        let why = Why { failure: failure.criu_line(&text).remedy(&text), cancelled: false };
        let target = PartAbort::Unconfirmed;
        record.state =
            if settled { State::Aborted { why } } else { State::Aborting { target, source: SourceAbort::Asked, why } };
        let (ms, bytes) = (1e300 / 3.0, u64::MAX);
        let report = &mut record.report;
        (report.downtime_ms, report.total_ms, report.wire_bytes) = (ms, ms, bytes);
        report.progress = Progress { raw_bytes: bytes, wire_bytes: bytes, expected_bytes: bytes };
        let (pages, raw_bytes, wire_bytes) = (bytes, bytes, bytes);
        let (duration_ms, dirty_rate, predicted_ms, cpu_limit) = (ms, ms, ms, ms);
        let round = Round { pages, raw_bytes, wire_bytes, duration_ms, dirty_rate, predicted_ms, cpu_limit };
        report.rounds = vec![round; 101];
        report.timings = Timings {
            preflight: ms,
            prepare: ms,
            precopy: ms,
            freeze: ms,
            dump: ms,
            transfer: ms,
            restore: ms,
            commit: ms,
            resume: ms,
            fill: ms,
        };
        report.keeps_connections = true;
        (0..100).for_each(|_| report.note(&text));
        record
    }

    #[test]
    fn all_that_is_kept_fits_into_one_message() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let records: Vec<_> = (0..1500).map(|number| long(number, number >= 200)).collect();
        store.fill(&records).unwrap();
        let kept = store.list().unwrap();
        assert!((1000..=1200).contains(&kept.len()), "{} are kept", kept.len());
        assert_eq!(store.open_migrations().unwrap().len(), 200, "none that is open is forgotten");
        let bytes = listed(&kept).encoded_len();
        assert!(bytes <= MAX_MESSAGE_BYTES, "{bytes} bytes are more than a message may have");
    }
}
