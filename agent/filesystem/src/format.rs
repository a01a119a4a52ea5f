//! The layer's stream.
//!
//! ```text
//! stream  = MAGIC frame* END
//! frame   = kind:u8 length:u32 (little endian) payload[length]
//! kind 1  ENTRY     payload: Entry (protobuf); the first one is the root directory, with an empty path
//! kind 2  DATA      payload: offset:u64 (little endian), then 1..=CHUNK bytes of the last ENTRY, a regular file
//! kind 3  FILE_END  payload: size:u64 (little endian); ends that regular file. What no DATA covered is a hole
//! kind 4  END       payload: Totals (protobuf)
//! ```
//!
//! Entries come in depth-first order, a directory before what is in it, so that a receiver needs no more memory than the
//! tree is deep. DATA of one file comes in ascending offsets that do not overlap. A file's size comes after its data, so
//! that a file which changes while it is read still makes a valid stream.
//!
//! # Seeds
//!
//! What large files hold can be sent before, while the container runs: as *seeds*, in streams of their own. A layer whose
//! regular files refer to seeds begins with [`MAGIC_WITH_SEEDS`]; it is the same but for this: an ENTRY with a `seed` has no
//! DATA, only its `FILE_END`, whose size must be the seed's. The file is that seed, and no other entry is.
//!
//! ```text
//! stream  = SEEDS_MAGIC (SEED (DATA | HOLE)* (FILE_END | DROP) | DROP)* END
//! kind 2  DATA      as above, of the last SEED
//! kind 3  FILE_END  payload: size:u64; ends the change of that seed: it is cut there, or goes on as a hole
//! kind 4  END       payload: Totals, with SEED frames as entries
//! kind 5  SEED      payload: id:u64, not 0; what follows changes this seed. One that is new begins as an empty file
//! kind 6  HOLE      payload: offset:u64 length:u64; these bytes of it are a hole now, as far as it reaches there
//! kind 7  DROP      payload: id:u64; this seed will not be referred to. In the middle of a change only the one that is changed
//! ```
//!
//! There may be any number of such streams, one after the other, all before the layer's. A change says only what is different
//! from what was sent before. DATA and HOLE of one change come in ascending offsets that do not overlap.

use std::io::{self, Read, Write};

use crate::error::{Error, Result, beyond, refused};

/// What a stream begins with: a name and the format's version.
pub const MAGIC: [u8; 8] = *b"PFLAYER\x01";
/// What a layer begins with whose files refer to seeds.
pub const MAGIC_WITH_SEEDS: [u8; 8] = *b"PFLAYER\x02";
/// What a stream of seeds begins with.
pub const SEEDS_MAGIC: [u8; 8] = *b"PFSEEDS\x01";
/// The most file bytes in one DATA frame.
pub const CHUNK: usize = 256 * 1024;
/// The deepest directory, in path components. Each level costs either side one file descriptor.
pub const MAX_DEPTH: usize = 256;
/// The longest path, in bytes: the kernel's `PATH_MAX`.
pub const MAX_PATH: usize = 4096;
/// Names and values of one entry's extended attributes, in bytes.
pub const MAX_XATTRS: usize = 256 * 1024;

pub(crate) const ENTRY: u8 = 1;
pub(crate) const DATA: u8 = 2;
pub(crate) const FILE_END: u8 = 3;
pub(crate) const END: u8 = 4;
pub(crate) const SEED: u8 = 5;
pub(crate) const HOLE: u8 = 6;
pub(crate) const DROP: u8 = 7;

/// The bytes of an offset in front of a DATA frame's file bytes.
pub(crate) const OFFSET_LEN: usize = 8;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// Not set: never sent.
    Unspecified = 0,
    /// A directory.
    Directory = 1,
    /// A regular file; DATA and `FILE_END` follow.
    Regular = 2,
    /// A symbolic link; `target` is its text.
    Symlink = 3,
    /// Another name of an earlier entry that is no directory; `target` is that entry's path.
    HardLink = 4,
    /// A named pipe.
    Fifo = 5,
    /// A socket's name, with nobody behind it.
    Socket = 6,
    /// A character device 0:0: overlayfs' mark for a deleted name.
    Whiteout = 7,
}

