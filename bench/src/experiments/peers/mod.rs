//! Other tools that move the same workload between the same nodes over the same link.

mod copy;
mod runc;

use podferry_report::results::{Outcome, Strategy};

pub use self::copy::{receive, send};
use super::measure::Moved;
use crate::{
    error::{Error, Result},
    stage::{NODES, Stage},
};

/// Moves the container from the node at `place` to the other one.
pub(super) fn move_it(
    stage: &Stage,
    name: &str,
    strategy: Strategy,
    place: usize,
) -> Result<Result<Moved, Outcome>> {
    let (source, target) = (stage.cluster().node(NODES[place])?, stage.cluster().node(NODES[1 - place])?);
    let moved = match strategy {
        Strategy::PeerRunc => runc::move_it(&source, &target, name),
        _ => return Err(Error::Misplaced(format!("{strategy:?} is not driven by this program yet"))),
    };
    Ok(moved.map_err(|error| Outcome::Failed(error.to_string())))
}
