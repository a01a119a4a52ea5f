//! Laying CRIU's page stream down as images, with the pages that come later among them.

use std::collections::HashMap;
use std::path::PathBuf;

use podferry_criu::{CriuError, Owner, PAGE_SIZE, PageSetWriter, PageSink, Run};
use podferry_memory::range::{PageRange, PageRanges};

/// The images of one dump.
#[derive(Debug)]
pub struct Images {
    folder: PathBuf,
    open: Option<(Owner, PageSetWriter)>,
    complete: Vec<(Owner, PageSetWriter)>,
    next: u32,
}

impl Images {
    /// Images in this folder.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, open: None, complete: Vec::new(), next: 1 }
    }

    /// Completes all images. `lazy` are the pages of each process, by its inner number, that come later; gives those that do,
    /// without what CRIU dumped after all.
    pub fn finish(mut self, lazy: &HashMap<i32, PageRanges>) -> Result<HashMap<i32, PageRanges>, CriuError> {
        self.complete.extend(self.open.take());
        let mut left = HashMap::new();
        for (owner, writer) in self.complete {
            let wanted = match owner {
                Owner::Process(pid) => pid.try_into().ok().and_then(|pid: i32| Some((pid, lazy.get(&pid)?))),
                Owner::SharedMemory(_) => None,
            };
            let runs: Vec<Run> = wanted.iter().flat_map(|(_, ranges)| ranges.iter().map(run)).collect();
            let later = writer.finish_with_lazy(&runs)?;
            if let Some((pid, _)) = wanted {
                left.insert(pid, later.iter().map(|run| PageRange::new(run.address, run.end())).collect());
            }
        }
        Ok(left)
    }
}

fn run(range: PageRange) -> Run {
    Run { address: range.start, pages: range.pages(), flags: 0 }
}

impl PageSink for Images {
    type Error = CriuError;

    fn open(&mut self, owner: Owner) -> Result<(), CriuError> {
        self.complete.extend(self.open.take());
        self.open = Some((owner, PageSetWriter::create(&self.folder, owner, self.next)?));
        self.next += 1;
        Ok(())
    }

    fn buffer(&mut self, bytes: usize) -> Vec<u8> {
        vec![0; bytes]
    }

    fn run(&mut self, run: Run, data: Vec<u8>) -> Result<(), CriuError> {
        let Some((_, writer)) = &mut self.open else { return Ok(()) };
        let zero: Vec<bool> = data.chunks(PAGE_SIZE).map(|page| page.iter().all(|byte| *byte == 0)).collect();
        let pages: Vec<u8> =
            data.chunks(PAGE_SIZE).zip(&zero).filter(|(_, zero)| !**zero).flat_map(|(page, _)| page).copied().collect();
        writer.add(run, |index| usize::try_from(index).ok().and_then(|index| zero.get(index)) == Some(&true), &pages)
    }
}
