//! Other tools that move the same workload between the same nodes over the same link.

mod copy;
mod criu;
mod runc;
mod way;

use podferry_report::results::{Outcome, Strategy};

pub use self::copy::{receive, send};
use self::way::Way;
use super::measure::Moved;
use crate::{
    error::{Error, Result},
    stage::{NODES, Stage},
};

/// Moves the container from the node at `place` to the other one.
pub(super) fn move_it(stage: &Stage, name: &str, strategy: Strategy, place: usize) -> Result<Result<Moved, Outcome>> {
    let (source, target) = (stage.cluster().node(NODES[place])?, stage.cluster().node(NODES[1 - place])?);
    let way = Way::new(&source, &target, name);
    let moved = match strategy {
        Strategy::PeerRunc => way.go(&mut runc::Runc),
        Strategy::PeerCriu => way.go(&mut criu::Criu::default()),
        _ => return Err(Error::Misplaced(format!("{strategy:?} is not driven by this program"))),
    };
    Ok(moved.map_err(|error| Outcome::Failed(error.to_string())))
}

/// Ends what no container runtime knows of, so that the container can be removed like any other.
pub(super) fn remove(stage: &Stage, name: &str, strategy: Strategy) -> Result<()> {
    if strategy != Strategy::PeerCriu {
        return Ok(());
    }
    NODES.iter().try_for_each(|node| criu::remove(&stage.cluster().node(node)?, name))
}
