//! `AgentService`: what the coordinator says to a node's agent.
//!
//! Only the *coordinator's* certificate may call it; `Describe` is also open to *client* certificates. The coordinator
//! calls `Describe` before it uses a node: the versions of the protocol must meet (see [`crate::Version`]).
//!
//! `ListContainers` and `ListRelays` say what is on the node; neither belongs to a migration.
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
//!   Release ─────────────▶ no process runs any more, nor will: answers
//!   Resume ────────────────────────────────────────────────────▶ link joined, address announced, runs: answers
//! ```
//!
//! Both preflights are about one strategy, and never about `AUTO`: a coordinator that has to choose asks the source about warm, with
//! `look_at_tracking`, and about cold where that is allowed, and the target about what it would choose, again when that is refused.
//!
//! # The order of a live migration
//!
//! Since version 2. It differs before the freeze and after the resume:
//!
//! ```text
//! coordinator             source agent                         target agent
//!   … as above up to Prepare
//!   Freeze {pre_copy} ───▶ (copies while the container runs) ══▶ keeps the pages
//!                          Round ─▶ Round … ─▶ Converged
//!   Restore ───────────────────────────────────────────────────▶ (waits for the rest)
//!                          Frozen ─▶ Progress… ═════════════════▶ stores, restores
//!                          Transferred                           answers Restore: held
//!   … as above up to Resume
//!   Fill ──────────────────────────────────────────────────────▶ every page in place: answers
//! ```
//!
//! - The source says `Round` when a round has ended, and `Converged` once, before it begins to freeze; no `Round` comes after
//!   that. The coordinator asks for the restore when it hears of it. `Frozen` or `Transferred` without a `Converged` before it
//!   count as that word, too. More rounds than `max_rounds` are a failure of the source's.
//! - `Progress` counts from the first round on. In `Transferred` all but the times and `last_round` are sums over all rounds;
//!   `last_round` is what was sent in the freeze, and comes behind the other rounds.
//! - With `pre_copy.verify` the source has the target compare all memory that was copied before it says `Transferred`, and says there
//!   what was compared. When a page differs, `Freeze` and `Restore` fail in the phase `verify`, and everything is undone. A coordinator
//!   that asked for it takes a `Transferred` without `verified` for a failure.
//! - `Fill` takes as long as the filling does. A caller whose patience ends calls again; that neither disturbs nor begins the
//!   filling anew. A target that needs no filling answers at once. Warm migrations are not asked.
//! - `Fill` fails with `DATA_LOSS` only when memory that the container needs is lost for good, and its agent has stopped the copy
//!   for that. The error has to name the agent's own node (see `podferry_common::failure`). The migration has failed then,
//!   although it is committed: nobody calls again, and no copy runs anywhere. In answer to any other call that code is a failure
//!   like others.
//!
//! With `pre_copy.throttle` a source whose rounds do not pay lowers the container's CPU limit (`cpu.max`, or `cpu.cfs_quota_us`) step
//! by step instead of failing, and fails when the last step does not help either. `Round.cpu_limit` is what the container was held to
//! while the round was sent, and `Converged` has a note that says how far it went. Its own limit is back before CRIU looks at the
//! frozen container, and before the part is ABORTED. A source whose container has no cpu controller goes on as without, and says so in
//! a note; so does one that does not know the field, without a note. The target has no part in it: its container has the limit of the
//! target's own bundle.
//!
//! `bandwidth_limit` bounds what the source sends in a migration of any strategy, in pre-copy and in the freeze. A source that
//! speaks version 1 does not know it, and a coordinator does not use such a source for a migration with a limit, nor either
//! node for a live one.
//!
//! # The order of a post-copy
//!
//! Of agents that have `agent:post_copy` among their `features`. `Prepare` names the source's address, and `Freeze` says `post_copy`; with
//! `pre_copy` it is a hybrid. The source sends everything but the memory that pre-copy has not brought below the budget, and lists that.
//! The target fetches it (see [`crate::fetch`]), also while it restores.
//!
//! ```text
//!   … as above up to COMMIT
//!   Resume ────────────────────────────────────────────────────▶ runs: answers
//!   Fill ──────────────────────────────────────────────────────▶ (fetches) every page in place: answers
//!   Release ─────────────▶ no process runs any more, nor will: answers
//! ```
//!
//! The source stays SEALED until then, also when it asks how the migration was decided and hears *commit*. When `Fill` fails with
//! `DATA_LOSS` it is released as well.
//!
//! # The order of a cold migration
//!
//! Between agents that have `agent:cold` among their `features`, whatever else they are unfit for. The calls are a live one's without
//! `Fill`; `Prepare` says `cold`, and `Freeze` has a `stop`, and a `pre_copy` whose rounds go over the container's files alone.
//!
//! ```text
//! coordinator             source agent                         target agent
//!   Freeze {stop} ───────▶ (copies large files) ═══════════════▶ keeps them
//!                          Round ─▶ Round … ─▶ Converged
//!                          stop signal ┄ grace period ┄ SIGKILL
//!   Restore ───────────────────────────────────────────────────▶ (waits for the rest)
//!                          Frozen ─▶ Progress… ═════════════════▶ unpacks the layer, runc create
//!                          Transferred                           answers Restore: held
//!   … Seal, COMMIT, Release: runc delete
//!   Resume ────────────────────────────────────────────────────▶ link joined, address announced, runc start: answers
//! ```
//!
//! - `Frozen` says that every process has ended; the link is cut by then. `freeze_ms` counts from the stop signal, with which the downtime
//!   begins.
//! - The target holds what `runc create` has made: its init waits at runc's fifo. HELD and SEALED mean that.
//! - A source that has sent the signal and is not SEALED undoes itself as ever, and so does an `Abort`: the container is seen to its end,
//!   within what is left of its grace period, and started again from its bundle. That also holds for an agent that was killed: it
//!   has noted what it was about to do. `Abort` is answered when the container runs.
//! - A source does not seal, nor does it confirm `Release`, while a container of that id runs which it has not started: somebody else has,
//!   and there would be two.
//!
//! # Pods
//!
//! Between agents that have `agent:pods` among their `features`: those of nodes of Kubernetes. `PreflightTarget` says `is_pod`: the pod
//! that the container is to become is still to be made, so nothing of it is looked for. Then the coordinator makes it, and `Prepare` names it
//! (`pod`). That is answered when its container waits to be restored, which may take minutes; who aborts meanwhile is answered at
//! once. In all other calls `workload` is the container's id on the source. A source says `NETWORK_KIND_POD`: no link moves, and connections are
//! not kept.
//!
//! A pod that keeps its name can be made only when the source's pod is gone, which must not be before the commit. Another one stands in for it
//! until then (`stands_in`; agents that have `agent:names`): everything comes to that, and its container is restored and held, so that it is known
//! that it can be. Behind the commit the coordinator deletes the source's pod and makes the one of its name, and `Resume` names that (`pod`). The
//! target's agent gives up the copy that it holds, waits for the container of the new pod, moves the files over and restores once more, from
//! what it has in memory. `Resume` without a pod is refused with `UNAVAILABLE`, also of an agent that only asks what was decided.
//!
//! # The order of an application-level migration
//!
//! Between agents that have `agent:application` among their `features`. The calls are a cold one's; `Prepare` says `cold` and
//! `application`, and `Freeze` has a `take_over`. `Converged` says that the new instance is ready and has caught up, `Frozen` that the old one
//! is cut off (a stateful one) or may be at any time (a stateless one), `Transferred` that the new one has all of its state. HELD and SEALED mean
//! on the target that the new instance runs and is reached by nobody. What the agents say to each other meanwhile: [`crate::application`].
//!
//! # Volumes
//!
//! `PreflightSource` tells of directories that are bound into the container: those that move, and those on storage that other nodes see. The
//! coordinator gives all of them to `PreflightTarget`, and those that move, in one order, to `Prepare` and `Freeze`: only to agents that have
//! `agent:volumes` among their `features`, at most 64. Each names a place in the container. Where that is on a node says the bundle there, and
//! nothing that comes from elsewhere; a place that is no volume there is refused.
//!
//! # The source's part
//!
//! ```text
//!  Freeze {pre_copy} ─▶ PRECOPYING ─▶┐
//!                             │       │
//!  Freeze ────────────────────┼───────┴─▶ FREEZING ─▶ FROZEN ──Seal──▶ SEALED ──Release──▶ RELEASED
//!                             │              │           │               │
//!                             └──────────────┴───────────┴───────────────┴──Abort──▶ ABORTED (runs on, connections alive)
//! ```
//!
//! While PRECOPYING, FREEZING or FROZEN the part rolls back by itself: on a failure, when its deadline passes, or when its agent
//! dies. While PRECOPYING that deadline is `pre_copy.deadline_ms`; `deadline_ms` begins with the end of pre-copy.
//! Once SEALED it does not: it waits for Release or Abort, and when its agent was restarted it asks the coordinator's
//! `GetDecision`. The network link is cut from the freeze on; after RELEASED it stays cut for good.
//!
//! # The target's part
//!
//! ```text
//!  Prepare ─▶ PREPARED ─Restore─▶ RESTORING ─▶ HELD ──Seal──▶ SEALED ──Resume──▶ [FILLING] ─▶ RESUMED
//!                 │                   │          │              │
//!                 └───────────────────┴──────────┴──────────────┴──Abort──▶ ABORTED (nothing left)
//! ```
//!
//! HELD: every process exists and none has run an instruction since the dump; the link is not joined. A SEALED part keeps
//! its images until the container runs, so that a restore that dies after the commit is done again from them. FILLING: it runs,
//! and pages that it lacks are laid in behind it; a part without such pages is RESUMED at once. `Resume` is answered when the
//! container runs, `Fill` when the part is RESUMED. While it is PREPARED and memory is copied, the part has the deadline of
//! `Prepare`, which covers pre-copy.
//!
//! # Who may say what when
//!
//! A call that does not fit the part's state is refused with `FAILED_PRECONDITION` and changes nothing: `Fill` before `Resume`
//! is such a call, and `Abort` once the container runs. Seal, Release, Resume, Fill and Abort may be repeated: the answer to a
//! repetition is the answer to the first. `Abort` for an unknown migration succeeds (there is nothing to undo) and keeps it from
//! beginning later; every other call for an unknown one is answered with `NOT_FOUND`. A second `Prepare` or `Freeze` of the same workload while a part of it lives: `ALREADY_EXISTS`.
//!
//! # Limits
//!
//! Messages: at most 4 MiB. Ids at most 64 bytes, names at most 63, `reason` is cut to 1 KiB. A deadline is between 1 s
//! and 24 h; what is outside is clamped. Pre-copy: a downtime budget above 0, 1 to 100 rounds; a coordinator asks for 1 ms to
//! 60 s and at most 30 rounds, for a grace period of at most 3600 s, and for a bandwidth limit of 0 or at least 64 KiB per second. A link has at most 16 addresses and
//! 64 routes. A word of `features` is ASCII, at most 64 bytes, and ignored by whoever does not know it.
