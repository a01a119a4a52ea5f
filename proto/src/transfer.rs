//! `TransferService`: what a source agent says to a target agent.
//!
//! One call of `Transfer` carries everything of one migration that CRIU and the runtime left on the source: files of the
//! checkpoint image, archives of layers, memory pages. It is ordinary gRPC over HTTP/2 over mutual TLS 1.3; any gRPC
//! library can send it, as long as its encoding is the canonical one below.
//!
//! # The order
//!
//! ```text
//! source agent                                            target agent
//!   Begin {version, migration, source node} ────────────▶ admits, or ends the call with a status
//!                                    ◀──────────────────  Welcome {version, limits}
//!   Open 1 {image file "core-1.img"} ───────────────────▶
//!   Open 2 {pages 1 of process 1} ──────────────────────▶
//!   Data 1 · Pages 2 · Pages 2 · Data 1 · … ────────────▶ verifies, stores
//!                                    ◀──────────────────  Acknowledgement {frames, bytes}   now and then
//!   Close 1 {length, digest} · Close 2 {length, digest} ▶ compares
//!   End {objects, length} ──────────────────────────────▶ compares, stores for good
//!                                    ◀──────────────────  Finished, status OK
//! ```
//!
//! When memory is copied while the process runs (since version 2), the beginning is longer and the end has one object more for each
//! process:
//!
//! ```text
//!   Open 1 {memory of process 7, round 1} · Pages 1 … · Close 1 ───▶ keeps the pages, by address
//!   Open 2 {memory of process 7, round 2} · Pages 2 · Deltas 2 … · Close 2 ▶ replaces or changes what it has
//!   (freeze) memory of the last round, CRIU's pages and images, layer ▶
//!   Open 9 {existing of process 7} · Data 9 … · Close 9 ───────────▶ forgets what is in no range; nothing of the rest may be missing
//! ```
//!
//! What large files of a layer hold may come before the layer, too, while they are still written to:
//!
//! ```text
//!   Open 3 {seeds of layer "upper", round 1} · Data 3 … · Close 3 ─▶ keeps each seed as a file
//!   Open 6 {seeds of layer "upper", round 2} · Data 6 … · Close 6 ─▶ changes what it has
//!   (freeze) seeds of the last round, then the layer ──────────────▶ makes files of the seeds that the layer refers to, deletes the rest
//! ```
//!
//! Layer and seeds are streams of a format of their own, `podferry_filesystem::format`. Refused are seeds before those of an earlier object
//! are complete, seeds behind their layer, and a layer before its seeds are complete.
//!
//! The pages of `existing` that CRIU's own page objects do not have are laid in behind the restored process. The memory objects of a
//! process for which no `existing` comes are forgotten: it has ended.
//!
//! A segment of shared memory is the owner of such objects in the same way, by CRIU's number of it, and its offsets are addresses. Its
//! pages are laid in when CRIU restores it, before anything runs. One for which no `existing` comes, or no page object of CRIU's, is
//! forgotten. None of its pages come later.
//!
//! With an end check the source then says what the existing pages hold, which it reads anew, when nothing of the process runs or is
//! run by CRIU any more:
//!
//! ```text
//!   Open 12 {digests of process 7} · Data 12 … · Close 12 ─────────▶ compares with what it keeps; ends the call at a difference
//! ```
//!
//! The data are the XXH3-64 (seed 0) of the 4096 bytes of each page in `existing`, in that order, 8 bytes little endian each, and no
//! frame ends inside of one. A page that the receiver does not have differs, and a page that was sent as a zero page counts as 4096
//! zeros. Refused are digests of an owner without `memory` or without a complete `existing` before them, more or fewer than there are
//! pages, and any memory of the owner behind them. Whoever has compared fails the call at `Close`, with `INTERNAL`, the phase
//! `verify`, and in the text the owner, how many pages differ, and which ones first. An owner without existing pages needs none.
//!
//! In post-copy (see [`crate::fetch`]) some of the existing pages stay with the source. An object for each process that has such says
//! which: `Open 10 {later of process 7} · Data 10 … · Close 10`, in the form of `existing`. What came of them before is forgotten. Only a
//! target that was told where to fetch them takes such an object.
//!
//! The image file `descriptors.json` comes once, before the freeze where that can be: with it the receiver may begin to restore, as far
//! as that goes without the rest.
//!
//! Objects may be interleaved as the sender likes. `Abort` may stand in place of any frame after `Begin` and is the last
//! one; a call that ends without `End` or `Abort` counts as aborted too. Whatever the receiver does not accept, it ends the
//! call with a status that carries `google.rpc.ErrorInfo` (see `podferry_common::failure`); the sender then closes the
//! connection. A transfer is never resumed: it succeeds as a whole, which is only known to the sender from `Finished`, or
//! everything of it is discarded. When the connection breaks between the two sides' last words, the receiver may have
//! stored what the sender believes lost; the coordinator's `Abort` of the migration settles it.
//!
//! # Who may
//!
//! Only a peer with an *agent's* certificate, whose name must be `source_node`, for a migration that the coordinator has
//! announced to the receiver with `Prepare` with that source. Anybody else gets `PERMISSION_DENIED`.
//!
//! # Versions
//!
//! `Begin` says what the sender speaks and `Welcome` what both speak from then on: the newest that both know (see
//! [`crate::Version`]). When there is none the call ends with `UNIMPLEMENTED`. Kinds of frames and methods of compression
//! that the version does not have are refused, not skipped.
//!
//! # A frame
//!
//! Every message of the request stream is one frame. Its encoding is canonical: fields in ascending order, `checksum`
//! always present, then `payload` unless it is empty, then nothing. So everything before `checksum` is *the head*, and
//!
//! ```text
//! checksum = XXH3-64( head ‖ XXH3-64(payload) as 8 bytes little endian )
//! digest   = XXH3-64( XXH3-64(payload) as 8 bytes little endian, of every frame between the object's Open and Close, in order )
//! ```
//!
//! both with seed 0. TLS already keeps strangers from changing a byte; the sums find what breaks inside the two agents, and
//! `sequence` what is lost or repeated there. A packed payload is one zstd frame with its content checksum.
//!
//! `Data` appends: its offset is the length so far. `Pages` is a run of at most 256 pages of 4 KiB at `vaddr`; pages that
//! are all zeros are only marked in `zero_pages` and the raw bytes are the others, in order. A run that is `absent` has
//! neither, and any count. `Scattered` is several such runs in one frame, at most 256 pages together; only memory objects have
//! them.
//!
//! # Deltas
//!
//! `Deltas` is for pages of a memory object that came before, in this object or an earlier one of the same process, and of which
//! little has changed: at most 256 pages a frame, each with a delta of at most 2048 bytes, against what came last of it. The 4096
//! bytes of a page are 512 words of 8 bytes; a delta is any number of stretches:
//!
//! ```text
//! stretch = varint: unchanged words, at least 1 but for the first stretch
//!         ‖ varint: changed words that follow them, at least 1
//!         ‖ those words, 8 bytes each: what they were XOR what they are now, so none is zero
//! ```
//!
//! Nothing of it reaches past the page's end, and all varints here are the shortest; words behind the last stretch are unchanged,
//! and a page that is as it was has the delta of 0 bytes. So each change has one encoding. The receiver refuses all others before
//! it looks at a page. It fails the transfer when it lacks one of the pages, and when `digest` is not that of what the pages
//! hold once the deltas are applied: then the two sides disagree about what was sent before. The page's length counts, not the
//! delta's, in `Close` and `End`.
//!
//! # Limits
//!
//! Checked before memory is taken for what they bound: a message is at most 1 MiB + 4 KiB, its head at most 4 KiB, its raw
//! bytes at most 1 MiB and its payload not longer than those; names are 1 to 128 of `A-Z a-z 0-9 . _ -` without a dot in
//! front; a transfer has at most 65536 objects, no two the same and at most 16 open; a reason at most 1 KiB. `Begin` must come, and be answered,
//! within 10 s. The receiver allows 16 MiB under way (HTTP/2's window) and takes more as its store takes what came: a slow
//! store slows the sender, and neither side's memory grows.
