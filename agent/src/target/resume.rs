//! Letting a committed container go, with its link; and restoring it again when it died before it ran.

use std::time::{Duration, Instant};

use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_memory::shared::laying;
use podferry_network::{Announcer, Netns, Replayer};
use podferry_part::{May, Side, Step, may};
use tokio::sync::MutexGuard;

use super::hook::Hold;
use super::{END_TIMEOUT, HOOK_TIMEOUT, TargetPart, fill, io_failed, network};
use crate::journal::{PartRecord, Role, Standing};
use crate::pager;
use crate::pager::messages::PagerState;

/// How often an address is announced after the first time, and the pause before each.
const ANNOUNCEMENTS: u32 = 3;
const ANNOUNCE_PAUSE: Duration = Duration::from_millis(250);
/// How often a committed restore that dies is done again.
const RESTORE_TRIES: u32 = 3;
/// How long such a restore may take: minutes for a workload of hundreds of GiB, for ever for a CRIU that hangs.
const HELD_TIMEOUT: Duration = Duration::from_secs(600);

/// What became of a container that was told to go.
enum Gone {
    /// It runs, or has run.
    Running,
    /// It has not run.
    Died(Failure),
}

impl TargetPart {
    /// The migration is committed and the source has stopped for good: lets the container run, with its address. Returns its init.
    ///
    /// # Errors
    /// When it does not come to run; to be called again.
    pub async fn resume(&self) -> Result<i32, Failure> {
        let mut record = self.ledger.lock().await;
        self.check_bound(&record)?;
        match may(Side::Target, record.standing, Step::Resume) {
            May::Taken => return Ok(self.init_pid()),
            May::Take => {}
            May::Refuse => return Err(self.wrong_standing("resume", record.standing)),
        }
        if let Some(pod) = record.pod().filter(|pod| pod.stands_in) {
            let message = format!("pod {} stands in for another, which is still to come", pod.name);
            let failure = self.refused(FailureCode::Unavailable, message, "resume");
            return Err(failure.remedy("the coordinator makes that pod, and asks again"));
        }
        if self.cold {
            self.start_created(&mut record).await?;
        } else {
            self.let_go(&mut record).await?;
        }
        tracing::debug!(migration = %self.migration, "runc is done with the restore");
        network::restore_mtu(&record);
        if let Some(away) = &self.away {
            away.settle();
        }
        self.note(&mut record, |record| record.standing = Standing::Resumed)?;
        self.context.admissions.forget(self.migration);
        if fill::is_under_way(&self.dirs) {
            // Private pages are there until they are in place; shared memory is in place, and takes its room twice until then.
            if let Err(error) = laying::remove(&self.dirs.images) {
                tracing::warn!(%error, "shared memory that was laid in cannot be removed");
            }
        } else {
            self.dirs.wipe_volatile();
        }
        Ok(self.init_pid())
    }

    /// Lets the held container go, with its link; restores it again when it is not there any more and has not run.
    ///
    /// The link joins only for a copy that is about to run: the sockets of a dead one would answer clients with resets, or
    /// acknowledge what the next copy knows nothing of.
    async fn let_go(&self, record: &mut MutexGuard<'_, PartRecord>) -> Result<(), Failure> {
        for _ in 0..RESTORE_TRIES {
            let died = match self.go_once(record).await? {
                Gone::Running => {
                    // An agent that was killed may not have come so far.
                    self.join_link(record)?;
                    Self::announce(record);
                    self.open_door(record);
                    return Ok(());
                }
                Gone::Died(failure) => failure,
            };
            if record.left().is_empty() {
                tracing::error!(migration = %self.migration, failure = %died, "a committed restore died; restoring again");
            }
            self.part_link(record)?;
            self.doorstep.close();
            if let Some(away) = &self.away {
                away.close();
            }
            self.clean_restore(self.patience()).await?;
            if self.has_given_pages_up(record.going).await? {
                tracing::error!(migration = %self.migration, "it had run: its memory is lost");
                return Ok(());
            }
            self.note(record, |record| record.going = false)?;
            self.restore_again(record).await?;
        }
        Err(self.refused(FailureCode::Internal, "the committed restore dies again and again", "resume"))
    }