/// One name of the tree and all that is known of it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Entry {
    /// Components joined by `/`, relative to the root; empty for the root itself.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// What it is.
    #[prost(enumeration = "Kind", tag = "2")]
    pub kind: i32,
    /// Permissions with set-user-id, set-group-id and sticky: at most `0o7777`.
    #[prost(uint32, tag = "3")]
    pub mode: u32,
    /// The owner, as the source's node numbers users.
    #[prost(uint32, tag = "4")]
    pub uid: u32,
    /// The group, as the source's node numbers groups.
    #[prost(uint32, tag = "5")]
    pub gid: u32,
    /// The modification time: seconds since the epoch.
    #[prost(sint64, tag = "6")]
    pub mtime_seconds: i64,
    /// Its nanoseconds, below one thousand million.
    #[prost(uint32, tag = "7")]
    pub mtime_nanoseconds: u32,
    /// Extended attributes.
    #[prost(message, repeated, tag = "8")]
    pub xattrs: Vec<Xattr>,
    /// A symbolic link's text, or the earlier path a hard link is another name of.
    #[prost(bytes = "vec", tag = "9")]
    pub target: Vec<u8>,
    /// The seed that holds a regular file's content; 0 when its content follows.
    #[prost(uint64, tag = "10")]
    pub seed: u64,
}

/// One extended attribute.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Xattr {
    /// Its name with the namespace, such as `user.comment`.
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    /// Its value.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// What was sent altogether; a receiver that counts otherwise has not got all of it.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Totals {
    /// ENTRY frames; of seeds, SEED frames.
    #[prost(uint64, tag = "1")]
    pub entries: u64,
    /// File bytes in DATA frames.
    #[prost(uint64, tag = "2")]
    pub data_bytes: u64,
}

/// Writes frames and counts bytes. Nothing at all is written before the first frame.
pub(crate) struct FrameWriter<W> {
    out: W,
    magic: [u8; 8],
    /// Bytes written since the beginning, the magic included.
    pub(crate) written: u64,
}

impl<W: Write> FrameWriter<W> {
    pub(crate) const fn new(out: W, magic: [u8; 8]) -> Self {
        Self { out, magic, written: 0 }
    }

    pub(crate) fn frame(&mut self, kind: u8, parts: &[&[u8]]) -> Result<()> {
        if self.written == 0 {
            self.put(&self.magic.clone())?;
        }
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let length = u32::try_from(length).map_err(|_| beyond(b"", "bytes in one frame", u64::from(u32::MAX)))?;
        let mut header = [kind, 0, 0, 0, 0];
        header[1..].copy_from_slice(&length.to_le_bytes());
        self.put(&header)?;
        parts.iter().try_for_each(|part| self.put(part))
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        self.out.flush().map_err(Error::Stream)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::Stream)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// Reads frames into one buffer of bounded size.
pub(crate) struct FrameReader<R> {
    input: R,
    buffer: Vec<u8>,
    /// The longest payload of a frame that is no DATA.
    longest_entry: usize,
}

impl<R: Read> FrameReader<R> {
    /// Of a stream that begins with one of these.
    pub(crate) fn start(mut input: R, longest_entry: usize, magics: &[[u8; 8]]) -> Result<Self> {
        let mut magic = [0; MAGIC.len()];
        input.read_exact(&mut magic).map_err(Error::Stream)?;
        if !magics.contains(&magic) {
            return Err(refused(&magic, "this is no podferry layer, or of a version that is not known here"));
        }
        Ok(Self { input, buffer: Vec::new(), longest_entry })
    }

    /// The next frame's kind and payload. A stream that ends before its END frame is an error.
    pub(crate) fn next(&mut self) -> Result<(u8, &[u8])> {
        let mut header = [0; 5];
        self.input.read_exact(&mut header).map_err(Error::Stream)?;
        let [kind, length @ ..] = header;
        let length = u32::from_le_bytes(length) as usize;
        let longest = if kind == DATA { CHUNK + OFFSET_LEN } else { self.longest_entry };
        if length > longest {
            return Err(beyond(b"", "bytes in one frame", longest as u64));
        }
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        let payload = &mut self.buffer[..length];
        self.input.read_exact(payload).map_err(Error::Stream)?;
        Ok((kind, payload))
    }
}

/// Splits the little-endian number off the front of a payload.
pub(crate) fn split_u64(payload: &[u8]) -> Result<(u64, &[u8])> {
    let (number, rest) =
        payload.split_first_chunk().ok_or_else(|| Error::Stream(io::Error::from(io::ErrorKind::InvalidData)))?;
    Ok((u64::from_le_bytes(*number), rest))
}
