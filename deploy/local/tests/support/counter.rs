//! One connection to Redis that counts up without a pause and checks every answer.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use podferry_local::FIRST_CONTAINER_ADDRESS;

use super::{Line, Stage, redis, redis_address};

type Job = Box<dyn FnOnce(&mut Line, u64) + Send>;

/// One connection that counts up without a pause and checks every answer.
pub(crate) struct Counter {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<(u64, Duration)>>,
}

impl Counter {
    /// Starts a Redis with so many values of 1000 bytes on the first node of a stage, and counts on it.
    pub(crate) fn on_redis(stage: &Stage, values: usize) -> Self {
        stage.start(&redis("redis", FIRST_CONTAINER_ADDRESS));
        let mut line = stage.connect(redis_address());
        assert_eq!(line.ask(&format!("DEBUG POPULATE {values} key 1000")), "+OK");
        assert_eq!(line.ask("SET counter 0"), "+OK");
        Self::start(line)
    }

    /// Counts on from 0, which the key `counter` must hold.
    pub(crate) fn start(line: Line) -> Self {
        let (jobs, inbox) = mpsc::channel();
        Self { jobs: Some(jobs), thread: Some(thread::spawn(move || count(line, &inbox))) }
    }

    /// Does something with the connection between two increments; the closure is told the counter.
    pub(crate) fn between<T: Send + 'static>(&self, job: impl FnOnce(&mut Line, u64) -> T + Send + 'static) -> T {
        let (sender, receiver) = mpsc::channel();
        let job: Job = Box::new(move |line, counted| drop(sender.send(job(line, counted))));
        self.jobs.as_ref().unwrap().send(job).unwrap_or_else(|_| panic!("the counting connection broke"));
        receiver.recv().expect("the counting connection broke")
    }

    /// How far it came, and the longest that one answer took.
    pub(crate) fn stop(mut self) -> (u64, Duration) {
        self.jobs.take();
        self.thread.take().unwrap().join().expect("the counting connection broke")
    }
}

fn count(mut line: Line, inbox: &Receiver<Job>) -> (u64, Duration) {
    let (mut counted, mut longest) = (0, Duration::ZERO);
    loop {
        match inbox.try_recv() {
            Ok(job) => job(&mut line, counted),
            Err(mpsc::TryRecvError::Disconnected) => return (counted, longest),
            Err(mpsc::TryRecvError::Empty) => {}
        }
        let asked = Instant::now();
        let answer = line.ask("INCR counter");
        longest = longest.max(asked.elapsed());
        counted += 1;
        assert_eq!(answer, format!(":{counted}"), "an increment was lost or done twice");
    }
}

/// Redis's digest of all its data with the counter at 0; the counter is put back.
pub(crate) fn digest(line: &mut Line, counted: u64) -> String {
    let stored = line.ask_bulk("GET counter");
    assert!(counted == 0 || stored == counted.to_string(), "{stored} instead of {counted}");
    assert_eq!(line.ask("SET counter 0"), "+OK");
    let digest = line.ask("DEBUG DIGEST");
    assert_eq!(line.ask(&format!("SET counter {counted}")), "+OK");
    digest
}
