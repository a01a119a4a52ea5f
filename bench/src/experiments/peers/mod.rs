//! Other tools that move the same workload between the same nodes over the same link.

mod copy;
mod criu;
mod runc;
mod way;

use podferry_report::results::{Outcome, Strategy};

pub(super) use self::copy::READY;
pub use self::copy::{receive, send};
use self::way::Way;
pub(super) use self::way::this_program;
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
    Ok(moved.map_err(|error| Outcome::Failed(essence(&error.to_string()))))
}

/// How much of what a tool says is kept.
const MOST_CHARACTERS: usize = 400;

/// Tools put all of CRIU's log into their errors: what it calls an error is kept, or the beginning where nothing is called so.
fn essence(said: &str) -> String {
    let errors: Vec<&str> =
        said.lines().filter_map(|line| Some(line.split_once("Error (")?.1.trim_end_matches('"'))).collect();
    let text = if errors.is_empty() { said.to_owned() } else { errors.join("; ") };
    text.chars().take(MOST_CHARACTERS).collect()
}

/// Removes images that a failure has left, and ends what no container runtime knows of, so that the container can be removed like any other.
pub(super) fn remove(stage: &Stage, name: &str, strategy: Strategy) -> Result<()> {
    for node in NODES {
        let node = stage.cluster().node(node)?;
        way::remove_images(&node)?;
        if strategy == Strategy::PeerCriu {
            criu::remove(&node, name)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_log_its_errors_are_kept() {
        let log = "level=warning msg=\"1: dumping /proc/7\"\nlevel=warning msg=\"2: Error (criu/cr-dump.c:389): Can't get rlimit 0\"\n";
        assert_eq!(essence(log), "criu/cr-dump.c:389): Can't get rlimit 0");
        assert_eq!(essence(&"x".repeat(900)).len(), MOST_CHARACTERS);
    }
}