    /// Tells a held container to go, and waits until runc is done with it. Whoever has been told may have run, so only
    /// runc's own failure, or the death of everything there was, says that it died.
    async fn go_once(&self, record: &mut MutexGuard<'_, PartRecord>) -> Result<Gone, Failure> {
        if !record.left().is_empty() {
            let message = "what came is for a container that was given up, and nothing has been restored since";
            return Ok(Gone::Died(self.refused(FailureCode::Unavailable, message, "resume")));
        }
        if !record.going {
            // After this agent's restart a sealed hook finds it within 100 ms.
            let hold = self.hook.until(HOOK_TIMEOUT, |hold| *hold != Hold::NotYet).await;
            if hold.pid().is_none() {
                return Ok(Gone::Died(self.refused(FailureCode::Internal, "the held container is gone", "resume")));
            }
            if let Err(failure) = self.check_held().await {
                return Ok(Gone::Died(failure));
            }
            self.note(record, |record| record.going = true)?;
            self.go(record).await?;
        } else if self.hook.until(Duration::ZERO, |_| true).await.pid().is_some() {
            // An earlier agent died, or could not join the link, between its note and its word.
            if let Err(failure) = self.check_held().await {
                self.note(record, |record| record.going = false)?;
                return Ok(Gone::Died(failure));
            }
            self.go(record).await?;
        }
        self.until_running(record).await
    }

    /// Fails when what is held must not run: its restore has died, or its pagers, and it would read zeros. It is given up then.
    async fn check_held(&self) -> Result<(), Failure> {
        self.check_restore().await?;
        let checked = self.check_pager();
        if checked.is_err() {
            // Nobody else tells it, and its restore waits for a word.
            let _gone_already = self.hook.tell("abort").await;
        }
        checked
    }

    /// Joins the link and tells where the address is now, then says the word: a container that runs without its link can only lose
    /// connections, and what its clients send meanwhile goes astray.
    async fn go(&self, record: &PartRecord) -> Result<(), Failure> {
        self.join_link(record)?;
        Self::announce(record);
        tracing::debug!(migration = %self.migration, "the container is told to go");
        // A hook that hung up just now is seen by what becomes of its restore.
        let _seen_later = self.hook.tell("go").await;
        Ok(())
    }

    /// Whether a restore of which nothing is left cannot be done again, because its processes ran, or may have, and their pages were
    /// given up. That is then noted, for whoever asks how the filling goes.
    async fn has_given_pages_up(&self, may_have_run: bool) -> Result<bool, Failure> {
        match self.stop_pager().await? {
            Some(PagerState::Done { .. }) => {
                let message = "the container's restore failed when its processes ran already; they were ended";
                pager::client::note_lost(&self.dirs.pager_status(), message)
                    .map_err(|error| io_failed(&self.context, &error))?;
                Ok(true)
            }
            Some(PagerState::Lost { .. }) => Ok(may_have_run),
            _ => Ok(false),
        }
    }

    async fn restore_again(&self, record: &mut MutexGuard<'_, PartRecord>) -> Result<(), Failure> {
        self.collect(record).await?;
        // Sockets of the dead copy may linger in its network namespace, and the next one needs their addresses.
        network::remove(&self.context, record).await?;
        network::make(&self.context, record).await?;
        self.start_restore().await?;
        let held = tokio::time::timeout(HELD_TIMEOUT, self.until_held()).await;
        held.map_err(|error| {
            let what = "the container is not restored in time";
            self.context.failure(FailureCode::DeadlineExceeded, what, &error).in_phase("resume")
        })?
    }

