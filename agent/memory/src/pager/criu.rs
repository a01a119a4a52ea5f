//! CRIU's side of the conversation, looked at before it is taken.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg};

/// CRIU's `LAZY_PAGES_RESTORE_FINISHED`.
pub(super) const RESTORE_FINISHED: i32 = 0x5253_5446;
const WORD: usize = 4;

/// What is next.
#[derive(Debug)]
pub(super) enum Heard {
    /// A process id, or [`RESTORE_FINISHED`].
    Word(i32),
    /// A userfaultfd.
    Descriptor(OwnedFd),
    /// CRIU has hung up.
    End,
}

/// Looks at what is next and leaves it there.
pub(super) fn peek(criu: impl AsFd) -> io::Result<Heard> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0; WORD];
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(criu, &mut [IoSliceMut::new(&mut word)], &mut ancillary, flags)?;
    let truncated = received.flags.contains(ReturnFlags::CTRUNC);
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match (received.bytes, descriptor) {
        (0, _) => Ok(Heard::End),
        // With a look, the kernel may also show the descriptor that comes behind.
        (WORD, _) => Ok(Heard::Word(i32::from_ne_bytes(word))),
        (1, Some(descriptor)) if !truncated => Ok(Heard::Descriptor(descriptor)),
        (length, _) => Err(io::Error::other(format!("a word of {length} bytes"))),
    }
}

/// Takes a word.
pub(super) fn take_word(criu: impl AsFd) -> io::Result<()> {
    take(criu, &mut [0; WORD])
}

/// Takes a descriptor, which is closed, and the byte it came with.
pub(super) fn take_descriptor(criu: impl AsFd) -> io::Result<()> {
    take(criu, &mut [0; 1])
}

fn take(criu: impl AsFd, place: &mut [u8]) -> io::Result<()> {
    let length = place.len();
    match recv(criu, place, RecvFlags::WAITALL)? {
        (_, taken) if taken == length => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
