//! What is moved in a scenario: its container, its clients, and what has to be done before it can be moved.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use podferry_local::Workload as Container;
use podferry_report::results::{Scenario, Workload};
use podferry_workloads::ballast::SIZE_VARIABLE;

use super::scenario;
use crate::{
    clients,
    error::{Error, Result},
    load::Kind,
    loads::{self, Load},
    stage::{Program, Stage},
};

/// How long a workload may take until it listens: some write all of their memory before.
const PATIENCE: Duration = Duration::from_secs(120);
/// Annotation that says how an application hands its state over.
const HOOKS: &str = "podferry.dev/application";
/// Annotation that says by which signal a program is to end.
const STOP_SIGNAL: &str = "org.opencontainers.image.stopSignal";
/// What a CPU limit is told in: µs of each 100 ms.
const PERIOD_US: f64 = 100_000.0;

/// What is moved. The same subject may be moved in one scenario after the other.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Subject {
    /// What it is.
    pub(super) workload: Workload,
    /// What it holds, in MiB.
    pub(super) memory_mib: u64,
    dirty_percent: Option<f64>,
    cpu_limit: Option<f64>,
    memory_limit_mib: Option<u64>,
}

impl Subject {
    /// That of a scenario.
    pub(super) fn of(scenario: &Scenario) -> Self {
        Self {
            workload: scenario.workload,
            memory_mib: scenario.memory_mib,
            dirty_percent: scenario.dirty_percent,
            cpu_limit: scenario.cpu_limit,
            memory_limit_mib: scenario.memory_limit_mib,
        }
    }

    /// The container's name.
    pub(super) fn name(&self) -> &'static str {
        match (self.program(), self.load()) {
            (Some(program), _) => program.name(),
            (None, Some(load)) => load,
            (None, None) => scenario::workload_name(self.workload),
        }
    }

    /// Names of all containers that there may be.
    pub(super) fn names() -> Vec<String> {
        let all = [
            Workload::Catalogue,
            Workload::Cart,
            Workload::Redis,
            Workload::Postgres,
            Workload::Java,
            Workload::Node,
            Workload::Go,
            Workload::Synthetic,
        ];
        let of =
            |workload| Self { workload, memory_mib: 0, dirty_percent: None, cpu_limit: None, memory_limit_mib: None };
        all.map(|workload| of(workload).name().to_owned()).into()
    }

    fn program(&self) -> Option<Program> {
        match self.workload {
            Workload::Catalogue => Some(Program::Catalogue),
            Workload::Cart => Some(Program::ShoppingCart),
            Workload::Redis => Some(Program::Redis),
            _ => None,
        }
    }

    /// Its name among the loads that `podferry-bench loads` knows.
    fn load(&self) -> Option<&'static str> {
        match self.workload {
            Workload::Postgres => Some("postgresql"),
            Workload::Java => Some("jvm"),
            Workload::Node => Some("node"),
            Workload::Go => Some("go"),
            _ => None,
        }
    }

    /// Where it listens.
    pub(super) fn address(&self) -> Result<SocketAddr> {
        Ok(match (self.program(), self.known_load()?) {
            (Some(program), _) => program.address(),
            (None, Some(load)) => load.address(),
            (None, None) => SocketAddr::from((podferry_local::FIRST_CONTAINER_ADDRESS, loads::PORT)),
        })
    }

    /// What its clients do.
    pub(super) fn kind(&self) -> Result<Kind> {
        Ok(match (self.workload, self.known_load()?) {
            (Workload::Catalogue, _) => Kind::Catalogue,
            (Workload::Cart, _) => Kind::Cart,
            (Workload::Redis, _) => Kind::Redis,
            (_, Some(load)) => load.kind(),
            (_, None) => Kind::Lines,
        })
    }

    fn known_load(&self) -> Result<Option<Load>> {
        let Some(name) = self.load() else { return Ok(None) };
        Ok(Load::named(&[name.to_owned()])?.first().copied())
    }

    /// Its container; images that are made lie below `folder`.
    fn container(&self, stage: &Stage, folder: &Path) -> Result<Container> {
        let mut container = match (self.program(), self.known_load()?) {
            (Some(program), _) => program.container(&image(stage, program)?)?,
            (None, Some(load)) => load.workload(folder)?,
            (None, None) => self.synthetic(folder)?,
        };
        if matches!(self.workload, Workload::Catalogue | Workload::Cart) {
            container.env.push(format!("{SIZE_VARIABLE}={}", self.memory_mib));
        }
        if let Some(preset) = self.preset() {
            container.annotations.push((HOOKS.to_owned(), preset.to_owned()));
        }
        if self.workload == Workload::Postgres {
            // As its official image has it: by SIGTERM it would wait for its clients to go.
            container.annotations.push((STOP_SIGNAL.to_owned(), "SIGINT".to_owned()));
        }
        container.memory_limit = self.memory_limit_mib.and_then(|mib| i64::try_from(mib << 20).ok());
        #[expect(clippy::cast_possible_truncation, reason = "at most 64 CPUs")]
        {
            container.cpu_quota = self.cpu_limit.map(|cpus| (cpus * PERIOD_US) as i64);
        }
        Ok(container)
    }

    fn preset(&self) -> Option<&'static str> {
        match self.workload {
            Workload::Redis => Some("redis"),
            Workload::Catalogue => Some("stateless"),
            _ => None,
        }
    }

    fn synthetic(&self, folder: &Path) -> Result<Container> {
        let percent = self.dirty_percent.unwrap_or_default();
        let (mib, percent) = (self.memory_mib.to_string(), percent.to_string());
        let words = ["--mib", mib.as_str(), "--percent", percent.as_str()];
        let std::net::IpAddr::V4(ip) = self.address()?.ip() else {
            return Err(Error::Misplaced("the workload has no IPv4 address".to_owned()));
        };
        loads::made_up(folder, self.name(), &words, ip)
    }

    /// Starts it on the first node, and fills it.
    pub(super) fn start(&self, stage: &Stage) -> Result<()> {
        let container = self.container(stage, stage.cluster().folder())?;
        let address = self.address()?;
        stage.start_container(&container, address.port(), PATIENCE)?;
        let client = stage.cluster().client();
        match self.workload {
            Workload::Redis => clients::fill_redis(client, address, self.memory_mib).map(drop),
            Workload::Postgres => clients::fill_sql(client, address),
            _ => Ok(()),
        }
    }
}

/// The program's root filesystem, made once for a cluster. Redis's is made once for the machine, and looked for by its script.
fn image(stage: &Stage, program: Program) -> Result<PathBuf> {
    let rootfs = stage.cluster().folder().join("images").join(program.name()).join("rootfs");
    if rootfs.exists() { Ok(rootfs) } else { stage.image(program) }
}
