//! Following writes by the kernel's soft-dirty marks (`Documentation/admin-guide/mm/soft-dirty.rst`).

use std::fs;
use std::sync::{Mutex, PoisonError};

use nix::unistd::Pid;

use super::pagemap::Pagemap;
use super::{Choice, Frozen, TrackError, WriteTracker, refuse_hazards};
use crate::PAGE_SIZE;
use crate::maps;
use crate::range::{PageRange, PageRanges};
use crate::sys::memory;
use crate::sys::pagemap::{Query, category};

/// The tracker's name.
pub(super) const NAME: &str = "soft-dirty marks";

/// Follows a process's writes by the soft-dirty marks of its pages, on kernels and processes for which there is no
/// [`super::UserfaultfdTracker`].
///
/// `make e2e-vm` tests it on kernels that have these marks; the tests beside it, that the lack of them is seen.
///
/// All marks of a process are cleared by one write to `/proc/PID/clear_refs`, which is another step than reading them. What a
/// running process writes between the two would be told by nobody. So they are cleared once, before anything is copied, and each
/// round tells all that was written *since the beginning*: that is never too little, but a round does not get smaller than what
/// the process has written to by then, and each but the first tells also what an earlier one told.
///
/// Pages of new mappings and pages that were moved have the mark (`VM_SOFTDIRTY`), and so has all memory of a new program
/// (execve(2)): nothing more needs to be known of them. Whoever else clears the marks takes them away from this tracker: of
/// processes that share their memory only one is followed, and nothing else on the node may write to `clear_refs`.
#[derive(Debug)]
pub struct SoftDirtyTracker {
    choice: Choice,
    process: Alone,
    pagemap: Pagemap,
    /// What is told again.
    owed: PageRanges,
    /// All that was told so far. What exists and was not told must be, marked or not: the page of zeros, where something was
    /// only read.
    told: PageRanges,
    /// Categories of pages that hold nothing; `None` for a kernel that does not find pages by this mark.
    scanned: Option<u64>,
}

impl SoftDirtyTracker {
    /// Whether this kernel makes the marks: tried out on this process.
    ///
    /// # Errors
    /// When this process's `pagemap` cannot be read.
    pub fn try_kernel() -> std::io::Result<bool> {
        is_available()
    }

    /// Begins to follow a process, and clears all its marks. `reason` says why it is not followed by a userfaultfd.
    pub fn attach(process: Pid, reason: String) -> Result<Self, TrackError> {
        if !is_available().map_err(TrackError::of_file(Pid::this(), "pagemap"))? {
            return Err(TrackError::NoSoftDirty);
        }
        let alone = Alone::with(process)?;
        let pagemap = Pagemap::of(process).map_err(TrackError::of_file(process, "pagemap"))?;
        let scanned = pagemap.knows(category::SOFT_DIRTY).then(|| pagemap.empty_categories());
        fs::write(format!("/proc/{process}/clear_refs"), "4").map_err(TrackError::of_file(process, "clear_refs"))?;
        let choice = Choice { tracker: NAME, reason };
        Ok(Self { choice, process: alone, pagemap, owed: PageRanges::new(), told: PageRanges::new(), scanned })
    }

    /// What there is in some ranges, and what of it has the mark.
    fn look(&mut self, ranges: &PageRanges) -> Result<Marked, TrackError> {
        let process = self.process.0;
        // Anew: an open one stays with the memory of the program that ran then.
        self.pagemap.reopen().map_err(TrackError::of_file(process, "pagemap"))?;
        let mut marked = Marked::default();
        for range in ranges {
            let looked = match self.scanned {
                Some(empty) => self.pagemap.scan(range, query(empty), &mut |region| {
                    marked.push(region.range(), region.is(category::SOFT_DIRTY));
                }),
                None => self.pagemap.read(range, &mut |run, dirty| marked.push(run, dirty)),
            };
            looked.map_err(|source| match source.raw_os_error() {
                Some(libc::ESRCH) => TrackError::Ended { process },
                _ => TrackError::Scan { process, range, source },
            })?;
        }
        Ok(marked)
    }
}

impl WriteTracker for SoftDirtyTracker {
    fn process(&self) -> Pid {
        self.process.0
    }

    fn choice(&self) -> &Choice {
        &self.choice
    }

    fn round(&mut self) -> Result<PageRanges, TrackError> {
        let process = self.process.0;
        refuse_hazards(process)?;
        let moved = maps::followable(process).map_err(TrackError::of_file(process, "maps, status or smaps"))?;
        let marked = self.look(&moved)?;
        refuse_hazards(process)?;
        let written = marked.to_tell(&self.told, &self.owed);
        self.owed = self.owed.difference(&moved);
        self.told = union(&self.told, &written);
        Ok(written)
    }

