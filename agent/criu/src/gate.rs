use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, mknodat};

use crate::CriuError;

/// The image that CRIU reads first of all on restore, and nothing before it.
const INVENTORY: &str = "inventory.img";
/// How often [`ImageGate::wait`] looks.
const POLL: Duration = Duration::from_millis(1);

/// Lets `criu restore` (also that of `runc restore`) start before the images are there, and wait for them.
///
/// CRIU's start takes 20 to 40 ms, most of it for trying out the kernel. Then it reads the inventory, before any other image:
/// here it finds a FIFO in its place and waits. When all other images are in the folder, [`ImageGate::open`] sends the
/// inventory through. Dropped without that, CRIU reads an empty inventory, and fails before it has made anything.
///
/// ```text
/// new ── start criu restore ── wait ── (freeze, images) ── open
///                                └────── drop: the restore fails
/// ```
///
/// `criu dump` would write its own inventory into the FIFO: dump to another folder.
#[derive(Debug)]
pub struct ImageGate {
    path: PathBuf,
    /// The FIFO, opened for nothing: it is found also when its name is another's.
    fifo: File,
    /// The end that CRIU reads from has been opened: this is the other one.
    reached: Option<File>,
}

impl ImageGate {
    /// Makes the FIFO in the folder of images.
    ///
    /// # Errors
    /// When it cannot be made; also when there is an inventory already.
    pub fn new(images: &Path) -> Result<Self, CriuError> {
        let path = images.join(INVENTORY);
        mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .map_err(|error| CriuError::Image { path: path.clone(), source: error.into() })?;
        let fifo = OpenOptions::new().read(true).custom_flags(flags(OFlags::PATH | OFlags::NOFOLLOW)).open(&path);
        let fifo = fifo.map_err(|source| CriuError::Image { path: path.clone(), source })?;
        Ok(Self { path, fifo, reached: None })
    }

    /// Whether a restore has come as far as to the inventory.
    ///
    /// # Errors
    /// When the FIFO cannot be opened for another reason than that nobody reads from it.
    pub fn is_reached(&mut self) -> Result<bool, CriuError> {
        if self.reached.is_none() {
            let opened = OpenOptions::new().write(true).custom_flags(flags(OFlags::NONBLOCK)).open(&self.path);
            self.reached = match opened {
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => None,
                opened => Some(opened.map_err(|source| self.error(source))?),
            };
        }
        Ok(self.reached.is_some())
    }

    /// Whether a restore had come here, and is gone: it was killed.
    pub fn is_deserted(&self) -> bool {
        let Some(pipe) = &self.reached else { return false };
        let mut end = [PollFd::new(pipe, PollFlags::empty())];
        // At the end that is written to: nobody has the other one open.
        poll(&mut end, Some(&Timespec::default())).is_ok() && end[0].revents().contains(PollFlags::ERR)
    }

    /// Waits until [`ImageGate::is_reached`], but not longer than this; gives whether it is. `lives` says whether the restore
    /// still runs: one that has failed never comes.
    ///
    /// # Errors
    /// As [`ImageGate::is_reached`].
    pub fn wait(&mut self, patience: Duration, mut lives: impl FnMut() -> bool) -> Result<bool, CriuError> {
        let begun = Instant::now();
        while !self.is_reached()? {
            if begun.elapsed() > patience || !lives() {
                return Ok(false);
            }
            std::thread::sleep(POLL);
        }
        Ok(true)
    }

    /// Lets the restore go on with this inventory. All other images must be in the folder. Where no restore waits yet, the
    /// inventory takes the FIFO's place.
    ///
    /// # Errors
    /// When the inventory cannot be written. Then the restore fails.
    pub fn open(mut self, inventory: &[u8]) -> Result<(), CriuError> {
        if !self.is_reached()? {
            // Beside and renamed: whoever opens it meanwhile must not find the half of it. One who has opened the FIFO between
            // the look and this is let go by the drop, and fails.
            let beside = self.path.with_extension("new");
            let placed = fs::write(&beside, inventory).and_then(|()| fs::rename(&beside, &self.path));
            return placed.map_err(|source| self.error(source));
        }
        let Some(mut pipe) = self.reached.take() else { return Ok(()) };
        let sent = blocking(&pipe).and_then(|()| pipe.write_all(inventory));
        sent.map_err(|source| self.error(source))
    }

