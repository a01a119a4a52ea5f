//! Network namespaces, by descriptor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Error, Result};

/// A network namespace, kept alive as long as this handle.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    path: PathBuf,
}

impl Netns {
    /// Opens a namespace by its path, such as `/run/netns/NAME`.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |source| Error::Netns { doing: "open", netns: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        Ok(Self { file: Arc::new(file), path: path.to_owned() })
    }

    /// Opens the namespace that a process is in, by its process id as this process sees it.
    pub fn of_process(pid: u32) -> Result<Self> {
        Self::open(&PathBuf::from(format!("/proc/{pid}/ns/net")))
    }

    /// Opens the namespace that the calling thread is in: the node's own, in an agent.
    pub fn current() -> Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Makes a namespace without a name, which goes when its handle and its last process are gone.
    pub fn anonymous() -> Result<Self> {
        let failed = |source: io::Error| Error::Netns { doing: "make", netns: "(anonymous)".into(), source };
        on_own_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))?;
            Self::current()
        })
        .map_err(failed)?
    }

    /// Runs a closure in this namespace, on a thread of its own that ends with it: no other thread ever changes its
    /// namespace. What the closure opens (sockets, child processes) stays in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_own_thread(|| self.enter().map(|()| work())).map_err(|source| self.failed("start a thread for", source))?
    }

    /// The same without blocking the async runtime's thread.
    pub async fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let netns = self.clone();
        let task = tokio::task::spawn_blocking(move || netns.run(work));
        match task.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => panic::resume_unwind(error.into_panic()),
            Err(error) => Err(self.failed("wait for a thread in", io::Error::other(error))),
        }
    }

    /// Whether two handles are of one namespace.
    pub fn is_same(&self, other: &Self) -> Result<bool> {
        Ok(self.identity()? == other.identity()?)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    fn identity(&self) -> Result<(u64, u64)> {
        let metadata = self.file.metadata().map_err(|source| self.failed("identify", source))?;
        Ok((metadata.dev(), metadata.ino()))
    }

    fn enter(&self) -> Result<()> {
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| self.failed("enter", errno.into()))
    }

    fn failed(&self, doing: &'static str, source: io::Error) -> Error {
        Error::Netns { doing, netns: self.path.clone(), source }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A thread that may change its namespace, because nothing runs on it afterwards. Fails when none can be started.
pub(crate) fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("podferry-netns".into()).spawn_scoped(scope, work)?;
        Ok(thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
    })
}
