//! The page stream: what CRIU's page-server client says when it dumps memory.
//!
//! CRIU is given one end of a Unix stream socket in place of a connection to `criu page-server`. It sends commands of
//! 32 bytes (`struct page_server_iov` of `criu/page-xfer.c`, CRIU >= 4.2, machine byte order, four bytes of padding after
//! the first field), each followed by its pages when they are present:
//!
//! | command | number | answer | pages follow |
//! |---|---|---|---|
//! | `OPEN` | 3 | none | no |
//! | `OPEN2` | 4 | one byte: is there a parent image | no |
//! | `PARENT` | 5 | four bytes: is there a parent image | no |
//! | `ADD_F` | 6 | none | if `PRESENT` is among the flags |
//! | `CLOSE`, `FORCE_CLOSE` | 0x1023, 0x1024 | four bytes: status | no |
//!
//! CRIU closes the stream also when the dump fails, so a closed stream alone is no success.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;

use crate::{CriuError, PAGE_SIZE, page_flags};

const COMMAND_SIZE: usize = 32;
const COMMAND_BITS: u32 = 16;
const ADD: u32 = 1;
const HOLE: u32 = 2;
const OPEN: u32 = 3;
const OPEN2: u32 = 4;
const PARENT: u32 = 5;
const ADD_F: u32 = 6;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;
const TYPE_BITS: u32 = 8;
const TYPE_PROCESS: u64 = 1;
const TYPE_SHARED: u64 = 2;
/// The most pages handed to a sink at once: 1 MiB.
const BATCH_PAGES: u64 = 256;

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// Of one process: its id inside its pid namespace.
    Process(u32),
    /// Shared: CRIU's id of the segment.
    SharedMemory(u64),
}

/// Consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Of the first byte; a multiple of the page size. For shared memory the offset in the segment.
    pub address: u64,
    /// How many pages.
    pub pages: u64,
    /// Of [`page_flags`].
    pub flags: u32,
}

impl Run {
    /// The first address after it.
    pub fn end(&self) -> u64 {
        self.address + self.pages * PAGE_SIZE as u64
    }
}

/// Who takes the pages. Blocking here is the back-pressure on CRIU.
pub trait PageSink {
    /// Why it could not.
    type Error: std::error::Error + Send + Sync + 'static;

    /// From now on pages are this owner's.
    ///
    /// # Errors
    /// Ends the stream.
    fn open(&mut self, owner: Owner) -> Result<(), Self::Error>;

    /// A buffer of exactly `bytes` bytes to be filled with pages; it comes back with [`PageSink::run`].
    fn buffer(&mut self, bytes: usize) -> Vec<u8>;

    /// Consecutive pages of the open owner, at most 256 at once; `data` is empty when they are not present.
    ///
    /// # Errors
    /// Ends the stream.
    fn run(&mut self, run: Run, data: Vec<u8>) -> Result<(), Self::Error>;
}

/// What a page stream held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageStreamStats {
    /// Pages whose contents came.
    pub pages: u64,
    /// Owners.
    pub owners: u64,
}

struct Command {
    number: u32,
    flags: u32,
    pages: u64,
    address: u64,
    owner: u64,
}

/// Takes the page stream until CRIU closes it.
///
/// # Errors
/// When the stream breaks or says what it must not, and when the sink fails. CRIU then fails too: the socket is closed.
pub fn receive<S: PageSink>(mut socket: UnixStream, sink: &mut S) -> Result<PageStreamStats, CriuError> {
    let mut stats = PageStreamStats::default();
    let mut open = None;
    loop {
        let command = read_command(&mut socket)?;
        match command.number {
            OPEN | OPEN2 => {
                let owner = owner_of(command.owner)?;
                sink.open(owner).map_err(|error| CriuError::Sink(Box::new(error)))?;
                open = Some(command.owner);
                stats.owners += 1;
                if command.number == OPEN2 {
                    answer(&mut socket, &[0])?;
                }
            }
            PARENT => answer(&mut socket, &0_i32.to_ne_bytes())?,
            ADD | ADD_F | HOLE => {
                if open != Some(command.owner) {
                    return Err(CriuError::PageStream(format!("pages of {:#x}, which is not open", command.owner)));
                }
                stats.pages += take_pages(&mut socket, sink, &command)?;
            }
            CLOSE | FORCE_CLOSE => {
                answer(&mut socket, &0_i32.to_ne_bytes())?;
                return Ok(stats);
            }
            other => return Err(CriuError::PageStream(format!("unknown command {other}"))),
        }
    }
}

