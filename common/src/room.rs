//! How much room a node needs for a workload that comes to it.
//!
//! The coordinator's placement asks for it before a migration begins and the target's agent in preflight: were the two
//! different, placement would choose nodes that preflight refuses.

/// Bytes that stay free: images are not all of a restore, and the node has other work.
pub const SPARE_BYTES: u64 = 64 << 20;

/// Bytes of available memory that restoring a workload with so many bytes of memory needs: its images, which are kept in
/// memory, and the restored pages are there at the same time.
pub fn to_restore(memory_bytes: u64) -> u64 {
    to_store(memory_bytes.saturating_mul(2))
}

/// Bytes that have to be free where that many are to be stored: images, or a writable layer.
pub fn to_store(bytes: u64) -> u64 {
    bytes.saturating_add(SPARE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_takes_twice_the_memory_and_no_size_wraps_around() {
        assert_eq!((to_restore(0), to_store(0)), (64 << 20, 64 << 20));
        assert_eq!((to_restore(100 << 20), to_store(100 << 20)), (264 << 20, 164 << 20));
        assert_eq!((to_restore(u64::MAX), to_store(u64::MAX)), (u64::MAX, u64::MAX));
    }
}
