//! Memory that does nothing but exist: what a migration has to carry.
//!
//! The bytes are pseudo-random, so neither compression nor the search for zero pages can make the work smaller, and
//! they follow from the seed, so that two processes with the same size and seed have the same digest.

use std::sync::Arc;

use axum::{Json, Router, routing::post};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

/// Bytes in a MiB.
const MIB: usize = 1 << 20;

/// The environment variable that gives the size in MiB.
pub const SIZE_VARIABLE: &str = "BALLAST_MIB";

/// What `POST /ballast/digest` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BallastDigest {
    /// Size in MiB.
    pub mib: usize,
    /// XXH3, 128 bits, of all bytes, in hexadecimal.
    pub digest: String,
}

/// Resident memory of a fixed size and content.
#[derive(Debug)]
pub struct Ballast {
    bytes: Vec<u8>,
}

impl Ballast {
    /// Makes `mib` MiB of pseudo-random bytes.
    pub fn new(mib: usize, seed: u64) -> Self {
        let mut bytes = vec![0_u8; mib * MIB];
        let mut state = seed;
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&split_mix(&mut state).to_le_bytes());
        }
        Self { bytes }
    }

    /// Reads every byte and gives their digest.
    pub fn digest(&self) -> BallastDigest {
        BallastDigest { mib: self.bytes.len() / MIB, digest: format!("{:032x}", xxh3_128(&self.bytes)) }
    }
}

/// Pseudo-random bytes, which nothing packs: the same for the same seed.
pub fn noise(length: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&split_mix(&mut seed).to_le_bytes()[..chunk.len()]);
    }
    bytes
}

/// One step of `SplitMix64` (Steele, Lea, Flood 2014): fast, and every seed gives a full period.
pub fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// `POST /ballast/digest`, hashed off the threads that serve requests.
pub fn router(ballast: Arc<Ballast>) -> Router {
    let digest = move || {
        let ballast = Arc::clone(&ballast);
        async move {
            tokio::task::spawn_blocking(move || ballast.digest())
                .await
                .map(Json)
                .map_err(|error| (axum::http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
        }
    };
    Router::new().route("/ballast/digest", post(digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_follows_from_size_and_seed_alone() {
        assert_eq!(Ballast::new(2, 7).digest(), Ballast::new(2, 7).digest());
        assert_ne!(Ballast::new(2, 7).digest(), Ballast::new(2, 8).digest());
        assert_eq!(Ballast::new(2, 7).digest().mib, 2);
    }

    #[test]
    fn a_single_changed_bit_changes_the_digest() {
        let mut ballast = Ballast::new(1, 1);
        let before = ballast.digest();
        ballast.bytes[MIB / 2] ^= 1;
        assert_ne!(ballast.digest(), before);
    }
}
