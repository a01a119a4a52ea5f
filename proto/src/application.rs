//! `ApplicationService`: two instances of one workload, of which the new one takes the old one's place.
//!
//! In an application-level migration nothing of the container moves. A new instance is started on the target from the target's own
//! bundle; it is ready, and has the state of the old one, before anybody is told to come to it. How the state gets across only the
//! application knows: hooks say so, which each node reads from the annotations of its own `config.json` (see docs/operations.md).
//! Neither node runs a hook that came from the other.
//!
//! # The order
//!
//! ```text
//! source agent                                            target agent
//!   (Freeze {take_over}; the transfer is admitted)
//!   BringUp {migration} ────────────────────────────────▶ runc create, runc start; the link is on no bridge
//!                                                         ready? … replicate · caught-up? …
//!        old instance ◀── Relay ◀───────────────────────── what those hooks say to 127.0.0.1:PODFERRY_SOURCE_PORT
//!                     ◀────────────────────────────────── BringUpResponse
//!   Converged; (stateful) link cut, quiesce
//!   Import {begin} · data … · {end} ─────────────────────▶ import (only with export)
//!                     ◀────────────────────────────────── ImportResponse: the new instance has it
//!   (the transfer ends, empty: nothing changes any more) ▶ caught-up? … · verify · promote · ready? …
//!                                                          answers Restore: HELD
//!   … Seal, COMMIT
//!   Release: (stateless) new connections held, stop signal, grace period; SIGKILL; link cut
//!                                                          Resume: link joined, address announced
//! ```
//!
//! `BringUp` says by which method the source moves the state. A target whose own `config.json` says another one refuses with
//! `FAILED_PRECONDITION`, before anything is started: one side would wait for what the other does not give, and that would be lost.
//!
//! A stateless container is not touched before the commit; clients are served by it until its `Release`, which lets it end what it is
//! being asked. A stateful one is cut off and quiesced before its state is taken for the last time: what it acknowledged is with the
//! new instance, or is undone with it. Undoing means: `unquiesce`, the link joined.
//!
//! *Held* means: the new instance runs, and nobody reaches it. There are two instances then, of which one has the address.
//!
//! # Relay
//!
//! Each connection that a hook of the target, or the new instance itself, opens to the address it was given is one call. The source
//! connects it to the port that its own container names, in that container's network namespace, on its loopback. Data goes both ways
//! until both directions have ended; the end of the request stream is the end of that direction.
//!
//! # Limits
//!
//! `Begin` comes first and once, data has at most 1 MiB. A target has at most 64 relayed connections open at once. An import is
//! confirmed only behind an `ImportEnd` whose count is right. The migration's bandwidth limit does not hold for either.
//!
//! # Who may
//!
//! `BringUp` and `Import`: only the agent that the coordinator has named in `Prepare` as this migration's source. `Relay`: only the one
//! that it has named in `Freeze` as its target, and until the part is released or undone. Anybody else gets `PERMISSION_DENIED`.
