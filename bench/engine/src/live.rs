//! Live migration of a process tree on one machine.
//!
//! ```text
//! process    runs ─────────────────────────────────▶│ frozen ···················│ runs ───────▶
//! tracker    attach, round 1, round 2, … round n    │ last round
//! copier             └ copy   └ copy     └ copy     │   └ copy
//! CRIU                            starts, waits ·· ─│ dump, blind to what moved │ restore, started before
//! pager                                             │                           │ serves, fills
//! ```

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use command_fds::FdMapping;
use nix::unistd::Pid;
use podferry_criu::{CgroupsMode, CriuLog, DumpRequest, Session, Verdict, page_stream};
use podferry_memory::copier::{self, Copier};
use podferry_memory::handover::Handover;
use podferry_memory::hide;
use podferry_memory::maps;
use podferry_memory::pager::{Kept, Paged, Pager, PagerError};
use podferry_memory::range::PageRanges;
use podferry_memory::store::Store;
use podferry_memory::tracker::{self, WriteTracker};

use crate::error::{Error, Result, file};
use crate::pages::Images;
use crate::restored::Waiting;
use crate::tools;
use crate::tree::{self, Member};
use crate::victim::Victim;

/// The number under which CRIU inherits the page socket.
const PAGE_FD: i32 = 4;
/// What CRIU is not to see, in a migration's folder.
const HIDDEN: &str = "work/hidden";
/// What CRIU need not ask the kernel, in a migration's folder.
const MAPPED: &str = "work/mapped";
/// Bytes that are read at a time.
const BATCH: usize = 1 << 20;
/// How often it is looked whether all tasks stand still.
const FREEZE_POLL: Duration = Duration::from_micros(200);
/// No more rounds than this.
const MOST_ROUNDS: usize = 8;
/// A round with fewer pages than this is short enough for the freeze: 4 MiB are read in a millisecond.
const FEW_PAGES: u64 = 1024;

/// What a migration took.
#[derive(Clone, Debug, Default)]
pub struct Migrated {
    /// Pages of each round; the last is that of the freeze.
    pub rounds: Vec<u64>,
    /// From the start until CRIU was told to dump.
    pub pre_copy: Duration,
    /// Looking for and reading what was written since the last round, beside CRIU's own work.
    pub last_round: Duration,
    /// From the freeze until CRIU had dumped.
    pub dump: Duration,
    /// The restore.
    pub restore: Duration,
    /// What the pager did.
    pub paged: Paged,
}

/// A process that is followed.
#[derive(Debug)]
struct Followed {
    member: Member,
    tracker: Box<dyn WriteTracker + Send>,
    copier: Copier,
    store: Store,
    /// What CRIU does not see.
    hidden: PageRanges,
}

impl Followed {
    fn new(member: Member, handover: &Path) -> Result<Self> {
        let tracker = tracker::attach(member.host)?;
        let copier = Copier::new(member.host, BATCH);
        // As much as a process may have: the store takes only what is put into it.
        let store = Handover::store(handover, member.inner, 64 << 30)?;
        Ok(Self { member, tracker, copier, store, hidden: PageRanges::new() })
    }

    fn copy(&mut self, pages: &PageRanges) -> Result<()> {
        let store = &mut self.store;
        let copied = self.copier.read::<Error>(pages, |batch| {
            let mut rest = batch.contents;
            for range in batch.ranges {
                let (now, later) = rest.split_at(usize::try_from(range.length()).unwrap_or(rest.len()));
                store.put(*range, now)?;
                rest = later;
            }
            Ok(())
        })?;
        self.tracker.tell_again(&copied.vanished);
        Ok(())
    }

    fn round(&mut self) -> Result<u64> {
        let written = self.tracker.round()?;
        self.copy(&written)?;
        Ok(written.pages())
    }

    /// The round in the freeze: gives all pages that exist where CRIU does not look, and how many of them were written.
    fn last_round(&mut self) -> Result<(PageRanges, u64)> {
        let moved = maps::moved(self.member.host, &self.hidden)?;
        let frozen = self.tracker.frozen(&moved)?;
        self.copy(&frozen.written)?;
        Ok((frozen.existing, frozen.written.pages()))
    }
}

/// What the last round found.
#[derive(Debug, Default)]
struct LastPages {
    /// Every process, with the pages that exist where CRIU does not look.
    processes: Vec<(Followed, PageRanges)>,
    /// Pages that were written since the round before.
    written: u64,
    /// When it began.
    frozen: Option<Instant>,
    /// How long it was.
    took: Duration,
}

