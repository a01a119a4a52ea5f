use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::{CriuError, Owner, PAGE_SIZE, Run, page_flags};

/// `IMG_COMMON_MAGIC` and `PAGEMAP_MAGIC` of `criu/include/magic.h`.
const PAGEMAP_MAGIC: [u32; 2] = [0x5456_4319, 0x5608_4025];

/// Writes one owner's pages as `criu restore` reads them: `pagemap-*.img` says which pages there are, `pages-N.img`
/// holds their contents one after the other.
///
/// Zero pages become holes of the pages file: on tmpfs they take no memory. Runs may be handed over in pieces; their
/// addresses must ascend, as CRIU dumps them.
#[derive(Debug)]
pub struct PageSetWriter {
    pages: File,
    pages_path: PathBuf,
    pagemap: BufWriter<File>,
    pagemap_path: PathBuf,
    /// What the pages file holds, in its order: neighbours with the same flags are one run.
    runs: Vec<Run>,
    /// Where in the pages file the next page goes.
    offset: u64,
}

impl PageSetWriter {
    /// Makes the two files in `dir`. `pages_id` numbers the pages file and must be used once in a folder.
    ///
    /// # Errors
    /// When a file is there already or cannot be made.
    pub fn create(dir: &Path, owner: Owner, pages_id: u32) -> Result<Self, CriuError> {
        let pages_path = dir.join(format!("pages-{pages_id}.img"));
        let pagemap_path = dir.join(match owner {
            Owner::Process(pid) => format!("pagemap-{pid}.img"),
            Owner::SharedMemory(id) => format!("pagemap-shmem-{id}.img"),
        });
        let pages = create(&pages_path)?;
        let mut pagemap = BufWriter::new(create(&pagemap_path)?);
        for magic in PAGEMAP_MAGIC {
            pagemap.write_all(&magic.to_le_bytes()).map_err(|error| image_error(&pagemap_path, error))?;
        }
        let mut writer = Self { pages, pages_path, pagemap, pagemap_path, runs: Vec::new(), offset: 0 };
        writer.put_entry(&[(1, u64::from(pages_id))])?;
        Ok(writer)
    }

    /// Adds a run whose pages are zero where `is_zero(index)` says so; `data` are the others, one after the other.
    ///
    /// # Errors
    /// When the pages do not follow those before, when `data` does not fit, or on a full disk.
    pub fn add(&mut self, run: Run, is_zero: impl Fn(u64) -> bool, data: &[u8]) -> Result<(), CriuError> {
        // Every page of the set is here, so none may be left for later.
        let run = Run { flags: run.flags & !page_flags::LAZY, ..run };
        self.grow(run)?;
        if run.flags & page_flags::PRESENT == 0 {
            return Ok(());
        }
        let mut rest = data;
        let mut index = 0;
        while index < run.pages {
            let zero = is_zero(index);
            let mut end = index + 1;
            while end < run.pages && is_zero(end) == zero {
                end += 1;
            }
            let bytes = usize::try_from(end - index).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE);
            if !zero {
                let (piece, after) = rest.split_at_checked(bytes).ok_or_else(|| {
                    image_error(&self.pages_path, io::Error::other("fewer pages came than were said"))
                })?;
                self.pages.write_all_at(piece, self.offset).map_err(|error| image_error(&self.pages_path, error))?;
                rest = after;
            }
            self.offset += bytes as u64;
            index = end;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(image_error(&self.pages_path, io::Error::other("more pages came than were said")))
        }
    }

    /// Completes both files.
    ///
    /// # Errors
    /// When the last bytes cannot be written.
    pub fn finish(self) -> Result<(), CriuError> {
        self.finish_with_lazy(&[]).map(drop)
    }

    /// Those of these runs, which must ascend, that were not added.
    pub fn missing(&self, runs: &[Run]) -> Vec<Run> {
        without(runs, &self.runs)
    }

    /// Completes both files; the pages of `lazy`, which must ascend, come later, from the one who serves
    /// `criu restore --lazy-pages`. A page that CRIU dumped is taken from there and is not lazy. Returns what is.
    ///
    /// # Errors
    /// When the last bytes cannot be written.
    pub fn finish_with_lazy(mut self, lazy: &[Run]) -> Result<Vec<Run>, CriuError> {
        let lazy = without(lazy, &self.runs);
        let mut entries: Vec<Run> = std::mem::take(&mut self.runs);
        entries.extend(&lazy);
        entries.sort_by_key(|run| run.address);
        for entry in entries {
            // Field 2 is the count of older CRIUs in 32 bits, field 5 the whole one.
            let compat = u32::try_from(entry.pages).unwrap_or(0);
            self.put_entry(&[
                (1, entry.address),
                (2, u64::from(compat)),
                (4, u64::from(entry.flags)),
                (5, entry.pages),
            ])?;
        }
        self.pages.set_len(self.offset).map_err(|error| image_error(&self.pages_path, error))?;
        self.pagemap.flush().map_err(|error| image_error(&self.pagemap_path, error))?;
        Ok(lazy)
    }

    fn grow(&mut self, run: Run) -> Result<(), CriuError> {
        match self.runs.last_mut() {
            Some(last) if run.address < last.end() => {
                Err(CriuError::PageOrder { address: run.address, end: last.end() })
            }
            Some(last) if run.address == last.end() && run.flags == last.flags => {
                last.pages += run.pages;
                Ok(())
            }
            _ => {
                self.runs.push(run);
                Ok(())
            }
        }
    }

    /// One protobuf message of varint fields after its length, as all of CRIU's images have them.
    fn put_entry(&mut self, fields: &[(u64, u64)]) -> Result<(), CriuError> {
        let mut message = Vec::with_capacity(32);
        for (number, value) in fields {
            put_varint(&mut message, number << 3);
            put_varint(&mut message, *value);
        }
        let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_le_bytes();
        let written = self.pagemap.write_all(&length).and_then(|()| self.pagemap.write_all(&message));
        written.map_err(|error| image_error(&self.pagemap_path, error))
    }
}

