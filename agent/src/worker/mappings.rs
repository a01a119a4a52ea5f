//! What CRIU is told of the mappings of the processes that it dumps, so that the kernel need not count all their pages in the freeze.
//!
//! ```text
//!   watch ─▶ CRIU starts ─▶ pre-dump: flags are read, file written ─▶ all stand still: has the watch seen anything? ─▶ CRIU reads the file
//!                                                                        └ then the file goes, and CRIU asks the kernel
//! ```
//!
//! See [`podferry_memory::hide::mappings`]. Whatever goes wrong here costs time in the freeze and nothing else. A call that was begun
//! before the watch and has not ended when flags are read, behind CRIU's start, would not be seen; a throttled process may stand still in
//! the middle of one for that long, so it is not told of (`DumpJob::mappings`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use podferry_common::failure::chain;
use podferry_memory::flags::FlagWatch;
use podferry_memory::hide;

/// What is told, or nothing.
#[derive(Debug, Default)]
pub(super) struct Mappings(Option<Watched>);

#[derive(Debug)]
struct Watched {
    file: PathBuf,
    watch: FlagWatch,
}

impl Mappings {
    /// Begins to watch, when there is a file to be written.
    pub(super) fn watch(file: Option<&Path>) -> Self {
        let Some(file) = file else { return Self::default() };
        match FlagWatch::start() {
            Ok(watch) => Self(Some(Watched { file: file.to_owned(), watch })),
            Err(error) => {
                tracing::debug!(error = chain(&error), "flags of mappings cannot be watched; CRIU asks the kernel for them");
                Self(None)
            }
        }
    }

    /// Writes the file. The processes run, and CRIU is about to stop them.
    pub(super) fn tell(&self, processes: impl FnOnce() -> Result<Vec<Pid>, podferry_runtime::Error>) {
        let Some(watched) = &self.0 else { return };
        let written = processes().map_err(|error| chain(&error));
        let written = written.and_then(|processes| watched.write(&processes).map_err(|error| chain(&error)));
        if let Err(error) = written {
            tracing::debug!(error, "flags of mappings cannot be told; CRIU asks the kernel for them");
        }
    }

    /// The processes stand still: what was written goes when it may be wrong.
    pub(super) fn check(&mut self) {
        let Some(Watched { file, watch }) = self.0.take() else { return };
        if !watch.has_seen_any().is_ok_and(|seen| !seen) {
            tracing::debug!("flags of mappings were changed meanwhile; CRIU asks the kernel for them");
            remove(&file);
        }
        // It takes the kernel a while to end it, and the container stands still.
        std::thread::spawn(move || drop(watch));
    }
}

impl Watched {
    fn write(&self, processes: &[Pid]) -> io::Result<()> {
        // One that has ended meanwhile has no mappings.
        let text: String = processes.iter().filter_map(|process| hide::mappings(*process).ok()).collect();
        fs::write(&self.file, text)
    }
}

fn remove(file: &Path) {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            // Empty, it says nothing either.
            tracing::warn!(%error, file = %file.display(), "what was told of mappings cannot be removed");
            let _ = fs::write(file, "");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use memmap2::{Advice, MmapMut};

    use super::*;

    /// What is left of the file when the processes stand still, and this is done meanwhile.
    fn told(meanwhile: impl Fn()) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("mappings");
        let mut mappings = Mappings::watch(Some(&file));
        mappings.tell(|| Ok(vec![Pid::this()]));
        meanwhile();
        mappings.check();
        fs::read_to_string(file).ok()
    }

    /// Others on this machine may change flags, too, though hardly each time.
    #[test]
    fn flags_are_told_unless_any_were_changed_meanwhile() {
        let memory = MmapMut::map_anon(1 << 20).unwrap();
        let heading = format!("process {}\n", Pid::this());
        let all_well = || told(|| memory.advise(Advice::WillNeed).unwrap());
        assert!((0..5).any(|_| all_well().is_some_and(|text| text.starts_with(&heading) && text.contains("VmFlags:"))));
        assert_eq!(told(|| memory.advise(Advice::DontDump).unwrap()), None);
    }

    #[test]
    fn without_a_file_nothing_is_watched() {
        let mut mappings = Mappings::watch(None);
        mappings.tell(|| unreachable!("nobody is to be told"));
        mappings.check();
    }
}
