//! A headless Chromium, driven by the `DevTools` protocol over a pipe.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt as _, FdMapping};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::pipe;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);
/// Debian's headless build, or the whole browser.
const PROGRAMS: [&str; 3] = ["chromium-headless-shell", "chromium", "chromium-browser"];

/// One browser with one page; killed when dropped.
pub(crate) struct Browser {
    child: Child,
    _profile: TempDir,
    commands: pipe::Sender,
    messages: BufReader<pipe::Receiver>,
    session: Option<String>,
    calls: u64,
    /// Events that came so far.
    pub(crate) events: Vec<Value>,
}

impl Browser {
    /// Starts it on an empty page.
    pub(crate) async fn start() -> Self {
        let profile = tempfile::tempdir().unwrap();
        let (their_commands, our_commands) = std::io::pipe().unwrap();
        let (our_messages, their_messages) = std::io::pipe().unwrap();
        let child = PROGRAMS.into_iter().find_map(|program| {
            let mut command = Command::new(program);
            command.args(["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"]);
            command.arg(format!("--user-data-dir={}", profile.path().display())).arg("about:blank");
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mapping = |parent_fd: OwnedFd, child_fd| FdMapping { parent_fd, child_fd };
            let commands = mapping(their_commands.try_clone().unwrap().into(), 3);
            let messages = mapping(their_messages.try_clone().unwrap().into(), 4);
            command.fd_mappings(vec![commands, messages]).unwrap();
            command.spawn().ok()
        });
        let child = child.unwrap_or_else(|| panic!("none of {PROGRAMS:?} is there: install chromium-headless-shell"));
        let commands = pipe::Sender::from_owned_fd(our_commands.into()).unwrap();
        let messages = BufReader::new(pipe::Receiver::from_owned_fd(our_messages.into()).unwrap());
        let (session, calls, events) = (None, 0, Vec::new());
        let mut browser = Self { child, _profile: profile, commands, messages, session, calls, events };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({"targetId": target, "flatten": true})).await;
        browser.session = Some(attached["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({})).await;
        }
        browser
    }

    /// Calls a method of the protocol; its result.
    pub(crate) async fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let mut message = json!({"id": self.calls, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        self.commands.write_all(format!("{message}\0").as_bytes()).await.unwrap();
        loop {
            let message = self.message().await;
            if message["id"] == self.calls {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].clone();
            }
            self.events.push(message);
        }
    }

    async fn message(&mut self) -> Value {
        let mut bytes = Vec::new();
        timeout(PATIENCE, self.messages.read_until(0, &mut bytes)).await.expect("the browser answers").unwrap();
        assert_eq!(bytes.pop(), Some(0), "the browser is gone");
        serde_json::from_slice(&bytes).unwrap()
    }

    /// What an expression of JavaScript is.
    pub(crate) async fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let answer = self.call("Runtime.evaluate", params).await;
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true.
    pub(crate) async fn until(&mut self, expression: &str) {
        let begun = Instant::now();
        while self.evaluate(expression).await != true {
            if begun.elapsed() > PATIENCE {
                let text = self.evaluate("document.body.innerText").await;
                panic!(
                    "it does not become true: {expression}\n{}\n{:?}",
                    text.as_str().unwrap_or_default(),
                    self.faults()
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Clicks with the mouse in the middle of what a selector names, which has to be what lies there.
    pub(crate) async fn click(&mut self, selector: &str) {
        let place = format!(
            "(() => {{ const e = document.querySelector({selector:?}); e.scrollIntoView({{block: 'center'}}); \
             const r = e.getBoundingClientRect(); const [x, y] = [r.x + r.width / 2, r.y + r.height / 2]; \
             return e.contains(document.elementFromPoint(x, y)) && !e.disabled ? {{x, y}} : null; }})()"
        );
        let place = self.evaluate(&place).await;
        assert!(place.is_object(), "{selector} cannot be clicked");
        for kind in ["mousePressed", "mouseReleased"] {
            let params = json!({"type": kind, "x": place["x"], "y": place["y"], "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", params).await;
        }
    }

    /// Presses a key that writes nothing, `Tab` or `Enter`.
    pub(crate) async fn press(&mut self, key: &str) {
        let (code, text) = if key == "Enter" { (13, "\r") } else { (9, "") };
        for kind in ["keyDown", "keyUp"] {
            let params = json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text});
            self.call("Input.dispatchKeyEvent", params).await;
        }
    }

    /// Goes on with `Tab` until what a selector names has the focus, and presses `Enter`.
    pub(crate) async fn choose_by_keyboard(&mut self, selector: &str) {
        for _ in 0..40 {
            if self.evaluate(&format!("document.activeElement.matches({selector:?})")).await == true {
                return self.press("Enter").await;
            }
            self.press("Tab").await;
        }
        panic!("{selector} cannot be reached by keyboard");
    }

    /// What the browser complained about.
    pub(crate) fn faults(&self) -> Vec<&Value> {
        let bad = ["Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed"];
        self.events.iter().filter(|event| bad.iter().any(|bad| event["method"] == *bad)).collect()
    }

    /// Every address that was asked.
    pub(crate) fn requests(&self) -> Vec<&str> {
        let sent = self.events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        sent.map(|event| event["params"]["request"]["url"].as_str().unwrap()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
