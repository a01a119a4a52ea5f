//! Nodes in temporary folders: files as real nodes have them, and a systemd that notes what it is told.
#![allow(clippy::unwrap_used, clippy::needless_for_each, reason = "a test that cannot make its node fails")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output};
use std::rc::Rc;
use std::time::Duration;

use podferry_install::{Bundle, Commands, Error, Host, Installed, Options, Restart, Settings, install, uninstall};
use tempfile::TempDir;

/// What a node's commands answer, and which have been run.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) commands: Vec<String>,
    pub(crate) answers: BTreeMap<String, String>,
    pub(crate) failing: Vec<String>,
}

struct Recorder(Rc<RefCell<Told>>);

impl Commands for Recorder {
    fn run(&self, command: &[&str]) -> io::Result<Output> {
        let line = command.join(" ");
        let mut told = self.0.borrow_mut();
        let fails = told.failing.iter().any(|failing| line.starts_with(failing.as_str()));
        let stdout = told.answers.get(&line).cloned().unwrap_or_default().into_bytes();
        told.commands.push(line);
        Ok(Output { status: ExitStatus::from_raw(i32::from(fails) << 8), stdout, stderr: b"it will not".to_vec() })
    }
}

/// A node, and a bundle beside it.
pub(crate) struct Node {
    folder: TempDir,
    pub(crate) told: Rc<RefCell<Told>>,
    pub(crate) options: Options,
    /// What is laid over `agent.toml`.
    pub(crate) config: &'static str,
}

impl Node {
    /// A node with systemd, runc and these files.
    pub(crate) fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options =
            Options { folder: None, runtime: None, containerd_config: None, restart: Restart::Systemd, force: false };
        let node = Self { folder, told: Rc::default(), options, config: "" };
        node.write("/run/systemd/system/.keep", "");
        node.write("/usr/bin/runc", "#!");
        fs::create_dir_all(node.root().join("opt")).unwrap();
        fs::create_dir_all(node.root().join("sys/kernel/tracing")).unwrap();
        fs::set_permissions(node.root().join("usr/bin/runc"), fs::Permissions::from_mode(0o755)).unwrap();
        files.iter().for_each(|(path, text)| node.write(path, text));
        for unit in ["containerd", "crio", "k3s", "rke2-agent"] {
            node.answer(&format!("systemctl show --property KillMode --value {unit}"), "process\n");
        }
        for unit in ["k3s-agent", "rke2-server"] {
            node.told.borrow_mut().failing.push(format!("systemctl is-active --quiet {unit}"));
        }
        node.make_bundle("1.0.0", "first");
        node
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn read(&self, path: &str) -> String {
        let path = self.root().join(path.trim_start_matches('/'));
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[allow(dead_code, reason = "not every test asks")]
    pub(crate) fn has(&self, path: &str) -> bool {
        self.root().join(path.trim_start_matches('/')).exists()
    }

    pub(crate) fn answer(&self, command: &str, answer: &str) {
        self.told.borrow_mut().answers.insert(command.to_owned(), answer.to_owned());
    }

    /// The commands since the last call that change something.
    pub(crate) fn commands(&self) -> Vec<String> {
        let all = std::mem::take(&mut self.told.borrow_mut().commands);
        let asks = |line: &String| ["is-active", "show", "--version"].iter().any(|word| line.contains(word));
        all.into_iter().filter(|line| !asks(line)).collect()
    }

    pub(crate) fn host(&self) -> Host {
        Host::new(self.root(), Box::new(Recorder(Rc::clone(&self.told))))
    }

    /// Makes a bundle with programs that contain `content`.
    pub(crate) fn make_bundle(&self, version: &str, content: &str) {
        let bundle = self.folder.path().join("bundle");
        let _ = fs::remove_dir_all(&bundle);
        for file in [
            "bin/podferry-agent",
            "bin/podferry-dump-worker",
            "bin/podferry-hook",
            "bin/podferry-pager",
            "bin/podferry-runtime",
            "bin/podferry-stdio-keeper",
            "bin/podferry-tar",
            "bin/libpodferry_criu_shim.so",
            "tools/libexec/criu",
            "tools/libexec/busybox",
            "tools/lib/criu/ld-linux-x86-64.so.2",
        ] {
            let path = bundle.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::write(bundle.join("VERSION"), format!("{version}\n")).unwrap();
    }

    pub(crate) fn install(&self) -> Result<Installed, Error> {
        let bundle = Bundle::open(&self.folder.path().join("bundle"))?;
        let settings = Settings {
            node: "node-a".to_owned(),
            listen: "10.0.0.1:7443".parse().unwrap(),
            metrics_listen: None,
            coordinator: "10.96.0.7:7443".to_owned(),
            extra: self.config.parse().unwrap(),
        };
        install(&self.host(), &self.options, &bundle, &settings)
    }

    pub(crate) fn uninstall(&self) -> Result<bool, Error> {
        uninstall(&self.host(), &self.options, Duration::ZERO)
    }

    /// All that is on the node: paths, modes, contents and where links lead.
    pub(crate) fn contents(&self) -> BTreeMap<PathBuf, (u32, String)> {
        let mut found = BTreeMap::new();
        collect(&self.root(), &self.root(), &mut found);
        found
    }
}

fn collect(root: &Path, folder: &Path, found: &mut BTreeMap<PathBuf, (u32, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = if meta.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if meta.is_dir() {
            collect(root, &path, found);
            String::new()
        } else {
            fs::read_to_string(&path).unwrap()
        };
        found.insert(path.strip_prefix(root).unwrap().to_owned(), (meta.permissions().mode(), content));
    }
}
