//! `RelayService`: connections live on though their address stays behind.
//!
//! A pod gets another address on its new node. Its old network namespace stays where it is, as the *home* of the old address: what comes for
//! that is no longer for any process there, but is carried by the two agents into the pod's new namespace, where the restored sockets have
//! that address on a device of their own (*away*). What they answer goes back the same way, and leaves from home, as it always did.
//! Nobody else learns of it: no peer, no switch, no network plugin.
//!
//! # The order
//!
//! ```text
//! source agent (home)                              target agent (away)
//!   Begin {migration} ───────────────────────────▶ admits, or ends the call with a status
//!                                    ◀──────────── Ready
//!   (new connections wait; the rest still reaches the container)
//!   Packets: what opens a connection ────────────▶ keeps them
//!   (the container is frozen; all that comes for it goes to the relay)
//!   Packets · Packets · … as they come ──────────▶ keeps them
//!   (the migration is committed)                   (the sockets are whole) hands over what it kept, and at once what comes
//!                                    ◀──────────── Packets · Packets · …
//!                                    ◀──────────── ends the call with OK: no connection is left, or it is late
//! ```
//!
//! The source begins before the freeze, so that nothing waits for a connection to be made. Until the commit it keeps a copy of what it
//! sends: when the migration is aborted that is handed to its own container, and the target forgets it.
//!
//! # When the stream breaks
//!
//! Packets are lost then, as on any link, and TCP repeats them. The source begins again, with growing pauses of at most a second, for
//! as long as the relay may live. An agent that was restarted takes it up, on either side. Behind the commit `NOT_FOUND`,
//! `PERMISSION_DENIED` and `UNIMPLEMENTED` end it: the target has no such relay any more.
//!
//! # Limits
//!
//! `Begin` comes first and once. A `Packets` has at most 4 MiB, a packet at most 65585 bytes. A target keeps 8 MiB until the
//! container is there, and lets go of what comes beyond; so does a source. Ten seconds after the container runs, when whoever asks for it
//! by name gets its new address, packets that would open a connection to an old address are not carried any more. A relay
//! ends when no connection is left, and ten minutes after the commit in any case.
//!
//! # Who may
//!
//! Only the agent that the coordinator has named in `Prepare` as this migration's source. Anybody else gets `PERMISSION_DENIED`; of a migration that has no relay
//! here, everybody gets `NOT_FOUND`. What is sent reaches the pod under its old addresses and nothing else of the node, and what comes back leaves home only
//! when it is from one of these: both sides drop the rest.
