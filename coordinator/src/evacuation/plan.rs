//! What is to be done next. Pure: it judges sizes, times and what is under way.

use std::collections::HashMap;
use std::time::Duration;

use podferry_common::{MigrationId, WorkloadName};

use super::Pace;
use super::record::{Entry, Evacuation, Hurried, Phase, Standing};
use crate::strategy::Strategy;

/// What there is room for, now.
#[derive(Clone, Debug, Default)]
pub struct Room {
    /// Migrations that the node takes part in.
    pub on_node: usize,
    /// Migrations that it may take part in.
    pub per_node: usize,
    /// Time until the deadline; none without one.
    pub left: Option<Duration>,
    /// Bytes that those under way still have to send, where that is known.
    pub unsent: HashMap<WorkloadName, u64>,
    /// Workloads that are not to be tried yet.
    pub resting: Vec<WorkloadName>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Ask for a migration; none: the coordinator chooses how.
    Begin {
        /// Of what.
        workload: WorkloadName,
        /// How.
        strategy: Option<Strategy>,
        /// Why it is not as was asked for, if it is not and that is new.
        hurried: Option<Hurried>,
    },
    /// Undo a migration.
    Cancel(MigrationId),
    /// Take down that a workload is not expected to be away in time; none: it is again.
    Late(WorkloadName, Option<String>),
    /// Take down that there is no time left to begin anything.
    DeadlinePassed,
}

/// What is to be done with an evacuation now, in this order. Nothing: there is something to wait for, or it is [done](is_done).
pub fn next(evacuation: &Evacuation, room: &Room) -> Vec<Command> {
    match evacuation.phase {
        Phase::Ended(_) => Vec::new(),
        Phase::Cancelling { .. } => ours(evacuation).map(Command::Cancel).collect(),
        Phase::Running if room.left.is_some_and(|left| left.is_zero()) => {
            let waits = evacuation.entries.iter().any(|entry| entry.standing == Standing::Waiting);
            if waits { vec![Command::DeadlinePassed] } else { Vec::new() }
        }
        Phase::Running => Planner::new(evacuation, room).plan(),
    }
}

/// Whether nothing is left to be done, as of the last look at the node. Until the deadline, of which so much is left, that means also that no
/// connection of what has moved away needs the node any more; there may be none.
pub(super) fn is_done(evacuation: &Evacuation, left: Option<Duration>) -> bool {
    match evacuation.phase {
        Phase::Ended(_) => false,
        Phase::Cancelling { .. } => ours(evacuation).next().is_none(),
        Phase::Running => {
            let waits = evacuation.homes > 0 && left.is_none_or(|left| !left.is_zero());
            !waits && evacuation.entries.iter().all(|entry| entry.standing.is_settled())
        }
    }
}

/// Migrations under way that this evacuation began.
fn ours(evacuation: &Evacuation) -> impl Iterator<Item = MigrationId> {
    evacuation.entries.iter().filter_map(|entry| match entry.standing {
        Standing::Moving { migration, ours: true, .. } => Some(migration),
        _ => None,
    })
}

struct Planner<'a> {
    evacuation: &'a Evacuation,
    room: &'a Room,
    /// Those that wait, in the order in which they are to leave.
    waiting: Vec<&'a Entry>,
    moving: Vec<&'a Entry>,
    lanes: usize,
    pace: Pace,
}

impl<'a> Planner<'a> {
    fn new(evacuation: &'a Evacuation, room: &'a Room) -> Self {
        let of = |wanted: fn(&Standing) -> bool| evacuation.entries.iter().filter(move |entry| wanted(&entry.standing));
        let mut waiting: Vec<_> = of(|standing| *standing == Standing::Waiting).collect();
        waiting.sort_by(|a, b| a.turn(&evacuation.terms).cmp(&b.turn(&evacuation.terms)));
        let moving = of(|standing| matches!(standing, Standing::Moving { .. })).collect();
        let lanes = evacuation.terms.concurrency.unwrap_or(usize::MAX).min(room.per_node).max(1);
        Self { evacuation, room, waiting, moving, lanes, pace: pace(evacuation, lanes) }
    }

    fn plan(&self) -> Vec<Command> {
        let in_time = self.in_time(&[]);
        let mut commands = self.lateness(&in_time);
        let some_in_time = in_time.contains(&true) || self.moving.iter().any(|entry| entry.late.is_none());
        let (mut free, mut copied) = (self.free(), Vec::new());
        for (entry, fits) in self.waiting.iter().zip(in_time) {
            // One that will be late takes no bandwidth from those that need not be.
            let gives_way = !fits && some_in_time;
            if free == 0 || gives_way || self.room.resting.contains(&entry.workload) {
                continue;
            }
            free -= 1;
            let hurried = if entry.hurried.is_none() { self.hurry(entry, fits, &copied) } else { None };
            if entry.hurried.is_none() && hurried.is_none() {
                copied.push(&entry.workload);
            }
            commands.push(self.begin(entry, hurried));
        }
        commands
    }

