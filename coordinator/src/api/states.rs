//! A migration or an evacuation as it changes.

use futures::{Stream, StreamExt as _, future, stream};
use podferry_common::{Failure, FailureCode};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Core;
use crate::evacuation::Evacuation;
use crate::store::Record;

/// Something that changes until nothing more is to be expected.
trait Changing: Clone + Send + Sync + 'static {
    fn is_over(&self) -> bool;
}

impl Changing for Record {
    fn is_over(&self) -> bool {
        self.state.is_settled()
    }
}

impl Changing for Evacuation {
    fn is_over(&self) -> bool {
        self.has_ended()
    }
}

/// A migration as it is now and each of its later states, up to the outcome. Ends also when `stop` is cancelled, behind what has
/// happened by then: a server that stops waits for its requests, and a watch may last for hours.
pub(super) async fn states(
    core: &Core,
    id: &str,
    stop: CancellationToken,
) -> Result<impl Stream<Item = Result<Record, Failure>> + Send + use<>, Failure> {
    let (now, view) = core.watch(id).await?;
    Ok(all(now, view, stop))
}

/// The same of an evacuation.
pub(super) async fn evacuation_states(
    core: &Core,
    id: &str,
    stop: CancellationToken,
) -> Result<impl Stream<Item = Result<Evacuation, Failure>> + Send + use<>, Failure> {
    let (now, view) = core.watch_evacuation(id).await?;
    Ok(all(now, view, stop))
}

fn all<T: Changing>(
    now: T,
    view: Option<watch::Receiver<T>>,
    stop: CancellationToken,
) -> impl Stream<Item = Result<T, Failure>> + Send {
    let first = stream::once(future::ready(Ok(now)));
    first.chain(stream::iter(view).flat_map(move |view| later(view, stop.clone())))
}

/// The states that come after the first. A driver that is gone before it says the outcome stops with the coordinator.
fn later<T: Changing>(
    view: watch::Receiver<T>,
    stop: CancellationToken,
) -> impl Stream<Item = Result<T, Failure>> + Send {
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
        let state = view.borrow_and_update().clone();
        let over = state.is_over();
        Some((Ok(state), (!over).then_some((view, stop))))
    })
}
