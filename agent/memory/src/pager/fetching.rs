//! The first holder's side of [fetching](crate::fetch) pages that are not kept here.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::fetch::{Answer, HEAD, LONGEST, Request};
use crate::range::{PageRange, PageRanges};

/// Bytes that nobody waits for and that are under way: what a link of 10 Gbit/s and 3 ms there and back has room for.
pub(super) const WINDOW: u64 = 4 << 20;
/// Between two tries to reach the fetcher.
const AGAIN: Duration = Duration::from_millis(100);
/// Bytes that are read at a time.
const PART: usize = 64 * 1024;
/// So many parts at most are read before what has come is laid in: 1 MiB.
const PARTS: usize = 16;

/// Something that came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    /// Pages of a process.
    Pages(i32, PageRange, Vec<u8>),
    /// Pages of a process that are zero.
    Zeros(i32, PageRange),
    /// Nothing more will.
    Lost,
}

/// The conversation.
#[derive(Debug, Default)]
pub(super) struct Fetching {
    fetcher: Option<UnixStream>,
    tried: Option<Instant>,
    inbound: Vec<u8>,
    /// What is to be asked for that nobody waits for; none as long as it is not known.
    ahead: Option<VecDeque<(i32, PageRange)>>,
    /// Of that, what was asked for.
    under_way: HashMap<(i32, u64), PageRange>,
    bytes_under_way: u64,
    /// First pages of what was asked for because somebody waits.
    awaited: HashSet<(i32, u64)>,
    /// Pages that came because somebody waited: they need not be asked for again.
    came: HashSet<(i32, u64)>,
}

impl Fetching {
    /// Whether the fetcher has to be called, again.
    pub(super) fn wants_fetcher(&self) -> bool {
        self.fetcher.is_none() && self.tried.is_none_or(|tried| tried.elapsed() >= AGAIN)
    }

    /// It was called.
    pub(super) fn called(&mut self, called: io::Result<UnixStream>) {
        self.tried = Some(Instant::now());
        match called.and_then(|fetcher| fetcher.set_nonblocking(true).map(|()| fetcher)) {
            Ok(fetcher) => self.fetcher = Some(fetcher),
            Err(error) => tracing::debug!(%error, "nobody fetches pages"),
        }
    }

