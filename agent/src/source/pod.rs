//! What a pod needs beside: that its kubelet leaves it alone, and that its address stays when it goes.

use std::sync::PoisonError;

use podferry_common::failure::{Failure, FailureCode};
use podferry_runtime::{Container, NamespaceKind};

use super::{Connections, FreezeOrder, SourcePart, io_failed};
use crate::context::{Context, blocking};
use crate::pods::Fence;
use crate::relay::Home;

impl SourcePart {
    /// Kubernetes: its probes fail while it stands still.
    pub(super) fn keep_from_being_killed(&self) -> Result<(), Failure> {
        let Some(fence) = &self.fence else { return Ok(()) };
        let keeping = fence.go_on_keeping().map_err(|error| io_failed(&self.context, &error))?;
        *self.keeping.lock().unwrap_or_else(PoisonError::into_inner) = Some(keeping);
        Ok(())
    }

    pub(super) async fn stop_keeping(&self) {
        let keeping = self.keeping.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(keeping) = keeping {
            keeping.end().await;
        }
    }

    /// Before the freeze. The target expects connections: it cannot go on without them now.
    pub(super) async fn stay_home(&self, order: &FreezeOrder) -> Result<(), Failure> {
        let netns = order.container.namespace_paths.get(&NamespaceKind::Network).cloned();
        let (Some(netns), Connections::Relay { lifetime_s }) = (netns, order.connections) else { return Ok(()) };
        let (context, migration, fence) = (self.context.clone(), order.migration, self.fence.clone());
        let target = (order.target.clone(), order.target_address.clone());
        let home = blocking(move || {
            Home::prepare(&context, migration, netns, target, fence, lifetime_s).map_err(|error| {
                let what = "nothing can carry the pod's connections to its new address";
                let failure = context.failure(FailureCode::FailedPrecondition, what, error.as_ref()).in_phase("freeze");
                failure.remedy("set kubernetes.relay_s = 0 in agent.toml to have connections closed when pods move")
            })
        });
        let _never_set_before = self.home.set(home.await?);
        Ok(())
    }
}

/// Kubernetes: what keeps the kubelet from starting the container again here.
pub(super) fn fence_of(context: &Context, container: &Container) -> Option<Fence> {
    let kubernetes = context.config.kubernetes.as_ref()?;
    Fence::of(&kubernetes.fence_dir, container)
}
