//! A migration as it changes.

use futures::{Stream, StreamExt as _, future, stream};
use podferry_common::{Failure, FailureCode};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Core;
use crate::store::Record;

/// A migration as it is now and each of its later states, up to the outcome. Ends also when `stop` is cancelled, behind what has
/// happened by then: a server that stops waits for its requests, and a watch may last for hours.
pub(super) async fn states(
    core: &Core,
    id: &str,
    stop: CancellationToken,
) -> Result<impl Stream<Item = Result<Record, Failure>> + Send + use<>, Failure> {
    let (now, view) = core.watch(id).await?;
    let first = stream::once(future::ready(Ok(now)));
    Ok(first.chain(stream::iter(view).flat_map(move |view| later(view, stop.clone()))))
}

/// The states that come after the first. A driver that is gone before it says the outcome stops with the coordinator.
fn later(view: watch::Receiver<Record>, stop: CancellationToken) -> impl Stream<Item = Result<Record, Failure>> {
    stream::unfold(Some((view, stop)), |open| async move {
        let (mut view, stop) = open?;
        let changed = tokio::select! {
            biased;
            changed = view.changed() => changed,
            () = stop.cancelled() => return None,
        };
        if changed.is_err() {
            let failure = Failure::new(FailureCode::Unavailable, "the coordinator is stopping");
            return Some((Err(failure.remedy("watch again in a moment")), None));
        }
        let record = view.borrow_and_update().clone();
        let settled = record.state.is_settled();
        Some((Ok(record), (!settled).then_some((view, stop))))
    })
}
