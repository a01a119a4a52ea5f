//! Mappings that a followed process moves.
//!
//! Without `UFFD_FEATURE_EVENT_REMAP`, mremap(2) takes the userfaultfd away from what it moves. Where the moved mapping is joined
//! to a neighbour, it is taken away from the neighbour too, whose pages keep their marks: a write to them clears no mark any
//! more, and after the next registration they look as if nobody had written to them (seen on Linux 6.18: stale pages in 9 of 60
//! runs of the churn test). With the feature, everything stays registered. The process then waits in mremap(2) until the event is
//! read, so a thread does nothing but read.
//!
//! A moved page keeps the mark it had at its old address; at the new one it counts as written.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::range::{PageRange, PageRanges};
use crate::sys::userfaultfd::{self, Event};

/// Reads the events of one userfaultfd until it is dropped.
#[derive(Debug)]
pub(crate) struct Moves {
    moved: Arc<Mutex<PageRanges>>,
    stop: Arc<OwnedFd>,
    reader: Option<JoinHandle<()>>,
}

impl Moves {
    pub(crate) fn of(userfaultfd: Arc<OwnedFd>) -> io::Result<Self> {
        let moved = Arc::new(Mutex::new(PageRanges::new()));
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let (told, end) = (Arc::clone(&moved), Arc::clone(&stop));
        let reader = std::thread::Builder::new().name("moves".to_owned());
        let reader = reader.spawn(move || read_until(&end, &userfaultfd, &told))?;
        Ok(Self { moved, stop, reader: Some(reader) })
    }

    /// Where mappings were moved to since the last call. A move whose process has gone on is among them.
    pub(crate) fn take(&self) -> PageRanges {
        std::mem::take(&mut *self.moved.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Moves {
    fn drop(&mut self) {
        let _told = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(reader) = self.reader.take() {
            let _ended = reader.join();
        }
    }
}

fn read_until(stop: &OwnedFd, userfaultfd: &OwnedFd, moved: &Mutex<PageRanges>) {
    loop {
        let mut polled = [PollFd::new(userfaultfd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return tracing::error!(%error, "moves of mappings are not read any more"),
        }
        let [events, end] = polled.map(|polled| polled.revents());
        if !end.is_empty() || !events.contains(PollFlags::IN) && !events.is_empty() {
            return;
        }
        // Reading lets the process go on. Whoever finds it frozen after that must find the move, too.
        let mut moved = moved.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(Some(event)) = userfaultfd::event(userfaultfd.as_fd()) {
            if let Event::Moved { from, to } = event {
                moved.push(PageRange::new(to, to + from.length()));
            }
        }
    }
}
