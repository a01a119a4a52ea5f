//! Writes and reads in Redis over one connection with many requests under way: how much gets done counts, not how long an answer takes.
//!
//! Every answer is known when it is asked for, because a client is alone with its keys and Redis keeps the order of a connection.
//! So an answer is bytes to be compared, and no driver takes them apart: this client shares its machine with what it measures.

use std::{
    collections::VecDeque,
    io::Write,
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::{Buf, BytesMut};
use podferry_workloads::ballast::split_mix;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Client, Fault};

/// How many keys a client writes and reads, in no order: those of four clients make Redis write to some 10 MiB of its memory all over.
const KEYS: usize = 10_000;
/// Bytes of a value.
const VALUE_BYTES: usize = 128;
/// Room for answers that have come.
const INPUT_BYTES: usize = 64 << 10;
/// How much of a wrong answer is told.
const EXCERPT_BYTES: usize = 80;

/// What Redis was asked. A value of 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Set { key: usize, value: u64 },
    Get { key: usize, value: u64 },
    Delete { key: usize },
}

impl Request {
    /// In Redis's protocol (RESP).
    fn encode(self, keys: &[String], output: &mut Vec<u8>) {
        let (verb, key, value) = match self {
            Self::Set { key, value } => ("SET", key, Some(value)),
            Self::Get { key, .. } => ("GET", key, None),
            Self::Delete { key } => ("DEL", key, None),
        };
        let (words, key) = (2 + usize::from(value.is_some()), &keys[key]);
        append(output, format_args!("*{words}\r\n$3\r\n{verb}\r\n${}\r\n{key}\r\n", key.len()));
        if let Some(value) = value {
            bulk(output, value);
        }
    }

    /// The only right answer.
    fn answer(self, output: &mut Vec<u8>) {
        output.clear();
        match self {
            Self::Set { .. } => output.extend(b"+OK\r\n"),
            Self::Get { value: 0, .. } => output.extend(b"$-1\r\n"),
            Self::Get { value, .. } => bulk(output, value),
            Self::Delete { .. } => output.extend(b":1\r\n"),
        }
    }

    fn fault(self, came: &[u8]) -> Fault {
        let came = String::from_utf8_lossy(&came[..came.len().min(EXCERPT_BYTES)]);
        let what = format!("{self:?} answered {:?}", came.trim_end());
        if matches!(self, Self::Set { .. }) { Fault::Wrong(what) } else { Fault::Lost { items: 1, what } }
    }
}

fn bulk(output: &mut Vec<u8>, value: u64) {
    append(output, format_args!("${VALUE_BYTES}\r\n{value:0>VALUE_BYTES$}\r\n"));
}

fn append(output: &mut Vec<u8>, text: std::fmt::Arguments) {
    // Writing into a vector cannot fail.
    let _ = output.write_fmt(text);
}

/// How long the first answer is, once its first line is there: a line, or the text whose length it is.
fn answer_length(input: &[u8]) -> Option<usize> {
    let line = input.iter().position(|byte| *byte == b'\n')? + 1;
    let text = input.strip_prefix(b"$").and_then(|rest| std::str::from_utf8(&rest[..line - 1]).ok());
    let length = text.and_then(|digits| digits.trim_end().parse::<usize>().ok());
    Some(length.map_or(line, |length| line + length + 2))
}

#[derive(Debug)]
pub(super) struct PipelineClient {
    target: SocketAddr,
    stream: Option<TcpStream>,
    depth: usize,
    keys: Vec<String>,
    /// What each key was last set to.
    values: Vec<u64>,
    sets: u64,
    random: u64,
    /// Keys that were being set when the connection broke. They are set anew.
    doubtful: Vec<usize>,
    under_way: VecDeque<Request>,
    output: Vec<u8>,
    input: BytesMut,
    expected: Vec<u8>,
    answers: u64,
}

