//! `CoordinatorService`: what scripts, the command line and agents say to the coordinator.
//!
//! # Who may say what
//!
//! Every call comes over mutual TLS 1.3. A *client* certificate may call everything but `GetDecision`; an *agent*
//! certificate may call `Hello` and `GetDecision` and nothing else. Anybody else is refused with `PERMISSION_DENIED`.
//!
//! A coordinator may have an access policy, which takes from clients what no grant of theirs allows: *viewers* may list, get and
//! watch, *operators* also migrate and cancel within the workloads and nodes of a grant, *admins* everything. What is refused by it is
//! `PERMISSION_DENIED`, too, and the message names what is missing. `Migrate` and `CancelMigration` are looked at twice: with
//! what the request names, and again when it is known which workload and nodes it is about. A `Migrate` without a target goes to
//! a node that the caller may use.
//!
//! A caller says [`Hello`](crate::v1::HelloRequest) first when it wants to know whether the two understand each other:
//! each side names the versions it speaks (the newest and the one before), and `FAILED_PRECONDITION` is the answer when
//! the ranges do not meet. Calls without a `Hello` are served as version 1.
//!
//! # A migration's life
//!
//! ```text
//!  Migrate ─▶ PREFLIGHT ─▶ PREPARE ─▶ [PRECOPY] ─▶ FREEZE ─▶ COMMIT ─▶ RELEASE ─▶ RESUME ─▶ [FILL] ─▶ SUCCEEDED
//!                 │            │           │          │        │  ▲                              │
//!                 └────────────┴───────────┴──────────┴────────┘  │          memory is lost for good ─▶ FAILED
//!                              │ any failure, deadline,           │
//!                              ▼ or CancelMigration               └ one durable write; nothing right of it is undone
//!                        ROLLING_BACK ─▶ FAILED or CANCELLED
//! ```
//!
//! A live migration goes through `PRECOPY` and `FILL`, a cold or application-level one through `PRECOPY` alone, a warm one through neither. In `FILL` the workload runs on the target and its
//! memory is laid in behind it: it is committed and cannot be cancelled, and the workload cannot be migrated again until that
//! has ended. `FAILED` has two meanings, which `decision` tells apart: with `ABORT` the migration was undone and the source runs
//! on; with `COMMIT` the target's agent said that memory was lost for good and stopped its copy, and the workload runs nowhere.
//! In `POSTCOPY` and `HYBRID` the source has the rest of the memory during `FILL`, and `RELEASE` comes behind it. They need `accept_loss`.
//! `rounds` grows by each round of pre-copy as it ends; a coordinator that is started again in `PRECOPY` undoes the migration,
//! and the rounds before that are forgotten.
//!
//! With the strategy `AUTO` the coordinator chooses one of the others in `PREFLIGHT`, by what both agents say. `strategy` is unspecified until then, and
//! stays so when none can work; `strategy_reason` says why that one, and why not the others. A request without a strategy
//! is one of a client that knows no `AUTO`, and moves warm.
//!
//! Where the workload is a pod, the policies of its namespace count (`MigrationPolicy`): what a request leaves out, and `AUTO` is left out, is as
//! they say, and what they forbid is refused with `FAILED_PRECONDITION`. What an evacuation asks for gives way to them instead, but for a pod
//! that must not be moved.
//!
//! `Migrate` answers as soon as the migration is recorded; it is refused at once (nothing recorded) when the workload or
//! node is unknown, target equals source, the strategy is not offered, the agent of either node is too old for what is asked,
//! the downtime or the bandwidth make no sense, or the workload is part of another migration.
//! `WatchMigration` sends the migration as it is and then after every change, and ends after `SUCCEEDED`, `FAILED` or
//! `CANCELLED`; a slow reader gets the newest state, not every state. `CancelMigration` is refused with
//! `FAILED_PRECONDITION` from the commit on.
//!
//! # Lists
//!
//! `ListWorkloads` of all workloads says what the agents that answer know; a workload on a silent node is `unknown`. Of one
//! node it lists the workloads that are there and those that are being migrated from or to it, with the `migration_id`,
//! wherever they are at the moment: whoever empties the node has to deal with them, too. A workload whose migration ends while
//! the nodes are asked may still carry its id. When the agent of that node does not answer, the call fails with
//! `UNAVAILABLE` and the node's name; an empty list means that no workload runs there.
//!
//! `ListConnections` has what has outlived the move of its workload, by the agents that answer; those that do not are named in `silent_nodes`. Agents from
//! before it have nothing to say.
//!
//! `ListMigrations` has all migrations that have not ended and the last 1000 that have. What is long in them is cut, so that
//! all fit into one message: a migration's last 4 rounds and last 4 notes stay, 160 bytes of each note, and of a failure 300 bytes of its message, 200
//! of CRIU's line and of the remedy, 64 of the names; a text that was cut ends with `…`. `GetMigration` and `WatchMigration`
//! tell everything that was recorded.
//!
//! `ListEvacuations` has all evacuations that have not ended and the last 100 that have, without their workloads. What they are is told by
//! [`crate::evacuation`].
//!
//! # Decisions
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
//! `downtime_budget_ms`: 0 for the default of 100, or 1 to 60000, and only with a strategy that copies memory in `PRECOPY`. `throttle`:
//! only with such a strategy, too. `grace_period_s`: 0 to 3600, and only with `COLD` and `APPLICATION`, whose default is 30. `verify`: only with `LIVE`. `bandwidth_limit`: 0 for none, or at least 65536 bytes per second. A migration has
//! at most 31 rounds.
//!
//! `connections`: `KEEP` not with `COLD`, `APPLICATION` or `allow_restart`. `connections_deadline_s`: 0 for as long as the nodes are set to, or 1 to
//! 604800, and not with what closes them.
//!
//! Names (workloads, nodes): 1–63 bytes of `[a-z0-9-]`, no `-` at either end. Ids: at most 64 bytes. A message: at most
//! 4 MiB. Lists name everything that is known; there is no paging in version 1.