type Last = Result<LastPages>;

/// Who lays the pages in.
pub trait Paging {
    /// Begins to wait for the restore. `handover` is the folder in which the stores of the kept pages lie.
    fn begin(&mut self, listener: UnixListener, kept: HashMap<i32, Kept>, handover: &Path) -> Result<()>;

    /// Waits until all pages are in place.
    fn finish(&mut self) -> Result<Paged>;
}

/// A pager in a thread of this process.
#[derive(Debug, Default)]
struct InThread(Option<JoinHandle<Result<Paged, PagerError>>>);

impl Paging for InThread {
    fn begin(&mut self, listener: UnixListener, kept: HashMap<i32, Kept>, _handover: &Path) -> Result<()> {
        self.0 = Some(thread::spawn(move || Pager::serve(listener, kept, None)));
        Ok(())
    }

    fn finish(&mut self) -> Result<Paged> {
        self.0.take().map_or_else(|| Ok(Paged::default()), join)
    }
}

/// Migrates the process on this machine. It runs on when that fails before its copy runs.
///
/// With `verify`, all kept pages are compared with those of the frozen process before its copy is made.
pub fn migrate(victim: &mut Victim, verify: bool) -> Result<Migrated> {
    migrate_with(victim, verify, &mut InThread::default())
}

/// As [`migrate`], with a pager of the caller's.
pub fn migrate_with(victim: &mut Victim, verify: bool, pager: &mut dyn Paging) -> Result<Migrated> {
    let folder = victim.next_folder()?;
    let mut migrated = Migrated::default();
    let begun = Instant::now();
    let followed = pre_copy(victim.pid(), &folder.join("handover"), &mut migrated)?;
    let socket = folder.join("restore/lazy-pages.socket");
    let listener = UnixListener::bind(&socket).map_err(file("listen at", &socket))?;
    migrated.pre_copy = begun.elapsed();
    let restoring =
        Restoring { folder: &folder, cgroup: victim.cgroup(), listener: Some(listener), pager: &mut *pager, verify };
    let pid = freeze_and_restore(victim.pid(), followed, restoring, &mut migrated)?;
    // Its copy runs: it is this that ends with the victim, however the rest goes.
    victim.moved(pid)?;
    migrated.paged = pager.finish()?;
    fs::remove_dir_all(&folder).map_err(file("remove", &folder))?;
    Ok(migrated)
}

fn pre_copy(root: Pid, handover: &Path, migrated: &mut Migrated) -> Result<Vec<Followed>> {
    let mut followed: Vec<Followed> = Vec::new();
    for _ in 0..MOST_ROUNDS {
        follow_new_ones(root, handover, &mut followed);
        let Some(pages) = round(&mut followed)? else { continue };
        migrated.rounds.push(pages);
        if pages < FEW_PAGES {
            break;
        }
    }
    Ok(followed)
}

fn follow_new_ones(root: Pid, handover: &Path, followed: &mut Vec<Followed>) {
    followed.retain(|process| !tree::is_zombie(process.member.host));
    for member in tree::members(root) {
        let known = followed.iter().any(|process| process.member == member);
        if !known && !tree::is_zombie(member.host) {
            // One that ends meanwhile needs no tracker, and one that cannot be followed is left to CRIU.
            followed.extend(Followed::new(member, handover).ok());
        }
    }
}

/// A round of all processes: gives the pages of all. `None` when one cannot be followed any more: in the next round it is followed
/// anew, if it can be, with all its memory to copy.
fn round(followed: &mut Vec<Followed>) -> Result<Option<u64>> {
    let mut pages = Some(0);
    for mut process in std::mem::take(followed) {
        match process.round() {
            Ok(written) => {
                pages = pages.map(|pages| pages + written);
                followed.push(process);
            }
            Err(Error::Track(error)) if error.is_end_of_following() => pages = None,
            Err(error) => return Err(error),
        }
    }
    Ok(pages)
}

/// Tells the shim what to hide, which is what can be moved now, and what the mappings are.
fn write_hidden(followed: &mut [Followed], hidden: &Path, mapped: &Path) -> Result<()> {
    for process in &mut *followed {
        process.hidden = maps::followable(process.member.host)?;
    }
    let ranges =
        followed.iter().flat_map(|process| process.hidden.iter().map(|range| (process.member.host.as_raw(), range)));
    fs::write(hidden, hide::describe(ranges, [])).map_err(file("write", hidden))?;
    // Last, so that as little as possible changes before the freeze. CRIU asks the kernel about those that are not in it.
    let mappings: String = followed.iter().filter_map(|process| hide::mappings(process.member.host).ok()).collect();
    fs::write(mapped, mappings).map_err(file("write", mapped))
}

