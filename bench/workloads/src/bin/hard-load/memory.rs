//! Memory in which every byte follows from its place and from how often it was written, so that it can be checked.

use std::io;

use memmap2::{Advice, MmapMut};
use podferry_workloads::ballast::split_mix;
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, MmapRegion};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

type Page = [u8; PAGE];

/// What a process asks the kernel for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backing {
    /// Private and anonymous, as the kernel gives it.
    Private,
    /// The same with transparent huge pages asked for.
    Huge,
    /// The same with transparent huge pages forbidden.
    Small,
    /// Anonymous and shared, as `PostgreSQL` has its buffers.
    Shared,
}

#[derive(Debug)]
enum Region {
    Private(MmapMut),
    Shared(MmapRegion),
}

impl Region {
    fn new(backing: Backing, pages: usize) -> io::Result<Self> {
        let length = pages * PAGE;
        let advice = match backing {
            Backing::Shared => return shared(length).map(Self::Shared),
            Backing::Private => Advice::Normal,
            Backing::Huge => Advice::HugePage,
            Backing::Small => Advice::NoHugePage,
        };
        let region = MmapMut::map_anon(length)?;
        region.advise(advice)?;
        Ok(Self::Private(region))
    }

    fn read(&self, page: usize, into: &mut Page) -> io::Result<()> {
        let start = page * PAGE;
        match self {
            Self::Private(region) => into.copy_from_slice(&region[start..start + PAGE]),
            Self::Shared(region) => {
                region.as_volatile_slice().read_slice(into, start).map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    fn write(&mut self, page: usize, from: &Page) -> io::Result<()> {
        let start = page * PAGE;
        match self {
            Self::Private(region) => region[start..start + PAGE].copy_from_slice(from),
            Self::Shared(region) => {
                region.as_volatile_slice().write_slice(from, start).map_err(io::Error::other)?;
            }
        }
        Ok(())
    }
}

fn shared(length: usize) -> io::Result<MmapRegion> {
    let flags = nix::libc::MAP_SHARED | nix::libc::MAP_ANONYMOUS;
    MmapRegion::build(None, length, nix::libc::PROT_READ | nix::libc::PROT_WRITE, flags).map_err(io::Error::other)
}

/// Pages, how often each was written, and which comes next.
#[derive(Debug)]
pub(crate) struct Memory {
    region: Region,
    generations: Vec<u32>,
    seed: u64,
    next_written: usize,
    next_checked: usize,
}

impl Memory {
    /// Memory of so many pages, all written once. Other seeds give other contents.
    pub(crate) fn new(backing: Backing, pages: usize, seed: u64) -> io::Result<Self> {
        let region = Region::new(backing, pages)?;
        let mut memory = Self { region, generations: vec![0; pages], seed, next_written: 0, next_checked: pages / 2 };
        (0..pages).try_for_each(|page| memory.write(page))?;
        Ok(memory)
    }

    /// How many pages there are.
    pub(crate) fn pages(&self) -> usize {
        self.generations.len()
    }

    /// Whether a page is what was written to it last.
    pub(crate) fn is_right(&self, page: usize) -> io::Result<bool> {
        let mut found = [0; PAGE];
        self.region.read(page, &mut found)?;
        Ok(found == content(self.seed, page, self.generations[page]))
    }

    /// Writes the next page anew, all pages in turn. Whether it was right before.
    pub(crate) fn write_next(&mut self) -> io::Result<bool> {
        let page = self.next_written;
        self.next_written = (page + 1) % self.pages();
        let right = self.is_right(page)?;
        self.write(page)?;
        Ok(right)
    }

    /// Looks at the next page, all pages in turn. Whether it is right.
    pub(crate) fn check_next(&mut self) -> io::Result<bool> {
        let page = self.next_checked;
        self.next_checked = (page + 1) % self.pages();
        self.is_right(page)
    }

    fn write(&mut self, page: usize) -> io::Result<()> {
        let generation = self.generations[page].wrapping_add(1);
        self.generations[page] = generation;
        self.region.write(page, &content(self.seed, page, generation))
    }
}

/// Pseudo-random, so that nothing packs it.
fn content(seed: u64, page: usize, generation: u32) -> Page {
    let mut state = seed ^ ((page as u64) << 32) ^ u64::from(generation);
    let mut bytes = [0; PAGE];
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&split_mix(&mut state).to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backing_keeps_what_is_written_and_shows_what_is_not() {
        for backing in [Backing::Private, Backing::Huge, Backing::Small, Backing::Shared] {
            let mut memory = Memory::new(backing, 8, 7).unwrap();
            for _ in 0..20 {
                assert!(memory.write_next().unwrap() && memory.check_next().unwrap(), "{backing:?}");
            }
            // A page of before, as a migration that loses a write would leave it.
            memory.region.write(3, &content(7, 3, memory.generations[3] - 1)).unwrap();
            let right: Vec<usize> = (0..8).filter(|page| memory.is_right(*page).unwrap()).collect();
            assert_eq!(right, [0, 1, 2, 4, 5, 6, 7], "{backing:?}");
        }
    }
}
