//! Starting `runc restore`, with what it needs, and removing what one has left.

use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode};
use podferry_memory::handover::Handover;
use podferry_memory::shared::laying;
use podferry_runtime::{CgroupsMode, RestoreRequest, RestoreStdio, RunningRestore};

use super::bundle::Bundle;
use super::early;
use super::{TargetPart, fetch, io_failed, pod};
use crate::context::{Context, blocking};
use crate::journal::{PartDirs, PodArrival};
use crate::pager;
use crate::pager::messages::{PagedContainer, PagerJob};

impl TargetPart {
    /// Everything is here: restores, with the restore that was started early if there is one.
    pub(super) async fn start_restore(&self) -> Result<(), Failure> {
        let mut running = Arc::clone(&self.restore).lock_owned().await;
        if running.as_ref().is_some_and(|started| !started.is_early()) {
            return Err(self.refused(FailureCode::FailedPrecondition, "this migration is being restored", "restore"));
        }
        if let Some(source) = &self.fetch_from {
            fetch::start(&self.context, self.migration, source).map_err(|error| io_failed(&self.context, &error))?;
        }
        let restoring = self.restoring();
        let (cancelled, fetches) = (self.cancelled.clone(), self.fetch_from.is_some());
        // This future may be dropped while pager and runc start. The lock goes along, so that an abort waits for what was started.
        let starting = tokio::spawn(async move {
            if cancelled.is_cancelled() {
                let context = &restoring.context;
                return Err(context.refusal(FailureCode::Aborted, "the migration was aborted").in_phase("restore"));
            }
            let waiting = restoring.listen_for_criu(fetches)?;
            let (with, lazy) = (restoring.clone(), waiting.is_some());
            let starting = blocking(move || early::go_on_or_start(&mut running, &with, lazy));
            // At once: CRIU needs its pager late, and the container stands still meanwhile.
            let (started, paging) = tokio::join!(starting, restoring.start_pager(waiting));
            started.and(paging)
        });
        let what = "the task that starts a restore ended";
        starting.await.map_err(|error| self.context.failure(FailureCode::Internal, what, &error))?
    }

    /// Ends a restore, if there is one, and removes what it made.
    pub(super) async fn clean_restore(&self, patience: Duration) -> Result<(), Failure> {
        let running = self.restore.lock().await.take();
        let restoring = self.restoring();
        blocking(move || match running {
            Some(started) => started.end(&restoring, patience),
            None => restoring.clean_up(),
        })
        .await
    }

    pub(super) fn restoring(&self) -> Restoring {
        Restoring {
            context: self.context.clone(),
            bundle: self.bundle.clone(),
            dirs: self.dirs.clone(),
            workload: self.workload.clone(),
            migration: self.migration,
            keep_connections: self.keep_connections || self.away.is_some(),
            pod: self.pod.clone(),
            cold: self.cold,
        }
    }
}

/// What a restore is made with.
#[derive(Clone, Debug)]
pub(super) struct Restoring {
    pub(super) context: Context,
    pub(super) bundle: Bundle,
    pub(super) dirs: PartDirs,
    /// runc's id of the container.
    pub(super) workload: String,
    pub(super) migration: MigrationId,
    keep_connections: bool,
    /// Kubernetes: what it becomes.
    pod: Option<PodArrival>,
    /// It is created, not restored.
    cold: bool,
}

impl Restoring {
    /// Listens for CRIU in place of whoever will serve the pages that come later; none when there are no such pages.
    fn listen_for_criu(&self, fetches: bool) -> Result<Option<(PagerJob, UnixListener)>, Failure> {
        let Self { context, bundle, dirs, workload, .. } = self;
        if !Handover::is_there(&dirs.images) {
            return Ok(None);
        }
        let cgroups = podferry_runtime::cgroups_of_bundle(&bundle.dir, workload)
            .map_err(|error| self.failed("the cgroup of the container that is restored cannot be named", &error))?;
        let job = PagerJob {
            migration: self.migration.to_string(),
            handover: dirs.images.clone(),
            status: dirs.pager_status(),
            fetch: fetches.then(|| dirs.fetch_socket()),
            container: PagedContainer {
                root: context.config.runc_root().to_owned(),
                id: workload.clone(),
                cgroups: cgroups.dirs().into_iter().map(Path::to_owned).collect(),
            },
        };
        let listener = pager::client::listen(&dirs.work).map_err(|error| io_failed(context, &error))?;
        Ok(Some((job, listener)))
    }

