//! Reads the shopping cart's feed: one long-lived connection on which every number has to come, once, in order.

use std::net::SocketAddr;

use http::{Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use podferry_workloads::cart::{LOST_EVENT, Tick};

use super::{
    Client, Fault,
    connection::{Connection, chain},
    sse::{SseEvent, SseParser},
};

const PATH: &str = "/feed";

#[derive(Debug)]
pub(super) struct FeedClient {
    target: SocketAddr,
    stream: Option<(Connection, Incoming)>,
    parser: SseParser,
    last: Option<Tick>,
}

impl FeedClient {
    pub(super) fn new(target: SocketAddr) -> Self {
        Self { target, stream: None, parser: SseParser::default(), last: None }
    }

    async fn next_event(&mut self) -> Result<SseEvent, Fault> {
        let broken = |what: String| Fault::Broken(format!("{PATH}: {what}"));
        loop {
            if let Some(event) = self.parser.next_event() {
                return Ok(event);
            }
            let (_, body) = self.stream.as_mut().ok_or_else(|| broken("not connected".to_owned()))?;
            let frame = body.frame().await.ok_or_else(|| broken("the stream ended".to_owned()))?;
            let frame = frame.map_err(|error| broken(chain(&error)))?;
            if let Some(data) = frame.data_ref() {
                self.parser.push(data);
            }
        }
    }
}

/// Whether `event` is the one that has to follow `last`; the tick it carries.
fn check(last: Option<Tick>, event: &SseEvent) -> Result<Tick, Fault> {
    if event.event == LOST_EVENT {
        let items = event.data.parse().unwrap_or(1);
        return Err(Fault::Lost { items, what: format!("the service says that {items} ticks were dropped") });
    }
    let wrong = || Fault::Wrong(format!("{PATH}: {event:?}"));
    let tick: Tick = serde_json::from_str(&event.data).map_err(|_| wrong())?;
    if event.id != tick.tick.to_string() || last.is_some_and(|last| tick.orders < last.orders) {
        return Err(wrong());
    }
    Ok(tick)
}

/// How many ticks are missing or doubled between two that came after each other.
fn missing(last: Tick, tick: Tick) -> u64 {
    tick.tick.abs_diff(last.tick + 1)
}

impl Client for FeedClient {
    async fn connect(&mut self) -> Result<(), Fault> {
        let mut connection = Connection::open(self.target).await?;
        let response = connection.send(Method::GET, PATH, &[], Bytes::new()).await?;
        if response.status() != StatusCode::OK {
            return Err(Fault::Wrong(format!("{PATH}: {}", response.status())));
        }
        self.parser = SseParser::default();
        self.stream = Some((connection, response.into_body()));
        Ok(())
    }

    async fn step(&mut self) -> Result<(), Fault> {
        let event = self.next_event().await?;
        let tick = check(self.last, &event)?;
        let last = self.last.replace(tick);
        match last.map_or(0, |last| missing(last, tick)) {
            0 => Ok(()),
            items => Err(Fault::Lost { items, what: format!("{PATH}: tick {} after {last:?}", tick.tick) }),
        }
    }

    async fn finish(&mut self) -> Vec<Fault> {
        Vec::new()
    }

    fn is_paced(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, data: &str) -> SseEvent {
        SseEvent { event: String::new(), id: id.to_owned(), data: data.to_owned() }
    }

    fn tick(tick: u64, orders: u64) -> Tick {
        Tick { tick, orders }
    }

    #[test]
    fn an_event_has_to_be_what_it_says() {
        assert_eq!(check(None, &event("5", r#"{"tick":5,"orders":1}"#)), Ok(tick(5, 1)));
        assert!(check(None, &event("6", r#"{"tick":5,"orders":1}"#)).is_err());
        assert!(check(None, &event("5", "{}")).is_err());
        assert!(check(Some(tick(4, 2)), &event("5", r#"{"tick":5,"orders":1}"#)).is_err());
        let lost = SseEvent { event: LOST_EVENT.to_owned(), id: String::new(), data: "12".to_owned() };
        assert!(matches!(check(None, &lost), Err(Fault::Lost { items: 12, .. })));
    }

    #[test]
    fn skipped_and_repeated_ticks_are_counted() {
        assert_eq!(missing(tick(4, 0), tick(5, 0)), 0);
        assert_eq!(missing(tick(4, 0), tick(8, 0)), 3);
        assert_eq!(missing(tick(4, 0), tick(4, 0)), 1);
        assert_eq!(missing(tick(9, 0), tick(1, 0)), 9);
    }
}
