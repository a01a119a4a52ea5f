//! What a migration whose strategy is chosen in preflight begins with.

use podferry_common::Failure;
use podferry_proto::v1;

use super::{Core, Journey, internal};
use crate::cluster::{Node, Workload};
use crate::runner::blocking;
use crate::store::Report;
use crate::strategy::{Asked, Auto, Past, Strategy, Wishes};

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

    /// The target; where a restart is allowed and no node can take the workload without, one that can with it.
    pub(super) async fn placed<'n>(
        &'n self,
        journey: &Journey<'n, '_>,
        wishes: Wishes,
        auto: Option<&mut Auto>,
    ) -> Result<(&'n Node, Report), Failure> {
        let failure = match self.target(journey, wishes).await {
            Ok(placed) => return Ok(placed),
            Err(failure) => failure,
        };
        let auto = auto.filter(|auto| auto.allow_restart && self.may_be_for_good(journey));
        let Some(auto) = auto else { return Err(failure) };
        let cold = Wishes { strategy: Strategy::Cold, ..wishes };
        let Ok(placed) = self.target(journey, cold).await else { return Err(failure) };
        auto.only_cold = Some(failure.message);
        Ok(placed)
    }

    /// Whether it will do no good to ask later, when placement finds no target. A node that is only busy now will take the workload
    /// then, without a restart.
    fn may_be_for_good(&self, journey: &Journey<'_, '_>) -> bool {
        let Journey { location, views, target, .. } = journey;
        let load = self.runner.load();
        let others = views.iter().map(|view| &view.node.name).filter(|name| **name != location.view.node.name);
        let busy = |name| load.get(name).is_some_and(|count| *count >= self.runner.limits().per_node);
        target.is_some() || !others.into_iter().any(busy)
    }
}