    /// How many may begin now.
    fn free(&self) -> usize {
        let by_node = self.room.per_node.saturating_sub(self.room.on_node);
        let mine = self.evacuation.entries.iter().filter(|entry| entry.migration().is_some()).count();
        by_node.min(self.lanes.saturating_sub(mine))
    }

    fn begin(&self, entry: &Entry, hurried: Option<Hurried>) -> Command {
        let instead = hurried.as_ref().or(entry.hurried.as_ref()).map(|hurried| hurried.strategy);
        let strategy = instead.or(self.evacuation.terms.strategy);
        Command::Begin { workload: entry.workload.clone(), strategy, hurried }
    }

    /// How a workload is moved if not as was asked for. Only what copies memory beforehand, or may do so, is replaced, and only if that
    /// takes time that this one or another one does not have.
    fn hurry(&self, entry: &Entry, fits: bool, copied: &[&WorkloadName]) -> Option<Hurried> {
        let left = self.room.left?;
        let asked = self.evacuation.terms.strategy;
        if !matches!(asked, None | Some(Strategy::Live | Strategy::Hybrid)) {
            return None;
        }
        let (live, warm) = (self.pace.live(entry.memory_bytes), self.pace.once(entry.memory_bytes));
        let said = |what: &str, needed: Duration| {
            format!("{what} would take about {} s, and {} s are left", needed.as_secs(), left.as_secs())
        };
        if !fits && warm > left && self.evacuation.terms.accept_loss {
            let why = format!("even {}, and a loss is accepted", said("warm", warm));
            return Some(Hurried { strategy: Strategy::Postcopy, why });
        }
        let why = if live > left {
            said("copying it while it runs", live)
        } else if self.costs(entry, copied) {
            format!("{} for {} workloads", said("copying it while it runs", live), self.waiting.len())
        } else {
            return None;
        };
        Some(Hurried { strategy: Strategy::Warm, why })
    }

    /// Whether some workload would be away in time if this one is sent once, and is not if it is copied while it runs, as those are that
    /// begin in the same moment.
    fn costs(&self, entry: &Entry, copied: &[&WorkloadName]) -> bool {
        let with: Vec<_> = copied.iter().copied().chain([&entry.workload]).collect();
        self.in_time(copied) != self.in_time(&with)
    }

    /// Of those that wait, which are expected to be away in time when each is sent once, but those that are copied while they run.
    /// One that is not takes no time from those behind it, since it gives way to them.
    fn in_time(&self, copied: &[&WorkloadName]) -> Vec<bool> {
        let Some(left) = self.room.left else { return vec![true; self.waiting.len()] };
        let mut lanes = vec![Duration::ZERO; self.lanes];
        for entry in &self.moving {
            let unsent = self.room.unsent.get(&entry.workload).copied().unwrap_or(entry.memory_bytes);
            let lane = earliest(&mut lanes);
            *lane = lane.saturating_add(self.pace.once(unsent));
        }
        let mut fits = Vec::new();
        for entry in &self.waiting {
            let twice = copied.contains(&&entry.workload);
            let needed = if twice { self.pace.live(entry.memory_bytes) } else { self.pace.once(entry.memory_bytes) };
            let lane = earliest(&mut lanes);
            let end = lane.saturating_add(needed);
            fits.push(end <= left);
            if end <= left {
                *lane = end;
            }
        }
        fits
    }

    /// What is to be said of who will be late, where it is not said already.
    fn lateness(&self, in_time: &[bool]) -> Vec<Command> {
        let Some(left) = self.room.left else { return Vec::new() };
        let changed = self.waiting.iter().zip(in_time).filter(|(entry, fits)| entry.late.is_none() != **fits);
        let said = changed.map(|(entry, fits)| {
            let needed = self.pace.once(entry.memory_bytes).as_secs();
            let why = format!(
                "it takes about {needed} s behind those that leave before it, and {} s are left",
                left.as_secs()
            );
            Command::Late(entry.workload.clone(), (!fits).then_some(why))
        });
        said.collect()
    }
}

/// The lane that is free first.
fn earliest(lanes: &mut [Duration]) -> &mut Duration {
    // There is at least one.
    let at = (0..lanes.len()).min_by_key(|at| lanes[*at]).unwrap_or_default();
    &mut lanes[at]
}

/// How fast memory leaves the node, by the migrations of this evacuation.
fn pace(evacuation: &Evacuation, lanes: usize) -> Pace {
    let mut pace = Pace::new(lanes);
    for entry in evacuation.entries.iter().filter(|entry| entry.standing == Standing::Moved && entry.total_ms > 0.0) {
        pace.saw(entry.memory_bytes, Duration::try_from_secs_f64(entry.total_ms / 1e3).unwrap_or_default());
    }
    pace
}
