//! The worker's side of the control socket.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::messages::{Order, Stage};

/// How long an unsealed worker waits for an agent to connect.
const CONNECT_GRACE: Duration = Duration::from_secs(10);

/// What the threads of a worker share.
#[derive(Debug)]
pub struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    orders: VecDeque<Order>,
    connection: Option<UnixStream>,
    /// Counts connections, so that the end of an old one is not taken for the end of the present one.
    generation: u64,
    lonely_since: Option<Instant>,
    ever_connected: bool,
}

impl Control {
    /// Listens at `path`, which must not be there.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(path: &Path) -> io::Result<Arc<Self>> {
        let listener = UnixListener::bind(path)?;
        let control = Arc::new(Self {
            state: Mutex::new(State {
                stage: Stage::Freezing,
                orders: VecDeque::new(),
                connection: None,
                generation: 0,
                lonely_since: Some(Instant::now()),
                ever_connected: false,
            }),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&control);
        thread::Builder::new().name("control".to_owned()).spawn(move || accepting.accept(&listener))?;
        Ok(control)
    }

    /// Says how far the worker is. An agent that is not there learns it when it connects.
    pub fn report(&self, stage: Stage) {
        let mut state = self.lock();
        state.stage = stage;
        send_stage(&mut state);
    }

    /// The next order, if one comes within `patience`.
    pub fn order(&self, patience: Duration) -> Option<Order> {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, patience, |state| state.orders.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.orders.pop_front()
    }

    /// Whether the agent is gone: its connection ended, or none ever came in time.
    pub fn is_abandoned(&self) -> bool {
        let state = self.lock();
        let grace = if state.ever_connected { Duration::ZERO } else { CONNECT_GRACE };
        state.lonely_since.is_some_and(|since| since.elapsed() > grace)
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        for connection in listener.incoming().flatten() {
            let Ok(reader) = connection.try_clone() else { continue };
            let generation = self.adopt(connection);
            let control = Arc::clone(self);
            let reading = move || control.read(generation, reader);
            if let Err(error) = thread::Builder::new().name("orders".to_owned()).spawn(reading) {
                tracing::error!(%error, "cannot read the agent's orders");
            }
        }
    }

    fn adopt(&self, connection: UnixStream) -> u64 {
        let mut state = self.lock();
        state.generation += 1;
        state.connection = Some(connection);
        state.lonely_since = None;
        state.ever_connected = true;
        send_stage(&mut state);
        state.generation
    }

    fn read(&self, generation: u64, connection: UnixStream) {
        for line in BufReader::new(connection).lines() {
            let Ok(line) = line else { break };
            match serde_json::from_str(&line) {
                Ok(order) => self.lock().orders.push_back(order),
                Err(error) => tracing::error!(%error, line, "the agent sent what is no order"),
            }
            self.changed.notify_all();
        }
        let mut state = self.lock();
        if state.generation == generation {
            state.connection = None;
            state.lonely_since = Some(Instant::now());
        }
        drop(state);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn send_stage(state: &mut State) {
    let Ok(mut line) = serde_json::to_vec(&state.stage) else { return };
    line.push(b'\n');
    if let Some(connection) = &mut state.connection
        && connection.write_all(&line).is_err()
    {
        state.connection = None;
    }
}
