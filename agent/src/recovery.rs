//! After a restart: takes up the parts that the journal remembers.
//!
//! | journal says | source | target |
//! |---|---|---|
//! | open | the worker has undone the dump when its agent went, or is told to; what was stopped is started again | the hook has failed the restore; the rest is removed |
//! | sealed | the coordinator's record decides | kept held; the coordinator's record aborts it, only its `Resume` frees it |
//! | sealed, and an operator has decided | the operator's word | the same; it may free it, too |
//! | ended | a tombstone, and what was not removed yet is | the same |

use std::sync::Arc;
use std::time::Duration;

use podferry_common::MigrationId;
use podferry_common::failure::Failure;
use podferry_common::identity::Peer;
use podferry_common::tls;
use podferry_part::{self as part, Known, Settle, Side, TakeUp, Word};
use podferry_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use podferry_proto::v1::{Decision, GetDecisionRequest};

use crate::context::Context;
use crate::journal::{self, OperatorsWord, PartDirs, PartRecord, Role, Standing};
use crate::parts::{Authority, Entry, Part, Parts};
use crate::pods::{Door, Fence};
use crate::relay;
use crate::source::SourcePart;
use crate::target::{TargetPart, fetch, fill};
use crate::worker::client::Worker;
use crate::worker::messages::WorkerRecord;
use crate::worker::record;

/// Between two questions to the coordinator, and between two tries to undo.
const RETRY: Duration = Duration::from_secs(1);
/// How long a sealed part waits for the coordinator before it asks by itself.
const SETTLE_AFTER: Duration = Duration::from_secs(5);

/// Takes up everything. Returns when every part is either settled or has a task that settles it.
pub async fn recover(context: &Context, parts: &Parts) {
    let (records, unreadable) = match journal::load_all(&context.config.parts_dir()) {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%error, "the journal cannot be read; parts of earlier migrations are not taken up");
            return;
        }
    };
    for migration in unreadable {
        parts.broken(migration, "");
    }
    journal::prune(&context.config, &records);
    relay::recover(context, &records).await;
    prune_fences(context, &records);
    for record in records {
        if record.standing == Standing::Released && !record.tidied {
            SourcePart::resumed(context, record.clone(), None).tidy().await;
        }
        if record.standing == Standing::Resumed && fill::is_under_way(&PartDirs::of(&context.config, record.migration))
        {
            fetch_again(context, &record);
            fill_behind(context, parts, record.migration, &record.workload);
            continue;
        }
        if take_up_as(&record) == TakeUp::Nothing {
            parts.ended(record.migration, record.standing);
            PartDirs::of(&context.config, record.migration).wipe_volatile();
            continue;
        }
        if let Err(failure) = take_up(context, parts, record.clone()).await {
            tracing::error!(migration = %record.migration, %failure, "a part of an earlier migration cannot be taken up");
            parts.broken(record.migration, &record.workload);
        }
    }
}

/// Those of parts that have not ended stay whatever is said of their pods.
fn prune_fences(context: &Context, records: &[PartRecord]) {
    let Some(kubernetes) = &context.config.kubernetes else { return };
    let open = records.iter().filter(|record| matches!(record.standing, Standing::Open | Standing::Sealed));
    let needed: Vec<_> = open.filter_map(PartRecord::fence).collect();
    if let Err(error) = Fence::prune(&kubernetes.fence_dir, &kubernetes.kubelet_dir, &needed) {
        tracing::warn!(%error, "the notes of pods that have left cannot be removed");
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
            if part::take_up(record.standing, noted.is_some_and(|noted| noted.sealed)) == TakeUp::Settle {
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
        if take_up_as(&record) == TakeUp::Settle {
            settle_sealed(&context, &parts, migration).await;
        } else {
            let reason = "the agent was restarted before the migration was sealed";
            undo(&parts, &part, migration, reason, Authority::Own).await;
        }
    });
    Ok(())
}

