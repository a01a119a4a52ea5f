//! After a restart: takes up the parts that the journal remembers.
//!
//! | journal says | source | target |
//! |---|---|---|
//! | open | the worker has undone the dump when its agent went, or is told to | the hook has failed the restore; the rest is removed |
//! | sealed | the coordinator's record decides | kept held; the coordinator's record aborts it, only its `Resume` frees it |
//! | ended | a tombstone, and what was not removed yet is | the same |

use std::sync::Arc;
use std::time::Duration;

use podferry_common::failure::Failure;
use podferry_common::identity::Peer;
use podferry_common::tls;
use podferry_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use podferry_proto::v1::{Decision, GetDecisionRequest};

use crate::context::Context;
use crate::journal::{self, PartDirs, PartRecord, Role, Standing};
use crate::parts::{Authority, Part, Parts};
use crate::source::SourcePart;
use crate::target::TargetPart;
use crate::worker::client::Worker;
use crate::worker::messages::WorkerRecord;
use crate::worker::record;

/// Between two questions to the coordinator, and between two tries to undo.
const RETRY: Duration = Duration::from_secs(1);

/// Takes up everything. Returns when every part is either settled or has a task that settles it.
pub async fn recover(context: &Context, parts: &Parts) {
    let records = match journal::load_all(&context.config.parts_dir()) {
        Ok(records) => records,
        Err(error) => {
            tracing::error!(%error, "the journal cannot be read; parts of earlier migrations are not taken up");
            return;
        }
    };
    journal::prune(&context.config, &records);
    for record in records {
        if record.standing == Standing::Released && !record.tidied {
            SourcePart::resumed(context, record.clone(), None).tidy().await;
        }
        if record.standing.is_last() {
            parts.ended(record.migration, record.standing);
            PartDirs::of(&context.config, record.migration).wipe_volatile();
            continue;
        }
        if let Err(failure) = take_up(context, parts, record.clone()).await {
            tracing::error!(migration = %record.migration, %failure, "a part of an earlier migration cannot be taken up");
        }
    }
}

async fn take_up(context: &Context, parts: &Parts, mut record: PartRecord) -> Result<(), Failure> {
    tracing::info!(migration = %record.migration, workload = record.workload, standing = ?record.standing, "taking up a part");
    let reservation = parts.reserve(record.migration, &record.workload)?;
    let migration = record.migration;
    let part = match record.role {
        Role::Source { .. } => {
            let dirs = PartDirs::of(&context.config, migration);
            let worker = Worker::reconnect(&dirs.control_socket()).await;
            // The worker seals before the journal says so.
            let noted: Option<WorkerRecord> = record::load(&dirs.worker_record()).unwrap_or_default();
            if noted.is_some_and(|noted| noted.sealed) {
                record.standing = Standing::Sealed;
            }
            Part::Source(Arc::new(SourcePart::resumed(context, record.clone(), worker)))
        }
        Role::Target { .. } => Part::Target(Arc::new(TargetPart::resumed(context, record.clone())?)),
    };
    reservation.fill(part.clone());
    let context = context.clone();
    let parts = parts.clone();
    tokio::spawn(async move {
        if record.standing == Standing::Sealed {
            settle_sealed(&context, &parts, &part, migration).await;
        } else {
            let reason = "the agent was restarted before the migration was sealed";
            undo(&parts, &part, migration, reason, Authority::Own).await;
        }
    });
    Ok(())
}

/// Follows the coordinator's record. The coordinator's own calls may come first; they say the same.
async fn settle_sealed(context: &Context, parts: &Parts, part: &Part, migration: podferry_common::MigrationId) {
    loop {
        if standing(part).await != Standing::Sealed {
            return;
        }
        match (ask(context, migration).await, part) {
            (Some(Decision::Abort), _) => {
                let reason = "the coordinator's record says that the migration was aborted";
                undo(parts, part, migration, reason, Authority::Coordinator).await;
                return;
            }
            (Some(Decision::Commit), Part::Source(source)) => match source.release().await {
                Ok(()) => {
                    tidy(parts, source, migration).await;
                    return;
                }
                Err(failure) => tracing::error!(%migration, %failure, "a committed source cannot be released"),
            },
            // The source must be dead before this copy runs, and only the coordinator knows that.
            (Some(Decision::Commit), Part::Target(_)) | (Some(_) | None, _) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Removes what a released source leaves, and then lets its workload come back.
pub async fn tidy(parts: &Parts, source: &SourcePart, migration: podferry_common::MigrationId) {
    source.tidy().await;
    parts.ended(migration, Standing::Released);
}

/// Undoes a part, again and again until it is undone or may not be any more.
pub async fn undo(
    parts: &Parts,
    part: &Part,
    migration: podferry_common::MigrationId,
    reason: &str,
    authority: Authority,
) {
    loop {
        let undone = match part {
            Part::Source(source) => source.abort(reason, authority).await,
            Part::Target(target) => target.abort(authority).await,
        };
        match undone {
            Ok(()) => {
                parts.ended(migration, Standing::Aborted);
                return;
            }
            Err(_) if standing(part).await.is_last() => return,
            Err(_) if authority == Authority::Own && standing(part).await == Standing::Sealed => return,
            Err(failure) => tracing::error!(%migration, %failure, "a part cannot be undone; trying again"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn standing(part: &Part) -> Standing {
    match part {
        Part::Source(source) => source.standing().await,
        Part::Target(target) => target.standing().await,
    }
}

async fn ask(context: &Context, migration: podferry_common::MigrationId) -> Option<Decision> {
    let channel = tls::connect(&context.config.coordinator, &context.identity, &Peer::Coordinator).await;
    let channel = channel
        .inspect_err(|error| tracing::warn!(%migration, %error, "the coordinator cannot be asked for its decision"))
        .ok()?;
    let request = GetDecisionRequest { migration_id: migration.to_string() };
    let answer = CoordinatorServiceClient::new(channel).get_decision(request).await;
    let answer = answer
        .inspect_err(|status| tracing::warn!(%migration, %status, "the coordinator does not tell its decision"))
        .ok()?;
    Some(answer.into_inner().decision())
}
