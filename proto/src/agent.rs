//! `AgentService`: what the coordinator says to a node's agent.
//!
//! Only the *coordinator's* certificate may call it; `Describe` is also open to *client* certificates. The coordinator
//! calls `Describe` before it uses a node: the versions of the protocol must meet (see [`crate::Version`]).
//!
//! # The order of a warm migration
//!
//! ```text
//! coordinator             source agent                         target agent
//!   PreflightSource ─────▶ findings, sizes, link
//!   PreflightTarget ───────────────────────────────────────────▶ findings
//!   Prepare ───────────────────────────────────────────────────▶ namespace, image memory; admits the named source
//!   Restore ───────────────────────────────────────────────────▶ (waits for the transfer)
//!   Freeze ──────────────▶ Frozen ─▶ Progress… ══transfer══════▶ stores, restores
//!                          Transferred                           answers Restore: held
//!   Seal ────────────────▶ sealed
//!   Seal ──────────────────────────────────────────────────────▶ sealed
//!   COMMIT (one durable write of the coordinator's)
//!   Release ─────────────▶ every process dead: answers
//!   Resume ────────────────────────────────────────────────────▶ link joined, address announced, runs: answers
//! ```
//!
//! # The source's part
//!
//! ```text
//!  Freeze ─▶ FREEZING ─▶ FROZEN ──Seal──▶ SEALED ──Release──▶ RELEASED
//!               │           │               │
//!               └───────────┴───────────────┴──Abort──▶ ABORTED (runs on, connections alive)
//! ```
//!
//! While FREEZING or FROZEN the part rolls back by itself: on a failure, when its deadline passes, or when its agent dies.
//! Once SEALED it does not: it waits for Release or Abort, and when its agent was restarted it asks the coordinator's
//! `GetDecision`. The network link is cut from the freeze on; after RELEASED it stays cut for good.
//!
//! # The target's part
//!
//! ```text
//!  Prepare ─▶ PREPARED ─Restore─▶ RESTORING ─▶ HELD ──Seal──▶ SEALED ──Resume──▶ RESUMED
//!                 │                   │          │              │
//!                 └───────────────────┴──────────┴──────────────┴──Abort──▶ ABORTED (nothing left)
//! ```
//!
//! HELD: every process exists and none has run an instruction since the dump; the link is not joined. A SEALED part keeps
//! its images until RESUMED, so that a restore that dies after the commit is done again from them.
//!
//! # Who may say what when
//!
//! A call that does not fit the part's state is refused with `FAILED_PRECONDITION` and changes nothing. Seal, Release,
//! Resume and Abort may be repeated: the answer to a repetition is the answer to the first. `Abort` for an unknown
//! migration succeeds (there is nothing to undo) and keeps it from beginning later; every other call for an unknown one is
//! answered with `NOT_FOUND`. A second `Prepare` or `Freeze` of the same workload while a part of it lives: `ALREADY_EXISTS`.
//!
//! # Limits
//!
//! Messages: at most 4 MiB. Ids at most 64 bytes, names at most 63, `reason` is cut to 1 KiB. A deadline is between 1 s
//! and 24 h; what is outside is clamped. A link has at most 16 addresses and 64 routes. A
//! word of `features` is ASCII, at most 64 bytes, and ignored by whoever does not know it.
