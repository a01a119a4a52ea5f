//! Inserts, updates and reads in `PostgreSQL` over one connection.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use podferry_workloads::ballast::split_mix;
use thiserror::Error as ThisError;
use tokio::task::JoinHandle;
use tokio_postgres::{Config, NoTls, error::SqlState};

use super::{CONNECT_DEADLINE, CONNECT_PAUSE, Client, Fault, connection::chain};

/// Rows of the ballast: with their 960 bytes each they fill about 450 MiB of shared buffers.
const ROWS: i32 = 430_000;
/// One row in so many has its content looked at in the end: to make all of them again would take a minute.
const SHARE: i32 = 20;
/// What a row holds, by its number.
const PAYLOAD: &str = "(SELECT string_agg(md5(id || ':' || part), '') FROM generate_series(1, 30) part)";

/// An open connection, which is not opened again when it breaks.
#[derive(Debug)]
struct Session {
    client: tokio_postgres::Client,
    driver: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

async fn open(target: SocketAddr) -> Result<Session, tokio_postgres::Error> {
    let mut config = Config::new();
    config.host(target.ip().to_string()).port(target.port()).user("postgres").dbname("postgres");
    let (client, connection) = config.connect(NoTls).await?;
    // Its outcome reaches whoever waits for an answer.
    let driver = tokio::spawn(async move { drop(connection.await) });
    Ok(Session { client, driver })
}

/// As [`open`]. A server that listens may still be starting, and then says so.
async fn open_when_ready(target: SocketAddr) -> Result<Session, tokio_postgres::Error> {
    let since = Instant::now();
    loop {
        match open(target).await {
            Err(error) if error.code() == Some(&SqlState::CANNOT_CONNECT_NOW) && since.elapsed() < CONNECT_DEADLINE => {
                tokio::time::sleep(CONNECT_PAUSE).await;
            }
            other => return other,
        }
    }
}

/// Why the tables could not be made.
#[derive(Debug, ThisError)]
#[error("PostgreSQL at {target}: cannot make its tables: {}", chain(source))]
pub struct FillError {
    /// Where it listens.
    pub target: SocketAddr,
    /// What it or the system said.
    pub source: tokio_postgres::Error,
}

/// Makes the tables and reads all of them into the shared buffers.
pub async fn fill(target: SocketAddr) -> Result<(), FillError> {
    let statements = format!(
        "CREATE EXTENSION amcheck; CREATE EXTENSION pg_prewarm;
         CREATE TABLE log (client text, number bigint, PRIMARY KEY (client, number));
         CREATE TABLE ballast (id int PRIMARY KEY, generation bigint NOT NULL, payload text NOT NULL);
         ALTER TABLE ballast ALTER payload SET STORAGE PLAIN;
         INSERT INTO ballast SELECT id, 0, {PAYLOAD} FROM generate_series(1, {ROWS}) id;
         CHECKPOINT; SELECT pg_prewarm('ballast'); SELECT pg_prewarm('ballast_pkey');"
    );
    let failed = |source| FillError { target, source };
    let session = open_when_ready(target).await.map_err(failed)?;
    session.client.batch_execute(&statements).await.map_err(failed)
}

#[derive(Debug)]
pub(super) struct SqlClient {
    target: SocketAddr,
    session: Option<Session>,
    name: String,
    random: u64,
    /// The last number that was confirmed.
    inserted: i64,
    /// Generations of the rows of the ballast that were confirmed to this client, which is the only one.
    generations: HashMap<i32, i64>,
    steps: u64,
}

impl SqlClient {
    pub(super) fn new(target: SocketAddr, number: u32) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        Self {
            target,
            session: None,
            name: format!("{number}-{started}"),
            random: u64::from(number),
            inserted: 0,
            generations: HashMap::new(),
            steps: 0,
        }
    }

    fn session(&self) -> Result<&tokio_postgres::Client, Fault> {
        self.session.as_ref().map(|session| &session.client).ok_or_else(|| Fault::Broken("not connected".to_owned()))
    }

