//! `FetchService`: pages that a target needs and its source still has, in post-copy.
//!
//! A container that was migrated so runs on the target before all of its memory is there. What is missing stays with its processes
//! on the source, which stand still, and is fetched from there: at once what somebody waits for, and everything else behind that.
//! **Until the last page is across, losing either node, or the link between them for too long, loses the workload.**
//!
//! # The order
//!
//! ```text
//! target agent                                              source agent
//!   Begin {migration} ────────────────────────────────────▶ admits, or ends the call with a status
//!   Pages {process, address, count} ──────────────────────▶ reads them
//!   Pages …                         (many may be under way)
//!                          ◀─────────────────────────────── FetchResponse {process, address, count, contents}, in the order asked
//!   end of the request stream, when all pages are there
//! ```
//!
//! A target has two calls open on two connections: one for what is waited for, and one for the rest, so that the former never stands
//! behind the latter. It may ask for pages as soon as the source stands still, and until the source is released. Pages do not change
//! meanwhile, so they may be asked for more than once.
//!
//! # When it breaks
//!
//! A call that breaks loses nothing: the source keeps every page until `Release`, and the target opens another call and asks again.
//! Whoever waits for a page waits meanwhile. A target tries for as long as it was configured to, five minutes by default, and then ends
//! the container: it says `DATA_LOSS`.
//!
//! The status `DATA_LOSS` from the source means that it does not have the pages any more, because its processes were killed. Trying
//! again is of no use then.
//!
//! # Limits
//!
//! `Begin` comes first and once. A request is for 1 to 256 pages (1 MiB) of addresses below 2^56. A target has at most 4 MiB under way
//! in the call for the rest. A response has at most 1 MiB and 64 KiB. The migration's bandwidth limit holds for the call for the rest:
//! what is waited for is not made to wait.
//!
//! # Who may
//!
//! Only the agent that the coordinator has named in `Freeze` as this migration's target, and only while the source stands still.
//! Anybody else gets `PERMISSION_DENIED`.
