//! A cluster with short deadlines and a Redis that is counted on, where faults are played.

use std::{collections::BTreeMap, fs, net::Ipv4Addr, path::Path, process::Command};

use podferry_local::{
    FIRST_CONTAINER_ADDRESS, LocalCluster, Options, Strategy, Workload,
    faults::{
        NODES, Scene,
        client::{Counting, Redis, Trouble},
        leftovers::{self, Inventory},
        sampler::{Sampler, running},
        stand_in,
    },
};

use crate::{
    error::{Error, Result},
    stage::{Interrupt, Program, Stage},
};

/// The workload.
pub(super) const NAME: &str = "redis";
/// Its program.
pub(super) const PROGRAM: &str = "redis-server";
/// What Redis holds, in MiB: on the slow link a transfer of seconds.
pub(super) const MEMORY: usize = 6;
/// How long a workload takes to end that is moved cold, in seconds, so that the target has begun by then.
const ENDING: u64 = 1;
/// For so many seconds the target of a post-copy tries a source that does not answer.
pub(super) const RECOVER: u64 = 9;

/// The coordinator's deadlines in seconds: short enough to be waited for, and longer than what they are for takes on two busy
/// processors.
pub(super) const DEADLINES: [(&str, u64); 10] = [
    ("preflight", 5),
    ("prepare", 5),
    ("precopy", 8),
    ("freeze", 8),
    ("commit", 4),
    ("release", 4),
    ("resume", 4),
    ("fill", 3),
    ("abort", 3),
    ("survey", 4),
];

/// Marks on a node at which its CRIU does not do as it should. Every node has a `/run` of its own.
pub(super) const ENDS_AT_ONCE: &str = "/run/chaos-criu-ends";
/// The kernel grants this CRIU no tracing, no namespaces and no checkpoints.
pub(super) const IS_REFUSED: &str = "/run/chaos-criu-refused";

/// Redis, a client that counts on it, and who looks whether two copies run.
#[derive(Debug)]
pub(super) struct Theatre {
    pub(super) counting: Option<Counting>,
    pub(super) sampler: Sampler,
    /// On which of [`NODES`] the workload is.
    pub(super) at: usize,
    pub(super) strategy: Strategy,
    /// What there is when the workload is on the one node, and on the other.
    clean: [Inventory; 2],
    pub(super) stage: Stage,
}

impl Theatre {
    /// Brings it up, and moves the workload there and back twice, so that all that is made only once is there.
    pub(super) fn up(strategy: Strategy, interrupt: &Interrupt) -> Result<Self> {
        let stage = Stage::up_as("chaos", interrupt, options_for)?;
        let workload = workload(NAME, FIRST_CONTAINER_ADDRESS, strategy, &stage.image(Program::Redis)?);
        let cluster = stage.cluster();
        cluster.start_workload(NODES[0], &workload)?;
        cluster.prepare_workload(NODES[1], &workload)?;
        Redis::connect(cluster.client(), FIRST_CONTAINER_ADDRESS)?.fill(MEMORY)?;
        let counting = Some(Counting::start(cluster.client(), FIRST_CONTAINER_ADDRESS)?);
        let sampler = Sampler::start(cluster.nodes(), NAME, PROGRAM);
        let mut theatre = Self { counting, sampler, at: 0, strategy, clean: Default::default(), stage };
        for turn in 0..3 {
            theatre.migrate()?;
            if turn > 0 {
                theatre.clean[theatre.at] = leftovers::settled(theatre.cluster())?;
            }
        }
        Ok(theatre)
    }

    pub(super) fn cluster(&self) -> &LocalCluster {
        self.stage.cluster()
    }