impl PipelineClient {
    pub(super) fn new(target: SocketAddr, number: u32, depth: usize) -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        Self {
            target,
            stream: None,
            depth,
            keys: (0..KEYS).map(|key| format!("load:{number}:{started}:{key}")).collect(),
            values: vec![0; KEYS],
            sets: 0,
            random: u64::from(number),
            doubtful: Vec::new(),
            under_way: VecDeque::new(),
            output: Vec::new(),
            input: BytesMut::with_capacity(INPUT_BYTES),
            expected: Vec::new(),
            answers: 0,
        }
    }

    /// As many writes as reads.
    fn choose(&mut self) -> Request {
        if let Some(key) = self.doubtful.pop() {
            return self.set(key);
        }
        let random = split_mix(&mut self.random);
        let key = usize::try_from(random >> 32).unwrap_or(0) % KEYS;
        if random.is_multiple_of(2) { self.set(key) } else { Request::Get { key, value: self.values[key] } }
    }

    fn set(&mut self, key: usize) -> Request {
        self.sets += 1;
        self.values[key] = self.sets;
        Request::Set { key, value: self.sets }
    }

    fn ask(&mut self, request: Request) {
        request.encode(&self.keys, &mut self.output);
        self.under_way.push_back(request);
    }

    /// Many requests cross in one packet, as few packets would be filled by one for each answer.
    fn fill(&mut self) {
        if self.under_way.len() > self.depth / 2 {
            return;
        }
        while self.under_way.len() < self.depth {
            let request = self.choose();
            self.ask(request);
        }
    }

    fn stream(&mut self) -> Result<&mut TcpStream, Fault> {
        self.stream.as_mut().ok_or_else(|| Fault::Broken("not connected".to_owned()))
    }

    async fn send(&mut self) -> Result<(), Fault> {
        let output = std::mem::take(&mut self.output);
        self.stream()?.write_all(&output).await.map_err(|error| Fault::Broken(error.to_string()))?;
        self.output = output;
        self.output.clear();
        Ok(())
    }

    /// Waits for at least one answer, if any is due, and compares all that have come.
    async fn receive(&mut self) -> Result<(), Fault> {
        let before = self.answers;
        loop {
            self.compare()?;
            if self.answers > before || self.under_way.is_empty() {
                return Ok(());
            }
            let Self { stream, input, .. } = self;
            let stream = stream.as_mut().ok_or_else(|| Fault::Broken("not connected".to_owned()))?;
            let read = stream.read_buf(input).await.map_err(|error| Fault::Broken(error.to_string()))?;
            if read == 0 {
                return Err(Fault::Broken("the connection was closed".to_owned()));
            }
        }
    }

    fn compare(&mut self) -> Result<(), Fault> {
        while let Some(length) = answer_length(&self.input).filter(|length| *length <= self.input.len()) {
            let Some(request) = self.under_way.pop_front() else {
                return Err(Fault::Broken("an answer came that nobody asked for".to_owned()));
            };
            request.answer(&mut self.expected);
            let right = self.input[..length] == self.expected[..];
            let fault = (!right).then(|| request.fault(&self.input[..length]));
            self.input.advance(length);
            match fault {
                Some(fault) => return Err(fault),
                None => self.answers += 1,
            }
        }
        Ok(())
    }

    /// Asks all of these and waits for the answers. What is wrong is noted; a broken connection ends it.
    async fn ask_all(&mut self, requests: Vec<Request>, faults: &mut Vec<Fault>) {
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() || !self.under_way.is_empty() {
            let room = self.depth.saturating_sub(self.under_way.len());
            requests.by_ref().take(room).for_each(|request| self.ask(request));
            let outcome = match self.send().await {
                Ok(()) => self.receive().await,
                broken => broken,
            };
            let Err(fault) = outcome else { continue };
            let broken = matches!(fault, Fault::Broken(_));
            faults.push(fault);
            if broken {
                return;
            }
        }
    }
}

impl Client for PipelineClient {
    async fn connect(&mut self) -> Result<(), Fault> {
        let broken = |error: std::io::Error| Fault::Broken(format!("cannot connect: {error}"));
        let stream = TcpStream::connect(self.target).await.map_err(broken)?;
        stream.set_nodelay(true).map_err(broken)?;
        self.stream = Some(stream);
        self.output.clear();
        self.input.clear();
        let unanswered = self.under_way.drain(..).filter_map(|request| match request {
            Request::Set { key, .. } => Some(key),
            Request::Get { .. } | Request::Delete { .. } => None,
        });
        self.doubtful.extend(unanswered);
        Ok(())
    }

