//! What CRIU is told of the mappings of the processes that it dumps, so that the kernel need not count all their pages in the freeze.
//!
//! ```text
//!   watch ─▶ CRIU starts ····· pre-dump: file written ─▶ all stand still: has the watch seen anything? ─▶ CRIU reads the file
//!            └ flags are read ─┘                           └ then the file goes, and CRIU asks the kernel
//! ```
//!
//! See [`podferry_memory::hide::mappings`]. Whatever goes wrong here costs time in the freeze and nothing else. A call that was begun
//! before the watch and has not ended a pause later would not be seen; a throttled process may stand still in the middle of one for that
//! long, so it is not told of (`DumpJob::mappings`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::unistd::Pid;
use podferry_common::failure::chain;
use podferry_memory::flags::FlagWatch;
use podferry_memory::hide;
use podferry_runtime::Container;

/// How long calls that were begun before the watch get to end: they take microseconds.
const PAUSE: Duration = Duration::from_millis(5);

/// What is told, or nothing.
#[derive(Debug, Default)]
pub(super) struct Mappings(Option<Watched>);

#[derive(Debug)]
struct Watched {
    file: PathBuf,
    watch: FlagWatch,
    /// Reads what is to be told.
    reading: Option<JoinHandle<String>>,
}

impl Mappings {
    /// Begins to watch, and to read of the processes of a container what is to be told, when there is a file to be written.
    pub(super) fn watch(file: Option<&Path>, container: &Container) -> Self {
        let Some(file) = file else { return Self::default() };
        match container.tree() {
            Ok(tree) => Self::watch_processes(file, tree.iter().map(|member| Pid::from_raw(member.pid)).collect()),
            Err(error) => Self::nothing(&error),
        }
    }

    fn watch_processes(file: &Path, processes: Vec<Pid>) -> Self {
        match FlagWatch::start() {
            Ok(watch) => {
                let reading = Some(thread::spawn(move || {
                    thread::sleep(PAUSE);
                    // One that has ended meanwhile has no mappings.
                    processes.into_iter().filter_map(|process| hide::mappings(process).ok()).collect()
                }));
                Self(Some(Watched { file: file.to_owned(), watch, reading }))
            }
            Err(error) => Self::nothing(&error),
        }
    }

    fn nothing(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::debug!(error = chain(error), "CRIU asks the kernel for the flags of mappings");
        Self(None)
    }

    /// Writes the file. The processes run, and CRIU is about to stop them.
    pub(super) fn tell(&mut self) {
        let Some(Watched { file, reading, .. }) = &mut self.0 else { return };
        let text = reading.take().and_then(|reading| reading.join().ok()).unwrap_or_default();
        if let Err(error) = fs::write(file, text) {
            *self = Self::nothing(&error);
        }
    }

    /// The processes stand still: what was written goes when it may be wrong.
    pub(super) fn check(&mut self) {
        let Some(Watched { file, watch, .. }) = self.0.take() else { return };
        if watch.has_seen_any().unwrap_or(true) {
            tracing::debug!("flags of mappings were changed meanwhile; CRIU asks the kernel for them");
            remove(&file);
        }
        // It takes the kernel a while to end it, and the container stands still.
        thread::spawn(move || drop(watch));
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
        let mut mappings = Mappings::watch_processes(&file, vec![Pid::this()]);
        mappings.tell();
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
        assert!(
            (0..30).any(|_| all_well().is_some_and(|text| text.starts_with(&heading) && text.contains("VmFlags:")))
        );
        assert_eq!(told(|| memory.advise(Advice::DontDump).unwrap()), None);
    }
}