    async fn until_running(&self, record: &PartRecord) -> Result<Gone, Failure> {
        let begun = Instant::now();
        while begun.elapsed() < END_TIMEOUT {
            let ended = match &mut *self.restore.lock().await {
                Some(restore) => match restore.try_wait() {
                    // That says nothing of the container.
                    Err(podferry_runtime::Error::LauncherGone { .. }) => self.earlier_restore_ended(),
                    ended => ended.map_err(|error| self.restore_failed(&error)),
                },
                None => self.earlier_restore_ended(),
            };
            match ended {
                Ok(true) => {
                    if self.init_pid() == 0 {
                        tracing::warn!(migration = %self.migration, workload = self.workload, "the container ran, and ended");
                    }
                    return Ok(Gone::Running);
                }
                Ok(false) => {}
                Err(failure) => return Ok(Gone::Died(failure)),
            }
            if self.hook.lets_go() {
                self.open_door(record);
            }
            if let Err(failure) = self.check_pager() {
                // This ends its processes.
                pager::client::wait_filled(&self.dirs.pager_status()).await;
                return Ok(Gone::Died(failure));
            }
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        Err(self.refused(FailureCode::DeadlineExceeded, "runc does not end its restore", "resume"))
    }

    /// Whether a restore that an earlier agent started is done: runc writes the pid then. It has died when nothing of it is
    /// left.
    fn earlier_restore_ended(&self) -> Result<bool, Failure> {
        let runc = self.context.runc(self.context.config.runc_root());
        if self.pid_file().is_file() {
            // Who started it would have, had it lived.
            if let Err(error) = runc.forget_restore(&self.workload) {
                tracing::warn!(%error, workload = self.workload, "the note of a restore that succeeded stays");
            }
            return Ok(true);
        }
        let left = runc.container(&self.workload).and_then(|container| container.processes());
        match left {
            Ok(processes) if !processes.is_empty() => Ok(false),
            _ => Err(self.refused(FailureCode::Internal, "an earlier agent's restore is gone", "resume")),
        }
    }

    pub(super) fn join_link(&self, record: &PartRecord) -> Result<(), Failure> {
        let Role::Target { link: Some(link), .. } = &record.role else { return Ok(()) };
        podferry_network::attach(&link.host_interface, &self.context.config.network.bridge).map(drop).map_err(|error| {
            let what = "the container's link cannot join the bridge";
            self.context.failure(FailureCode::Internal, what, &error).in_phase("resume")
        })
    }

    pub(super) fn part_link(&self, record: &PartRecord) -> Result<(), Failure> {
        let Role::Target { link: Some(link), .. } = &record.role else { return Ok(()) };
        podferry_network::detach(&link.host_interface).map_err(|error| {
            let what = "the link of a container that died cannot leave the bridge";
            self.context.failure(FailureCode::Internal, what, &error).in_phase("resume")
        })
    }

    /// Hands the container what came for it where it was. Its sockets have to be whole.
    pub(super) fn open_door(&self, record: &PartRecord) {
        if let Some(away) = &self.away {
            away.open();
        }
        let Role::Target { link: Some(link), plan: Some(plan), .. } = &record.role else { return };
        if self.doorstep.is_open() {
            return;
        }
        let mtu = plan.mtu.min(plan.mtu_during_restore());
        match Replayer::open(&link.host_interface, plan.mac, mtu) {
            Ok(replayer) => self.doorstep.open(replayer),
            Err(error) => tracing::warn!(error = chain(&error), "what came in the freeze is lost"),
        }
    }

    /// Tells switches and neighbours where the address is now. They would find out by themselves, later.
    pub(super) fn announce(record: &PartRecord) {
        let Role::Target { netns: Some(netns), .. } = &record.role else { return };
        let announced = Netns::open(netns).and_then(|netns| {
            let announcer = Announcer::open(&netns, network::INTERFACE)?;
            announcer.send().map(|()| announcer)
        });
        match announced {
            // Switches forget, frames get lost: once more, and again.
            Ok(announcer) => drop(tokio::spawn(async move { announcer.repeat(ANNOUNCEMENTS, ANNOUNCE_PAUSE).await })),
            Err(error) => tracing::warn!(error = chain(&error), "the container's address cannot be announced"),
        }
    }
}
