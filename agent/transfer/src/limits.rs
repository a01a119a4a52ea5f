//! What a receiver bounds before it takes memory, and how a sender cuts what it sends.

use std::time::Duration;

/// Bytes of a memory page.
pub const PAGE_SIZE: usize = 4096;
/// The most raw bytes of one frame: 256 pages.
pub const MAX_RAW_LENGTH: usize = 1 << 20;
/// The most bytes of a message besides its payload.
pub const MAX_HEAD_LENGTH: usize = 4 << 10;
/// The most bytes of a message. A payload is never larger than its raw bytes.
pub const MAX_MESSAGE_LENGTH: usize = MAX_RAW_LENGTH + MAX_HEAD_LENGTH;
/// The most bytes of a name of an image file or layer.
pub const MAX_NAME_LENGTH: usize = 128;
/// The most objects of one transfer.
pub const MAX_OBJECTS: usize = 1 << 16;
/// The most objects of one transfer that are open at the same time: each may be two files at the receiver.
pub const MAX_OPEN: usize = 16;
/// The most bytes of a reason to give up.
pub const MAX_REASON_LENGTH: usize = 1 << 10;
/// The most bytes of one answer of the receiver's.
pub const MAX_RESPONSE_LENGTH: usize = 4 << 10;
/// How long the first frame and its answer may take.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How much a sender may have under way: HTTP/2's window, of a stream and of its connection.
pub const WINDOW: u32 = 16 << 20;
/// The largest HTTP/2 frame that a receiver takes: a message in one piece is not copied together.
pub const MAX_HTTP2_FRAME: u32 = 2 << 20;
/// Raw bytes that a sender puts into one frame.
pub const FRAME_LENGTH: usize = 1 << 20;
/// Frames that wait on each side between threads.
pub const QUEUE: usize = 4;

const _: () = assert!(FRAME_LENGTH <= MAX_RAW_LENGTH && FRAME_LENGTH.is_multiple_of(PAGE_SIZE));
const _: () = assert!(MAX_MESSAGE_LENGTH + 5 <= MAX_HTTP2_FRAME as usize);
