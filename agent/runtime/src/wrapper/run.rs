//! The program itself.

use std::borrow::Cow;
use std::env;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::arguments::Invoked;
use super::bundle::{Mark, PodContainer, uid_of_sandbox};
use super::fence::{self, KEEP, STAY, SandboxEnd};
use super::messages::{self, Hello, Order, Report, VERSION};
use super::settings::Settings;
use crate::container::Container;
use crate::leftovers;

/// Between two looks for an agent that is not there.
const RECONNECT: Duration = Duration::from_millis(100);

/// Does what the shim asks. Returns when runc did not take this process's place.
pub fn run(program: &Path, words: &[OsString]) -> ExitCode {
    let invoked = Invoked::parse(words);
    let log = invoked.as_ref().ok().and_then(|invoked| invoked.log.clone());
    let done = invoked.map_err(|error| error.to_string()).and_then(|invoked| {
        let folder = program.parent().unwrap_or(Path::new("/"));
        let settings = Settings::beside(folder).map_err(|error| error.to_string())?;
        Wrapper { settings, invoked, words }.run()
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            say(log.as_deref(), &message);
            ExitCode::FAILURE
        }
    }
}

/// The shim takes the last error of this log for the reason. Standard error is the container's, unless there is no log.
fn say(log: Option<&Path>, message: &str) {
    let Some(log) = log else {
        eprintln!("podferry-runtime: {message}");
        return;
    };
    let line =
        serde_json::json!({ "level": "error", "msg": format!("podferry: {message}"), "time": jiff::Timestamp::now() });
    // Nobody is left who could be told that it cannot be written.
    let _not_told =
        OpenOptions::new().create(true).append(true).open(log).and_then(|mut file| writeln!(file, "{line}"));
}

struct Wrapper<'a> {
    settings: Settings,
    invoked: Invoked,
    words: &'a [OsString],
}

/// A container that comes by a migration.
struct Coming {
    container: PodContainer,
    migration: String,
    mark: Mark,
    until: Instant,
    began_ms: u64,
}

