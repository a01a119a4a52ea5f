//! What the first holder notes for the second, over a socket that keeps packets whole.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::range::PageRange;

/// How long a second holder that takes nothing counts as one.
const PATIENCE: Duration = Duration::from_secs(2);
/// Words of the largest packet.
const MOST_WORDS: usize = 6 * 1024;
/// Pieces that fit into one packet.
pub(super) const MOST_PIECES: usize = 2000;

/// Where the pending pages of a task come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// CRIU: all lazy pages of the process.
    Restored,
    /// A fork: those of the task with this number, as they are now.
    Forked(u32),
    /// Notes that follow; so a new second holder learns it.
    Noted,
}

/// A change of what a holder knows.
#[derive(Debug)]
pub(super) enum Note {
    /// The socket at which CRIU connects.
    Listener(OwnedFd),
    /// CRIU's connection.
    Connected(OwnedFd),
    /// CRIU has named the process whose userfaultfd is next.
    Awaiting(i32),
    /// The restore is complete.
    Complete,
    /// A userfaultfd.
    Task { task: u32, pid: i32, origin: Origin, sequence: u64, userfaultfd: OwnedFd },
    /// A mapping was moved.
    Moved { task: u32, sequence: u64, from: PageRange, to: u64 },
    /// Pages were given up.
    GivenUp { task: u32, sequence: u64, range: PageRange },
    /// Mappings were removed.
    Unmapped { task: u32, sequence: u64, range: PageRange },
    /// Pages are there, or need nothing any more. `faults` were served in all.
    Settled { task: u32, range: PageRange, pages: u64, faults: u64 },
    /// The process of a task is gone.
    Ended { task: u32 },
    /// Pages that a task waits for, and where they are kept.
    Pieces { task: u32, pieces: Vec<(PageRange, u64)> },
    /// The pages and faults that were served in all.
    Served { pages: u64, faults: u64 },
    /// Everything is done: nobody has to take over.
    Done,
}

impl Note {
    fn words(&self) -> Vec<u64> {
        let sign = |pid: i32| u64::from(pid.cast_unsigned());
        match self {
            Self::Listener(_) => vec![1],
            Self::Connected(_) => vec![2],
            Self::Awaiting(pid) => vec![3, sign(*pid)],
            Self::Complete => vec![4],
            Self::Task { task, pid, origin, sequence, .. } => {
                let (kind, parent) = match origin {
                    Origin::Restored => (0, 0),
                    Origin::Forked(parent) => (1, *parent),
                    Origin::Noted => (2, 0),
                };
                vec![5, (*task).into(), sign(*pid), kind, parent.into(), *sequence]
            }
            Self::Moved { task, sequence, from, to } => {
                vec![6, (*task).into(), *sequence, from.start, from.end, *to]
            }
            Self::GivenUp { task, sequence, range } => vec![7, (*task).into(), *sequence, range.start, range.end],
            Self::Unmapped { task, sequence, range } => vec![13, (*task).into(), *sequence, range.start, range.end],
            Self::Settled { task, range, pages, faults } => {
                vec![8, (*task).into(), range.start, range.end, *pages, *faults]
            }
            Self::Ended { task } => vec![9, (*task).into()],
            Self::Pieces { task, pieces } => {
                let pieces = pieces.iter().flat_map(|(range, kept)| [range.start, range.end, *kept]);
                [10, (*task).into()].into_iter().chain(pieces).collect()
            }
            Self::Served { pages, faults } => vec![11, *pages, *faults],
            Self::Done => vec![12],
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Listener(descriptor) | Self::Connected(descriptor) => Some(descriptor.as_fd()),
            Self::Task { userfaultfd, .. } => Some(userfaultfd.as_fd()),
            _ => None,
        }
    }