/// How the copy is made.
struct Restoring<'a> {
    folder: &'a Path,
    cgroup: Option<&'a Path>,
    listener: Option<UnixListener>,
    pager: &'a mut dyn Paging,
    verify: bool,
}

/// The freeze: CRIU's dump, and from its last callback the restore, so that the source is whole until its copy runs.
fn freeze_and_restore<'a>(
    root: Pid,
    followed: Vec<Followed>,
    restoring: Restoring<'a>,
    migrated: &'a mut Migrated,
) -> Result<Pid> {
    let (folder, restoring_cgroup) = (restoring.folder, restoring.cgroup);
    let request = DumpRequest {
        pid: root.as_raw(),
        images_dir: folder.join("images"),
        work_dir: folder.join("work"),
        root: "/".into(),
        external_mounts: Vec::new(),
        externals: Vec::new(),
        tcp_established: true,
        skip_in_flight: false,
        freeze_cgroup: None,
        cgroups: CgroupsMode::Ignore,
        freeze_timeout_s: 10,
    };
    let images = File::open(&request.images_dir).map_err(file("open", &request.images_dir))?;
    let work = File::open(&request.work_dir).map_err(file("open", &request.work_dir))?;
    let (ours, theirs) = UnixStream::pair()?;
    let mut sink = Images::new(request.images_dir.clone());
    let pages = thread::spawn(move || page_stream::receive(ours, &mut sink).map(|_| sink));
    let environment = [
        ("LD_PRELOAD".into(), tools::shim()?.into_os_string()),
        (hide::HIDE_VARIABLE.into(), folder.join(HIDDEN).into_os_string()),
        (hide::MAPPINGS_VARIABLE.into(), folder.join(MAPPED).into_os_string()),
    ];
    let inherit = vec![FdMapping { parent_fd: OwnedFd::from(theirs), child_fd: PAGE_FD }];
    let session = Session::start_with(&tools::criu()?, inherit, environment)?;
    let mut freeze = Freeze {
        root,
        restoring,
        followed,
        last: None,
        waiting: Some(Waiting::start(folder, restoring_cgroup)?),
        trackers: Vec::new(),
        pages: Some(pages),
        outcome: None,
        migrated,
    };
    let options = request.options(images.as_fd(), work.as_fd(), PAGE_FD);
    let dumped =
        session.dump(options, &CriuLog::of_dump(&request.work_dir), |notification| match notification.name.as_str() {
            "pre-dump" => freeze.prepare(),
            "post-dump" => freeze.restore(),
            _ => Verdict::Proceed,
        });
    let outcome = freeze.outcome.take();
    drop(freeze);
    match (outcome, dumped) {
        (Some(Err(error)), _) => Err(error),
        (_, Err(error)) => Err(error.into()),
        (None, Ok(())) => Err(Error::Program { program: "criu", problem: "it did not ask".to_owned() }),
        (Some(Ok(pid)), Ok(())) => Ok(pid),
    }
}

/// The last round, in a thread of its own: it begins as soon as all tasks stand still, beside CRIU, which does not look where it
/// looks.
#[derive(Debug)]
struct LastRound {
    /// Set when the tasks stand still for certain.
    frozen: Arc<AtomicBool>,
    /// Set when there will be no freeze.
    given_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<Last>>,
}

impl LastRound {
    fn begin(root: Pid, followed: Vec<Followed>) -> Self {
        let (frozen, given_up) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (told, stop) = (Arc::clone(&frozen), Arc::clone(&given_up));
        let thread = thread::spawn(move || {
            while !told.load(Ordering::Acquire) && !tree::stands_still(root) {
                if stop.load(Ordering::Acquire) {
                    return Ok(LastPages::default());
                }
                thread::sleep(FREEZE_POLL);
            }
            last_rounds(followed)
        });
        Self { frozen, given_up, thread: Some(thread) }
    }

    fn finish(&mut self) -> Last {
        self.frozen.store(true, Ordering::Release);
        self.thread.take().map_or_else(|| Ok(LastPages::default()), join)
    }
}

impl Drop for LastRound {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Release);
    }
}

