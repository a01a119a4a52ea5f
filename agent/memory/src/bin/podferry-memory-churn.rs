//! A process that changes its memory in every way there is and checks all the time that it holds what it should.
//!
//! `podferry-memory-churn SIGN THREADS [CHILDREN] [OPTION...]` makes the file `SIGN`, prints `ready`, starts so many more of itself,
//! works until it is killed, and ends with 1 and a line on standard error when a page is not what it was written to be, when a change
//! of its mappings fails that cannot fail, or when a child ends.
//!
//! | Option | What it does besides |
//! |---|---|
//! | `--fork` | forks children all the time, which write to what they share with it and end |
//! | `--spawn` | runs other programs all the time, in children that share its memory until then (vfork) |
//! | `--exec MS` | becomes itself anew after so many milliseconds, again and again |
//! | `--direct FILE` | makes the file, and reads it all the time past the page cache (`O_DIRECT`) |
//! | `--aio` | has a context for asynchronous I/O |

#![expect(clippy::unwrap_used, reason = "its panic is the report")]
#![expect(unsafe_code, reason = "mmap(2), mremap(2), munmap(2), madvise(2), mprotect(2), fork(2), io_setup(2)")]

use std::ffi::c_void;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mprotect, mremap, mremap_fixed,
    munmap,
};

const PAGE: usize = 4096;
const SLOTS: usize = 40;
/// Pages of a mapping when it is made: some large enough for huge pages.
const LARGEST: u64 = 3000;

static NEXT: AtomicU64 = AtomicU64::new(1);

struct Random(u64);

impl Random {
    /// xorshift64 (Marsaglia 2003).
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A mapping, and what each of its pages was last written to be; 0 for never.
struct Slot {
    start: NonNull<u8>,
    pages: Vec<u64>,
    /// It consists of several mappings, which mremap(2) does not move together.
    pieced: bool,
}

impl Slot {
    fn new(random: &mut Random) -> Self {
        let most = if random.below(8) == 0 { LARGEST } else { 200 };
        let pages = usize::try_from(1 + random.below(most)).unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping where the kernel likes.
        let start = unsafe { mmap_anonymous(null_mut(), pages * PAGE, protection, MapFlags::PRIVATE) }.unwrap();
        if random.below(4) == 0 {
            // SAFETY: the mapping just made. Huge pages may be switched off: then it has no effect.
            let _ = unsafe { madvise(start, pages * PAGE, Advice::LinuxHugepage) };
        }
        Self { start: NonNull::new(start.cast()).unwrap(), pages: vec![0; pages], pieced: false }
    }

    fn length(&self) -> usize {
        self.pages.len() * PAGE
    }

    fn at(&self, page: usize) -> *mut c_void {
        assert!(page <= self.pages.len());
        // SAFETY: inside the mapping or just behind it.
        unsafe { self.start.as_ptr().add(page * PAGE).cast() }
    }

    fn words(&mut self, page: usize) -> &mut [u64] {
        assert!(page < self.pages.len());
        // SAFETY: a page of the mapping, which only this slot has, readable and writable, aligned to 4096.
        unsafe { std::slice::from_raw_parts_mut(self.at(page).cast(), PAGE / 8) }
    }

    fn write(&mut self, page: usize) {
        let seed = NEXT.fetch_add(1, Ordering::Relaxed);
        for (index, word) in self.words(page).iter_mut().enumerate() {
            *word = content(seed, index);
        }
        self.pages[page] = seed;
    }

    fn check(&mut self, page: usize) {
        let seed = self.pages[page];
        let good = |(index, word): (usize, &u64)| *word == if seed == 0 { 0 } else { content(seed, index) };
        let bad = self.words(page).iter().enumerate().position(|word| !good(word));
        if let Some(index) = bad {
            let found = self.words(page)[index];
            fail(&format!("page {page} of {:?}, word {index}: {found:#x}, written was {seed}", self.start));
        }
    }

    fn any(&self, random: &mut Random) -> usize {
        usize::try_from(random.below(self.pages.len() as u64)).unwrap()
    }

