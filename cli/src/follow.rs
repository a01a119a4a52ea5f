//! Following a migration to its end, also across a restart of the coordinator.

use std::time::{Duration, Instant};

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{Evacuation, Migration, WatchEvacuationRequest, WatchMigrationRequest};
use tonic::Status;

use crate::coordinator::{Coordinator, is_broken, present};
use crate::words;

/// How long a coordinator may be away, from the first failure in a row. A migration goes on without its watcher, so giving
/// up loses nothing.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two tries to reach it.
const PAUSE: Duration = Duration::from_millis(500);

/// Calls `seen` with the migration as it is and after each change, and returns it when it has ended.
pub(crate) async fn follow(
    coordinator: &mut Coordinator,
    id: &str,
    seen: impl FnMut(&Migration),
) -> Result<Migration, Failure> {
    until_ended(id, PATIENCE, async |noted| watch(coordinator, id, noted).await, seen).await
}

/// The same of an evacuation.
pub(crate) async fn follow_evacuation(
    coordinator: &mut Coordinator,
    id: &str,
    seen: impl FnMut(&Evacuation),
) -> Result<Evacuation, Failure> {
    until_ended(id, PATIENCE, async |noted| watch_evacuation(coordinator, id, noted).await, seen).await
}

/// Watches again and again, until it has ended or watches have failed for longer than `patience`.
async fn until_ended<T>(
    id: &str,
    patience: Duration,
    mut watch: impl AsyncFnMut(&mut dyn FnMut(&T)) -> Result<Option<T>, Status>,
    mut seen: impl FnMut(&T),
) -> Result<T, Failure> {
    // A watch may be silent for long, because a phase is: only failures say that the coordinator is away.
    let mut away_since: Option<Instant> = None;
    loop {
        let mut noted = |state: &T| {
            away_since = None;
            seen(state);
        };
        let lost = match watch(&mut noted).await {
            Ok(Some(ended)) => return Ok(ended),
            Ok(None) => {
                Failure::new(FailureCode::Unavailable, "the coordinator ended the watch before what was watched ended")
            }
            Err(status) if is_broken(&status) => {
                Failure { code: FailureCode::Unavailable, ..Failure::from_status(&status) }
            }
            Err(status) => return Err(Failure::from_status(&status)),
        };
        if away_since.get_or_insert_with(Instant::now).elapsed() > patience {
            return Err(lost.remedy(format!("it goes on without its watcher: `podferry watch {id}`")));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// One stream, to the migration's end (`Some`) or its own (`None`).
async fn watch(
    coordinator: &mut Coordinator,
    id: &str,
    seen: &mut dyn FnMut(&Migration),
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

/// The same of an evacuation.
async fn watch_evacuation(
    coordinator: &mut Coordinator,
    id: &str,
    seen: &mut dyn FnMut(&Evacuation),
) -> Result<Option<Evacuation>, Status> {
    let request = WatchEvacuationRequest { id: id.to_owned() };
    let mut stream = coordinator.watch_evacuation(request).await?.into_inner();
    while let Some(update) = stream.message().await? {
        let Some(evacuation) = update.evacuation else { continue };
        seen(&evacuation);
        if !evacuation.ended_at.is_empty() {
            return Ok(Some(evacuation));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use podferry_proto::v1::Phase;

    use super::*;

    fn at(phase: Phase) -> Migration {
        Migration { phase: phase.into(), ..Migration::default() }
    }

    const PATIENCE: Duration = Duration::from_millis(1500);

    /// Follows with watches of this script: what each hears, and how long it is silent before it breaks. After them comes
    /// one that sees the end.
    async fn followed(script: Vec<(Option<Phase>, Duration)>) -> Result<Migration, Failure> {
        let mut watches = script.into_iter();
        let watch = async |noted: &mut dyn FnMut(&Migration)| {
            let Some((heard, silence)) = watches.next() else { return Ok(Some(at(Phase::Succeeded))) };
            if let Some(phase) = heard {
                noted(&at(phase));
            }
            tokio::time::sleep(silence).await;
            Err(Status::unavailable("gone"))
        };
        until_ended("m1", PATIENCE, watch, |_| {}).await
    }

    #[tokio::test]
    async fn a_long_silence_before_a_failure_costs_no_patience() {
        // Away twice, each time after a phase that was longer than the patience; together longer than that, too.
        let away = [(Some(Phase::Freeze), 2 * PATIENCE), (None, Duration::ZERO)];
        let ended = followed([away, away].concat()).await;
        assert_eq!(ended.unwrap().phase(), Phase::Succeeded);
    }

    #[tokio::test]
    async fn a_coordinator_that_stays_away_is_given_up() {
        let began = Instant::now();
        let lost = followed(vec![(None, Duration::ZERO); 1000]).await.unwrap_err();
        assert!(began.elapsed() > PATIENCE);
        assert_eq!(lost.code, FailureCode::Unavailable);
        assert!(lost.remedy.is_some_and(|remedy| remedy.contains("podferry watch m1")));
    }
}