    /// Something can be read there when something has come.
    pub(super) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.fetcher.as_ref().map(|fetcher| fetcher.as_fd())
    }

    /// Asks for pages that somebody waits for, unless they were asked for already.
    pub(super) fn ask(&mut self, process: i32, range: PageRange) {
        if !self.awaited.contains(&(process, range.start)) && self.say(Request { process, awaited: true, range }) {
            self.awaited.insert((process, range.start));
        }
    }

    /// Whether it is known what is to be asked for that nobody waits for.
    pub(super) fn knows_ahead(&self) -> bool {
        self.ahead.is_some()
    }

    /// Whether all that was to be asked for has come.
    pub(super) fn is_idle(&self) -> bool {
        let asked = self.ahead.as_ref().is_some_and(VecDeque::is_empty);
        asked && self.under_way.is_empty() && self.awaited.is_empty()
    }

    /// It has to be found out anew what is to be asked for.
    pub(super) fn forget_ahead(&mut self) {
        self.ahead = None;
        self.came.clear();
    }

    /// This is to be asked for, in that order.
    pub(super) fn know_ahead(&mut self, missing: impl Iterator<Item = (i32, PageRange)>) {
        let pieces = missing.flat_map(|(process, range)| pieces(range).map(move |piece| (process, piece)));
        self.ahead = Some(pieces.collect());
    }

    /// Whether somebody waits for something that was asked for.
    pub(super) fn is_awaited(&self) -> bool {
        !self.awaited.is_empty()
    }

    /// Asks for what nobody waits for, as far as no more than so many bytes of it are under way.
    pub(super) fn ask_ahead(&mut self, window: u64) {
        while self.fetcher.is_some() && self.bytes_under_way < window {
            let Some((process, range)) = self.ahead.as_mut().and_then(VecDeque::pop_front) else { return };
            let wanted: PageRanges =
                range.single_pages().filter(|page| !self.came.contains(&(process, page.start))).collect();
            for range in &wanted {
                if self.say(Request { process, awaited: false, range }) {
                    self.under_way.insert((process, range.start), range);
                    self.bytes_under_way += range.length();
                }
            }
        }
    }

    /// What has come since the last time, but not without end: somebody may wait for the first of it.
    pub(super) fn receive(&mut self) -> Vec<Arrived> {
        let mut arrived = Vec::new();
        for _ in 0..PARTS {
            let Some(fetcher) = &mut self.fetcher else { break };
            let before = self.inbound.len();
            self.inbound.resize(before + PART, 0);
            let read = fetcher.read(&mut self.inbound[before..]);
            self.inbound.truncate(before + read.as_ref().copied().unwrap_or(0));
            match read {
                Ok(0) => self.hang_up("it has hung up"),
                Ok(_) => self.understand(&mut arrived),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.hang_up(&error.to_string()),
            }
        }
        arrived
    }

    fn understand(&mut self, arrived: &mut Vec<Arrived>) {
        let mut from = 0;
        while let Some(head) = self.inbound[from..].first_chunk::<HEAD>() {
            let Some((answer, process, range)) = Answer::decode(head) else {
                return self.hang_up("what it says makes no sense");
            };
            let length = if answer == Answer::Contents { usize::try_from(range.length()).unwrap_or(0) } else { 0 };
            let Some(contents) = self.inbound[from + HEAD..].get(..length) else { break };
            arrived.push(match answer {
                Answer::Contents => Arrived::Pages(process, range, contents.to_vec()),
                Answer::Zeros => Arrived::Zeros(process, range),
                Answer::Lost => Arrived::Lost,
            });
            from += HEAD + length;
            self.note_arrival(process, range);
        }
        self.inbound.drain(..from);
    }

    fn note_arrival(&mut self, process: i32, range: PageRange) {
        if self.awaited.remove(&(process, range.start)) {
            self.came.extend(range.single_pages().map(|page| (process, page.start)));
        } else if self.under_way.remove(&(process, range.start)).is_some() {
            self.bytes_under_way = self.bytes_under_way.saturating_sub(range.length());
        }
    }

    /// False when it cannot be said now.
    fn say(&mut self, request: Request) -> bool {
        let Some(fetcher) = &mut self.fetcher else { return false };
        match fetcher.write(&request.encode()) {
            Ok(HEAD) => true,
            Ok(_) => {
                self.hang_up("it takes half a request");
                false
            }
            Err(error) => {
                self.hang_up(&error.to_string());
                false
            }
        }
    }

    /// What was asked for has to be asked for again.
    fn hang_up(&mut self, why: &str) {
        tracing::warn!(why, "whoever fetches pages is gone");
        self.fetcher = None;
        self.inbound.clear();
        self.awaited.clear();
        self.bytes_under_way = 0;
        let again = self.under_way.drain().map(|((process, _), range)| (process, range));
        // There is nothing under way before it is known what is ahead.
        if let Some(ahead) = &mut self.ahead {
            ahead.extend(again);
        }
    }
}

