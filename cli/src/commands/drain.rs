//! `drain`: all workloads of a node, one after the other, each to the node that placement chooses.

mod plan;

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{self, ListWorkloadsRequest, MigrateRequest, Migration, Phase, Workload};

use super::migrate::to_the_end;
use crate::arguments::{self, Global, Output, Strategy};
use crate::coordinator::{Coordinator, answer, connect, present};
use crate::exit::Exit;
use crate::progress::Progress;
use crate::render::{self, DrainReport, Hurried, LeftBehind};
use crate::words;

/// Moves what runs on the node elsewhere. A workload that cannot be moved does not keep the others.
pub(super) async fn drain(global: &Global, flags: arguments::Drain) -> Result<Exit, Failure> {
    let coordinator = connect(global).await?;
    let report = DrainReport::of(&flags.node);
    let begun = Instant::now();
    let priorities = flags.priority.iter().cloned().collect();
    let pace = plan::Pace::default();
    let mut drain = Drain { coordinator, flags, priorities, begun, pace, output: global.output, report };
    let mut there = drain.look().await?;
    let mut dealt_with = HashSet::new();
    while let Some(workload) = there.iter().find(|workload| !dealt_with.contains(&workload.name)).cloned() {
        dealt_with.insert(workload.name.clone());
        if stays(&workload) {
            drain.report.not_running.push(workload.name);
            continue;
        }
        let Some(()) = drain.deal_with(workload).await else { return Ok(Exit::Interrupted) };
        // That may have taken minutes. Others move workloads, too: one that has left must not be fetched from where it is.
        match drain.look().await {
            Ok(now) => there = now,
            Err(failure) => {
                there.retain(|workload| !dealt_with.contains(&workload.name) && !stays(workload));
                drain.give_up(&there, &failure);
                break;
            }
        }
    }
    render::drain(global.output, &drain.report);
    Ok(match &drain.report {
        report if report.is_complete() => Exit::Done,
        report if report.lost.is_empty() => Exit::Failed,
        _ => Exit::Lost,
    })
}

/// Whether there is nothing to move. While a workload is migrated its status says only what one of the copies does.
fn stays(workload: &Workload) -> bool {
    workload.status == "stopped" && workload.migration_id.is_empty()
}

struct Drain {
    coordinator: Coordinator,
    flags: arguments::Drain,
    priorities: HashMap<String, i32>,
    begun: Instant,
    pace: plan::Pace,
    output: Output,
    report: DrainReport,
}

impl Drain {
    /// What is on the node now, or on its way from or to it, in the order in which it is to leave. A node that does not say so is
    /// an error.
    async fn look(&mut self) -> Result<Vec<Workload>, Failure> {
        let request = ListWorkloadsRequest { node: self.report.node.clone() };
        let there = answer(self.coordinator.list_workloads(request)).await?.workloads;
        Ok(plan::order(there, &self.priorities))
    }

    /// How much time there is until the deadline; none without one.
    fn left(&self) -> Option<Duration> {
        self.flags.deadline.map(|deadline| deadline.saturating_sub(self.begun.elapsed()))
    }

    /// Moves one workload and reports what became of it. `None` when the user interrupts.
    async fn deal_with(&mut self, workload: Workload) -> Option<()> {
        let mut moved = self.move_one(&workload, self.flags.strategy).await;
        if let Ok(Some(ended)) = &moved
            && let Some(strategy) = self.instead(ended)
        {
            self.note_end(ended);
            let here = Workload { migration_id: String::new(), ..workload.clone() };
            moved = self.move_one(&here, strategy).await;
        }
        let left = match moved {
            Ok(None) => return None,
            Ok(Some(ended)) => {
                self.note_end(&ended);
                self.note_lost(&ended);
                self.note_pace(&workload, &ended);
                still_there(&ended, &self.report.node)
            }
            Err(failure) => Some(LeftBehind { workload: workload.name, error: failure, migrated: false }),
        };
        if let Some(left) = left {
            render::failure(self.output, &left.error);
            self.report.left_behind.push(left);
        }
        Some(())
    }

    fn note_end(&mut self, ended: &Migration) {
        self.report.migrations.push(ended.into());
        if !self.output.is_json() {
            render::outcome(self.output, ended);
        }
    }

    /// How a workload is moved that auto has not moved because it writes memory faster than it is sent. Somebody who migrates it is asked
    /// what to do; a node that is to be empty does not wait until it writes less.
    fn instead(&mut self, ended: &Migration) -> Option<Strategy> {
        let problem = ended.problem.as_ref()?;
        let gave_up = problem.phase == "precopy" && problem.code == FailureCode::FailedPrecondition.as_str();
        let chosen = self.flags.strategy == Strategy::Auto && ended.source == self.report.node;
        if !gave_up || !chosen || ended.phase() != Phase::Failed {
            return None;
        }
        self.note_other(&ended.workload, Strategy::Warm, problem.message.clone());
        Some(Strategy::Warm)
    }

