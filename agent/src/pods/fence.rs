//! Keeps the kubelet from starting what moves away, on a disk: it starts pods again after a reboot, too.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podferry_runtime::Container;
use podferry_runtime::wrapper::{KEEP, PodContainer, STAY, SandboxEnd, asked, fence_of};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::context::Context;
use crate::worker::record::{self, at};

/// How often it is said again that a container must not be killed: [`podferry_runtime::wrapper`] believes it for minutes.
const SAID_EVERY: Duration = Duration::from_secs(60);

/// How long a wrapper takes at most from the word that it reads to its note.
const NOTING: Duration = Duration::from_millis(200);

/// The fence around one pod. [`podferry_runtime::wrapper`] starts nothing behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence(PathBuf);

impl Fence {
    /// That of a container's pod; none when it is no pod's.
    pub fn of(dir: &Path, container: &Container) -> Option<Self> {
        Self::around(dir, &PodContainer::of(&container.annotations)?.uid)
    }

    /// That of the pod with this uid; none when it is no uid.
    pub fn around(dir: &Path, uid: &str) -> Option<Self> {
        fence_of(dir, uid).map(Self)
    }

    /// Removes those of pods that are not on this node any more, which the kubelet's folder of theirs tells; not those that are `needed`.
    ///
    /// # Errors
    /// When one stays, or it cannot be told whether it has to.
    pub fn prune(dir: &Path, kubelet_dir: &Path, needed: &[&Self]) -> io::Result<()> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        let pods = kubelet_dir.join("pods");
        // One that is not there, or not yet, says nothing of any pod.
        fs::read_dir(&pods).map_err(|error| at(&pods, &error))?;
        for entry in entries {
            let note = Self(entry?.path());
            // What stands beside one has its name, too.
            let pod = note.0.file_stem().unwrap_or_default();
            let needed = needed.iter().any(|fence| fence.0.file_name() == Some(pod));
            if !needed && !pods.join(pod).try_exists()? {
                note.take_away()?;
            }
        }
        Ok(())
    }

    /// Puts it up. Idempotent. It is on the disk then, and so is there after a power failure.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn put_up(&self) -> io::Result<()> {
        let Some(dir) = self.0.parent() else { return Ok(()) };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        fs::File::create(&self.0)?.sync_all()?;
        fs::File::open(dir)?.sync_all()
    }

    /// Whether it is up.
    pub fn stands(&self) -> bool {
        self.0.exists()
    }

    /// Keeps the container from being killed, too: it stands still, so that its probes fail, and its memory is needed. Its
    /// processes end with a power failure anyhow, so this need not be on the disk.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn keep(&self) -> io::Result<()> {
        self.say(KEEP)
    }

    /// Says so until that is ended.
    ///
    /// # Errors
    /// When it cannot be written down the first time.
    pub fn go_on_keeping(&self) -> io::Result<Keeping> {
        self.go_on_saying(KEEP)
    }

    /// The pod has moved: keeps its sandbox from being killed, until that is ended.
    ///
    /// # Errors
    /// When it cannot be written down the first time.
    pub fn go_on_staying(&self) -> io::Result<Keeping> {
        self.go_on_saying(STAY)
    }

    fn go_on_saying(&self, word: &'static str) -> io::Result<Keeping> {
        self.say(word)?;
        let fence = self.clone();
        Ok(Keeping(tokio::spawn(async move {
            loop {
                tokio::time::sleep(SAID_EVERY).await;
                if let Err(error) = fence.say(word) {
                    tracing::warn!(%error, word, "it cannot be said that a pod must not be killed");
                }
            }
        })))
    }

    /// Nobody needs the sandbox any more: it ends if it was to, by the hand of the agent. Blocks.
    ///
    /// # Errors
    /// When it is not told, or does not end; the kubelet asks for it again, in two minutes.
    pub fn end_sandbox(&self, context: &Context) -> io::Result<()> {
        self.let_die()?;
        // Who has read the old word notes it by then.
        std::thread::sleep(NOTING);
        let note = asked(&self.0);
        let Some(SandboxEnd { root, id }) = record::load(&note)? else { return Ok(()) };
        let runc = context.runc(&root);
        match runc.kill(&id, "KILL") {
            // The kubelet may ask once more in the moment in which it may be.
            Err(error) if runc.container(&id).is_ok_and(|sandbox| sandbox.is_alive()) => Err(io::Error::other(error)),
            _ => match fs::remove_file(note) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        }
    }

    /// Lets it be killed again, and no more than that.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn let_die(&self) -> io::Result<()> {
        self.say("")
    }

    /// Whoever reads it meanwhile reads the old word or the new one.
    fn say(&self, word: &str) -> io::Result<()> {
        let new = self.0.with_extension("new");
        fs::write(&new, word)?;
        fs::rename(&new, &self.0)
    }

    /// Takes it away. Idempotent.
    ///
    /// # Errors
    /// When it stays.
    pub fn take_away(&self) -> io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// A frozen container is kept from being killed for as long as this is there.