    fn error(&self, source: io::Error) -> CriuError {
        CriuError::Image { path: self.path.clone(), source }
    }
}

impl Drop for ImageGate {
    /// CRIU may be before, in, or behind its opening of the FIFO. Gone first, it is found by nobody who comes later; who waits in
    /// the opening is let go by the opening and closing of the other end.
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| file.file_type().is_fifo()) {
            let _gone = fs::remove_file(&self.path);
        }
        let both_ends = format!("/proc/self/fd/{}", self.fifo.as_raw_fd());
        let _closed = OpenOptions::new().read(true).write(true).custom_flags(flags(OFlags::NONBLOCK)).open(both_ends);
    }
}

fn flags(flags: OFlags) -> i32 {
    i32::try_from(flags.bits()).unwrap_or_default()
}

fn blocking(pipe: &File) -> io::Result<()> {
    let flags = fcntl_getfl(pipe)?;
    Ok(fcntl_setfl(pipe, flags.difference(OFlags::NONBLOCK))?)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    /// Reads it as CRIU does: with an opening that waits. Gives what was read.
    fn read(path: PathBuf) -> mpsc::Receiver<io::Result<Vec<u8>>> {
        let (told, hear) = mpsc::channel();
        thread::spawn(move || told.send(fs::read(path)));
        hear
    }

    #[test]
    fn whoever_waits_gets_the_inventory() {
        let folder = tempfile::tempdir().unwrap();
        let mut gate = ImageGate::new(folder.path()).unwrap();
        assert!(!gate.is_reached().unwrap());
        assert!(!gate.wait(Duration::from_secs(60), || false).unwrap());
        let reader = read(folder.path().join(INVENTORY));
        assert!(gate.wait(Duration::from_secs(60), || true).unwrap());
        // More than a pipe takes at once.
        let inventory = vec![7; 200_000];
        gate.open(&inventory).unwrap();
        assert_eq!(reader.recv().unwrap().unwrap(), inventory);
    }

    #[test]
    fn who_has_come_and_is_killed_is_missed() {
        let folder = tempfile::tempdir().unwrap();
        let mut gate = ImageGate::new(folder.path()).unwrap();
        let reading =
            File::options().read(true).custom_flags(flags(OFlags::NONBLOCK)).open(folder.path().join(INVENTORY));
        assert!(!gate.is_deserted());
        assert!(gate.is_reached().unwrap() && !gate.is_deserted());
        drop(reading.unwrap());
        assert!(gate.is_deserted());
        assert!(gate.open(b"inventory").is_err());
    }

    #[test]
    fn whoever_comes_late_finds_the_inventory() {
        let folder = tempfile::tempdir().unwrap();
        ImageGate::new(folder.path()).unwrap().open(b"inventory").unwrap();
        assert_eq!(fs::read(folder.path().join(INVENTORY)).unwrap(), b"inventory");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_gate_that_is_dropped_lets_everyone_go_with_nothing() {
        for looked in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let mut gate = ImageGate::new(folder.path()).unwrap();
            let reader = read(folder.path().join(INVENTORY));
            if looked {
                assert!(gate.wait(Duration::from_secs(60), || true).unwrap());
            } else {
                // Long enough for it to wait in its opening, mostly; before or behind that it ends as well.
                thread::sleep(Duration::from_millis(50));
            }
            drop(gate);
            let read = reader.recv_timeout(Duration::from_secs(60)).expect("it still waits");
            assert!(read.as_ref().map_or(true, Vec::is_empty), "{read:?}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn an_inventory_that_is_there_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(INVENTORY), b"there").unwrap();
        assert!(ImageGate::new(folder.path()).is_err());
        assert_eq!(fs::read(folder.path().join(INVENTORY)).unwrap(), b"there");
    }
}