impl Wrapper<'_> {
    fn run(&self) -> Result<(), String> {
        match self.invoked.command.as_str() {
            "create" => self.create(),
            "start" if self.was_restored() => Ok(()),
            "kill" if self.is_kept() || self.stays() => Ok(()),
            "delete" => self.delete(),
            _ => self.become_runc(),
        }
    }

    fn was_restored(&self) -> bool {
        self.invoked.root.as_deref().is_some_and(|root| Mark::was_restored(root, &self.invoked.id))
    }

    /// runc removes its folder of a container and all that is in it. A restore that did not come to its end has the root filesystem
    /// mounted there.
    fn delete(&self) -> Result<(), String> {
        if let Some(root) = self.invoked.root.as_deref().filter(|_| !self.invoked.id.is_empty()) {
            leftovers::unmount_state(&root.join(&self.invoked.id)).map_err(|error| error.to_string())?;
        }
        self.become_runc()
    }

    /// Whoever asks for its end asks again.
    fn is_kept(&self) -> bool {
        let kept = || {
            let container = Container::read(self.invoked.root.as_deref()?, &self.killed()?).ok()?;
            let pod = PodContainer::of(&container.annotations)?;
            fence::of_pod(&self.settings.fence_dir, &pod.uid)
        };
        kept().is_some_and(|fence| fence::says(&fence, KEEP))
    }

    /// Whether it is a sandbox that somebody still needs, and it is noted that it was to end. One that cannot be noted ends.
    fn stays(&self) -> bool {
        let noted = || {
            let root = self.invoked.root.clone()?;
            let id = self.killed()?;
            let sandbox = Container::read(&root, &id).ok()?;
            let fence = fence::of_pod(&self.settings.fence_dir, &uid_of_sandbox(&sandbox.annotations)?)?;
            if !fence::says(&fence, STAY) {
                // It ends now. The agent may not have come to see the note, or not in time.
                fence::forget(&fence);
                return None;
            }
            fence::ask(&fence, &SandboxEnd { root, id }).ok()
        };
        noted().is_some()
    }

    /// The container of `kill [--all] ID [SIGNAL]`.
    fn killed(&self) -> Option<String> {
        let mut words = self.words.iter().map(|word| word.to_string_lossy()).skip_while(|word| word != "kill").skip(1);
        words.find(|word| !word.starts_with('-')).map(Cow::into_owned)
    }

    /// Returns only when that fails.
    fn become_runc(&self) -> Result<(), String> {
        let runc = &self.settings.runc;
        let error = Command::new(runc).args(self.words).exec();
        Err(format!("{} cannot be started: {error}", runc.display()))
    }

    fn create(&self) -> Result<(), String> {
        let (Some(bundle), Some(root)) = (&self.invoked.bundle, &self.invoked.root) else {
            return self.become_runc();
        };
        let found = PodContainer::of_bundle(bundle);
        let Some(container) = found.map_err(|error| format!("{}/config.json: {error}", bundle.display()))? else {
            return self.become_runc();
        };
        self.refuse_fenced(&container)?;
        let mark = Mark::of(bundle, root, &self.invoked.id, &container);
        match container.migration.clone().filter(|_| !mark.has_arrived()) {
            None => self.become_runc(),
            Some(migration) => {
                let until = Instant::now() + self.settings.wait();
                let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
                let began_ms = u64::try_from(began).unwrap_or_default();
                self.receive(Coming { container, migration, mark, until, began_ms })
            }
        }
    }

    /// The kubelet starts a container again that has ended. One that was moved has not ended: it runs elsewhere.
    fn refuse_fenced(&self, container: &PodContainer) -> Result<(), String> {
        let Some(fence) = fence::of_pod(&self.settings.fence_dir, &container.uid) else { return Ok(()) };
        Err(format!(
            "pod {}/{} moves to another node, or has moved there: its container is not started here ({}); delete the pod if it \
             stays",
            container.namespace,
            container.pod,
            fence.display()
        ))
    }

    fn receive(&self, mut coming: Coming) -> Result<(), String> {
        loop {
            let stream = self.connect(&coming)?;
            match self.converse(&stream, &mut coming) {
                Ok(Some(done)) => return done,
                // The agent is gone, and comes back.
                Ok(None) | Err(_) => sleep(RECONNECT),
            }
        }
    }

    fn connect(&self, coming: &Coming) -> Result<UnixStream, String> {
        loop {
            let error = match UnixStream::connect(&self.settings.socket) {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            if Instant::now() >= coming.until {
                return Err(format!(
                    "the pod comes by migration {}, and podferry's agent does not answer at {}: {error}",
                    coming.migration,
                    self.settings.socket.display()
                ));
            }
            sleep(RECONNECT);
        }
    }

    /// One connection; none when it broke.
    fn converse(&self, stream: &UnixStream, coming: &mut Coming) -> io::Result<Option<Result<(), String>>> {
        messages::write(stream, &self.hello(coming))?;
        let mut reader = BufReader::new(stream);
        loop {
            let left = coming.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Some(Err(too_late(coming))));
            }
            stream.set_read_timeout(Some(left))?;
            let order = match messages::read(&mut reader) {
                Ok(Some(order)) => order,
                Ok(None) => return Ok(None),
                Err(error) if is_timeout(&error) => return Ok(Some(Err(too_late(coming)))),
                Err(error) => return Err(error),
            };
            match order {
                Order::Create => return Ok(Some(self.become_runc())),
                Order::Fail { message } => return Ok(Some(Err(message))),
                Order::Restore { program, args, env } => {
                    if let Some(done) = self.restore(stream, coming, &program, &args, env)? {
                        return Ok(Some(done));
                    }
                }
            }
        }
    }

    fn hello(&self, coming: &Coming) -> Hello {
        let invoked = &self.invoked;
        Hello {
            version: VERSION,
            migration: coming.migration.clone(),
            namespace: coming.container.namespace.clone(),
            pod: coming.container.pod.clone(),
            uid: coming.container.uid.clone(),
            container: coming.container.container.clone(),
            id: invoked.id.clone(),
            root: invoked.root.clone().unwrap_or_default(),
            bundle: invoked.bundle.clone().unwrap_or_default(),
            pid_file: invoked.pid_file.clone().unwrap_or_default(),
            began_ms: coming.began_ms,
        }
    }

    /// None when the restore failed: the agent says what comes then.
    fn restore(
        &self,
        stream: &UnixStream,
        coming: &mut Coming,
        program: &Path,
        args: &[String],
        env: Vec<(String, String)>,
    ) -> io::Result<Option<Result<(), String>>> {
        let mut child = match self.restore_command(program, args, env).spawn() {
            Ok(child) => child,
            Err(error) => {
                let message = format!("{}: {error}", program.display());
                messages::write(stream, &Report::NotStarted { message })?;
                return Ok(None);
            }
        };
        // An agent that is gone is no reason to leave runc alone.
        let told = messages::write(stream, &Report::Started { pid: child.id() });
        let status = child.wait()?;
        if status.success() {
            coming.mark.set();
            let _not_heard = messages::write(stream, &Report::exited(status));
            return Ok(Some(Ok(())));
        }
        // It may be told what to do now by another agent.
        coming.until = coming.until.max(Instant::now() + Duration::from_secs(10));
        told?;
        messages::write(stream, &Report::exited(status))?;
        Ok(None)
    }

    /// `restore` takes what the shim gave to the create.
    fn restore_command(&self, program: &Path, args: &[String], env: Vec<(String, String)>) -> Command {
        let mut command = Command::new(program);
        command.env_clear().envs(env);
        if self.invoked.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        let (id, options) = args.split_last().map_or((None, args), |(id, options)| (Some(id), options));
        command.args(options);
        let given = [("--pid-file", &self.invoked.pid_file), ("--console-socket", &self.invoked.console_socket)];
        for (option, value) in given {
            if let Some(value) = value {
                command.arg(option).arg(value);
            }
        }
        command.args(id);
        // systemd's own socket for readiness, should the shim have one.
        if let Some(notify) = env::var_os("NOTIFY_SOCKET") {
            command.env("NOTIFY_SOCKET", notify);
        }
        command
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn too_late(coming: &Coming) -> String {
    format!(
        "the pod comes by migration {}, which has not come so far that its container can be restored: the kubelet tries again",
        coming.migration
    )
}