/// Follows the operator's word, or the coordinator's record. The coordinator's own calls may come first; they say the same.
async fn settle_sealed(context: &Context, parts: &Parts, migration: MigrationId) {
    let mut waits_for_release = false;
    // Looked up each time: a part that has ended is not to be kept, and a pod's may have been given another container.
    while let Some(Entry::Alive { part, .. }) = parts.get(migration) {
        if part.standing() != Standing::Sealed {
            return;
        }
        let known = match operators_word(context, migration) {
            Some(OperatorsWord::Commit) => Known::Said(Word::Commit),
            Some(OperatorsWord::Abort) => Known::Said(Word::Abort),
            None if waits_for_release => Known::Nothing,
            None => known_of(ask(context, migration).await),
        };
        let (side, keeps_memory) = match &part {
            Part::Source(source) => (Side::Source, source.fetched_by().is_some()),
            Part::Target(_) => (Side::Target, false),
        };
        match (part::settle(side, known, keeps_memory), &part) {
            (Settle::Undo, _) => {
                let by_hand = matches!(known, Known::Said(_));
                let reason = if by_hand { "an operator decided so" } else { "the coordinator's record says so" };
                undo(parts, &part, migration, reason, Authority::Coordinator).await;
                return;
            }
            (Settle::Await, _) => waits_for_release = true,
            (Settle::Release, Part::Source(source)) => match source.release().await {
                Ok(()) => {
                    tidy(parts, source, migration).await;
                    return;
                }
                Err(failure) => tracing::error!(%migration, %failure, "a committed source cannot be released"),
            },
            (Settle::Resume, Part::Target(target)) => match resume(context, parts, target, None).await {
                Ok(_) => return,
                Err(failure) => tracing::error!(%migration, %failure, "a target cannot be let go"),
            },
            // A side is told only what is its own to do.
            (Settle::AskAgain | Settle::Release | Settle::Resume, _) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// What is to become of a part, by its journal alone.
fn take_up_as(record: &PartRecord) -> TakeUp {
    part::take_up(record.standing, false)
}

fn known_of(answer: Option<Decision>) -> Known {
    match answer {
        Some(Decision::Commit) => Known::Recorded(Word::Commit),
        Some(Decision::Abort) => Known::Recorded(Word::Abort),
        Some(Decision::Undecided | Decision::Unspecified) | None => Known::Nothing,
    }
}

/// Listens in place of an agent that fetched memory for a container.
fn fetch_again(context: &Context, record: &PartRecord) {
    let Some(source) = fetch::Source::of(&record.role) else { return };
    if let Err(error) = fetch::start(context, record.migration, &source) {
        tracing::error!(migration = %record.migration, %error, "memory of a running container cannot be fetched");
    }
}

/// Notes that a container runs; when the rest of its memory is still to come, it is watched until that is there.
pub fn fill_behind(context: &Context, parts: &Parts, migration: MigrationId, workload: &str) {
    let dirs = PartDirs::of(&context.config, migration);
    if !fill::is_under_way(&dirs) {
        dirs.wipe_volatile();
        parts.ended(migration, Standing::Resumed);
        return;
    }
    parts.filling(migration, workload);
    let (context, parts) = (context.clone(), parts.clone());
    tokio::spawn(async move { fill::watch(&context, &parts, migration).await });
}

/// Lets a container run, and watches over it until its memory is whole; where the kubelet has begun it anew meanwhile, what came is given to
/// the new one, and to that at `door` where the part has one that stands in for it. Gives its init.
///
/// # Errors
/// When it does not come to run; to be called again, for the part that is in the registry then.
pub async fn resume(
    context: &Context,
    parts: &Parts,
    target: &TargetPart,
    door: Option<&Door>,
) -> Result<i32, Failure> {
    let migration = target.migration();
    let failure = match target.resume().await {
        Ok(pid) => {
            fill_behind(context, parts, migration, target.workload());
            return Ok(pid);
        }
        Err(failure) => failure,
    };
    let Some(rebound) = target.rebound(door).await? else { return Err(failure) };
    let rebound = Arc::new(rebound);
    tracing::info!(%migration, why = %failure, container = rebound.workload(), "another container gets what came");
    parts.rebind(migration, rebound.workload(), Part::Target(Arc::clone(&rebound)));
    let pid = rebound.resume().await?;
    fill_behind(context, parts, migration, rebound.workload());
    Ok(pid)
}

/// Settles a part that has just been sealed, should the coordinator not do so soon.
pub fn settle_later(context: &Context, parts: &Parts, migration: MigrationId) {
    let (context, parts) = (context.clone(), parts.clone());
    tokio::spawn(async move {
        tokio::time::sleep(SETTLE_AFTER).await;
        settle_sealed(&context, &parts, migration).await;
    });
}

fn operators_word(context: &Context, migration: MigrationId) -> Option<OperatorsWord> {
    let file = PartDirs::of(&context.config, migration).decision_file();
    let word = record::load(&file);
    word.inspect_err(|error| tracing::error!(%migration, %error, "the operator's word cannot be read"))
        .unwrap_or_default()
}

/// Removes what a released source leaves, and then lets its workload come back.
pub async fn tidy(parts: &Parts, source: &SourcePart, migration: MigrationId) {
    source.tidy().await;
    parts.ended(migration, Standing::Released);
}

/// Undoes a part, again and again until it is undone or may not be any more.
pub async fn undo(parts: &Parts, part: &Part, migration: MigrationId, reason: &str, authority: Authority) {
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
            Err(_) if part::is_let_be(part.standing(), authority) => return,
            Err(failure) => tracing::error!(%migration, %failure, "a part cannot be undone; trying again"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn ask(context: &Context, migration: MigrationId) -> Option<Decision> {
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
