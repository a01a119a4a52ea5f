//! Following a migration to its end, also across a restart of the coordinator.

use std::time::{Duration, Instant};

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{Migration, WatchMigrationRequest};
use tonic::Status;

use crate::coordinator::{Coordinator, is_broken, present};
use crate::words;

/// How long a coordinator may be away. A migration goes on without its watcher, so giving up loses nothing.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two tries to reach it.
const PAUSE: Duration = Duration::from_millis(500);

/// Calls `seen` with the migration as it is and after each change, and returns it when it has ended.
pub(crate) async fn follow(
    coordinator: &mut Coordinator,
    id: &str,
    mut seen: impl FnMut(&Migration),
) -> Result<Migration, Failure> {
    let mut heard = Instant::now();
    loop {
        let mut noted = |migration: &Migration| {
            heard = Instant::now();
            seen(migration);
        };
        let lost = match watch(coordinator, id, &mut noted).await {
            Ok(Some(ended)) => return Ok(ended),
            Ok(None) => {
                Failure::new(FailureCode::Unavailable, "the coordinator ended the watch before the migration ended")
            }
            Err(status) if is_broken(&status) => {
                Failure { code: FailureCode::Unavailable, ..Failure::from_status(&status) }
            }
            Err(status) => return Err(Failure::from_status(&status)),
        };
        if heard.elapsed() > PATIENCE {
            return Err(lost.remedy(format!("the migration goes on without its watcher: `podferry watch {id}`")));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// One stream, to the migration's end (`Some`) or its own (`None`).
async fn watch(
    coordinator: &mut Coordinator,
    id: &str,
    seen: &mut impl FnMut(&Migration),
) -> Result<Option<Migration>, Status> {
    let request = WatchMigrationRequest { id: id.to_owned() };
    let mut stream = coordinator.watch_migration(request).await?.into_inner();
    while let Some(update) = stream.message().await? {
        let migration = present(update.migration)?;
        seen(&migration);
        if words::has_ended(&migration) {
            return Ok(Some(migration));
        }
    }
    Ok(None)
}
