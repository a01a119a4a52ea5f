//! The tasks of one connection: hyper makes several, and all of them have to end for the socket to close.

use std::sync::{Arc, Mutex, PoisonError};

use hyper::rt::Executor;
use tokio::task::AbortHandle;

/// Runs hyper's tasks and can end them. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Tasks(Arc<Mutex<Vec<AbortHandle>>>);

impl<F: Future<Output: Send + 'static> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, future: F) {
        self.spawn(future);
    }
}

impl Tasks {
    pub(super) fn spawn<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) {
        let task = tokio::spawn(future);
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|task| !task.is_finished());
        tasks.push(task.abort_handle());
    }

    /// Closes the connection now.
    pub(super) fn abort(&self) {
        for task in self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }

    /// Whether the connection has closed by itself.
    pub(super) fn is_finished(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().all(AbortHandle::is_finished)
    }
}
