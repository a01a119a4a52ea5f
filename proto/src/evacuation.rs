//! Evacuations: `Evacuate`, `GetEvacuation`, `ListEvacuations`, `WatchEvacuation` and `CancelEvacuation` of `CoordinatorService`.
//!
//! An evacuation empties a node. It is recorded when `Evacuate` answers, and from then on it is the coordinator's: it goes on when its
//! caller has gone, and a coordinator that is started again goes on with it. There is at most one of a node at a time
//! (`ALREADY_EXISTS`). A node whose agent does not answer is refused (`UNAVAILABLE` with the node's name).
//!
//! ```text
//!  Evacuate ─▶ RUNNING ─▶ COMPLETE    nothing that runs is left there
//!                │   └──▶ INCOMPLETE  something is left, was lost, or it is not known any more what is there
//!                └─▶ CANCELLING ─▶ CANCELLED
//! ```
//!
//! While it runs, no migration goes to the node, whoever asks (`FAILED_PRECONDITION`). With `cordon` the node is marked unschedulable in
//! Kubernetes, too, and stays so; without Kubernetes that is refused. With `selector` the others stay where they are, and are no matter of the evacuation.
//!
//! Each workload goes through a migration like any other, on behalf of whoever asked for the evacuation: what that client may not
//! migrate is left behind with `PERMISSION_DENIED`. What is under way already, from the node or to it, is followed; what has arrived,
//! or was left by somebody else's migration, is moved then. So a workload is
//!
//! ```text
//!  WAITING ─▶ MOVING ─▶ MOVED, LEFT_BEHIND, LOST or ELSEWHERE        NOT_RUNNING stays
//! ```
//!
//! and is back in `WAITING` when its migration was undone by a restart of the coordinator, and when `AUTO` gave it up because it writes
//! memory faster than it is sent: it moves warm then (`hurried_strategy`). A workload that its target refuses in preflight is tried on another
//! node, up to three in all.
//!
//! The order is that of the priorities, higher ones first unless `order` says the opposite. Among equal ones the largest comes first: they move side by side, and a large
//! one that begins last is what everybody waits for. With a deadline the smallest comes first: as many as possible are away then.
//!
//! With `deadline_s`, and as long as there is time, a workload moves as was asked for when that costs no other one its time. What could
//! not all be away otherwise moves warm (with `accept_loss` post-copy, where not even warm is expected to be in time). Those that are not
//! expected to be away in any way are named at once (`late`), and are not begun before all others are away, so that they take no
//! bandwidth from them. Behind the deadline nothing is begun: what is left has the problem `DEADLINE_EXCEEDED`. What is under way then
//! goes on.
//!
//! When all have an outcome it waits, until the deadline at most, for those that have left the node and have connections which still need it (`homes`):
//! see [`crate::relay`].
//!
//! Expectations are of 110 MB/s of memory, shared by what moves at a time, until migrations of this evacuation were seen.
//!
//! The limits of `coordinator.toml` (migrations of a node, and of a pair of nodes, at a time) hold; `concurrency` is a lower one.
//!
//! `CancelEvacuation` begins nothing more and undoes what the evacuation has begun and is not committed. What was moved stays where
//! it is.

/// What an evacuation's id begins with; a migration's id is the rest.
pub const ID_PREFIX: &str = "evac-";
