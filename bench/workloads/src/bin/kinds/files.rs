//! Open files, names, attributes, locks and watches.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rustix::fs::{XattrFlags, getxattr, setxattr};

use crate::{Kind, Outcome, same};

/// The files that carry a lock of each kind; the child tries to take them.
pub(crate) const LOCKS: [(&str, &str); 3] =
    [("flock", "/data/flock"), ("record-lock", "/data/record-lock"), ("descriptor-lock", "/data/descriptor-lock")];

pub(crate) fn make() -> Outcome<Vec<Kind>> {
    Ok(vec![
        deleted()?,
        renamed()?,
        hard_link()?,
        extended_attribute()?,
        offset()?,
        appended()?,
        inotify("inotify", Path::new("/data/watched"))?,
        inotify("inotify-tmpfs", Path::new("/dev/shm/watched"))?,
    ])
}

fn create(path: &str) -> Outcome<File> {
    Ok(File::options().read(true).write(true).create(true).truncate(true).open(path)?)
}

fn deleted() -> Outcome<Kind> {
    let content: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let file = create("/data/deleted")?;
    file.write_all_at(&content, 0)?;
    fs::remove_file("/data/deleted")?;
    Ok(Kind::new("deleted-file", move || {
        let mut now = vec![0; content.len()];
        file.read_exact_at(&mut now, 0)?;
        same("its number of names", &file.metadata()?.nlink(), &0)?;
        if now == content { Ok(()) } else { Err("its content has changed".into()) }
    }))
}

/// A file that was given another name while it was open.
fn renamed() -> Outcome<Kind> {
    let file = create("/data/first-name")?;
    fs::rename("/data/first-name", "/data/second-name")?;
    let mut count = 0_u64;
    Ok(Kind::new("renamed-file", move || {
        count += 1;
        file.write_all_at(&count.to_le_bytes(), 0)?;
        same("what the name leads to", &fs::read("/data/second-name")?, &count.to_le_bytes().to_vec())
    }))
}

fn hard_link() -> Outcome<Kind> {
    create("/data/one-name")?.write_all(b"two names")?;
    fs::hard_link("/data/one-name", "/data/other-name")?;
    Ok(Kind::new("hard-link", || {
        let [one, other] = ["/data/one-name", "/data/other-name"].map(fs::metadata);
        let (one, other) = (one?, other?);
        same("the number of names", &one.nlink(), &2)?;
        same("the inode of the other name", &other.ino(), &one.ino())?;
        same("the content", &fs::read_to_string("/data/other-name")?.as_str(), &"two names")
    }))
}

fn extended_attribute() -> Outcome<Kind> {
    create("/data/attributed")?;
    setxattr("/data/attributed", "user.kinds", b"\0binary\xff", XattrFlags::empty())?;
    Ok(Kind::new("extended-attribute", || {
        let mut value = [0_u8; 64];
        let length = getxattr("/data/attributed", "user.kinds", &mut value[..])?;
        same("the attribute", &&value[..length], &b"\0binary\xff".as_slice())
    }))
}

fn offset() -> Outcome<Kind> {
    create("/data/offset")?.write_all(&[7; 4096])?;
    let mut file = File::open("/data/offset")?;
    file.read_exact(&mut [0; 100])?;
    let flags = fcntl(&file, FcntlArg::F_GETFL)?;
    Ok(Kind::new("file-offset", move || {
        same("the offset", &file.stream_position()?, &100)?;
        same("the flags", &fcntl(&file, FcntlArg::F_GETFL)?, &flags)
    }))
}

fn appended() -> Outcome<Kind> {
    let mut file = File::options().append(true).create(true).open("/data/appended")?;
    let mut length = 0;
    Ok(Kind::new("appended-file", move || {
        same("the length", &fs::metadata("/data/appended")?.len(), &length)?;
        file.write_all(b"entry\n")?;
        length += 6;
        Ok(())
    }))
}

fn inotify(name: &'static str, folder: &Path) -> Outcome<Kind> {
    fs::create_dir_all(folder)?;
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    watch.add_watch(folder, AddWatchFlags::IN_CREATE)?;
    let file = folder.join("created");
    Ok(Kind::new(name, move || {
        File::create(&file)?;
        fs::remove_file(&file)?;
        let events = watch.read_events().map_err(|error| format!("no event: {error}"))?;
        let names: Vec<_> = events.into_iter().filter_map(|event| event.name).collect();
        same("what was created", &names, &vec!["created".into()])
    }))
}

fn whole_file() -> nix::libc::flock {
    nix::libc::flock {
        l_type: i16::try_from(nix::libc::F_WRLCK).unwrap_or_default(),
        l_whence: i16::try_from(nix::libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// A lock that lasts as long as this value.
pub(crate) enum Lock {
    /// Of the open file description.
    Flock { _held: Flock<File> },
    /// Of the process, or (`F_OFD_SETLK`) of the open file description.
    Record { _held: File },
}

/// Takes a lock of [`LOCKS`] unless somebody else has it.
pub(crate) fn take(kind: &str, path: &str) -> Outcome<Lock> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    match kind {
        "flock" => match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => Ok(Lock::Flock { _held: held }),
            Err((_, error)) => Err(error.into()),
        },
        "record-lock" => {
            fcntl(&file, FcntlArg::F_SETLK(&whole_file()))?;
            Ok(Lock::Record { _held: file })
        }
        _ => {
            fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file()))?;
            Ok(Lock::Record { _held: file })
        }
    }
}
