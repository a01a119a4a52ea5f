//! Big buffers that are used again.
//!
//! A fresh megabyte from the kernel costs a page fault for every 4 KiB, more than encrypting them: what was paid for once
//! is kept.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Hands out buffers and takes them back when the last reader of their bytes is gone. Clones share the buffers.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    free: Mutex<Vec<Vec<u8>>>,
    keep: usize,
    shared: AtomicUsize,
    most_shared: AtomicUsize,
}

impl Pool {
    /// A pool that keeps at most `keep` free buffers.
    pub fn new(keep: usize) -> Self {
        let free = Mutex::new(Vec::with_capacity(keep));
        Self(Arc::new(Inner { free, keep, shared: AtomicUsize::new(0), most_shared: AtomicUsize::new(0) }))
    }

    /// A buffer of exactly `length` bytes with anything in it. Never waits.
    pub fn take(&self, length: usize) -> Vec<u8> {
        let mut buffer = self.lock().pop().unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }

    /// The buffer's bytes, to be read by many; the last one to drop them gives the buffer back. It need not come from this
    /// pool.
    pub fn share(&self, buffer: Vec<u8>) -> Bytes {
        let shared = self.0.shared.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.most_shared.fetch_max(shared, Ordering::Relaxed);
        Bytes::from_owner(Shared { buffer, pool: self.clone() })
    }

    /// How many shared buffers have readers now.
    pub fn shared(&self) -> usize {
        self.0.shared.load(Ordering::Relaxed)
    }

    /// The most shared buffers that had readers at once.
    pub fn most_shared(&self) -> usize {
        self.0.most_shared.load(Ordering::Relaxed)
    }

    fn give_back(&self, buffer: Vec<u8>) {
        let mut free = self.lock();
        if free.len() < self.0.keep {
            free.push(buffer);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        // A list of buffers is whole whatever its last user did.
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Shared {
    buffer: Vec<u8>,
    pool: Pool,
}

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.pool.0.shared.fetch_sub(1, Ordering::Relaxed);
        self.pool.give_back(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_the_last_reader() {
        let pool = Pool::new(1);
        let buffer = pool.take(100);
        let address = buffer.as_ptr();
        let bytes = pool.share(buffer);
        let slice = bytes.slice(10..20);
        drop(bytes);
        assert_eq!((pool.shared(), pool.most_shared()), (1, 1));
        drop(slice);
        assert_eq!(pool.shared(), 0);
        let again = pool.take(50);
        assert_eq!(again.as_ptr(), address);
    }

    #[test]
    fn no_more_than_asked_for_are_kept() {
        let pool = Pool::new(1);
        let both = [pool.share(vec![1; 10]), pool.share(vec![2; 10])];
        drop(both);
        assert_eq!(pool.take(10)[0], 1);
        assert_eq!(pool.take(10)[0], 0, "a new one");
    }
}