fn last_rounds(followed: Vec<Followed>) -> Last {
    let since = Instant::now();
    let mut last = LastPages { frozen: Some(since), ..LastPages::default() };
    for mut process in followed {
        if tree::is_zombie(process.member.host) {
            continue;
        }
        let (existing, written) = process.last_round()?;
        last.written += written;
        last.processes.push((process, existing));
    }
    last.took = since.elapsed();
    Ok(last)
}

struct Freeze<'a> {
    root: Pid,
    restoring: Restoring<'a>,
    followed: Vec<Followed>,
    last: Option<LastRound>,
    waiting: Option<Waiting>,
    /// They stay until the source is gone: then nothing has to be done for its pages any more when they are closed, which takes 30 ms
    /// for each GiB otherwise.
    trackers: Vec<Box<dyn WriteTracker + Send>>,
    pages: Option<JoinHandle<Result<Images, podferry_criu::CriuError>>>,
    outcome: Option<Result<Pid>>,
    migrated: &'a mut Migrated,
}

impl Freeze<'_> {
    /// CRIU has started and stops the tasks next: what takes no longer than a round is brought up to date.
    fn prepare(&mut self) -> Verdict {
        match self.try_prepare() {
            Ok(()) => Verdict::Proceed,
            Err(error) => {
                self.outcome = Some(Err(error));
                Verdict::GiveUp
            }
        }
    }

    fn try_prepare(&mut self) -> Result<()> {
        if let Some(waiting) = &mut self.waiting {
            waiting.wait()?;
        }
        let mut followed = std::mem::take(&mut self.followed);
        let folder = self.restoring.folder;
        follow_new_ones(self.root, &folder.join("handover"), &mut followed);
        // One that cannot be followed any more is CRIU's from now on.
        self.migrated.rounds.extend(round(&mut followed)?);
        write_hidden(&mut followed, &folder.join(HIDDEN), &folder.join(MAPPED))?;
        self.last = Some(LastRound::begin(self.root, followed));
        Ok(())
    }

    fn restore(&mut self) -> Verdict {
        let outcome = self.try_restore();
        let verdict = if outcome.is_ok() { Verdict::Proceed } else { Verdict::GiveUp };
        self.outcome = Some(outcome);
        verdict
    }

    fn try_restore(&mut self) -> Result<Pid> {
        let missing = || Error::Program { program: "criu", problem: "it dumped without a freeze".to_owned() };
        let LastPages { processes, written, frozen, took } = self.last.as_mut().ok_or_else(missing)?.finish()?;
        self.migrated.last_round = took;
        self.migrated.rounds.push(written);
        let images = join(self.pages.take().ok_or_else(missing)?)?;
        let lazy = processes.iter().map(|(process, existing)| (process.member.inner, existing.clone())).collect();
        let mut lazy = images.finish(&lazy)?;
        self.migrated.dump = frozen.map_or(Duration::ZERO, |frozen| frozen.elapsed());
        let mut kept = HashMap::new();
        for (process, _) in processes {
            let lazy = lazy.remove(&process.member.inner).unwrap_or_default();
            let lost = process.store.missing(&lazy);
            if let Some(range) = lost.as_slice().first() {
                return Err(Error::Lost { pid: process.member.inner, range: range.to_string() });
            }
            if self.restoring.verify {
                let different = copier::first_difference(process.member.host, &lazy, &process.store)?;
                if let Some(page) = different {
                    return Err(Error::Different { pid: process.member.inner, page: page.to_string() });
                }
            }
            kept.insert(process.member.inner, Kept { store: process.store, lazy });
            self.trackers.push(process.tracker);
        }
        let handover = self.restoring.folder.join("handover");
        // CRIU asks for the memory of all processes, also of those that it dumped itself.
        for member in tree::members(self.root) {
            if let Entry::Vacant(unknown) = kept.entry(member.inner) {
                let store = Handover::store(&handover, member.inner, 0)?;
                unknown.insert(Kept { store, lazy: PageRanges::new() });
            }
        }
        let listener = self.restoring.listener.take().ok_or_else(missing)?;
        self.restoring.pager.begin(listener, kept, &handover)?;
        let since = Instant::now();
        let pid = self.waiting.take().ok_or_else(missing)?.finish()?;
        self.migrated.restore = since.elapsed();
        Ok(pid)
    }
}

fn join<T, E: Into<Error>>(thread: JoinHandle<Result<T, E>>) -> Result<T> {
    let outcome = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    outcome.map_err(Into::into)
}

impl From<io::ErrorKind> for Error {
    fn from(kind: io::ErrorKind) -> Self {
        Self::Copy(kind.into())
    }
}
