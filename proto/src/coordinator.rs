//! `CoordinatorService`: what scripts, the command line and agents say to the coordinator.
//!
//! # Who may say what
//!
//! Every call comes over mutual TLS 1.3. A *client* certificate may call everything but `GetDecision`; an *agent*
//! certificate may call `Hello` and `GetDecision` and nothing else. Anybody else is refused with `PERMISSION_DENIED`.
//!
//! A caller says [`Hello`](crate::v1::HelloRequest) first when it wants to know whether the two understand each other:
//! each side names the versions it speaks (the newest and the one before), and `FAILED_PRECONDITION` is the answer when
//! the ranges do not meet. Calls without a `Hello` are served as version 1.
//!
//! # A migration's life
//!
//! ```text
//!  Migrate ─▶ PREFLIGHT ─▶ PREPARE ─▶ [PRECOPY] ─▶ FREEZE ─▶ COMMIT ─▶ RELEASE ─▶ RESUME ─▶ SUCCEEDED
//!                 │            │           │          │        │  ▲
//!                 └────────────┴───────────┴──────────┴────────┘  └ one durable write; nothing left of it is undone
//!                              │ any failure, deadline, or CancelMigration
//!                              ▼
//!                        ROLLING_BACK ─▶ FAILED or CANCELLED
//! ```
//!
//! `Migrate` answers as soon as the migration is recorded; it is refused at once (nothing recorded) when the workload or
//! node is unknown, target equals source, the strategy is not offered, or the workload is part of another migration.
//! `WatchMigration` sends the migration as it is and then after every change, and ends after `SUCCEEDED`, `FAILED` or
//! `CANCELLED`; a slow reader gets the newest state, not every state. `CancelMigration` is refused with
//! `FAILED_PRECONDITION` from the commit on.
//!
//! `GetDecision` answers from the durable record alone: `COMMIT` after the commit's write, `ABORT` once rolling back has
//! been written, `UNDECIDED` before either. An id that was never recorded is `UNDECIDED` too: its record was lost, and may
//! have been a commit. A part that gets `UNDECIDED` or no answer asks again; it changes nothing meanwhile, unless its
//! operator decides (`podferry-agent decide`).
//!
//! # Errors
//!
//! Every error carries `google.rpc.ErrorInfo` (domain `podferry.dev`) with the failing node, phase, CRIU's own line and
//! a remedy where there is one: see `podferry_common::failure`.
//!
//! # Limits
//!
//! Names (workloads, nodes): 1–63 bytes of `[a-z0-9-]`, no `-` at either end. Ids: at most 64 bytes. A message: at most
//! 4 MiB. Lists are whole; there is no paging in version 1.
