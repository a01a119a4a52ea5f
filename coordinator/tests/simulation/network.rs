//! The network: it delays, reorders, loses and repeats, and may be cut in either direction.

use podferry_common::FailureCode;
use podferry_coordinator::migration::{Call, Decision};

use crate::coordinator::JobId;
use crate::world::{Event, MS, NODES, Number, SECOND, Time, World};

/// Where a message comes from or goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Coordinator,
    Node(usize),
}

impl Place {
    pub(crate) const fn index(self) -> usize {
        match self {
            Self::Coordinator => NODES,
            Self::Node(node) => node,
        }
    }
}

/// What crosses the network.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Message {
    /// The coordinator calls an agent.
    Request { job: JobId, number: Number, call: Call },
    /// An agent answers, or the connection of that call breaks.
    Answer { job: JobId, result: Result<(), FailureCode> },
    /// The stream of a freeze says that pre-copy has ended,
    Converged { job: JobId },
    /// or that the tasks stand still.
    Frozen { job: JobId },
    /// The coordinator listens to that stream no more.
    HangUp { number: Number, job: JobId },
    /// A sealed part asks how it was decided.
    Ask { number: Number },
    /// The answer.
    Told { number: Number, decision: Decision },
}

/// Which links are cut, counted, by sender and receiver.
#[derive(Debug, Default)]
pub(crate) struct Network {
    pub(crate) cut: [[u8; NODES + 1]; NODES + 1],
    /// When the last word of each stream arrives: what is on one stream stays in order.
    streams: Vec<(JobId, Time)>,
}

impl Network {
    pub(crate) fn is_cut(&self, from: Place, to: Place) -> bool {
        self.cut[from.index()][to.index()] > 0
    }
}

impl World {
    /// Whether two nodes can talk now.
    pub(crate) fn reaches(&self, from: usize, to: usize) -> bool {
        let (from, to) = (Place::Node(from), Place::Node(to));
        !self.network.is_cut(from, to) && !self.network.is_cut(to, from)
    }

    pub(crate) fn latency(&mut self) -> Time {
        if !self.is_calm() && self.rng.u32(..1000) < self.plan.slow_network {
            return self.rng.u64(10 * MS..60 * SECOND);
        }
        self.rng.u64(200..2 * MS)
    }

    /// Gives a message to the network. Who sends learns at most that a connection broke, and perhaps only by waiting.
    pub(crate) fn send(&mut self, from: Place, to: Place, message: Message) {
        if self.network.is_cut(from, to) {
            // TCP repeats it, for a while.
            if self.chance(600) {
                let after = self.rng.u64(200 * MS..20 * SECOND);
                self.schedule(after, Event::Carry { from, to, message });
            } else {
                self.lose(from, to, message);
            }
            return;
        }
        if !self.is_calm() && self.rng.u32(..1000) < self.plan.loss {
            self.lose(from, to, message);
            return;
        }
        let after = self.delay(message);
        self.schedule(after, Event::Arrive { from, to, message });
        let repeats = matches!(message, Message::Request { .. } | Message::Answer { .. } | Message::Told { .. });
        if repeats && !self.is_calm() && self.rng.u32(..1000) < self.plan.twice {
            let later = after + self.rng.u64(MS..30 * SECOND);
            self.say(|| format!("  (the network repeats {message:?} in {} ms)", later / MS));
            self.schedule(later, Event::Arrive { from, to, message });
        }
    }

    fn delay(&mut self, message: Message) -> Time {
        let after = self.latency();
        let (Message::Answer { job, .. } | Message::Converged { job } | Message::Frozen { job }) = message else {
            return after;
        };
        let mut at = self.now + after;
        match self.network.streams.iter_mut().find(|(stream, _)| *stream == job) {
            Some((_, last)) => {
                at = at.max(*last + 1);
                *last = at;
            }
            None => self.network.streams.push((job, at)),
        }
        at - self.now
    }

    fn lose(&mut self, from: Place, to: Place, message: Message) {
        self.say(|| format!("  lost: {message:?} from {from:?} to {to:?}"));
        let (Message::Request { job, .. } | Message::Answer { job, .. } | Message::HangUp { job, .. }) = message else {
            return;
        };
        let broken = if matches!(message, Message::HangUp { .. }) {
            // An agent whose coordinator is gone without a word finds out by its keepalive, or never.
            Event::Arrive { from, to, message }
        } else {
            let broken = Message::Answer { job, result: Err(FailureCode::Unavailable) };
            Event::Arrive { from: to, to: Place::Coordinator, message: broken }
        };
        // Otherwise the caller waits in vain.
        if self.chance(500) {
            let after = self.rng.u64(MS..20 * SECOND);
            self.schedule(after, broken);
        }
    }

    pub(crate) fn arrive(&mut self, from: Place, to: Place, message: Message) {
        match (to, message) {
            (Place::Node(node), Message::Request { job, .. }) if !self.nodes[node].up => {
                self.say(|| format!("{to:?} is down: {message:?}"));
                let refused = Message::Answer { job, result: Err(FailureCode::Unavailable) };
                self.send(to, from, refused);
            }
            (Place::Node(node), _) if !self.nodes[node].up => {}
            (Place::Node(node), Message::Request { job, number, call }) => {
                self.say(|| format!("node {node} is called: {call:?} of {number}"));
                self.request(node, job, number, call);
            }
            (Place::Node(node), Message::HangUp { number, job }) => self.hung_up(node, number, job),
            (Place::Node(node), Message::Told { number, decision }) => self.told(node, number, decision),
            (Place::Coordinator, Message::Ask { number }) => {
                if let (Place::Node(node), true) = (from, self.coordinator.up) {
                    let decision = self.read_decision(number);
                    self.say(|| format!("node {node} is told that {number} is {decision:?}"));
                    self.send(to, from, Message::Told { number, decision });
                }
            }
            (Place::Coordinator, _) => self.hear(message),
            (Place::Node(_), _) => {}
        }
    }
}
