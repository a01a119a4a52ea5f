//! The data set that Redis holds while it is migrated, and its digest.
//!
//! The values are pseudo-random and follow from their number, so that any two runs have the same digest and no
//! compression makes the work smaller. `DEBUG DIGEST` needs `enable-debug-command yes` (or `local`, on loopback only).

use std::net::SocketAddr;

use podferry_workloads::ballast::split_mix;
use redis::{Cmd, InfoDict, RedisError, aio::MultiplexedConnection};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::redis_client;

/// Bytes of one value.
pub const VALUE_BYTES: usize = 4096;
/// Values that are written in one go.
const BATCH: u64 = 256;

/// Why the data set could not be made or looked at.
#[derive(Debug, Error)]
#[error("Redis at {target}: cannot {what}: {source}; is it running, with `enable-debug-command yes`?")]
pub struct RedisDataError {
    /// Where Redis listens.
    pub target: SocketAddr,
    /// What was tried.
    pub what: &'static str,
    /// What Redis or the system said.
    pub source: RedisError,
}

/// What Redis holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedisState {
    /// `DEBUG DIGEST`: a digest of all keys and values.
    pub digest: String,
    /// How many keys there are.
    pub keys: u64,
    /// Memory that Redis has allocated, in bytes.
    pub used_bytes: u64,
}

/// Writes `mib` MiB of values, replacing what the same keys held.
pub async fn fill(target: SocketAddr, mib: u64) -> Result<RedisState, RedisDataError> {
    let fail = |what| move |source| RedisDataError { target, what, source };
    let mut connection = redis_client::open(target).await.map_err(fail("connect"))?;
    let values = mib * (1 << 20) / VALUE_BYTES as u64;
    for first in (0..values).step_by(usize::try_from(BATCH).unwrap_or(1)) {
        let mut batch = redis::pipe();
        for number in first..values.min(first + BATCH) {
            batch.set(format!("data:{number}"), value(number)).ignore();
        }
        batch.exec_async(&mut connection).await.map_err(fail("write the data set"))?;
    }
    look(target, &mut connection).await
}

/// Asks for the digest of all that Redis holds.
pub async fn state(target: SocketAddr) -> Result<RedisState, RedisDataError> {
    let fail = |source| RedisDataError { target, what: "connect", source };
    look(target, &mut redis_client::open(target).await.map_err(fail)?).await
}

async fn look(target: SocketAddr, connection: &mut MultiplexedConnection) -> Result<RedisState, RedisDataError> {
    let fail = |what| move |source| RedisDataError { target, what, source };
    let digest = Cmd::new().arg("DEBUG").arg("DIGEST").query_async(connection).await.map_err(fail("ask its digest"))?;
    let keys = Cmd::new().arg("DBSIZE").query_async(connection).await.map_err(fail("count its keys"))?;
    let info: InfoDict =
        Cmd::new().arg("INFO").arg("memory").query_async(connection).await.map_err(fail("ask its memory"))?;
    Ok(RedisState { digest, keys, used_bytes: info.get("used_memory").unwrap_or(0) })
}

fn value(number: u64) -> Vec<u8> {
    let mut state = number;
    (0..VALUE_BYTES / 8).flat_map(|_| split_mix(&mut state).to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_follow_from_their_number() {
        assert_eq!(value(3), value(3));
        assert_ne!(value(3), value(4));
        assert_eq!(value(3).len(), VALUE_BYTES);
    }
}
