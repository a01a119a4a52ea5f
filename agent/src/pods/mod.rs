//! Pods: what an agent in Kubernetes does beside moving containers.
//!
//! Who starts a pod's container is containerd's shim, and it has to stay its parent. So the restore of a container that comes is run by
//! what the shim starts in runc's place, the wrapper ([`podferry_runtime::wrapper`]): it is a [`Visitor`] here, waits for the
//! migration's part ([`crate::target`]) and runs what that says.
//!
//! ```text
//!  kubelet ─▶ containerd ─▶ shim ─▶ podferry-runtime create ──hello──▶ Pods ◀──await── TargetPart::prepare
//!                                        │  ◀────── restore ───────────────────────────── TargetPart::restore
//!                                        └─▶ runc restore ─▶ CRIU ─▶ podferry-hook ──held──▶ …
//! ```
//!
//! And the kubelet starts again what has ended, where it is. What moves away must not: the [`Fence`] keeps it from that.

mod fence;
mod visitor;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use podferry_common::MigrationId;
use podferry_runtime::wrapper::{Hello, Order, VERSION};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::config::Kubernetes;
use crate::journal::Standing;
use crate::parts::{Entry, Parts};

pub use fence::{Fence, Keeping};
pub use visitor::Visitor;

/// How long a wrapper gets to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest hello, in bytes.
const MOST_HELLO: u64 = 64 << 10;

/// Wrappers that wait for a word. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Visitors {
    waiting: Arc<Mutex<Vec<Arc<Visitor>>>>,
    changed: Arc<watch::Sender<()>>,
}

/// Which container of which pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Door {
    /// The pod's uid.
    pub uid: String,
    /// The container's name in the pod.
    pub container: String,
}

impl Visitors {
    /// The wrapper that waits at that door for that migration, the youngest of them; waits for it in its turn, at most `patience`.
    pub async fn wait(&self, door: &Door, migration: MigrationId, patience: Duration) -> Option<Arc<Visitor>> {
        let mut changes = self.changed.subscribe();
        let found = async {
            loop {
                changes.borrow_and_update();
                let youngest = self.of(migration).into_iter().filter(|visitor| visitor.door() == *door);
                if let Some(visitor) = youngest.max_by_key(|visitor| visitor.hello.began_ms) {
                    return Some(visitor);
                }
                changes.changed().await.ok()?;
            }
        };
        timeout(patience, found).await.ok().flatten()
    }

    /// Tells all that wait for that migration that nothing comes of it.
    pub async fn dismiss(&self, migration: MigrationId) {
        for visitor in self.of(migration) {
            visitor.fail(&undone(migration)).await;
        }
    }

    /// Tells those that wait at that door for that migration why nothing comes there.
    pub async fn send_away(&self, door: &Door, migration: MigrationId, why: &str) {
        for visitor in self.of(migration).iter().filter(|visitor| visitor.door() == *door) {
            visitor.fail(why).await;
        }
    }

    /// Those that are there. Who has begun anew may come before the one that was given up is seen to go.
    fn of(&self, migration: MigrationId) -> Vec<Arc<Visitor>> {
        let waiting = self.lock();
        waiting.iter().filter(|visitor| visitor.is_of(migration) && visitor.is_there()).cloned().collect()
    }

    fn come(&self, visitor: &Arc<Visitor>) {
        self.lock().push(Arc::clone(visitor));
        self.changed.send_replace(());
    }

    fn go(&self, visitor: &Arc<Visitor>) {
        self.lock().retain(|waiting| !Arc::ptr_eq(waiting, visitor));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Visitor>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens for wrappers until the process ends.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn serve(&self, settings: &Kubernetes, parts: Parts) -> io::Result<()> {
        let listener = bind(&settings.socket)?;
        let (visitors, fences) = (self.clone(), settings.fence_dir.clone());
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let receiving = receive(visitors.clone(), parts.clone(), fences.clone(), stream);
                        drop(tokio::spawn(receiving));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a wrapper cannot be accepted");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        });
        Ok(())
    }
}

/// For root alone: whoever speaks here makes this node run what it likes.
fn bind(socket: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = socket.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn receive(visitors: Visitors, parts: Parts, fences: PathBuf, stream: UnixStream) {
    let (read, write) = stream.into_split();
    let mut lines = BufReader::new(read);
    let mut line = Vec::new();
    let said = timeout(HELLO_TIMEOUT, (&mut lines).take(MOST_HELLO).read_until(b'\n', &mut line)).await;
    let hello: Hello = match (said, serde_json::from_slice(&line)) {
        (Ok(Ok(_)), Ok(hello)) => hello,
        (_, Err(error)) => return tracing::warn!(%error, "a wrapper does not say who it is"),
        (_, Ok(_)) => return tracing::warn!("a wrapper does not say who it is"),
    };
    tracing::info!(
        migration = hello.migration,
        pod = hello.pod,
        namespace = hello.namespace,
        "a pod's container comes"
    );
    let visitor = Arc::new(Visitor::new(hello, write));
    visitors.come(&visitor);
    // Looked at behind that: whoever ends a migration, or puts up a fence, dismisses those who have come.
    if let Some(word) = word_at_once(&parts, &fences, &visitor.hello) {
        visitor.order(&word).await;
    }
    visitor.listen(lines).await;
    visitors.go(&visitor);
}

fn undone(migration: MigrationId) -> String {
    format!("migration {migration} was undone: the pod that was to move stays where it is; delete this one")
}

/// What a wrapper is told whose migration is over, or in whose pod nothing is to run.
fn word_at_once(parts: &Parts, fences: &Path, hello: &Hello) -> Option<Order> {
    let fail = |message: String| Some(Order::Fail { message });
    if Fence::around(fences, &hello.uid).is_some_and(|fence| fence.stands()) {
        return fail(format!("pod {} stood in for another, which has taken its place", hello.pod));
    }
    if hello.version != VERSION {
        return fail(format!(
            "podferry-runtime speaks version {}, and the agent {VERSION}: install podferry again",
            hello.version
        ));
    }
    let Ok(migration) = hello.migration.parse::<MigrationId>() else {
        return fail(format!("the pod's annotation names no migration: {:?}", hello.migration));
    };
    match parts.get(migration)? {
        Entry::Ended(Standing::Resumed) | Entry::Filling { .. } => Some(Order::Create),
        Entry::Ended(_) => fail(undone(migration)),
        Entry::Alive { .. } | Entry::Beginning { .. } | Entry::Broken { .. } => None,
    }
}