fn pieces(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = range.end.min(start + LONGEST);
        let piece = (start < end).then(|| PageRange::new(start, end));
        start = end;
        piece
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(start * PAGE_SIZE, end * PAGE_SIZE)
    }

    fn connected() -> (Fetching, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut fetching = Fetching::default();
        fetching.called(Ok(ours));
        theirs.set_nonblocking(true).unwrap();
        (fetching, theirs)
    }

    fn heard(fetcher: &mut UnixStream) -> Vec<Request> {
        let mut bytes = Vec::new();
        let _would_block = fetcher.read_to_end(&mut bytes);
        bytes.as_chunks::<HEAD>().0.iter().map(|head| Request::decode(head).unwrap()).collect()
    }

    #[test]
    fn what_comes_in_pieces_arrives_whole_and_no_more_is_asked_for_than_there_is_room() {
        let (mut fetching, mut fetcher) = connected();
        fetching.know_ahead([(7, range(0, 2048))].into_iter());
        fetching.ask_ahead(WINDOW);
        let asked = heard(&mut fetcher);
        assert_eq!(asked.iter().map(|request| request.range.length()).sum::<u64>(), WINDOW);
        let first = asked[0].range;
        let contents = vec![5; usize::try_from(first.length()).unwrap()];
        let mut wire = Answer::Contents.encode(7, first).to_vec();
        wire.extend(&contents);
        wire.extend(Answer::Zeros.encode(7, asked[1].range));
        let mut arrived = Vec::new();
        for part in wire.chunks(10_007) {
            fetcher.write_all(part).unwrap();
            arrived.extend(fetching.receive());
        }
        assert_eq!(arrived, [Arrived::Pages(7, first, contents), Arrived::Zeros(7, asked[1].range)]);
        fetching.ask_ahead(WINDOW);
        assert_eq!(heard(&mut fetcher).len(), 2, "as much as came");
    }

    #[test]
    fn little_is_under_way_that_nobody_waits_for_when_little_may_be() {
        let (mut fetching, mut fetcher) = connected();
        fetching.know_ahead([(7, range(0, 2048))].into_iter());
        fetching.ask_ahead(LONGEST);
        fetching.ask_ahead(LONGEST);
        let asked = heard(&mut fetcher);
        assert_eq!(asked.iter().map(|request| request.range.length()).collect::<Vec<_>>(), [LONGEST]);
        assert!(!fetching.is_awaited());
        fetching.ask(7, range(1000, 1001));
        assert!(fetching.is_awaited());
        fetcher.write_all(&Answer::Zeros.encode(7, range(1000, 1001))).unwrap();
        fetching.receive();
        assert!(!fetching.is_awaited());
    }

    #[test]
    fn what_came_because_somebody_waited_is_not_asked_for_again() {
        let (mut fetching, mut fetcher) = connected();
        fetching.ask(7, range(3, 5));
        fetching.ask(7, range(3, 5));
        assert_eq!(heard(&mut fetcher), [Request { process: 7, awaited: true, range: range(3, 5) }]);
        fetcher.write_all(&Answer::Zeros.encode(7, range(3, 5))).unwrap();
        assert_eq!(fetching.receive(), [Arrived::Zeros(7, range(3, 5))]);
        fetching.know_ahead([(7, range(0, 8))].into_iter());
        fetching.ask_ahead(WINDOW);
        let asked: Vec<PageRange> = heard(&mut fetcher).iter().map(|request| request.range).collect();
        assert_eq!(asked, [range(0, 3), range(5, 8)]);
    }

    #[test]
    fn a_fetcher_that_is_gone_is_called_again_and_asked_for_all_that_did_not_come() {
        let (mut fetching, mut fetcher) = connected();
        fetching.know_ahead([(7, range(0, 64)), (8, range(0, 1))].into_iter());
        fetching.ask_ahead(WINDOW);
        fetching.ask(7, range(100, 101));
        // Half an answer.
        fetcher.write_all(&Answer::Contents.encode(7, range(0, 64))[..20]).unwrap();
        drop(fetcher);
        assert_eq!(fetching.receive(), []);
        assert!(fetching.as_fd().is_none());
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        fetching.called(Ok(ours));
        fetching.ask_ahead(WINDOW);
        fetching.ask(7, range(100, 101));
        let mut asked: Vec<_> = heard(&mut theirs).iter().map(|asked| (asked.process, asked.range)).collect();
        asked.sort_unstable();
        assert_eq!(asked, [(7, range(0, 64)), (7, range(100, 101)), (8, range(0, 1))]);
    }

    #[test]
    fn a_fetcher_that_goes_before_it_is_known_what_is_ahead_leaves_that_unknown() {
        let (mut fetching, fetcher) = connected();
        drop(fetcher);
        assert_eq!(fetching.receive(), []);
        assert!(!fetching.knows_ahead());
    }

    #[test]
    fn a_fetcher_that_talks_nonsense_is_left() {
        let (mut fetching, mut fetcher) = connected();
        fetcher.write_all(&[0xff; HEAD]).unwrap();
        assert_eq!(fetching.receive(), []);
        assert!(fetching.as_fd().is_none());
    }
}
