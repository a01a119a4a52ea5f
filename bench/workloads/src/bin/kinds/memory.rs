//! Memory that is not shared, shared within the process, with files, and with another process.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use podferry_workloads::ballast::split_mix;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, FileOffset, MmapRegion};

use crate::{Kind, Outcome, same};

/// Bytes of a mapping: some pages, and not a multiple of what CRIU copies at once.
pub(crate) const LENGTH: usize = 37 * 4096;
/// Bytes of the heap: so many that they are in their own mapping.
const HEAP: usize = 6 << 20;

type Region = MmapRegion<()>;

pub(crate) fn make() -> Outcome<Vec<Kind>> {
    Ok(vec![
        heap(),
        shared_anonymous()?,
        changing_memfd()?,
        of_file("mapped-file", Path::new("/data/mapped"))?,
        of_file("posix-shared-memory", Path::new("/dev/shm/kinds"))?,
    ])
}

/// A byte that depends on its place, so that no page is like its neighbour.
fn pattern(index: usize) -> u8 {
    u8::try_from((index / 4096 * 31 + index * 7) % 251).unwrap_or_default()
}

fn heap() -> Kind {
    let mut bytes: Vec<u8> = (0..HEAP).map(pattern).collect();
    let mut turn = 0;
    Kind::new("heap", move || {
        // Some of it at each look, all of it in a while; what was looked at is changed.
        let from = turn % 16 * (HEAP / 16);
        let shift = u8::try_from(turn / 16 % 256)?;
        for (index, byte) in bytes.iter_mut().enumerate().skip(from).take(HEAP / 16) {
            if *byte != pattern(index).wrapping_add(shift) {
                return Err(format!("byte {index} of the heap is {byte}").into());
            }
            *byte = byte.wrapping_add(1);
        }
        turn += 1;
        Ok(())
    })
}

fn fill(region: &Region) -> Outcome {
    let bytes: Vec<u8> = (0..LENGTH).map(pattern).collect();
    // The first page is for counters.
    Ok(region.as_volatile_slice().write_slice(&bytes[4096..], 4096)?)
}

fn compare(region: &Region) -> Outcome {
    let mut bytes = vec![0; LENGTH - 4096];
    region.as_volatile_slice().read_slice(&mut bytes, 4096)?;
    match bytes.iter().zip(4096..).find(|(byte, index)| **byte != pattern(*index)) {
        Some((byte, index)) => Err(format!("byte {index} of the mapping is {byte}").into()),
        None => Ok(()),
    }
}

fn shared_anonymous() -> Outcome<Kind> {
    let flags = nix::libc::MAP_SHARED | nix::libc::MAP_ANONYMOUS;
    let region = Region::build(None, LENGTH, nix::libc::PROT_READ | nix::libc::PROT_WRITE, flags)?;
    fill(&region)?;
    let mut count = 0_u64;
    Ok(Kind::new("shared-anonymous-memory", move || {
        compare(&region)?;
        let slice = region.as_volatile_slice();
        same("the counter", &slice.load::<u64>(0, Ordering::Acquire)?, &count)?;
        count += 1;
        Ok(slice.store(count, 0, Ordering::Release)?)
    }))
}

/// Bytes of shared memory that is more than a few pages.
const MUCH: usize = 8 << 20;
const PAGE: usize = 4096;

/// Shared memory that is written through its mapping and its descriptor, gives pages back, and gets shorter and longer.
fn changing_memfd() -> Outcome<Kind> {
    let file = Arc::new(File::from(memfd_create("much", MemfdFlags::CLOEXEC)?));
    file.set_len(u64::try_from(MUCH)?)?;
    let region = Region::from_file(FileOffset::from_arc(Arc::clone(&file), 0), MUCH)?;
    let (mut expected, mut state, mut length) = (vec![0_u8; MUCH], 7_u64, MUCH);
    Ok(Kind::new("changing-memfd", move || {
        same("the length", &file.metadata()?.len(), &u64::try_from(length)?)?;
        let mut found = vec![0; length];
        file.read_exact_at(&mut found, 0)?;
        if let Some(wrong) = found.iter().zip(&expected).position(|(found, expected)| found != expected) {
            return Err(format!("byte {wrong} of the memfd is {}, not {}", found[wrong], expected[wrong]).into());
        }
        for _ in 0..200 {
            let random = split_mix(&mut state);
            let page = usize::try_from(random >> 8)? % (MUCH / PAGE) * PAGE;
            let bytes = [u8::try_from(random % 251)?; PAGE];
            match random % 7 {
                // Pages behind the end cannot be written through the mapping.
                0..3 if page < length => region.as_volatile_slice().write_slice(&bytes, page)?,
                3 | 4 if page < length => file.write_all_at(&bytes, u64::try_from(page)?)?,
                5 => {
                    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(&file, punch, u64::try_from(page)?, u64::try_from(PAGE)?)?;
                    expected[page..page + PAGE].fill(0);
                    continue;
                }
                _ => continue,
            }
            expected[page..page + PAGE].copy_from_slice(&bytes);
        }
        // Between half and all of it, and sometimes in the middle of a page.
        let shorter = MUCH / 2 + usize::try_from(split_mix(&mut state))? % (MUCH / 2);
        length = if length == MUCH { shorter } else { MUCH };
        file.set_len(u64::try_from(length)?)?;
        expected[length..].fill(0);
        Ok(())
    }))
}

/// A shared mapping of a file: what is stored in it is read from the file and the other way round.
fn of_file(name: &'static str, path: &Path) -> Outcome<Kind> {
    let file = Arc::new(File::options().read(true).write(true).create(true).truncate(true).open(path)?);
    file.set_len(u64::try_from(LENGTH)?)?;
    let region = Region::from_file(FileOffset::from_arc(Arc::clone(&file), 0), LENGTH)?;
    fill(&region)?;
    let mut count = 0_u64;
    Ok(Kind::new(name, move || {
        compare(&region)?;
        let slice = region.as_volatile_slice();
        same("the counter", &slice.load::<u64>(0, Ordering::Acquire)?, &count)?;
        count += 1;
        slice.store(count, 0, Ordering::Release)?;
        let mut stored = [0; 8];
        file.read_exact_at(&mut stored, 0)?;
        same("the file's counter", &u64::from_ne_bytes(stored), &count)?;
        file.write_all_at(&count.to_ne_bytes(), 8)?;
        same("the written counter", &slice.load::<u64>(8, Ordering::Acquire)?, &count)
    }))
}

/// A memfd of [`LENGTH`] bytes that a child inherits.
pub(crate) fn memfd() -> Outcome<OwnedFd> {
    let descriptor = memfd_create("kinds", MemfdFlags::CLOEXEC)?;
    ftruncate(&descriptor, u64::try_from(LENGTH)?)?;
    Ok(descriptor)
}

/// A process's own mapping of a memfd.
pub(crate) struct Shared(Region);

impl Shared {
    pub(crate) fn map(descriptor: OwnedFd) -> Outcome<Self> {
        Ok(Self(Region::from_file(FileOffset::new(File::from(descriptor), 0), LENGTH)?))
    }

    pub(crate) fn fill(&self) -> Outcome {
        fill(&self.0)
    }

    pub(crate) fn compare(&self) -> Outcome {
        compare(&self.0)
    }

    pub(crate) fn counter(&self) -> Outcome<u64> {
        Ok(self.0.as_volatile_slice().load(0, Ordering::Acquire)?)
    }

    pub(crate) fn set_counter(&self, count: u64) -> Outcome {
        Ok(self.0.as_volatile_slice().store(count, 0, Ordering::Release)?)
    }
}
