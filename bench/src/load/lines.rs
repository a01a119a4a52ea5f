//! Counts and checks over one connection, line by line, as `podferry-hard-load` and the services of other languages answer.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::{Client, Fault};

/// One request in so many is a check, the others count.
const CHECK_EVERY: u64 = 4;

#[derive(Debug)]
pub(super) struct LineClient {
    target: SocketAddr,
    connection: Option<BufReader<TcpStream>>,
    steps: u64,
    /// The last number that came. None yet: others may have counted before.
    counted: Option<u64>,
    /// Whether nobody else counts. Otherwise numbers only have to grow: one that is lost among those of others is not seen, one that comes
    /// twice to this client is.
    is_alone: bool,
    /// Whether the answer to a count is missing: it may or may not have been counted.
    doubtful: bool,
}

impl LineClient {
    pub(super) fn new(target: SocketAddr, is_alone: bool) -> Self {
        Self { target, connection: None, steps: 0, counted: None, is_alone, doubtful: false }
    }

    async fn ask(&mut self, question: &str) -> Result<String, Fault> {
        let broken = |what: String| Fault::Broken(format!("{question}: {what}"));
        let connection = self.connection.as_mut().ok_or_else(|| broken("not connected".to_owned()))?;
        let line = format!("{question}\n");
        connection.get_mut().write_all(line.as_bytes()).await.map_err(|error| broken(error.to_string()))?;
        let mut answer = String::new();
        let read = connection.read_line(&mut answer).await.map_err(|error| broken(error.to_string()))?;
        if read == 0 { Err(broken("the connection was closed".to_owned())) } else { Ok(answer.trim().to_owned()) }
    }

    async fn count(&mut self) -> Result<(), Fault> {
        let doubtful = std::mem::replace(&mut self.doubtful, true);
        let answer = self.ask("count").await?;
        self.doubtful = false;
        self.compare(&answer, doubtful)
    }

    fn compare(&mut self, answer: &str, doubtful: bool) -> Result<(), Fault> {
        let came: u64 = answer.parse().map_err(|_| Fault::Wrong(format!("count: {answer}")))?;
        let Some(last) = self.counted.replace(came) else { return Ok(()) };
        let expected = last + 1;
        let others = !self.is_alone && came > expected;
        if came == expected || others || doubtful && came == expected + 1 {
            return Ok(());
        }
        Err(Fault::Lost { items: came.abs_diff(expected), what: format!("{came} where {expected} was due") })
    }

    async fn check(&mut self, question: &str) -> Result<(), Fault> {
        match self.ask(question).await?.as_str() {
            "ok" => Ok(()),
            other => Err(Fault::Wrong(format!("{question}: {other}"))),
        }
    }
}

impl Client for LineClient {
    async fn connect(&mut self) -> Result<(), Fault> {
        let broken = |error: std::io::Error| Fault::Broken(format!("cannot connect to {}: {error}", self.target));
        let stream = TcpStream::connect(self.target).await.map_err(broken)?;
        stream.set_nodelay(true).map_err(broken)?;
        self.connection = Some(BufReader::new(stream));
        Ok(())
    }

    async fn step(&mut self) -> Result<(), Fault> {
        self.steps += 1;
        if self.steps.is_multiple_of(CHECK_EVERY) { self.check("check").await } else { self.count().await }
    }

    async fn finish(&mut self) -> Vec<Fault> {
        self.check("check-all").await.err().into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn client() -> LineClient {
        LineClient::new(SocketAddr::from(([127, 0, 0, 1], 1)), true)
    }

    #[test]
    fn every_number_has_to_come_once() {
        let mut client = client();
        assert_eq!(client.compare("7", false), Ok(()), "whatever it is at first");
        assert_eq!(client.compare("8", false), Ok(()));
        assert!(matches!(client.compare("8", false), Err(Fault::Lost { items: 1, .. })));
        assert!(matches!(client.compare("12", false), Err(Fault::Lost { items: 3, .. })));
        assert!(matches!(client.compare("x", false), Err(Fault::Wrong(_))));
    }

    #[test]
    fn among_others_numbers_have_to_grow() {
        let mut client = LineClient { is_alone: false, ..client() };
        for came in ["7", "8", "15"] {
            assert_eq!(client.compare(came, false), Ok(()));
        }
        assert!(matches!(client.compare("15", false), Err(Fault::Lost { items: 1, .. })));
    }

    #[test]
    fn after_a_break_the_last_count_may_have_been_counted_or_not() {
        for came in ["6", "7"] {
            let mut client = LineClient { counted: Some(5), ..client() };
            assert_eq!(client.compare(came, true), Ok(()));
        }
        let mut client = LineClient { counted: Some(5), ..client() };
        assert!(client.compare("8", true).is_err());
    }

    #[tokio::test]
    async fn wrong_memory_and_a_closed_connection_are_faults() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = LineClient::new(listener.local_addr().unwrap(), true);
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut lines = BufReader::new(stream);
            for answer in ["1\n", "ok\n", "wrong: 1 pages\n"] {
                lines.read_line(&mut String::new()).await.unwrap();
                lines.get_mut().write_all(answer.as_bytes()).await.unwrap();
            }
        });
        client.connect().await.unwrap();
        client.count().await.unwrap();
        client.check("check").await.unwrap();
        assert!(matches!(client.check("check").await, Err(Fault::Wrong(what)) if what.contains("wrong: 1 pages")));
        server.await.unwrap();
        assert!(matches!(client.count().await, Err(Fault::Broken(_))));
    }
}