fn take_pages<S: PageSink>(socket: &mut UnixStream, sink: &mut S, command: &Command) -> Result<u64, CriuError> {
    let flags = match command.number {
        ADD => page_flags::PRESENT,
        HOLE => page_flags::PARENT,
        _ => command.flags,
    };
    let overflows = command.pages.checked_mul(PAGE_SIZE as u64).and_then(|bytes| command.address.checked_add(bytes));
    if overflows.is_none() || command.pages == 0 || !command.address.is_multiple_of(PAGE_SIZE as u64) {
        return Err(CriuError::PageStream(format!("{} pages at {:#x}", command.pages, command.address)));
    }
    if flags & page_flags::PRESENT == 0 {
        let run = Run { address: command.address, pages: command.pages, flags };
        sink.run(run, Vec::new()).map_err(|error| CriuError::Sink(Box::new(error)))?;
        return Ok(0);
    }
    let mut taken = 0;
    while taken < command.pages {
        let pages = (command.pages - taken).min(BATCH_PAGES);
        let bytes = usize::try_from(pages).unwrap_or_default() * PAGE_SIZE;
        let mut data = sink.buffer(bytes);
        socket.read_exact(&mut data).map_err(CriuError::PageStreamIo)?;
        let run = Run { address: command.address + taken * PAGE_SIZE as u64, pages, flags };
        sink.run(run, data).map_err(|error| CriuError::Sink(Box::new(error)))?;
        taken += pages;
    }
    Ok(taken)
}

fn read_command(socket: &mut UnixStream) -> Result<Command, CriuError> {
    let mut bytes = [0; COMMAND_SIZE];
    socket.read_exact(&mut bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => CriuError::PageStream("it ended without being closed".to_owned()),
        _ => CriuError::PageStreamIo(error),
    })?;
    let word = u32::from_ne_bytes(field(&bytes, 0));
    Ok(Command {
        number: word & ((1 << COMMAND_BITS) - 1),
        flags: word >> COMMAND_BITS,
        pages: u64::from_ne_bytes(field(&bytes, 8)),
        address: u64::from_ne_bytes(field(&bytes, 16)),
        owner: u64::from_ne_bytes(field(&bytes, 24)),
    })
}

fn field<const N: usize>(bytes: &[u8; COMMAND_SIZE], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[at + index])
}

fn owner_of(encoded: u64) -> Result<Owner, CriuError> {
    let id = encoded >> TYPE_BITS;
    match (encoded & ((1 << TYPE_BITS) - 1), u32::try_from(id)) {
        (TYPE_PROCESS, Ok(pid)) => Ok(Owner::Process(pid)),
        (TYPE_SHARED, _) => Ok(Owner::SharedMemory(id)),
        _ => Err(CriuError::PageStream(format!("unknown owner {encoded:#x}"))),
    }
}

