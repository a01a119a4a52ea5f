//! `migrate` and `watch`.

use podferry_common::Failure;
use podferry_proto::v1::{self, MigrateRequest, Migration, Strategy};

use crate::arguments::{Global, Migrate, Output};
use crate::coordinator::{Coordinator, answer, connect, present};
use crate::exit::Exit;
use crate::follow::follow;
use crate::progress::Progress;
use crate::{render, words};

/// Asks for a migration; with `--wait` follows it.
pub(super) async fn migrate(global: &Global, flags: Migrate) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let wishes = flags.wishes;
    let request = MigrateRequest {
        workload: flags.workload,
        target: flags.to.unwrap_or_default(),
        strategy: Strategy::from(wishes.strategy).into(),
        no_compression: wishes.no_compression,
        downtime_budget_ms: wishes.downtime_budget.map_or(0.0, f64::from),
        bandwidth_limit: wishes.bandwidth_limit.unwrap_or_default(),
        accept_loss: wishes.accept_loss,
        allow_restart: wishes.allow_restart,
        verify: wishes.verify,
        throttle: wishes.throttle,
        grace_period_s: wishes.grace_period,
        connections: v1::Connections::from(wishes.connections).into(),
        connections_deadline_s: wishes.connections_deadline_s(),
    };
    let begun = present(answer(coordinator.migrate(request)).await?.migration)?;
    if !flags.wait {
        render::outcome(global.output, &begun);
        return Ok(Exit::Done);
    }
    let Some(ended) = to_the_end(&mut coordinator, &begun.id, Progress::new()).await? else {
        return Ok(Exit::Interrupted);
    };
    render::outcome(global.output, &ended);
    Ok(judge(global.output, &ended))
}

/// Follows a migration. As JSON every update is a line, the last one is the migration as it ended.
pub(super) async fn watch(global: &Global, id: &str) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    if !global.output.is_json() {
        let Some(ended) = to_the_end(&mut coordinator, id, Progress::new()).await? else {
            return Ok(Exit::Interrupted);
        };
        render::outcome(global.output, &ended);
        return Ok(judge(global.output, &ended));
    }
    let print = |migration: &Migration| render::outcome(Output::Json, migration);
    tokio::select! {
        ended = follow(&mut coordinator, id, print) => Ok(judge(global.output, &ended?)),
        _ = tokio::signal::ctrl_c() => Ok(interrupted(id)),
    }
}

/// Follows a migration and shows its progress; `None` when the user interrupts.
pub(super) async fn to_the_end(
    coordinator: &mut Coordinator,
    id: &str,
    mut progress: Progress,
) -> Result<Option<Migration>, Failure> {
    let ended = tokio::select! {
        ended = follow(coordinator, id, |migration| progress.show(migration)) => Some(ended?),
        _ = tokio::signal::ctrl_c() => None,
    };
    progress.end();
    if ended.is_none() {
        interrupted(id);
    }
    Ok(ended)
}

/// Says that the migration does not stop with its watcher.
fn interrupted(id: &str) -> Exit {
    eprintln!("the migration {id} goes on; stop it with: podferry cancel {id}");
    Exit::Interrupted
}

/// Says why a migration did not succeed, and the exit code of how it ended.
pub(super) fn judge(output: Output, ended: &Migration) -> Exit {
    if let Some(failure) = words::failure(ended) {
        render::failure(output, &failure);
    }
    Exit::of_migration(ended)
}