/// What of `lazy` is in none of `runs`; both ascend.
fn without(lazy: &[Run], runs: &[Run]) -> Vec<Run> {
    let mut left = Vec::new();
    let mut add = |start: u64, end: u64| {
        if start < end {
            left.push(Run { address: start, pages: (end - start) / PAGE_SIZE as u64, flags: page_flags::LAZY });
        }
    };
    let mut from = 0;
    for run in lazy {
        let mut start = run.address;
        from += runs[from..].partition_point(|dumped| dumped.end() <= start);
        for dumped in runs[from..].iter().take_while(|dumped| dumped.address < run.end()) {
            add(start, dumped.address.max(start));
            start = start.max(dumped.end());
        }
        add(start, run.end().max(start));
    }
    left
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

fn create(path: &Path) -> Result<File, CriuError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    opened.map_err(|error| image_error(path, error))
}

fn image_error(path: &Path, source: io::Error) -> CriuError {
    CriuError::Image { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    const PRESENT: u32 = page_flags::PRESENT;

    fn run(address: u64, pages: u64, flags: u32) -> Run {
        Run { address, pages, flags }
    }

    #[test]
    fn zero_pages_are_holes_and_neighbouring_runs_grow_together() {
        let dir = tempfile::tempdir().unwrap();
        let mut set = PageSetWriter::create(dir.path(), Owner::Process(1), 3).unwrap();
        set.add(run(0x1000, 3, PRESENT | page_flags::LAZY), |index| index == 1, &[7; 2 * PAGE_SIZE]).unwrap();
        set.add(run(0x4000, 1, PRESENT), |_| false, &[8; PAGE_SIZE]).unwrap();
        set.add(run(0x9000, 2, PRESENT), |_| true, &[]).unwrap();
        set.finish().unwrap();

        let pages = std::fs::read(dir.path().join("pages-3.img")).unwrap();
        let firsts: Vec<u8> = pages.chunks(PAGE_SIZE).map(|page| page[0]).collect();
        assert_eq!(firsts, [7, 0, 7, 8, 0, 0]);
        let pagemap = std::fs::read(dir.path().join("pagemap-1.img")).unwrap();
        assert_eq!(&pagemap[8..14], [2, 0, 0, 0, 8, 3]);
        // Two entries: 0x1000 of 4 pages, 0x9000 of 2; LAZY is gone.
        assert_eq!(pagemap[14..].windows(2).filter(|pair| pair == &[0x20, 0x04]).count(), 2);
        assert!(std::fs::metadata(dir.path().join("pages-3.img")).unwrap().blocks() <= 4 * 8);
    }

    #[test]
    fn pages_out_of_order_and_lengths_that_lie_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut set = PageSetWriter::create(dir.path(), Owner::SharedMemory(5), 1).unwrap();
        set.add(run(0x4000, 2, PRESENT), |_| true, &[]).unwrap();
        assert!(matches!(set.add(run(0x5000, 1, PRESENT), |_| true, &[]), Err(CriuError::PageOrder { .. })));
        assert!(set.add(run(0x8000, 2, PRESENT), |_| false, &[0; PAGE_SIZE]).is_err());
        assert!(set.add(run(0xa000, 1, PRESENT), |_| false, &[0; 2 * PAGE_SIZE]).is_err());
    }

    #[test]
    fn lazy_pages_stand_between_the_others_and_what_was_dumped_is_not_lazy() {
        let dir = tempfile::tempdir().unwrap();
        let mut set = PageSetWriter::create(dir.path(), Owner::Process(1), 1).unwrap();
        set.add(run(0x4000, 2, PRESENT), |_| false, &[1; 2 * PAGE_SIZE]).unwrap();
        set.add(run(0x9000, 1, PRESENT), |_| false, &[2; PAGE_SIZE]).unwrap();
        let lazy = set.finish_with_lazy(&[run(0x1000, 4, 0), run(0x6000, 1, 0), run(0x8000, 3, 0), run(0xf000, 1, 0)]);
        let expected = [(0x1000, 3), (0x6000, 1), (0x8000, 1), (0xa000, 1), (0xf000, 1)];
        assert_eq!(lazy.unwrap(), expected.map(|(address, pages)| run(address, pages, page_flags::LAZY)));
        let pagemap = std::fs::read(dir.path().join("pagemap-1.img")).unwrap();
        let mut entries = Vec::new();
        let mut rest = &pagemap[14..];
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let (message, later) = after.split_at(usize::try_from(u32::from_le_bytes(*length)).unwrap());
            // The flags are field 4, of one byte.
            entries.push(message[message.iter().rposition(|byte| *byte == 0x20).unwrap() + 1]);
            rest = later;
        }
        assert_eq!(entries, [2, 4, 2, 2, 4, 2, 2]);
    }

    #[test]
    fn no_image_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let _first = PageSetWriter::create(dir.path(), Owner::Process(1), 1).unwrap();
        assert!(PageSetWriter::create(dir.path(), Owner::Process(2), 1).is_err());
    }
}
