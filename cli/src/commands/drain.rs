//! `drain`: all workloads of a node, one after the other, each to the node that placement chooses.

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{ListNodesRequest, ListWorkloadsRequest, MigrateRequest, Migration, Phase, Workload};

use super::migrate::to_the_end;
use crate::arguments::{Global, Strategy};
use crate::coordinator::{Coordinator, answer, connect, present};
use crate::exit::Exit;
use crate::progress::Progress;
use crate::render::{self, DrainReport, LeftBehind};
use crate::words;

/// Moves what runs on `node` elsewhere. A workload that cannot be moved does not keep the others.
pub(super) async fn drain(global: &Global, node: &str, strategy: Strategy) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    must_exist(&mut coordinator, node).await?;
    let request = ListWorkloadsRequest { node: node.to_owned() };
    let (running, stopped): (Vec<_>, Vec<_>) =
        answer(coordinator.list_workloads(request)).await?.workloads.into_iter().partition(|w| w.status != "stopped");
    let not_running = stopped.into_iter().map(|workload| workload.name).collect();
    let mut report =
        DrainReport { node: node.to_owned(), migrations: Vec::new(), left_behind: Vec::new(), not_running };
    for workload in running {
        let moved = match move_one(&mut coordinator, &workload, strategy).await {
            Ok(None) => return Ok(Exit::Interrupted),
            Ok(Some(ended)) => {
                report.migrations.push((&ended).into());
                if !global.output.is_json() {
                    render::outcome(global.output, &ended);
                }
                still_there(&ended, node)
            }
            Err(failure) => Some(LeftBehind { workload: workload.name, error: failure, migrated: false }),
        };
        if let Some(left) = moved {
            render::failure(global.output, &left.error);
            report.left_behind.push(left);
        }
    }
    render::drain(global.output, &report);
    Ok(if report.left_behind.is_empty() { Exit::Done } else { Exit::Failed })
}

async fn must_exist(coordinator: &mut Coordinator, node: &str) -> Result<(), Failure> {
    let known = answer(coordinator.list_nodes(ListNodesRequest {})).await?.nodes;
    if known.iter().any(|known| known.name == node) {
        return Ok(());
    }
    let failure = Failure::new(FailureCode::NotFound, format!("there is no node {node:?}"));
    Err(failure.remedy("see `podferry nodes`"))
}

/// Moves one workload, or follows the migration that it is part of already. `None` when the user interrupts.
async fn move_one(
    coordinator: &mut Coordinator,
    workload: &Workload,
    strategy: Strategy,
) -> Result<Option<Migration>, Failure> {
    if !workload.migration_id.is_empty() {
        return to_the_end(coordinator, &workload.migration_id, Progress::new()).await;
    }
    let strategy = podferry_proto::v1::Strategy::from(strategy).into();
    let request = MigrateRequest { workload: workload.name.clone(), strategy, ..MigrateRequest::default() };
    let begun = present(answer(coordinator.migrate(request)).await?.migration)?;
    to_the_end(coordinator, &begun.id, Progress::new()).await
}

/// Why the workload is still on `node` after that migration, if it is. One that was on its way *to* the node and got
/// there is.
fn still_there(ended: &Migration, node: &str) -> Option<LeftBehind> {
    let succeeded = ended.phase() == Phase::Succeeded;
    if succeeded && ended.target != node {
        return None;
    }
    let error = if succeeded {
        let message = format!("{} came to {node} while it was drained", ended.workload);
        Failure::new(FailureCode::Aborted, message).remedy("drain it again")
    } else {
        let message = format!("the migration {} ended as {}", ended.id, words::phase(ended));
        words::failure(ended).unwrap_or_else(|| Failure::new(FailureCode::Aborted, message))
    };
    Some(LeftBehind { workload: ended.workload.clone(), error, migrated: true })
}