    fn shrink(&mut self, random: &mut Random) {
        let left = 1 + self.any(random);
        if left == self.pages.len() {
            return;
        }
        // SAFETY: the end of the mapping, which nobody uses any more.
        unsafe { munmap(self.at(left), self.length() - left * PAGE) }.unwrap();
        self.pages.truncate(left);
    }

    fn grow(&mut self, random: &mut Random) {
        let pages = self.pages.len() + 1 + self.any(random);
        if self.pieced || pages > 2 * usize::try_from(LARGEST).unwrap() {
            return;
        }
        // SAFETY: the whole mapping, which only this slot knows.
        let moved = unsafe { mremap(self.at(0), self.length(), pages * PAGE, MremapFlags::MAYMOVE) };
        let start = moved.unwrap_or_else(|error| fail(&format!("mremap to {pages} pages: {error}")));
        self.start = NonNull::new(start.cast()).unwrap();
        self.pages.resize(pages, 0);
    }

    /// To another place for certain, whose old one may be used by the next mapping.
    fn shift(&mut self) {
        if self.pieced {
            return;
        }
        // SAFETY: a fresh reservation; the move then replaces it whole.
        let moved = unsafe {
            let place = mmap_anonymous(null_mut(), self.length(), ProtFlags::empty(), MapFlags::PRIVATE).unwrap();
            mremap_fixed(self.at(0), self.length(), self.length(), MremapFlags::MAYMOVE, place)
        };
        let start = moved.unwrap_or_else(|error| fail(&format!("mremap to a fixed place: {error}")));
        self.start = NonNull::new(start.cast()).unwrap();
    }

    fn drop_pages(&mut self, random: &mut Random) {
        let first = self.any(random);
        let count = (1 + usize::try_from(random.below(200)).unwrap()).min(self.pages.len() - first);
        // SAFETY: pages of the mapping; what they hold is given up.
        unsafe { madvise(self.at(first), count * PAGE, Advice::LinuxDontNeed) }.unwrap();
        self.pages[first..first + count].fill(0);
    }

    fn forbid_and_allow(&mut self) {
        // SAFETY: nobody touches the mapping between the two.
        unsafe {
            mprotect(self.at(0), self.length(), MprotectFlags::empty()).unwrap();
            std::thread::sleep(Duration::from_micros(100));
            mprotect(self.at(0), self.length(), MprotectFlags::READ | MprotectFlags::WRITE).unwrap();
        }
    }

