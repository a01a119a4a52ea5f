//! Listening where a predecessor may just be ending.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;

/// How long an address may stay in use: a killed process keeps its sockets until its last thread has ended.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two attempts.
const RETRY: Duration = Duration::from_millis(20);

/// Listens at `address`; waits up to ten seconds for a predecessor to leave it.
///
/// # Errors
/// Those of `bind(2)`, and `EADDRINUSE` when the address stays in use.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let begun = Instant::now();
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && begun.elapsed() < PATIENCE => {
                tokio::time::sleep(RETRY).await;
            }
            bound => return bound,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_predecessor_that_ends_is_waited_for() {
        let predecessor = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = predecessor.local_addr().unwrap();
        let successor = tokio::spawn(listen(address));
        tokio::time::sleep(RETRY * 3).await;
        assert!(!successor.is_finished());
        drop(predecessor);
        assert_eq!(successor.await.unwrap().unwrap().local_addr().unwrap(), address);
    }
}