    async fn insert(&mut self) -> Result<(), Fault> {
        let number = self.inserted + 1;
        // After a break the same number is sent again: it may be there already.
        let text = "INSERT INTO log VALUES ($1, $2) ON CONFLICT DO NOTHING";
        self.session()?.execute(text, &[&self.name, &number]).await.map_err(fault)?;
        self.inserted = number;
        Ok(())
    }

    /// Every number that was confirmed has to be there, once.
    async fn read(&mut self) -> Result<(), Fault> {
        let text = "SELECT count(*), coalesce(max(number), 0) FROM log WHERE client = $1 AND number > $2";
        let since = (self.inserted - 100).max(0);
        let row = self.session()?.query_one(text, &[&self.name, &since]).await.map_err(fault)?;
        let (count, last): (i64, i64) = (row.get(0), row.get(1));
        same("numbers", self.inserted - since, count)?;
        same("last number", self.inserted, last)
    }

    async fn update(&mut self) -> Result<(), Fault> {
        let id = i32::try_from(split_mix(&mut self.random) % u64::from(ROWS.unsigned_abs())).unwrap_or(0) + 1;
        let text = "UPDATE ballast SET generation = generation + 1 WHERE id = $1 RETURNING generation";
        let row = self.session()?.query_one(text, &[&id]).await.map_err(fault)?;
        let came: i64 = row.get(0);
        // Others may have written to it before this client did.
        match self.generations.insert(id, came) {
            Some(before) => same("generation", before + 1, came),
            None => Ok(()),
        }
    }

    /// Every page and index entry for damage, some rows for their content, and every number.
    async fn look_at_everything(&self) -> Result<(), Fault> {
        let session = self.session()?;
        let looked_at =
            format!("SELECT count(*) FILTER (WHERE payload = {PAYLOAD}) FROM ballast WHERE id % {SHARE} = 0");
        let right: i64 = session.query_one(&looked_at, &[]).await.map_err(fault)?.get(0);
        same("rows of the ballast that are right", i64::from(ROWS / SHARE), right)?;
        let checks = "SELECT bt_index_check('ballast_pkey', true); SELECT bt_index_check('log_pkey', true)";
        session.batch_execute(checks).await.map_err(fault)?;
        let damaged = "SELECT count(*) FROM verify_heapam('ballast')";
        same("damages in the ballast", 0, session.query_one(damaged, &[]).await.map_err(fault)?.get(0))?;
        let counted = "SELECT count(*) FROM log WHERE client = $1";
        same("all numbers", self.inserted, session.query_one(counted, &[&self.name]).await.map_err(fault)?.get(0))
    }
}

fn same(what: &str, expected: i64, came: i64) -> Result<(), Fault> {
    let items = came.abs_diff(expected);
    if items == 0 { Ok(()) } else { Err(Fault::Lost { items, what: format!("{what}: {came} instead of {expected}") }) }
}

#[expect(clippy::needless_pass_by_value, reason = "made for `map_err`")]
fn fault(error: tokio_postgres::Error) -> Fault {
    let what = chain(&error);
    // Only an answer of the server has a code: everything else is a connection that is no more.
    if error.code().is_some() { Fault::Wrong(what) } else { Fault::Broken(what) }
}

impl Client for SqlClient {
    async fn connect(&mut self) -> Result<(), Fault> {
        self.session = Some(open(self.target).await.map_err(fault)?);
        // Whether an update whose answer is missing was made, nobody knows.
        self.generations.clear();
        Ok(())
    }

    async fn step(&mut self) -> Result<(), Fault> {
        self.steps += 1;
        match self.steps % 4 {
            0 | 1 => self.insert().await,
            2 => self.update().await,
            _ => self.read().await,
        }
    }

    async fn finish(&mut self) -> Vec<Fault> {
        self.look_at_everything().await.err().into_iter().collect()
    }
}