    fn replace(&mut self) {
        let half = self.pages.len() / 2;
        if half == 0 {
            return;
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: replaces pages of the mapping, whose contents are given up.
        unsafe { mmap_anonymous(self.at(0), half * PAGE, protection, MapFlags::PRIVATE | MapFlags::FIXED) }.unwrap();
        self.pages[..half].fill(0);
        self.pieced = true;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, which nobody uses any more.
        unsafe { munmap(self.at(0), self.length()) }.unwrap();
    }
}

fn content(seed: u64, index: usize) -> u64 {
    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64)
}

fn fail(what: &str) -> ! {
    eprintln!("podferry-memory-churn: {what}");
    std::process::exit(1)
}

fn change(slot: &mut Slot, random: &mut Random) {
    match random.below(100) {
        0..70 => {
            for _ in 0..20 {
                let page = slot.any(random);
                slot.write(page);
            }
        }
        70..74 => *slot = Slot::new(random),
        74..78 => slot.shrink(random),
        78..83 => slot.grow(random),
        83..87 => slot.shift(),
        87..92 => slot.drop_pages(random),
        92..94 => slot.forbid_and_allow(),
        94..96 => slot.replace(),
        _ => {
            for _ in 0..20 {
                let page = slot.any(random);
                slot.check(page);
            }
        }
    }
}

fn work(number: u64) {
    let mut random = Random(0x853c_49e6_748f_ea9b ^ (number + 1));
    let mut slots: Vec<Slot> = (0..SLOTS).map(|_| Slot::new(&mut random)).collect();
    for round in 1_u64.. {
        let slot = usize::try_from(random.below(SLOTS as u64)).unwrap();
        change(&mut slots[slot], &mut random);
        if round.is_multiple_of(64) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if round.is_multiple_of(4096) {
            for slot in &mut slots {
                (0..slot.pages.len()).for_each(|page| slot.check(page));
            }
        }
    }
}

/// Children change pages that they share with this process until then; this one's stay what they are.
fn fork_all_the_time() -> ! {
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut slot = Slot::new(&mut random);
    loop {
        for _ in 0..20 {
            let page = slot.any(&mut random);
            slot.write(page);
        }
        // SAFETY: the child does nothing but write to its memory and end: no allocation, no lock.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                (0..slot.pages.len()).for_each(|page| slot.write(page));
                // SAFETY: takes no pointers, and runs nothing of this program.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                let status = waitpid(child, None);
                if !matches!(status, Ok(WaitStatus::Exited(_, 0))) {
                    fail(&format!("a forked child: {status:?}"));
                }
            }
        }
        (0..slot.pages.len()).for_each(|page| slot.check(page));
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn spawn_all_the_time() -> ! {
    loop {
        let status = Command::new("true").stdin(Stdio::null()).status();
        if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
            fail(&format!("a child that ran true: {status:?}"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn become_itself_anew(after: Duration) -> ! {
    std::thread::sleep(after);
    let mut arguments = std::env::args_os();
    let program = arguments.next().unwrap();
    let error = Command::new(program).args(arguments).exec();
    fail(&format!("exec: {error}"))
}

fn read_directly(path: &str) -> ! {
    const LENGTH: usize = 1 << 20;
    fs::write(path, vec![0x5a; LENGTH]).unwrap();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh mapping where the kernel likes, which stays for ever and which only this function has.
    let buffer: &mut [u8] = unsafe {
        let start = mmap_anonymous(null_mut(), LENGTH, protection, MapFlags::PRIVATE).unwrap();
        std::slice::from_raw_parts_mut(start.cast(), LENGTH)
    };
    loop {
        file.read_exact_at(buffer, 0).unwrap();
        if buffer.iter().any(|byte| *byte != 0x5a) {
            fail("what was read directly is not what the file has");
        }
        buffer.fill(0);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn set_up_aio() {
    let mut context = 0_u64;
    // SAFETY: the kernel writes an `aio_context_t`, an unsigned long, to `context`, which outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_io_setup, 16, &raw mut context) };
    if result != 0 {
        fail(&format!("io_setup: {}", std::io::Error::last_os_error()));
    }
}

/// Begins what an option says; `value` gives what stands behind it. Gives after how long to become itself anew, which is for the first
/// thread: done by another one, the process looks as if it had ended for a moment.
fn begin(option: &str, value: &mut dyn FnMut() -> String) -> Option<Duration> {
    match option {
        "--fork" => drop(std::thread::spawn(|| fork_all_the_time())),
        "--spawn" => drop(std::thread::spawn(|| spawn_all_the_time())),
        "--exec" => return Some(Duration::from_millis(value().parse().unwrap())),
        "--direct" => {
            let path = value();
            drop(std::thread::spawn(move || read_directly(&path)));
        }
        "--aio" => set_up_aio(),
        _ => fail(&format!("there is no option {option}")),
    }
    None
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [program, sign, rest @ ..] = arguments.as_slice() else { fail("it needs SIGN and THREADS") };
    let (numbers, options) = rest.split_at(rest.iter().take_while(|word| !word.starts_with("--")).count());
    let number = |index: usize| numbers.get(index).map_or(0, |number| number.parse().unwrap());
    let (threads, children): (u64, u64) = (number(0), number(1));
    let mut options = options.iter().cloned();
    let mut anew = None;
    while let Some(option) = options.next() {
        anew =
            anew.or(begin(&option, &mut || options.next().unwrap_or_else(|| fail(&format!("{option} needs a value")))));
    }
    fs::File::create(sign).unwrap();
    println!("ready");
    std::io::stdout().flush().unwrap();
    for _ in 0..children {
        let mut child = Command::new(program).args(["/dev/null", "1"]).spawn().unwrap();
        std::thread::spawn(move || fail(&format!("a child ended: {:?}", child.wait())));
    }
    let workers: Vec<_> = (0..threads).map(|number| std::thread::spawn(move || work(number))).collect();
    if let Some(after) = anew {
        become_itself_anew(after);
    }
    for worker in workers {
        if worker.join().is_err() {
            fail("a thread panicked");
        }
    }
    loop {
        std::thread::park();
    }
}
