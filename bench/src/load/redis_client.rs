//! Counts, writes and reads in Redis over one connection.

use std::{
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use redis::{AsyncCommands, AsyncConnectionConfig, Client as Server, RedisError, aio::MultiplexedConnection};

use super::{ANSWER_DEADLINE, Client, Fault};

/// How many keys a client writes to, one after the other.
const KEYS: u64 = 64;

/// Opens a connection that is not opened again when it breaks.
///
/// The driver's own deadline for an answer, half a second, is shorter than a migration may take: ours stands in its
/// place.
pub(super) async fn open(target: SocketAddr) -> Result<MultiplexedConnection, RedisError> {
    let config = AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(Some(ANSWER_DEADLINE));
    Server::open(format!("redis://{target}"))?.get_multiplexed_async_connection_with_config(&config).await
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Write {
    None,
    Increment,
    Set(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Increment,
    Set(u64),
    Get(u64),
}

pub(super) struct RedisClient {
    target: SocketAddr,
    connection: Option<MultiplexedConnection>,
    prefix: String,
    steps: u64,
    counter: u64,
    /// What each key was last set to; 0 before the first time.
    values: Vec<u64>,
    /// A write whose answer never came: it may or may not have been carried out.
    doubtful: Write,
}

impl RedisClient {
    pub(super) fn new(target: SocketAddr, number: u32) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        Self {
            target,
            connection: None,
            prefix: format!("load:{number}:{started}"),
            steps: 0,
            counter: 0,
            values: vec![0; usize::try_from(KEYS).unwrap_or(0)],
            doubtful: Write::None,
        }
    }

    fn connection(&self) -> Result<MultiplexedConnection, Fault> {
        self.connection.clone().ok_or_else(|| Fault::Broken("not connected".to_owned()))
    }

    fn counter_key(&self) -> String {
        format!("{}:counter", self.prefix)
    }

    fn key(&self, index: u64) -> String {
        format!("{}:{index}", self.prefix)
    }

    fn value(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|index| self.values.get(index)).copied().unwrap_or(0)
    }

    /// Two increments, a write, and a read of a key that was written a while ago.
    fn choose(&self) -> Action {
        let round = self.steps / 4;
        match self.steps % 4 {
            0 | 1 => Action::Increment,
            2 => Action::Set(round % KEYS),
            _ => Action::Get((round + KEYS / 2) % KEYS),
        }
    }

    async fn increment(&mut self) -> Result<(), Fault> {
        self.doubtful = Write::Increment;
        let came: u64 = self.connection()?.incr(self.counter_key(), 1).await.map_err(fault)?;
        self.doubtful = Write::None;
        let expected = self.counter + 1;
        self.counter = came;
        if came == expected {
            return Ok(());
        }
        Err(lost(came.abs_diff(expected), format!("counter {came} where {expected} was due")))
    }

    async fn set(&mut self, index: u64) -> Result<(), Fault> {
        self.doubtful = Write::Set(index);
        let value = self.steps;
        let answer: String = self.connection()?.set(self.key(index), content(value)).await.map_err(fault)?;
        self.doubtful = Write::None;
        if let Some(slot) = usize::try_from(index).ok().and_then(|index| self.values.get_mut(index)) {
            *slot = value;
        }
        if answer == "OK" { Ok(()) } else { Err(Fault::Wrong(format!("SET answered {answer}"))) }
    }

    async fn get(&mut self, index: u64) -> Result<(), Fault> {
        let came: Option<String> = self.connection()?.get(self.key(index)).await.map_err(fault)?;
        let value = self.value(index);
        let expected = (value > 0).then(|| content(value));
        if came == expected {
            return Ok(());
        }
        Err(lost(1, format!("key {index} is {came:?} instead of {expected:?}")))
    }

    /// Finds out after a broken connection whether the write in doubt was carried out. Either is right, once.
    async fn settle(&mut self) -> Result<(), Fault> {
        match std::mem::replace(&mut self.doubtful, Write::None) {
            Write::None => {}
            Write::Increment => {
                let came: Option<u64> = self.connection()?.get(self.counter_key()).await.map_err(fault)?;
                let came = came.unwrap_or(0);
                if came == self.counter + 1 {
                    self.counter = came;
                }
            }
            // Back to what it was, which may be nothing.
            Write::Set(index) => match self.value(index) {
                0 => self.connection()?.del(self.key(index)).await.map_err(fault)?,
                value => self.connection()?.set(self.key(index), content(value)).await.map_err(fault)?,
            },
        }
        Ok(())
    }

    /// Takes the client's keys away, so that the digest is again what it was before.
    async fn clean(&mut self) -> Result<(), Fault> {
        let written = (0..KEYS).filter(|index| self.value(*index) > 0).map(|index| self.key(index));
        let mut keys: Vec<String> = written.collect();
        if self.counter > 0 {
            keys.push(self.counter_key());
        }
        if keys.is_empty() {
            return Ok(());
        }
        let expected = keys.len() as u64;
        let came: u64 = self.connection()?.del(keys).await.map_err(fault)?;
        if came == expected { Ok(()) } else { Err(lost(expected.abs_diff(came), format!("{came} of {expected} keys"))) }
    }

    async fn check_counter(&mut self) -> Result<(), Fault> {
        let came: Option<u64> = self.connection()?.get(self.counter_key()).await.map_err(fault)?;
        let (came, expected) = (came.unwrap_or(0), self.counter);
        if came == expected {
            return Ok(());
        }
        Err(lost(came.abs_diff(expected), format!("counter {came} at the end where {expected} was due")))
    }
}

/// What a key is set to: longer than what Redis stores inside its object header.
fn content(value: u64) -> String {
    format!("{value:0>100}")
}

fn lost(items: u64, what: String) -> Fault {
    Fault::Lost { items, what }
}

#[expect(clippy::needless_pass_by_value, reason = "made for `map_err`")]
fn fault(error: RedisError) -> Fault {
    let dead = error.is_connection_dropped() || error.is_unrecoverable_error() || error.is_io_error();
    let what = super::connection::chain(&error);
    if dead { Fault::Broken(what) } else { Fault::Wrong(what) }
}

impl Client for RedisClient {
    async fn connect(&mut self) -> Result<(), Fault> {
        self.connection = Some(open(self.target).await.map_err(fault)?);
        self.settle().await
    }

    async fn step(&mut self) -> Result<(), Fault> {
        self.steps += 1;
        match self.choose() {
            Action::Increment => self.increment().await,
            Action::Set(index) => self.set(index).await,
            Action::Get(index) => self.get(index).await,
        }
    }

    async fn finish(&mut self) -> Vec<Fault> {
        let mut faults = Vec::new();
        faults.extend(self.check_counter().await.err());
        for index in 0..KEYS {
            faults.extend(self.get(index).await.err());
        }
        faults.extend(self.clean().await.err());
        faults
    }
}