    async fn step(&mut self) -> Result<(), Fault> {
        self.answers = 0;
        self.fill();
        self.send().await?;
        self.receive().await
    }

    /// Looks at every key, and takes them away, so that the digest is again what it was before.
    async fn finish(&mut self) -> Vec<Fault> {
        let mut faults = Vec::new();
        let doubtful = std::mem::take(&mut self.doubtful);
        let sets = doubtful.into_iter().map(|key| self.set(key)).collect();
        self.ask_all(sets, &mut faults).await;
        let values = || self.values.iter().copied().enumerate();
        let gets = values().map(|(key, value)| Request::Get { key, value }).collect();
        let deletes = values().filter(|(_, value)| *value > 0).map(|(key, _)| Request::Delete { key }).collect();
        self.ask_all(gets, &mut faults).await;
        self.ask_all(deletes, &mut faults).await;
        faults
    }

    fn is_paced(&self) -> bool {
        false
    }

    fn answers(&self) -> u64 {
        self.answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(depth: usize) -> PipelineClient {
        PipelineClient::new(SocketAddr::from(([127, 0, 0, 1], 1)), 0, depth)
    }

    fn answer(request: Request) -> Vec<u8> {
        let mut bytes = Vec::new();
        request.answer(&mut bytes);
        bytes
    }

    #[test]
    fn requests_are_what_redis_understands() {
        let mut bytes = Vec::new();
        Request::Get { key: 0, value: 7 }.encode(&["k".to_owned()], &mut bytes);
        assert_eq!(bytes, b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n");
        bytes.clear();
        Request::Set { key: 0, value: 7 }.encode(&["k".to_owned()], &mut bytes);
        let value = format!("{}7", "0".repeat(127));
        assert_eq!(bytes, format!("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$128\r\n{value}\r\n").into_bytes());
    }

    #[test]
    fn an_answer_is_as_long_as_it_says() {
        for whole in ["+OK\r\n", "$-1\r\n", ":1\r\n", "-ERR no\r\n", "$3\r\na\r\n\r\n"] {
            assert_eq!(answer_length(format!("{whole}+OK\r\n").as_bytes()), Some(whole.len()), "{whole:?}");
        }
        assert_eq!(answer_length(b"$12"), None);
        assert_eq!(answer_length(b"$12\r\nabc"), Some(19), "more than is there yet");
    }

    #[test]
    fn the_pipeline_is_filled_when_half_of_it_is_answered() {
        let mut client = client(8);
        client.fill();
        assert_eq!(client.under_way.len(), 8);
        client.under_way.drain(..3);
        client.fill();
        assert_eq!(client.under_way.len(), 5);
        client.under_way.drain(..1);
        client.fill();
        assert_eq!(client.under_way.len(), 8);
    }

    #[test]
    fn answers_are_compared_however_they_come() {
        let mut client = client(16);
        client.fill();
        let all: Vec<u8> = client.under_way.iter().flat_map(|request| answer(*request)).collect();
        for byte in &all {
            client.input.extend([*byte]);
            client.compare().unwrap();
        }
        assert_eq!((client.answers, client.under_way.len(), client.input.len()), (16, 0, 0));
    }

    #[test]
    fn a_wrong_answer_is_told_and_the_next_is_looked_at_all_the_same() {
        let mut client = client(4);
        for request in
            [Request::Get { key: 1, value: 9 }, Request::Set { key: 1, value: 10 }, Request::Get { key: 1, value: 10 }]
        {
            client.ask(request);
        }
        client.input.extend(b"$-1\r\n-OOM\r\n");
        client.input.extend(answer(Request::Get { key: 1, value: 10 }));
        assert!(matches!(client.compare(), Err(Fault::Lost { items: 1, .. })));
        assert!(matches!(client.compare(), Err(Fault::Wrong(what)) if what.contains("OOM")));
        assert_eq!((client.compare(), client.answers), (Ok(()), 1));
        client.input.extend(b"+OK\r\n");
        assert!(matches!(client.compare(), Err(Fault::Broken(_))), "that nobody asked for");
    }
}
