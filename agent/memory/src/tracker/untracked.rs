//! Memory that nobody follows, because all of it is moved after the freeze.

use std::fmt;

use nix::unistd::Pid;

use crate::range::PageRanges;
use crate::sys::pagemap::{Query, category};

use super::pagemap::{self, Pagemap};
use super::{Choice, Frozen, TrackError, WriteTracker};

/// Follows nothing, so that the process is not touched: no round tells any page, and the freeze tells all of them.
pub struct Untracked {
    choice: Choice,
    process: Pid,
}

impl Untracked {
    /// For a process whose memory is moved behind the freeze; `reason` says why.
    pub fn of(process: Pid, reason: String) -> Self {
        Self { choice: Choice { tracker: "nobody", reason }, process }
    }
}

impl fmt::Debug for Untracked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Untracked").field("process", &self.process).finish_non_exhaustive()
    }
}

impl WriteTracker for Untracked {
    fn process(&self) -> Pid {
        self.process
    }

    fn choice(&self) -> &Choice {
        &self.choice
    }

    fn round(&mut self) -> Result<PageRanges, TrackError> {
        Ok(PageRanges::new())
    }

    fn tell_again(&mut self, _pages: &PageRanges) {}

    fn frozen(&mut self, ranges: &PageRanges) -> Result<Frozen, TrackError> {
        let process = self.process;
        let of_pagemap = |source| TrackError::of_file(process, "pagemap")(source);
        let pagemap = Pagemap::of(process).map_err(of_pagemap)?;
        let mut existing = PageRanges::new();
        if pagemap.knows(category::PRESENT) {
            let any_of = category::PRESENT | category::SWAPPED;
            let query =
                Query { with: 0, without: pagemap.empty_categories(), any_of, tell: category::PRESENT, protect: false };
            let regions = pagemap::scan_together(process, ranges, query, pagemap::SHARE);
            let regions = regions.map_err(|(range, source)| TrackError::Scan { process, range, source })?;
            for region in &regions {
                existing.push(region.range());
            }
        } else {
            for range in ranges {
                pagemap.read(range, &mut |run, _dirty| existing.push(run)).map_err(of_pagemap)?;
            }
        }
        Ok(Frozen { written: existing.clone(), existing })
    }
}
