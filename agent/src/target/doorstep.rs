//! Packets that came for the container on the node it leaves, on their way to it: see [`podferry_proto::delivery`].

use std::sync::{Mutex, MutexGuard, PoisonError};

use podferry_common::failure::chain;
use podferry_network::Replayer;

/// The most that waits for a container, in bytes; see the specification.
const MOST_WAITING: usize = 4 << 20;

/// Where they wait until the container's sockets are whole, and are handed over from then on.
#[derive(Debug, Default)]
pub struct Doorstep(Mutex<Door>);

#[derive(Debug)]
enum Door {
    Closed { waiting: Vec<Vec<u8>>, bytes: usize },
    Open(Replayer),
}

impl Default for Door {
    fn default() -> Self {
        Self::Closed { waiting: Vec::new(), bytes: 0 }
    }
}

impl Doorstep {
    /// Takes a packet. True when the container was given it, or will be.
    pub fn put(&self, packet: &[u8]) -> bool {
        match &mut *self.lock() {
            Door::Open(replayer) => hand_over(replayer, packet),
            Door::Closed { bytes, .. } if *bytes + packet.len() > MOST_WAITING => false,
            Door::Closed { waiting, bytes } => {
                *bytes += packet.len();
                waiting.push(packet.to_vec());
                true
            }
        }
    }

    /// Whether what comes is handed over at once.
    pub fn is_open(&self) -> bool {
        matches!(*self.lock(), Door::Open(_))
    }

    /// The container's sockets are whole and its link is joined: hands over what has waited, and at once what comes from now on.
    pub fn open(&self, replayer: Replayer) {
        let mut door = self.lock();
        let Door::Closed { waiting, .. } = &*door else { return };
        for packet in waiting {
            hand_over(&replayer, packet);
        }
        *door = Door::Open(replayer);
    }

    /// The container there was is gone: nothing is handed over until there is another.
    pub fn close(&self) {
        let mut door = self.lock();
        if matches!(*door, Door::Open(_)) {
            *door = Door::default();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Door> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hand_over(replayer: &Replayer, packet: &[u8]) -> bool {
    let delivered = replayer.deliver(packet);
    if let Err(error) = &delivered {
        tracing::debug!(error = chain(error), "a packet of the freeze is lost");
    }
    delivered.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_waits_than_there_is_room_for() {
        let doorstep = Doorstep::default();
        let packet = vec![0; 60_000];
        let taken = (0..100).filter(|_| doorstep.put(&packet)).count();
        assert_eq!(taken, MOST_WAITING / 60_000);
        assert!(!doorstep.is_open());
    }
}