    fn tell_again(&mut self, pages: &PageRanges) {
        self.owed = union(&self.owed, pages);
    }

    fn frozen(&mut self, ranges: &PageRanges) -> Result<Frozen, TrackError> {
        let marked = self.look(ranges)?;
        let written = marked.to_tell(&self.told, &self.owed);
        Ok(Frozen { existing: marked.existing, written })
    }
}

/// Pages that exist, and those of them that have the mark.
#[derive(Debug, Default)]
struct Marked {
    existing: PageRanges,
    dirty: PageRanges,
}

impl Marked {
    fn push(&mut self, range: PageRange, dirty: bool) {
        self.existing.push(range);
        if dirty {
            self.dirty.push(range);
        }
    }

    fn to_tell(&self, told: &PageRanges, owed: &PageRanges) -> PageRanges {
        let new = self.existing.difference(told);
        union(&union(&self.dirty, &new), &owed.intersection(&self.existing))
    }
}

fn union(one: &PageRanges, other: &PageRanges) -> PageRanges {
    let mut all: Vec<PageRange> = one.iter().chain(other.iter()).collect();
    all.sort_unstable();
    all.into_iter().collect()
}

fn query(empty: u64) -> Query {
    let any_of = category::PRESENT | category::SWAPPED;
    Query { with: 0, without: empty, any_of, tell: category::SOFT_DIRTY | category::PRESENT, protect: false }
}

/// Whether this kernel makes the marks: a page that was just written has one.
fn is_available() -> std::io::Result<bool> {
    let page = vec![1_u8; 2 * usize::try_from(PAGE_SIZE).unwrap_or(0)];
    let start = (page.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
    let mut marked = Marked::default();
    Pagemap::of(Pid::this())?
        .read(PageRange::new(start, start + PAGE_SIZE), &mut |run, dirty| marked.push(run, dirty))?;
    drop(page);
    Ok(!marked.dirty.is_empty())
}

/// The processes whose marks are cleared by this one.
static FOLLOWED: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// A process that shares its memory with no other that is followed: clearing the marks of one would clear the other's.
#[derive(Debug)]
struct Alone(Pid);

impl Alone {
    fn with(process: Pid) -> Result<Self, TrackError> {
        let mut followed = FOLLOWED.lock().unwrap_or_else(PoisonError::into_inner);
        for other in followed.iter() {
            match memory::is_shared(process, *other) {
                Ok(false) => {}
                Ok(true) => return Err(TrackError::Shared { process }),
                // The other has ended, or this one: then it is found out soon.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(source) => return Err(TrackError::Proc { process, file: "memory's sharers", source }),
            }
        }
        followed.push(process);
        Ok(Self(process))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let mut followed = FOLLOWED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = followed.iter().position(|process| *process == self.0) {
            followed.swap_remove(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(pages: &[u64]) -> PageRanges {
        pages.iter().map(|page| PageRange::new(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)).collect()
    }

    /// On a kernel with the marks it must say so, and follow; on one without, say what is missing.
    #[test]
    fn a_kernel_without_the_marks_is_recognized() {
        // One of them is there: distributions have the second.
        let mut look = std::process::Command::new("sh");
        look.args(["-c", "for config in /proc/config.gz /boot/config-$(uname -r); do [ -e $config ] && exec zgrep -qx $0 $config; done; exit 2"]);
        let status = look.arg("CONFIG_MEM_SOFT_DIRTY=y").status().unwrap();
        assert!(status.code() != Some(2), "the kernel's configuration is neither in /proc nor in /boot");
        let has = status.success();
        assert_eq!(is_available().unwrap(), has);
        if !has {
            let error = SoftDirtyTracker::attach(Pid::this(), String::new()).unwrap_err();
            assert!(matches!(error, TrackError::NoSoftDirty), "{error}");
        }
    }

    #[test]
    fn what_is_marked_or_was_never_told_is_told() {
        let marked = Marked { existing: pages(&[1, 2, 3, 4, 5]), dirty: pages(&[2]) };
        assert_eq!(marked.to_tell(&PageRanges::new(), &PageRanges::new()), pages(&[1, 2, 3, 4, 5]));
        assert_eq!(marked.to_tell(&pages(&[1, 2, 3, 4, 9]), &pages(&[4, 8])), pages(&[2, 4, 5]));
    }

    #[test]
    fn who_shares_memory_with_a_followed_process_is_not_followed() {
        let first = Alone::with(Pid::this()).unwrap();
        let error = Alone::with(Pid::this()).unwrap_err();
        assert!(matches!(error, TrackError::Shared { .. }), "{error}");
        let _other = Alone::with(Pid::parent()).unwrap();
        drop(first);
        let _again = Alone::with(Pid::this()).unwrap();
    }
}