    /// `None` when it is no note.
    fn of(words: &[u64], descriptor: Option<OwnedFd>) -> Option<Self> {
        let task = |word: u64| u32::try_from(word).ok();
        let pid = |word: u64| u32::try_from(word).ok().map(u32::cast_signed);
        Some(match *words {
            [1] => Self::Listener(descriptor?),
            [2] => Self::Connected(descriptor?),
            [3, number] => Self::Awaiting(pid(number)?),
            [4] => Self::Complete,
            [5, number, process, kind, parent, sequence] => {
                let origin = match kind {
                    0 => Origin::Restored,
                    1 => Origin::Forked(task(parent)?),
                    2 => Origin::Noted,
                    _ => return None,
                };
                Self::Task { task: task(number)?, pid: pid(process)?, origin, sequence, userfaultfd: descriptor? }
            }
            [6, number, sequence, start, end, to] => {
                Self::Moved { task: task(number)?, sequence, from: PageRange::new(start, end), to }
            }
            [7, number, sequence, start, end] => {
                Self::GivenUp { task: task(number)?, sequence, range: PageRange::new(start, end) }
            }
            [13, number, sequence, start, end] => {
                Self::Unmapped { task: task(number)?, sequence, range: PageRange::new(start, end) }
            }
            [8, number, start, end, pages, faults] => {
                Self::Settled { task: task(number)?, range: PageRange::new(start, end), pages, faults }
            }
            [9, number] => Self::Ended { task: task(number)? },
            [10, number, ref pieces @ ..] => {
                let pieces = pieces.chunks_exact(3).map(|piece| (PageRange::new(piece[0], piece[1]), piece[2]));
                Self::Pieces { task: task(number)?, pieces: pieces.collect() }
            }
            [11, pages, faults] => Self::Served { pages, faults },
            [12] => Self::Done,
            _ => return None,
        })
    }
}

/// One end of the socket.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// The first holder's end, and the second's.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&ours, Timeout::Send, Some(PATIENCE))?;
        Ok((Self(ours), theirs))
    }

    pub(super) fn over(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub(super) fn send(&self, note: &Note) -> io::Result<()> {
        let bytes: Vec<u8> = note.words().iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<BorrowedFd<'_>> = note.descriptor().into_iter().collect();
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// The next note; `None` when the other end is closed and all were read.
    pub(super) fn receive(&self) -> io::Result<Option<Note>> {
        let mut bytes = vec![0; MOST_WORDS * 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let place = &mut [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, place, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                // A peer that ended with packets unread resets the connection.
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                received => break received?,
            }
        };
        if received.bytes == 0 {
            return Ok(None);
        }
        let descriptor = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let whole = !received.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC);
        let words: Vec<u64> = bytes[..received.bytes]
            .chunks_exact(8)
            .map(|word| word.try_into().map(u64::from_ne_bytes).unwrap_or_default())
            .collect();
        let note = if whole { Note::of(&words, descriptor) } else { None };
        note.map(Some).ok_or_else(|| io::Error::other("a note that makes no sense"))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    #[test]
    fn notes_arrive_as_they_were_sent_and_the_end_is_seen() {
        let (first, second) = Link::pair().unwrap();
        let second = Link::over(second);
        let range = PageRange::new(PAGE_SIZE, 3 * PAGE_SIZE);
        let descriptor = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let notes = [
            Note::Listener(descriptor()),
            Note::Connected(descriptor()),
            Note::Awaiting(-7),
            Note::Task { task: 1, pid: 7, origin: Origin::Restored, sequence: 0, userfaultfd: descriptor() },
            Note::Task { task: 2, pid: 7, origin: Origin::Forked(1), sequence: 3, userfaultfd: descriptor() },
            Note::Moved { task: 1, sequence: 4, from: range, to: 9 * PAGE_SIZE },
            Note::GivenUp { task: 2, sequence: 5, range },
            Note::Unmapped { task: 2, sequence: 6, range },
            Note::Settled { task: 2, range, pages: 1, faults: 8 },
            Note::Ended { task: 2 },
            Note::Pieces { task: 1, pieces: vec![(range, PAGE_SIZE); MOST_PIECES] },
            Note::Served { pages: 5, faults: 6 },
            Note::Complete,
            Note::Done,
        ];
        for note in &notes {
            first.send(note).unwrap();
            let received = second.receive().unwrap().unwrap();
            assert_eq!(received.words(), note.words());
            assert_eq!(received.descriptor().is_some(), note.descriptor().is_some());
        }
        first.send(&Note::Complete).unwrap();
        drop(first);
        assert!(matches!(second.receive(), Ok(Some(Note::Complete))));
        assert!(matches!(second.receive(), Ok(None)));
    }
}
