//! What the shim asks, as far as the wrapper has to understand it.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

/// The shim's call. All that is not looked at here is runc's alone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Invoked {
    /// `--root`: where runc keeps its containers' state.
    pub root: Option<PathBuf>,
    /// `--log`: where the shim reads why something failed.
    pub log: Option<PathBuf>,
    /// `--systemd-cgroup`.
    pub systemd_cgroup: bool,
    /// `create`, `start`, …; empty when there is none.
    pub command: String,
    /// `--bundle` of a create.
    pub bundle: Option<PathBuf>,
    /// `--pid-file` of a create.
    pub pid_file: Option<PathBuf>,
    /// `--console-socket` of a create.
    pub console_socket: Option<PathBuf>,
    /// The last word: the container.
    pub id: String,
}

/// Why a call cannot be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WrongArguments {
    /// An option that takes a value is the last word.
    #[error("{option} has no value")]
    NoValue {
        /// Which.
        option: String,
    },
    /// `create` lacks what every shim gives.
    #[error("create without {what}")]
    Lacks {
        /// What.
        what: &'static str,
    },
}

/// runc's global options that take a value (`main.go`).
const GLOBAL_VALUES: [&str; 5] = ["root", "log", "log-format", "criu", "rootless"];
/// Those of `create` (`create.go`).
const CREATE_VALUES: [&str; 5] = ["bundle", "pid-file", "console-socket", "pidfd-socket", "preserve-fds"];

impl Invoked {
    /// Understands the words behind the program's name.
    ///
    /// # Errors
    /// When an option lacks its value, or a create what every shim gives.
    pub fn parse(words: &[OsString]) -> Result<Self, WrongArguments> {
        let mut invoked = Self::default();
        let mut words = words.iter().map(OsString::as_os_str);
        while let Some(word) = words.next() {
            match option(word) {
                Some((name, value)) => invoked.take(name, value, &mut words)?,
                None if invoked.command.is_empty() => invoked.command = word.to_string_lossy().into_owned(),
                None => invoked.id = word.to_string_lossy().into_owned(),
            }
        }
        invoked.whole()
    }

    fn take<'a>(
        &mut self,
        name: &str,
        value: Option<&'a str>,
        rest: &mut impl Iterator<Item = &'a OsStr>,
    ) -> Result<(), WrongArguments> {
        let name = if name == "b" { "bundle" } else { name };
        let takes = if self.command.is_empty() { &GLOBAL_VALUES } else { &CREATE_VALUES };
        if name == "systemd-cgroup" {
            self.systemd_cgroup = value.is_none_or(|value| value == "true");
        }
        if !takes.contains(&name) {
            return Ok(());
        }
        let missing = || WrongArguments::NoValue { option: format!("--{name}") };
        let value = value.map(OsStr::new).or_else(|| rest.next()).ok_or_else(missing)?;
        let place = match name {
            "root" => &mut self.root,
            "log" => &mut self.log,
            "bundle" => &mut self.bundle,
            "pid-file" => &mut self.pid_file,
            "console-socket" => &mut self.console_socket,
            _ => return Ok(()),
        };
        *place = Some(value.into());
        Ok(())
    }

    fn whole(self) -> Result<Self, WrongArguments> {
        if self.command != "create" {
            return Ok(self);
        }
        let lacks = [
            (self.bundle.is_none(), "--bundle"),
            (self.pid_file.is_none(), "--pid-file"),
            (self.root.is_none(), "--root"),
            (self.id.is_empty(), "a container"),
        ];
        let lacks = lacks.into_iter().find_map(|(lacks, what)| lacks.then_some(what));
        lacks.map_or(Ok(self), |what| Err(WrongArguments::Lacks { what }))
    }
}

/// A word that is an option: its name, and its value when that is in the same word.
fn option(word: &OsStr) -> Option<(&str, Option<&str>)> {
    let word = word.to_str()?;
    let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|name| !name.is_empty())?;
    Some(name.split_once('=').map_or((name, None), |(name, value)| (name, Some(value))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Invoked, WrongArguments> {
        Invoked::parse(&text.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn what_a_shim_asks_is_understood() {
        let created = parse(
            "--root /run/containerd/runc/k8s.io --log /b/log.json --log-format json --systemd-cgroup create --bundle /b \
             --pid-file /b/init.pid c0ffee",
        )
        .unwrap();
        assert_eq!(created.command, "create");
        assert_eq!(created.root, Some("/run/containerd/runc/k8s.io".into()));
        assert_eq!(created.log, Some("/b/log.json".into()));
        assert_eq!((created.bundle, created.pid_file), (Some("/b".into()), Some("/b/init.pid".into())));
        assert!(created.systemd_cgroup && created.console_socket.is_none());
        assert_eq!(created.id, "c0ffee");
        let with = parse("--root=/r create --console-socket /s/pty.sock --no-pivot -b /b --pid-file=/p c").unwrap();
        assert_eq!((with.console_socket, with.bundle), (Some("/s/pty.sock".into()), Some("/b".into())));
        assert!(!with.systemd_cgroup);
    }

    #[test]
    fn commands_with_words_of_their_own_are_left_to_runc() {
        let exec = parse("--root /r --log /l exec --process /tmp/p --detach --pid-file /p c").unwrap();
        assert_eq!((exec.command.as_str(), exec.id.as_str()), ("exec", "c"));
        let kill = parse("--root /r kill --all c 9").unwrap();
        assert_eq!(kill.command, "kill");
        assert_eq!(parse("--version").unwrap(), Invoked::default());
    }

    #[test]
    fn a_create_that_lacks_something_says_what() {
        assert_eq!(parse("--root /r create --bundle"), Err(WrongArguments::NoValue { option: "--bundle".into() }));
        assert_eq!(parse("--root /r create --bundle /b c"), Err(WrongArguments::Lacks { what: "--pid-file" }));
        assert_eq!(parse("create --bundle /b --pid-file /p c"), Err(WrongArguments::Lacks { what: "--root" }));
        assert_eq!(
            parse("--root /r create --bundle /b --pid-file /p"),
            Err(WrongArguments::Lacks { what: "a container" })
        );
    }
}
