//! The verbs.

mod certificates;
mod drain;
mod migrate;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{
    CancelMigrationRequest, GetMigrationRequest, KeptConnections, ListConnectionsRequest, ListMigrationsRequest,
    ListNodesRequest, ListWorkloadsRequest, Migration, Phase,
};

use crate::arguments::{self, Arguments, Global, Verb};
use crate::coordinator::{Coordinator, answer, connect, present};
use crate::exit::Exit;
use crate::render;

/// Does what the command line says.
pub(crate) async fn run(arguments: Arguments) -> Result<Exit, Failure> {
    let Arguments { global, verb } = arguments;
    match verb {
        Verb::Migrate(flags) => migrate::migrate(&global, flags).await,
        Verb::Watch { id } if is_evacuation(&id) => drain::watch(&global, &id).await,
        Verb::Watch { id } => migrate::watch(&global, &id).await,
        Verb::Drain(flags) => drain::drain(&global, flags).await,
        Verb::Nodes => nodes(&global).await,
        Verb::Check => check(&global).await,
        Verb::Workloads { node } => workloads(&global, node).await,
        Verb::Connections { workload, node } => connections(&global, workload, node).await,
        Verb::Migrations { workload, active } => migrations(&global, workload, active).await,
        Verb::Evacuations { node, active } => drain::list(&global, node, active).await,
        Verb::Describe { id } if is_evacuation(&id) => drain::describe(&global, id).await,
        Verb::Describe { id } => describe(&global, id).await,
        Verb::Cancel { id } if is_evacuation(&id) => drain::cancel(&global, id).await,
        Verb::Cancel { id } => cancel(&global, id).await,
        Verb::Certificates(verb) => certificates::certificates(global.output, &verb),
        Verb::Completions { shell } => {
            let name = arguments::program();
            clap_complete::generate(shell, &mut arguments::command(), name, &mut std::io::stdout());
            Ok(Exit::Done)
        }
    }
}

/// Whether the id is an evacuation's: those of migrations begin in another way.
fn is_evacuation(id: &str) -> bool {
    id.starts_with(podferry_proto::evacuation::ID_PREFIX)
}

async fn nodes(global: &Global) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let found = answer(coordinator.list_nodes(ListNodesRequest {})).await?;
    render::nodes(global.output, &found.nodes);
    Ok(Exit::Done)
}

async fn check(global: &Global) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let found = answer(coordinator.list_nodes(ListNodesRequest {})).await?;
    if found.nodes.is_empty() {
        return Err(Failure::new(FailureCode::FailedPrecondition, "the coordinator knows no nodes")
            .remedy("name them in the coordinator's inventory"));
    }
    render::check(global.output, &found.nodes);
    let all_fit = found.nodes.iter().all(|node| node.reachable && node.fit);
    Ok(if all_fit { Exit::Done } else { Exit::Failed })
}

async fn workloads(global: &Global, node: String) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let found = answer(coordinator.list_workloads(ListWorkloadsRequest { node })).await?;
    render::workloads(global.output, &found.workloads);
    Ok(Exit::Done)
}

async fn connections(global: &Global, workload: String, node: String) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let found = answer(coordinator.list_connections(ListConnectionsRequest { workload, node })).await?;
    render::connections(global.output, &found);
    Ok(Exit::Done)
}

async fn migrations(global: &Global, workload: String, active_only: bool) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let found = answer(coordinator.list_migrations(ListMigrationsRequest { workload, active_only })).await?;
    render::migrations(global.output, &found.migrations);
    Ok(Exit::Done)
}

async fn describe(global: &Global, id: String) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let found = answer(coordinator.get_migration(GetMigrationRequest { id })).await?;
    let migration = present(found.migration)?;
    render::migration(global.output, &migration, living(&mut coordinator, &migration).await.as_ref());
    Ok(Exit::Done)
}

/// What lives on of the connections that a migration took along; none when nothing does, or nobody says so.
async fn living(coordinator: &mut Coordinator, migration: &Migration) -> Option<KeptConnections> {
    if migration.phase() != Phase::Succeeded || !migration.keeps_connections {
        return None;
    }
    // Not by the workload's name, which may be another now.
    let found = coordinator.list_connections(ListConnectionsRequest::default()).await.ok()?.into_inner();
    found.kept.into_iter().find(|kept| kept.migration_id == migration.id)
}

async fn cancel(global: &Global, id: String) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let cancelled = answer(coordinator.cancel_migration(CancelMigrationRequest { id })).await?;
    render::outcome(global.output, &present(cancelled.migration)?);
    Ok(Exit::Done)
}
