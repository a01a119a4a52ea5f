//! Writes a large value into Redis and reads it again, over one connection: what its way carries, in both directions.

use std::net::SocketAddr;

use podferry_workloads::ballast::noise;
use redis::{AsyncCommands, RedisError, aio::MultiplexedConnection};

use super::{Client, Fault, redis_client};

/// Bytes of a value: an answer takes long enough for nothing but bytes to count.
const VALUE_BYTES: usize = 1 << 20;

pub(super) struct BulkClient {
    target: SocketAddr,
    connection: Option<MultiplexedConnection>,
    key: String,
    value: Vec<u8>,
    reads: bool,
}

impl BulkClient {
    pub(super) fn new(target: SocketAddr, number: u32) -> Self {
        let value = noise(VALUE_BYTES, u64::from(number) + 1);
        Self { target, connection: None, key: format!("bulk:{number}"), value, reads: false }
    }

    fn connection(&self) -> Result<MultiplexedConnection, Fault> {
        self.connection.clone().ok_or_else(|| Fault::Broken("not connected".to_owned()))
    }

    async fn read(&self) -> Result<(), Fault> {
        let came: Vec<u8> = self.connection()?.get(&self.key).await.map_err(|error| broken(&error))?;
        if came == self.value { Ok(()) } else { Err(Fault::Wrong(format!("{} came back as something else", self.key))) }
    }

    async fn write(&self) -> Result<(), Fault> {
        let written: Result<(), _> = self.connection()?.set(&self.key, &self.value).await;
        written.map_err(|error| broken(&error))
    }
}

fn broken(error: &RedisError) -> Fault {
    Fault::Broken(error.to_string())
}

impl Client for BulkClient {
    async fn connect(&mut self) -> Result<(), Fault> {
        self.connection = Some(redis_client::open(self.target).await.map_err(|error| broken(&error))?);
        self.write().await
    }

    async fn step(&mut self) -> Result<(), Fault> {
        self.reads = !self.reads;
        if self.reads { self.read().await } else { self.write().await }
    }

    async fn finish(&mut self) -> Vec<Fault> {
        let gone: Result<(), Fault> = match self.connection() {
            Ok(mut connection) => connection.del(&self.key).await.map_err(|error| broken(&error)),
            Err(fault) => Err(fault),
        };
        gone.err().into_iter().collect()
    }
}