#[derive(Debug)]
pub struct Keeping(JoinHandle<()>);

impl Keeping {
    /// Ends it. Nothing is said afterwards: that would put up a fence again that was taken away.
    pub async fn end(mut self) {
        self.0.abort();
        let _cancelled = (&mut self.0).await;
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fences_stand_as_long_as_their_pods_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let (fences, kubelet) = (folder.path().join("fenced"), folder.path().join("kubelet"));
        Fence::prune(&fences, &kubelet, &[]).unwrap();
        for uid in ["there", "gone", "needed"] {
            Fence(fences.join(uid)).put_up().unwrap();
            Fence(fences.join(uid)).put_up().unwrap();
        }
        Fence::prune(&fences, &kubelet, &[]).unwrap_err();
        assert!(fences.join("gone").exists(), "a kubelet's folder that is not there says nothing of pods");
        fs::create_dir_all(kubelet.join("pods/there")).unwrap();
        Fence::prune(&fences, &kubelet, &[&Fence(fences.join("needed"))]).unwrap();
        assert!(fences.join("there").exists() && fences.join("needed").exists() && !fences.join("gone").exists());
        Fence(fences.join("there")).keep().unwrap();
        assert_eq!(fs::read_to_string(fences.join("there")).unwrap(), KEEP);
        Fence(fences.join("there")).let_die().unwrap();
        assert_eq!(fs::read_to_string(fences.join("there")).unwrap(), "");
        Fence(fences.join("there")).take_away().unwrap();
        Fence(fences.join("there")).take_away().unwrap();
        assert!(!fences.join("there").exists());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_sandbox_that_has_ended_without_the_agent_leaves_no_note() {
        let folder = tempfile::tempdir().unwrap();
        let context = crate::target::tests::context(folder.path());
        let fence = Fence(folder.path().join("pod"));
        fence.put_up().unwrap();
        let end = SandboxEnd { root: folder.path().join("runc"), id: "gone".to_owned() };
        fs::write(asked(&fence.0), serde_json::to_vec(&end).unwrap()).unwrap();
        for _ in 0..2 {
            fence.end_sandbox(&context).unwrap();
            assert!(!asked(&fence.0).exists());
        }
        assert_eq!(fs::read_to_string(&fence.0).unwrap(), "", "it stands");
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_said_again_that_a_pod_is_kept_and_no_more_once_that_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let fence = Fence(folder.path().join("pod"));
        let keeping = fence.go_on_keeping().unwrap();
        assert_eq!(fs::read_to_string(&fence.0).unwrap(), KEEP);
        fence.let_die().unwrap();
        tokio::time::sleep(SAID_EVERY * 2).await;
        assert_eq!(fs::read_to_string(&fence.0).unwrap(), KEEP);
        keeping.end().await;
        fence.take_away().unwrap();
        tokio::time::sleep(SAID_EVERY * 2).await;
        assert!(!fence.0.exists());
    }
}