    async fn start_pager(&self, waiting: Option<(PagerJob, UnixListener)>) -> Result<(), Failure> {
        let Self { context, dirs, .. } = self;
        let Some((job, listener)) = waiting else { return Ok(()) };
        let job_file = dirs.state.join("pager-job.json");
        let log = dirs.state.join("pager.log");
        let started = pager::client::start(&context.config.tools.pager, &job, &job_file, listener, &log).await;
        started.map(drop).map_err(|failure| failure.on(context.config.node.as_str()))
    }

    /// Mounts the root filesystem, unless it is mounted; blocks.
    pub(super) fn mount_root(&self) -> Result<(), Failure> {
        if self.bundle.is_mounted() {
            return Ok(());
        }
        let rootfs = self.bundle.rootfs();
        podferry_filesystem::unmount(&rootfs)
            .and_then(|()| self.bundle.overlay().mount(&rootfs))
            .map_err(|error| self.failed("the container's root filesystem cannot be mounted", &error))
    }

    /// Starts `runc restore`; blocks. The root filesystem, or something in its place, has to be mounted.
    pub(super) fn start(&self, lazy_pages: bool) -> Result<RunningRestore, Failure> {
        let Self { context, bundle, dirs, workload, migration, keep_connections, .. } = self;
        let tools = &context.config.tools;
        let criu_config = dirs.run.join("criu.conf");
        fs::write(&criu_config, podferry_runtime::criu_config(&tools.hook, !keep_connections))
            .map_err(|error| io_failed(context, &error))?;
        let launcher = self.pod.as_ref().map(|pod| pod::launcher(context, pod, workload, *migration)).transpose()?;
        let stdio = match &launcher {
            // Its own are the container's.
            Some(_) => RestoreStdio::Null,
            None => self.kept_stdio()?,
        };
        laying::begin_again(&dirs.images).map_err(|error| io_failed(context, &error))?;
        let variables: [(&str, OsString); 6] = [
            (laying::VARIABLE, laying::index(&dirs.images).into()),
            ("LD_PRELOAD", tools.criu_shim.clone().into()),
            (podferry_runtime::hook::HOOK_PROGRAM, tools.hook.clone().into()),
            ("CRIU_CONFIG_FILE", criu_config.into()),
            (podferry_runtime::hook::HOOK_SOCKET, dirs.hook_socket().into()),
            (podferry_runtime::hook::MIGRATION, migration.to_string().into()),
        ];
        let request = RestoreRequest {
            id: workload.clone(),
            bundle: bundle.dir.clone(),
            image_path: dirs.images.clone(),
            work_path: dirs.work.clone(),
            pid_file: launcher.is_none().then(|| dirs.run.join("pid")),
            stdio,
            tcp_established: *keep_connections,
            file_locks: true,
            lazy_pages,
            cgroups_mode: CgroupsMode::Ignore,
            env: variables.into_iter().map(|(name, value)| (name.into(), value)).collect(),
            detach: true,
            launcher,
        };
        let programs = dirs.programs(tools).map_err(|error| io_failed(context, &error))?;
        let runc = context.runc(context.config.runc_root()).with_programs(programs);
        runc.restore(request).map_err(|error| self.failed("runc restore cannot be started", &error))
    }

    fn kept_stdio(&self) -> Result<RestoreStdio, Failure> {
        let stdio = self.context.container_stdio(&self.workload)?;
        tracing::debug!(migration = %self.migration, "the output has its keeper");
        Ok(RestoreStdio::Fds { stdin: stdio.stdin, stdout: stdio.stdout, stderr: stdio.stderr })
    }

    /// Removes what a restore that did not come to its end has left, if this migration started it; blocks.
    pub(super) fn clean_up(&self) -> Result<(), Failure> {
        let runc = self.context.runc(self.context.config.runc_root());
        if self.cold {
            self.wait_for_runc()?;
        }
        // What has another origin is not ours to kill.
        if runc.restores_from(&self.workload).map_err(|error| self.not_removed(&error))?.as_ref()
            != Some(&self.dirs.work)
        {
            return Ok(());
        }
        let cgroup = self.pod.as_ref().and_then(|pod| pod.cgroup.as_ref());
        let cleaned = match cgroup.filter(|_| !self.bundle.dir.join("config.json").exists()) {
            // The kubelet has given the container up, and containerd has removed all that it knows of it.
            Some(cgroup) => runc.cleanup_given_up_restore(&self.workload, cgroup),
            None => runc.cleanup_killed_restore(&self.workload, &self.bundle.dir),
        };
        cleaned.map_err(|error| self.not_removed(&error))
    }

    pub(super) fn failed(&self, what: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
        self.context.failure(FailureCode::Internal, what, error).in_phase("restore")
    }

    pub(super) fn not_removed(&self, error: &podferry_runtime::Error) -> Failure {
        let what = "what a restore left cannot be removed";
        self.context.failure(FailureCode::Internal, what, error).in_phase("rollback")
    }
}