fn answer(socket: &mut UnixStream, bytes: &[u8]) -> Result<(), CriuError> {
    socket.write_all(bytes).map_err(CriuError::PageStreamIo)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default, Debug, PartialEq)]
    struct Kept {
        owners: Vec<Owner>,
        runs: Vec<(Run, Vec<u8>)>,
    }

    impl PageSink for Kept {
        type Error = Infallible;

        fn open(&mut self, owner: Owner) -> Result<(), Infallible> {
            self.owners.push(owner);
            Ok(())
        }

        fn buffer(&mut self, bytes: usize) -> Vec<u8> {
            vec![0; bytes]
        }

        fn run(&mut self, run: Run, data: Vec<u8>) -> Result<(), Infallible> {
            self.runs.push((run, data));
            Ok(())
        }
    }

    fn command(number: u32, pages: u64, address: u64, owner: u64) -> Vec<u8> {
        let mut bytes = number.to_ne_bytes().to_vec();
        bytes.extend([0; 4]);
        for value in [pages, address, owner] {
            bytes.extend(value.to_ne_bytes());
        }
        bytes
    }

    fn said(bytes: Vec<u8>) -> (Result<PageStreamStats, CriuError>, Kept) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let sender = std::thread::spawn(move || {
            let _ = theirs.write_all(&bytes);
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answers = Vec::new();
            let _ = theirs.read_to_end(&mut answers);
        });
        let mut kept = Kept::default();
        let result = receive(ours, &mut kept);
        sender.join().unwrap();
        (result, kept)
    }

    const PRESENT: u32 = page_flags::PRESENT << COMMAND_BITS | ADD_F;

    #[test]
    fn runs_are_cut_into_batches_that_keep_addresses_and_contents() {
        let data: Vec<u8> = (0..300 * PAGE_SIZE).map(|index| (index / 7).to_le_bytes()[0]).collect();
        let mut bytes = command(OPEN2, 0, 0, 7 << 8 | 1);
        bytes.extend(command(PRESENT, 300, 0x10000, 7 << 8 | 1));
        bytes.extend(&data);
        bytes.extend(command(FORCE_CLOSE, 0, 0, 0));
        let (result, kept) = said(bytes);
        assert_eq!(result.unwrap(), PageStreamStats { pages: 300, owners: 1 });
        assert_eq!(kept.owners, [Owner::Process(7)]);
        let runs: Vec<_> = kept.runs.iter().map(|(run, _)| (run.address, run.pages)).collect();
        assert_eq!(runs, [(0x10000, 256), (0x110_000, 44)]);
        assert_eq!(kept.runs.iter().flat_map(|(_, data)| data.clone()).collect::<Vec<_>>(), data);
    }

    #[test]
    fn pages_that_are_not_present_have_no_data() {
        let mut bytes = command(OPEN2, 0, 0, 9 << 8 | 2);
        bytes.extend(command(HOLE, 4, 0, 9 << 8 | 2));
        bytes.extend(command(CLOSE, 0, 0, 0));
        let (result, kept) = said(bytes);
        assert_eq!(result.unwrap().pages, 0);
        assert_eq!(kept.owners, [Owner::SharedMemory(9)]);
        assert_eq!(kept.runs, [(Run { address: 0, pages: 4, flags: page_flags::PARENT }, Vec::new())]);
    }

    #[test]
    fn what_the_protocol_does_not_allow_is_refused() {
        let open = command(OPEN2, 0, 0, 7 << 8 | 1);
        let broken = [
            command(99, 0, 0, 0),
            command(OPEN2, 0, 0, 7 << 8 | 5),
            command(PRESENT, 1, 0, 7 << 8 | 1),
            [open.clone(), command(PRESENT, 0, 0, 7 << 8 | 1)].concat(),
            [open.clone(), command(PRESENT, 1, 5, 7 << 8 | 1)].concat(),
            [open.clone(), command(PRESENT, u64::MAX, 0, 7 << 8 | 1)].concat(),
            [open.clone(), command(PRESENT, 1, 0, 7 << 8 | 1), vec![1; 100]].concat(),
            open,
            Vec::new(),
        ];
        for bytes in broken {
            assert!(said(bytes.clone()).0.is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = said(bytes);
        }
    }
}
