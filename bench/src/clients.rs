//! Load generators as processes on the cluster's client side.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::Stdio,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    time::Duration,
};

use podferry_local::{Place, Running};
use serde::de::DeserializeOwned;

use crate::{
    error::{Error, Result},
    load::{Event, Kind, LoadReport, redis_data::RedisState},
};

/// How long the clients may take until each has had an answer.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// How long they may take to end: longer than their last answer, another connection and the final checks take together.
const END_DEADLINE: Duration = Duration::from_secs(60);
/// How long Redis may take to be filled or to digest what it holds.
const DATA_DEADLINE: Duration = Duration::from_secs(300);

/// Clients of one kind that run until they are told to end. Dropping kills them.
#[derive(Debug)]
pub struct LoadProcess {
    running: Running,
    target: SocketAddr,
    kind: Kind,
    lines: Receiver<String>,
}

impl LoadProcess {
    /// Starts the clients and waits until each has had an answer.
    pub fn start(place: &Place, kind: Kind, clients: u32, target: SocketAddr) -> Result<Self> {
        Self::start_with(place, kind, clients, target, &[])
    }

    /// As [`LoadProcess::start`], with further words for `podferry-bench load`.
    pub fn start_with(place: &Place, kind: Kind, clients: u32, target: SocketAddr, words: &[&str]) -> Result<Self> {
        let mut command = place.command(this_program());
        command.arg("load").arg("--kind").arg(name(kind)).args(["--clients", &clients.to_string()]);
        command.args(["--until-stdin-closes", "--target", &target.to_string()]).args(words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut running = place.spawn_command(command)?;
        let (sender, lines) = channel();
        let output = running.child().stdout.take();
        std::thread::spawn(move || {
            let read = output.map(|output| BufReader::new(output).lines().map_while(std::io::Result::ok));
            read.into_iter().flatten().try_for_each(|line| sender.send(line))
        });
        let process = Self { running, target, kind, lines };
        match process.next_event(READY_DEADLINE)? {
            Event::Ready => Ok(process),
            Event::Report(report) => Err(process.fail(&format!("they ended at once: {report:?}"))),
        }
    }

    /// The number of the process that the clients are in.
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// Ends the clients and gives what they saw.
    pub fn stop(mut self) -> Result<LoadReport> {
        drop(self.running.child().stdin.take());
        match self.next_event(END_DEADLINE)? {
            Event::Report(report) => {
                self.running.wait(END_DEADLINE);
                Ok(report)
            }
            Event::Ready => Err(self.fail("they became ready twice")),
        }
    }

    fn next_event(&self, deadline: Duration) -> Result<Event> {
        let line = self.lines.recv_timeout(deadline).map_err(|error| match error {
            RecvTimeoutError::Timeout => self.fail(&format!("nothing was heard of them for {} s", deadline.as_secs())),
            RecvTimeoutError::Disconnected => self.fail("they ended without a report"),
        })?;
        serde_json::from_str(&line).map_err(|error| self.fail(&format!("{error} in {line}")))
    }

    fn fail(&self, problem: &str) -> Error {
        Error::Client {
            what: format!("{} clients", name(self.kind)),
            target: self.target.to_string(),
            problem: problem.to_owned(),
        }
    }
}

/// Fills Redis from the client side.
pub fn fill_redis(place: &Place, target: SocketAddr, mib: u64) -> Result<RedisState> {
    ask(place, target, &["redis-fill", "--mib", &mib.to_string()])
}

/// Asks Redis for its digest from the client side.
pub fn redis_state(place: &Place, target: SocketAddr) -> Result<RedisState> {
    ask(place, target, &["redis-digest"])
}

/// Fills `PostgreSQL` from the client side.
pub fn fill_sql(place: &Place, target: SocketAddr) -> Result<()> {
    ask(place, target, &["sql-fill"])
}

fn ask<T: DeserializeOwned>(place: &Place, target: SocketAddr, arguments: &[&str]) -> Result<T> {
    let mut command = place.command(this_program());
    command.args(arguments).args(["--target", &target.to_string()]);
    let output = podferry_local::command::run_within(&mut command, DATA_DEADLINE)?.success()?;
    serde_json::from_str(&output).map_err(|error| Error::Client {
        what: arguments.join(" "),
        target: target.to_string(),
        problem: format!("{error} in {output}"),
    })
}

/// In tests this process is not the program, which then lies beside it.
fn this_program() -> std::path::PathBuf {
    podferry_local::default_binaries().join("podferry-bench")
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Catalogue => "catalogue",
        Kind::Cart => "cart",
        Kind::Feed => "feed",
        Kind::Redis => "redis",
        Kind::Bulk => "bulk",
        Kind::Pipeline => "pipeline",
        Kind::Lines => "lines",
        Kind::Sql => "sql",
    }
}
