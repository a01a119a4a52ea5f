//! What a migration whose strategy is chosen in preflight begins with.

use podferry_common::Failure;
use podferry_proto::v1;

use super::{Core, internal};
use crate::cluster::{Location, Node, NodeView, Workload};
use crate::runner::blocking;
use crate::strategy::{Asked, Auto, Past};

impl Core {
    /// What is allowed and known where the choice is left to this coordinator; none where it is not.
    pub(super) async fn auto(
        &self,
        request: &v1::MigrateRequest,
        workload: &Workload,
    ) -> Result<Option<Auto>, Failure> {
        if Asked::of(request.strategy)? != Asked::Auto {
            return Ok(None);
        }
        let (accept_loss, allow_restart) = (request.accept_loss, request.allow_restart);
        let store = self.store.clone();
        let newest_first = blocking(move || store.list()).await.map_err(|error| internal(&error))?;
        let past = newest_first.iter().filter(|record| record.workload == workload.name).find_map(Past::of);
        Ok(Some(Auto { accept_loss, allow_restart, only_cold: None, past }))
    }

    /// Whether it will do no good to ask later, when placement finds no target. A node that is only busy now will take the workload
    /// then, without a restart.
    pub(super) fn may_be_for_good(&self, views: &[NodeView], location: &Location<'_>, wanted: Option<&Node>) -> bool {
        let load = self.runner.load();
        let others = views.iter().map(|view| &view.node.name).filter(|name| **name != location.view.node.name);
        let busy = |name| load.get(name).is_some_and(|count| *count >= self.runner.limit());
        wanted.is_some() || !others.into_iter().any(busy)
    }
}
