//! The agent's side of `podferry-hook`, which holds a restored container before its first instruction.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// What the hook said last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Nothing yet.
    NotYet,
    /// The container is held.
    Held {
        /// Its init, in the node's pid namespace.
        pid: i32,
    },
    /// It stays held until it is told otherwise.
    Sealed {
        /// Its init, in the node's pid namespace.
        pid: i32,
    },
    /// The hook hung up.
    Gone,
}

impl Hold {
    /// The held init, when one is held.
    pub fn pid(&self) -> Option<i32> {
        match self {
            Self::Held { pid } | Self::Sealed { pid } => Some(*pid),
            Self::NotYet | Self::Gone => None,
        }
    }
}

/// Waits for the hook of one restore and speaks to it.
#[derive(Debug)]
pub struct HookKeeper {
    hold: watch::Receiver<Hold>,
    letting_go: Arc<AtomicBool>,
    voice: Arc<Mutex<Voice>>,
    listening: JoinHandle<()>,
}

/// The way to the hook.
#[derive(Debug, Default)]
struct Voice {
    hook: Option<OwnedWriteHalf>,
    /// A hook that comes from now on is told to abort: CRIU may reach it after the decision.
    aborted: bool,
}

impl HookKeeper {
    /// Listens at `socket`, in place of an agent that did so before.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(socket: &Path, migration: String) -> io::Result<Self> {
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        let (sender, hold) = watch::channel(Hold::NotYet);
        let voice = Arc::new(Mutex::new(Voice::default()));
        let letting_go = Arc::new(AtomicBool::new(false));
        let ear = Ear { migration, hold: sender, letting_go: Arc::clone(&letting_go), voice: Arc::clone(&voice) };
        let listening = tokio::spawn(ear.accept(listener));
        Ok(Self { hold, letting_go, voice, listening })
    }

    /// What the hook said last.
    pub fn hold(&self) -> Hold {
        self.hold.borrow().clone()
    }

    /// Whether CRIU is letting the processes go: their sockets are whole.
    pub fn lets_go(&self) -> bool {
        self.letting_go.load(Ordering::Acquire)
    }

    /// Waits until `fits`, at most `patience`; returns what was said last.
    pub async fn until(&self, patience: Duration, fits: impl Fn(&Hold) -> bool) -> Hold {
        let mut hold = self.hold.clone();
        match timeout(patience, hold.wait_for(|hold| fits(hold))).await {
            Ok(Ok(hold)) => hold.clone(),
            _ => self.hold(),
        }
    }

    /// Tells the hook `seal` or `go`.
    ///
    /// # Errors
    /// When no hook is there or it hung up.
    pub async fn tell(&self, word: &str) -> io::Result<()> {
        self.voice.lock().await.say(word).await
    }

    /// Tells the hook to abort, also one that comes later.
    pub async fn abort(&self) {
        let mut voice = self.voice.lock().await;
        voice.aborted = true;
        let _none_or_gone = voice.say("abort").await;
    }
}

impl Voice {
    async fn say(&mut self, word: &str) -> io::Result<()> {
        match &mut self.hook {
            Some(hook) => hook.write_all(format!("{word}\n").as_bytes()).await,
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "no hook is there")),
        }
    }
}

impl Drop for HookKeeper {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// What listens to the hook.
struct Ear {
    migration: String,
    hold: watch::Sender<Hold>,
    letting_go: Arc<AtomicBool>,
    voice: Arc<Mutex<Voice>>,
}

impl Ear {
    async fn accept(self, listener: UnixListener) {
        loop {
            match listener.accept().await {
                // One restore has one hook, so one conversation at a time is enough.
                Ok((stream, _)) => self.converse(stream).await,
                Err(error) => {
                    tracing::warn!(%error, "a hook cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    async fn converse(&self, stream: UnixStream) {
        let (read, write) = stream.into_split();
        self.voice.lock().await.hook = Some(write);
        let mut lines = BufReader::new(read).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if line.strip_prefix("pre-resume ") == Some(&self.migration) {
                self.letting_go.store(true, Ordering::Release);
                continue;
            }
            let before = self.hold.borrow().clone();
            let Some(said) = understand(&line, &self.migration, &before) else {
                tracing::error!(line, self.migration, "a hook said what nobody understands");
                break;
            };
            self.letting_go.store(false, Ordering::Release);
            self.hold.send_replace(said);
            let mut voice = self.voice.lock().await;
            if voice.aborted {
                let _gone = voice.say("abort").await;
            }
        }
        self.voice.lock().await.hook = None;
        self.hold.send_replace(Hold::Gone);
    }
}

fn understand(line: &str, migration: &str, before: &Hold) -> Option<Hold> {
    let words: Vec<&str> = line.split(' ').collect();
    match words.as_slice() {
        ["post-restore", pid, of] if *of == migration => Some(Hold::Held { pid: pid.parse().ok()? }),
        ["post-restore-sealed", pid, of] if *of == migration => Some(Hold::Sealed { pid: pid.parse().ok()? }),
        ["sealed"] => Some(Hold::Sealed { pid: before.pid()? }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_migrations_hook_is_understood() {
        let held = Hold::Held { pid: 7 };
        assert_eq!(understand("post-restore 7 m1", "m1", &Hold::NotYet), Some(held.clone()));
        assert_eq!(understand("sealed", "m1", &held), Some(Hold::Sealed { pid: 7 }));
        assert_eq!(understand("post-restore-sealed 7 m1", "m1", &Hold::Gone), Some(Hold::Sealed { pid: 7 }));
        for line in ["post-restore 7 m2", "post-restore x m1", "sealed", "", "go"] {
            assert_eq!(understand(line, "m1", &Hold::NotYet), None, "{line}");
        }
    }
}
