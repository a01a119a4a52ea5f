//! `DeliveryService`: packets that came for a container while it stood still.
//!
//! From the freeze on the container's link is cut, so that no packet meets sockets that are being dumped. What its clients send then
//! would be lost, and TCP repeats it only after 200 ms: a client would wait as long however short the downtime is. So the source
//! keeps these packets, and the target hands them to the restored container.
//!
//! Only segments of existing TCP connections go this way, those that do not open one (no SYN). They are seen where they enter the
//! source's node, before its firewall, and are put into the container's link behind the target's: but a socket takes only what fits
//! a connection that both have let through. What opens a connection, and datagrams, come again or are missed, as on any lossy link.
//!
//! # The order
//!
//! ```text
//! source agent                                     target agent
//!   (link cut)
//!   Begin {migration} ───────────────────────────▶ admits, or ends the call with a status
//!   Packets · Packets · … as they come ──────────▶ keeps them
//!   (the migration is committed)                   (the sockets are whole, no process runs yet) hands over what it kept,
//!   Packets: what still went astray ─────────────▶ and from now on what comes
//!   end of the request stream, a second after the release
//!                                    ◀──────────── DeliverResponse {delivered}
//! ```
//!
//! When the migration is aborted the source hands what it kept to its own container, and the target forgets it.
//!
//! # What it is not
//!
//! Nothing depends on it. A source need not call it, a target need not know it (`UNIMPLEMENTED`), packets may be missing when a side
//! keeps too many or an agent is restarted, and may come twice: all that a network may do. What is lost is repeated by TCP.
//!
//! # Limits
//!
//! `Begin` comes first and once. A `Packets` has at most 4 MiB. A target keeps 4 MiB until the container is there, and lets go of what
//! comes beyond; so does a source. A packet has at most 65575 bytes (an IPv6 header and what it can announce).
//!
//! # Who may
//!
//! Only the agent that the coordinator has named in `Prepare` as this migration's source. Anybody else gets `PERMISSION_DENIED`.