    pub(super) fn scene(&self) -> Scene<'_> {
        Scene { cluster: self.cluster(), workload: NAME, at: self.at, strategy: self.strategy }
    }

    fn migrate(&mut self) -> Result<()> {
        let record = self.stage.ask(NAME, self.strategy.words(), NODES[1 - self.at])?;
        if !record.succeeded() {
            return Err(Error::Misplaced(format!("before any fault: {}: {}", record.phase, record.reason)));
        }
        self.at = 1 - self.at;
        if !self.strategy.keeps_connections() {
            self.reconnect()?
                .map_or(Ok(()), |trouble| Err(Error::Misplaced(format!("before any fault: {trouble}"))))?;
        }
        Ok(())
    }

    /// A new connection counts on; what was confirmed over the old one and is gone is the trouble.
    pub(super) fn reconnect(&mut self) -> Result<Option<Trouble>> {
        let Some(counting) = self.counting.take() else { return Ok(None) };
        let (counting, lost) = counting.reconnected(self.cluster().client(), FIRST_CONTAINER_ADDRESS)?;
        self.counting = Some(counting);
        Ok(lost)
    }

    /// What is there that was not there before any fault, or the other way round.
    pub(super) fn left(&self) -> Result<Vec<String>> {
        Ok(leftovers::difference(&self.clean[self.at], &leftovers::inventory(self.cluster())?))
    }

    /// How many copies run on each node.
    pub(super) fn copies(&self) -> Result<[usize; 2]> {
        let mut copies = [0; 2];
        for (copies, name) in copies.iter_mut().zip(NODES) {
            *copies = running(&self.cluster().node(name)?, NAME, PROGRAM).len();
        }
        Ok(copies)
    }

    /// How many of the values that Redis was filled with are not there.
    pub(super) fn lost_values(&self) -> Result<usize> {
        Ok(Redis::connect(self.cluster().client(), FIRST_CONTAINER_ADDRESS)?.count_lost(MEMORY)?)
    }

    /// Keeps what explains a failure beside the logs, which outlive the cluster: journals and CRIU's logs. Gives where.
    pub(super) fn keep(&self, case: &str) -> std::path::PathBuf {
        let folder = self.stage.logs();
        for node in self.cluster().nodes() {
            for from in [node.agent_state(), node.images()] {
                let to = folder.join(node.name());
                // As much as can be had: the case has failed already.
                let _ = fs::create_dir_all(&to);
                let images = ["--exclude=*.store", "--exclude=pages-*.img"];
                let mut copy = Command::new("tar");
                copy.arg("-C").arg(node.on_machine(&from)).arg("-cf").arg(to.join(tar_name(&from))).args(images);
                let _ = podferry_local::command::run(copy.arg("."));
            }
        }
        let _ = fs::write(folder.join("case"), case);
        folder
    }
}

fn tar_name(folder: &Path) -> String {
    format!("{}.tar", folder.file_name().unwrap_or_default().to_string_lossy())
}

fn options_for(mut options: Options) -> Result<Options> {
    let deadlines = DEADLINES.map(|(name, seconds)| (name.to_owned(), seconds));
    options.deadlines = BTreeMap::from(deadlines);
    options.recover_within_s = Some(RECOVER);
    let before = format!(
        "if test \"$1\" = swrk; then
    if test -e {ENDS_AT_ONCE}; then exit 1; fi
    if test -e {IS_REFUSED}; then
        exec setpriv --bounding-set=-sys_ptrace,-sys_admin,-checkpoint_restore {} \"$@\"
    fi
fi",
        options.tools.join("criu").display()
    );
    options.tools = stand_in::folder_with(&options.folder.join("tools"), &options.tools, "criu", &before)?;
    Ok(options)
}

/// A Redis. The one that is moved cold writes down each change before it answers, and takes a while to end.
pub(crate) fn workload(name: &str, ip: Ipv4Addr, strategy: Strategy, rootfs: &Path) -> Workload {
    let redis = "/bin/redis-server --protected-mode no --dir /data";
    let script = match strategy {
        Strategy::Cold => format!(
            "{redis} --save '' --appendonly yes & pid=$!
             trap 'sleep {ENDING}; kill -TERM $pid' TERM
             while kill -0 $pid 2>/dev/null; do wait $pid; done"
        ),
        _ => format!("exec {redis} --save ''"),
    };
    Workload::new(name, rootfs, ["/bin/sh", "-c", &script], ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_moved_cold_is_written_to_disk() {
        let image = Path::new("/images/redis");
        let words = |strategy| workload(NAME, FIRST_CONTAINER_ADDRESS, strategy, image).args.concat();
        assert!(words(Strategy::Cold).contains("--appendonly yes") && words(Strategy::Cold).contains("trap"));
        assert!(
            words(Strategy::Live).contains("exec /bin/redis-server") && !words(Strategy::Live).contains("appendonly")
        );
    }

    #[test]
    fn a_target_waits_longer_for_its_source_than_any_other_fault_lasts_behind_the_commit() {
        let deadline = |wanted| DEADLINES.iter().find(|(name, _)| *name == wanted).unwrap().1;
        assert!(["release", "resume", "fill"].into_iter().all(|phase| deadline(phase) + 2 < RECOVER));
    }
}
