//! The coordinator as a process.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::PATIENCE;

/// A running coordinator; killed when dropped.
pub(crate) struct Coordinator {
    child: Child,
    pub(crate) address: String,
    pub(crate) log: Arc<Mutex<Vec<String>>>,
}

impl Coordinator {
    /// Starts it and waits until it listens.
    pub(crate) async fn start(configuration: &Path) -> Self {
        Self::start_with(configuration, &[]).await
    }

    /// The same with these variables.
    pub(crate) async fn start_with(configuration: &Path, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_podferry-coordinator"));
        command.arg("--config").arg(configuration).stderr(Stdio::piped()).kill_on_drop(true);
        command.envs(variables.iter().copied());
        command.env("PODFERRY_LOG", "info").env("PODFERRY_LOG_FORMAT", "json");
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (said, listening) = oneshot::channel();
        let copy = Arc::clone(&log);
        tokio::spawn(async move {
            let mut said = Some(said);
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some(address) = address(&line)
                    && let Some(said) = said.take()
                {
                    let _gone = said.send(address);
                }
                eprintln!("{line}");
                copy.lock().unwrap().push(line);
            }
        });
        let address = timeout(PATIENCE, listening).await.expect("the coordinator does not begin to listen");
        Self { child, address: address.expect("the coordinator ended before it listened"), log }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
        // One that is stopped is so only when all of its threads are.
        while signal == Signal::STOP && !self.stands_still() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn stands_still(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id().unwrap())).unwrap();
        tasks.flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
        })
    }

    pub(crate) async fn end(&mut self) -> ExitStatus {
        timeout(PATIENCE + Duration::from_secs(5), self.child.wait())
            .await
            .expect("the coordinator does not end")
            .unwrap()
    }

    /// Waits until it has logged such a line.
    pub(crate) async fn said(&self, such: impl Fn(&String) -> bool) {
        let said = async {
            while !self.log.lock().unwrap().iter().any(&such) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, said).await.expect("the coordinator does not say it");
    }

    /// `kill -9`.
    pub(crate) async fn kill(mut self) {
        self.signal(Signal::KILL);
        self.end().await;
    }
}

impl Drop for Coordinator {
    /// The next one opens the same store, whose lock ends with the process, not with the signal.
    fn drop(&mut self) {
        let _over = self.child.start_kill();
        while let Ok(None) = self.child.try_wait() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn address(line: &str) -> Option<String> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    (line["message"] == "listening").then(|| line["address"].as_str().map(str::to_owned))?
}
