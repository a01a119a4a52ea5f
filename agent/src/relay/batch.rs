//! Packets that go in one message.

use podferry_network::Error;
use podferry_proto::v1::CarryPackets;

/// Messages that wait for the connection, each way.
pub const QUEUE: usize = 64;
/// The most bytes of packets in one message, apart from the last of them.
const MESSAGE: usize = 256 << 10;

/// A packet and those that wait behind it, as many as one message may have.
///
/// # Errors
/// When `next` fails.
pub fn batch(first: Vec<u8>, mut next: impl FnMut() -> Result<Option<Vec<u8>>, Error>) -> Result<Vec<Vec<u8>>, Error> {
    let (mut bytes, mut batch) = (first.len(), vec![first]);
    while bytes < MESSAGE
        && let Some(packet) = next()?
    {
        bytes += packet.len();
        batch.push(packet);
    }
    Ok(batch)
}

/// How many bytes they have.
pub fn bytes_of(packets: &[Vec<u8>]) -> usize {
    packets.iter().map(Vec::len).sum()
}

/// Their message.
pub fn message(packets: Vec<Vec<u8>>) -> CarryPackets {
    CarryPackets { packets: packets.into_iter().map(Into::into).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_what_waits_and_no_more_than_there_is_room_for() {
        let mut waiting = vec![vec![1; 40], vec![2; 50]].into_iter();
        assert_eq!(batch(vec![0], || Ok(waiting.next())).unwrap(), [vec![0], vec![1; 40], vec![2; 50]]);
        let endless = batch(Vec::new(), || Ok(Some(vec![0; 60_000]))).unwrap();
        assert_eq!(bytes_of(&endless), MESSAGE.next_multiple_of(60_000));
    }
}