    /// Tells that a workload is moved in another way than was asked for.
    fn note_other(&mut self, workload: &str, strategy: Strategy, why: String) {
        let word = v1::Strategy::from(strategy).as_str_name().trim_start_matches("STRATEGY_").to_ascii_lowercase();
        let hurried = Hurried { workload: workload.to_owned(), strategy: word, why };
        render::hurried(self.output, &hurried);
        self.report.hurried.push(hurried);
    }

    /// What a migration of this node's took says what the next ones take.
    fn note_pace(&mut self, workload: &Workload, ended: &Migration) {
        let took = Duration::try_from_secs_f64(ended.total_ms / 1e3).unwrap_or_default();
        if ended.phase() == Phase::Succeeded && workload.migration_id.is_empty() {
            self.pace.saw(workload.memory_bytes, took);
        }
    }

    /// A workload that was lost is on no node: it is not left behind either.
    fn note_lost(&mut self, ended: &Migration) {
        if words::is_lost(ended) {
            self.report.lost.push(ended.workload.clone());
            if let Some(failure) = words::failure(ended) {
                render::failure(self.output, &failure);
            }
        }
    }

    /// Moves one workload, or follows the migration that it is part of already. `None` when the user interrupts.
    async fn move_one(&mut self, workload: &Workload, asked: Strategy) -> Result<Option<Migration>, Failure> {
        let id = match workload.migration_id.as_str() {
            "" => self.begin(workload, asked).await?,
            under_way => under_way.to_owned(),
        };
        to_the_end(&mut self.coordinator, &id, Progress::new()).await
    }

    /// How it is moved, in the time that is left.
    fn strategy_for(&mut self, workload: &Workload, asked: Strategy) -> Result<Strategy, Failure> {
        match plan::next(asked, self.flags.accept_loss, workload.memory_bytes, self.left(), self.pace) {
            plan::Next::AsAsked => Ok(asked),
            plan::Next::Faster { strategy, why } => {
                self.note_other(&workload.name, strategy, why);
                Ok(strategy)
            }
            plan::Next::TooLate => {
                let deadline = self.flags.deadline.unwrap_or_default().as_secs();
                let message = format!("{} was not begun: the deadline of {deadline} s has passed", workload.name);
                Err(Failure::new(FailureCode::DeadlineExceeded, message).remedy("move it by itself, if there is time"))
            }
        }
    }

    /// Asks for a migration; returns the id of it, or of the one that somebody else was faster with.
    async fn begin(&mut self, workload: &Workload, asked: Strategy) -> Result<String, Failure> {
        let strategy = self.strategy_for(workload, asked)?;
        let workload = workload.name.as_str();
        let request = MigrateRequest {
            workload: workload.to_owned(),
            strategy: v1::Strategy::from(strategy).into(),
            accept_loss: self.flags.accept_loss,
            // What takes the place of auto restarts nobody.
            allow_restart: self.flags.allow_restart && strategy == self.flags.strategy,
            ..MigrateRequest::default()
        };
        let refusal = match answer(self.coordinator.migrate(request)).await {
            Ok(begun) => return Ok(present(begun.migration)?.id),
            Err(failure) if failure.code != FailureCode::AlreadyExists => return Err(failure),
            Err(failure) => failure,
        };
        let there = self.look().await?;
        let other = there.into_iter().find(|other| other.name == workload && !other.migration_id.is_empty());
        Ok(other.ok_or(refusal)?.migration_id)
    }

    /// Nobody says any more what is on the node: the workloads that are left, if any, cannot be moved.
    fn give_up(&mut self, left: &[Workload], failure: &Failure) {
        render::failure(self.output, failure);
        let left = left.iter().map(|workload| workload.name.clone());
        self.report.left_behind.extend(left.map(|workload| LeftBehind {
            workload,
            error: failure.clone(),
            migrated: false,
        }));
        self.report.lost_sight = true;
    }
}

/// Why the workload is on `node` after that migration, if it is. One that was on its way *to* the node is when it got
/// there, and not when that failed.
fn still_there(ended: &Migration, node: &str) -> Option<LeftBehind> {
    let succeeded = ended.phase() == Phase::Succeeded;
    let arrival = ended.target == node;
    if succeeded != arrival || words::is_lost(ended) {
        return None;
    }
    let error = if arrival {
        let message = format!("{} came to {node} while it was drained", ended.workload);
        Failure::new(FailureCode::Aborted, message).remedy("drain it again")
    } else {
        let message = format!("the migration {} ended as {}", ended.id, words::phase(ended));
        words::failure(ended).unwrap_or_else(|| Failure::new(FailureCode::Aborted, message))
    };
    Some(LeftBehind { workload: ended.workload.clone(), error, migrated: true })
}
