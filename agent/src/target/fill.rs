//! The time after the resume in which the container runs and the rest of its memory is laid in behind it.
//!
//! The [pager](crate::pager) does that, and outlives this agent; here is only waited for it.

use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode};

use crate::context::Context;
use crate::journal::{PartDirs, Standing};
use crate::pager::client;
use crate::pager::messages::PagerState;
use crate::parts::Parts;

/// What was laid in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Pages.
    pub pages: u64,
    /// How often the container waited for one.
    pub faults: u64,
    /// Milliseconds from its first instruction until the last page was in place.
    pub fill_ms: u64,
}

/// Whether pages are still missing.
pub fn is_under_way(dirs: &PartDirs) -> bool {
    match client::status(&dirs.pager_status()) {
        Ok(status) => !status.state.is_last(),
        // One that cannot be read may tell of pages that are still needed.
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

/// Waits until a resumed container has all of its memory.
///
/// # Errors
/// `DATA_LOSS` when pages of it were lost: its processes were ended.
pub async fn wait(context: &Context, migration: MigrationId) -> Result<Filled, Failure> {
    let status = PartDirs::of(&context.config, migration).pager_status();
    if !status.is_file() {
        return Ok(Filled::default());
    }
    match client::wait_filled(&status).await {
        PagerState::Done { pages, faults, fill_ms } => Ok(Filled { pages, faults, fill_ms }),
        PagerState::Lost { message } => {
            let failure = context.refusal(FailureCode::DataLoss, message).in_phase("fill");
            Err(failure.remedy("start the workload anew; the pager's log in the agent's state folder says more"))
        }
        // Of a container that runs none of these can be the last word.
        state => {
            let message = format!("the pager of a running container says {state:?}");
            Err(context.refusal(FailureCode::Internal, message).in_phase("fill"))
        }
    }
}

/// Watches over a resumed container until it has all of its memory, then removes what it came in.
pub async fn watch(context: &Context, parts: &Parts, migration: MigrationId) {
    match wait(context, migration).await {
        Ok(filled) => tracing::info!(%migration, ?filled, "all memory is in place"),
        Err(failure) => tracing::error!(%migration, %failure, "a container has lost memory"),
    }
    PartDirs::of(&context.config, migration).wipe_volatile();
    parts.ended(migration, Standing::Resumed);
}
