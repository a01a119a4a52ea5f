//! `podferry-runtime` as a shim calls it: the agent is played by the test, and runc is a script that notes how it was called.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use podferry_runtime::wrapper::{self, Hello, Order, Report};

const MIGRATION: &str = "0192d9e07b2a7c3a8000000000abcdef";

/// A node's folders, with the wrapper installed.
struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new(wait_s: u64) -> Self {
        let node = Self { dir: tempfile::tempdir().unwrap() };
        for dir in ["bin", "fenced", "run", "runc/c1", "task/c1", "task/s1"] {
            fs::create_dir_all(node.path(dir)).unwrap();
        }
        fs::copy(env!("CARGO_BIN_EXE_podferry-runtime"), node.path("bin/podferry-runtime")).unwrap();
        let settings = serde_json::json!({
            "runc": node.path("bin/runc"),
            "socket": node.path("run/runtime.sock"),
            "fence_dir": node.path("fenced"),
            "wait_s": wait_s,
        });
        fs::write(node.path("bin/runtime.json"), settings.to_string()).unwrap();
        node.runc("exit 0");
        node.pod(Some(MIGRATION));
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What runc does beside noting its words.
    fn runc(&self, does: &str) {
        let script = format!("#!/bin/sh\necho \"$@\" >>{}\n{does}\n", self.path("calls").display());
        let new = self.path("bin/runc.new");
        fs::write(&new, script).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, self.path("bin/runc")).unwrap();
    }

    fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.path("calls")).unwrap_or_default().lines().map(ToOwned::to_owned).collect()
    }

    /// The bundle of a pod's container.
    fn pod(&self, migration: Option<&str>) {
        let mut annotations = serde_json::json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.container-name": "redis",
            "io.kubernetes.cri.sandbox-id": "s1",
            "io.kubernetes.cri.sandbox-name": "redis-0",
            "io.kubernetes.cri.sandbox-namespace": "shop",
            "io.kubernetes.cri.sandbox-uid": "u-1",
        });
        if let Some(migration) = migration {
            annotations["podferry.dev/migration"] = migration.into();
        }
        fs::write(self.path("task/c1/config.json"), serde_json::json!({ "annotations": annotations }).to_string())
            .unwrap();
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.path("bin/podferry-runtime"));
        command.arg("--root").arg(self.path("runc")).arg("--log").arg(self.path("log.json"));
        command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn create(&self) -> Child {
        let bundle = self.path("task/c1");
        let mut command = self.command(&["--log-format", "json", "--systemd-cgroup", "create", "--bundle"]);
        command.arg(&bundle).arg("--pid-file").arg(bundle.join("init.pid")).arg("c1").spawn().unwrap()
    }

    fn listen(&self) -> UnixListener {
        let socket = self.path("run/runtime.sock");
        let _not_there = fs::remove_file(&socket);
        UnixListener::bind(socket).unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log.json")).unwrap_or_default()
    }
}

/// A wrapper, from the agent's side.
struct Visit {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    hello: Hello,
}

impl Visit {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let hello = wrapper::read(&mut reader).unwrap().unwrap();
        Self { stream, reader, hello }
    }

    fn order(&self, order: &Order) {
        wrapper::write(&self.stream, order).unwrap();
    }

    fn restore(&self, node: &Node) {
        let args = ["--root", "/r", "restore", "--detach", "c1"].map(ToOwned::to_owned).to_vec();
        let env = vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
        self.order(&Order::Restore { program: node.path("bin/runc"), args, env });
    }

    fn report(&mut self) -> Report {
        wrapper::read(&mut self.reader).unwrap().unwrap()
    }
}

fn end(child: Child) -> Output {
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.stdout.len(), output.stderr.len()), (0, 0), "these are the container's: {output:?}");
    output
}

fn assert_restored(node: &Node) {
    assert!(node.path("runc/c1/podferry-restored").exists() && node.path("task/s1/podferry-arrived-redis").exists());
}

#[test]
fn whatever_is_no_migrations_is_runcs() {
    let node = Node::new(1);
    node.runc("exit 7");
    node.pod(None);
    assert_eq!(end(node.create()).status.code(), Some(7), "its answer is runc's");
    assert_eq!(end(node.command(&["kill", "c1", "9"]).spawn().unwrap()).status.code(), Some(7));
    assert_eq!(end(node.command(&["start", "c1"]).spawn().unwrap()).status.code(), Some(7));
    let calls = node.calls();
    assert!(calls[0].contains("--systemd-cgroup create --bundle") && calls[0].ends_with(" c1"), "{calls:?}");
    assert!(calls[1].ends_with("kill c1 9") && calls[2].ends_with("start c1"), "{calls:?}");
}

#[test]
fn what_comes_is_restored_once_and_then_runs_like_any_other() {
    let node = Node::new(20);
    let listener = node.listen();
    let child = node.create();
    let mut visit = Visit::accept(&listener);
    assert_eq!((visit.hello.migration.as_str(), visit.hello.uid.as_str()), (MIGRATION, "u-1"));
    assert_eq!((visit.hello.id.as_str(), visit.hello.bundle.clone()), ("c1", node.path("task/c1")));
    visit.restore(&node);
    assert!(matches!(visit.report(), Report::Started { pid } if pid > 0));
    assert_eq!(visit.report(), Report::Exited { status: 0 });
    assert!(end(child).status.success());
    let pid_file = node.path("task/c1/init.pid");
    let call = format!("--systemd-cgroup --root /r restore --detach --pid-file {} c1", pid_file.display());
    assert_eq!(node.calls(), [call]);
    assert_restored(&node);
    // It runs already.
    assert!(end(node.command(&["start", "c1"]).spawn().unwrap()).status.success());
    assert_eq!(node.calls().len(), 1);
    // The kubelet starts it again after its end: another container of the same pod, with the same annotation.
    fs::remove_dir_all(node.path("runc/c1")).unwrap();
    assert!(end(node.create()).status.success());
    assert!(node.calls()[1].contains(" create "));
    assert!(end(node.command(&["start", "c1"]).spawn().unwrap()).status.success());
    assert!(node.calls()[2].ends_with("start c1"));
}

#[test]
fn an_agent_that_is_away_is_waited_for_and_a_restore_that_fails_is_told() {
    let node = Node::new(20);
    let child = node.create();
    sleep(Duration::from_millis(300));
    let listener = node.listen();
    // It is killed, and another one comes.
    drop(Visit::accept(&listener));
    let mut visit = Visit::accept(&listener);
    node.runc("exit 1");
    visit.restore(&node);
    assert!(matches!(visit.report(), Report::Started { .. }));
    assert_eq!(visit.report(), Report::Exited { status: 256 });
    // Killed again; the next one tries once more.
    let began_ms = visit.hello.began_ms;
    drop(visit);
    let mut visit = Visit::accept(&listener);
    assert_eq!(visit.hello.began_ms, began_ms);
    node.runc("exit 0");
    visit.restore(&node);
    assert!(matches!(visit.report(), Report::Started { .. }));
    assert_eq!(visit.report(), Report::Exited { status: 0 });
    assert!(end(child).status.success());
    assert_restored(&node);
}

#[test]
fn runc_is_waited_for_when_its_agent_dies() {
    let node = Node::new(20);
    let listener = node.listen();
    let child = node.create();
    let mut visit = Visit::accept(&listener);
    let gate = node.path("gate");
    node.runc(&format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display()));
    visit.restore(&node);
    assert!(matches!(visit.report(), Report::Started { .. }));
    drop((visit, listener));
    sleep(Duration::from_millis(200));
    fs::write(gate, "").unwrap();
    assert!(end(child).status.success(), "the container runs, whoever heard of it");
    assert_restored(&node);
}

#[test]
fn the_agents_no_is_the_shims_answer_and_nobody_waits_for_ever() {
    let node = Node::new(20);
    let listener = node.listen();
    let child = node.create();
    Visit::accept(&listener).order(&Order::Fail { message: "migration m was undone".to_owned() });
    assert!(!end(child).status.success());
    assert!(
        node.log().contains(r#""level":"error""#) && node.log().contains("migration m was undone"),
        "{}",
        node.log()
    );
    let child = node.create();
    Visit::accept(&listener).order(&Order::Create);
    assert!(end(child).status.success() && node.calls()[0].contains(" create "));

    let node = Node::new(1);
    let begun = Instant::now();
    assert!(!end(node.create()).status.success());
    assert!(node.log().contains("does not answer at"), "{}", node.log());
    let listener = node.listen();
    let child = node.create();
    let _silent = Visit::accept(&listener);
    assert!(!end(child).status.success());
    assert!(node.log().contains("the kubelet tries again"), "{}", node.log());
    assert!(begun.elapsed() >= Duration::from_secs(2) && node.calls().is_empty());
}

#[test]
fn a_delete_does_not_empty_the_root_filesystem_of_a_restore_that_was_given_up() {
    let node = Node::new(1);
    let (rootfs, mounted) = (node.path("rootfs"), node.path("runc/c1/criu-root"));
    for dir in [&rootfs, &mounted] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(rootfs.join("came"), "").unwrap();
    rustix::mount::mount_bind(&rootfs, &mounted).unwrap();
    // As runc does.
    node.runc(&format!("rm -r {}", node.path("runc/c1").display()));
    let deleted = end(node.command(&["delete", "--force", "c1"]).spawn().unwrap());
    assert!(deleted.status.success(), "{}", node.log());
    assert!(rootfs.join("came").exists() && !node.path("runc/c1").exists());
    // What has never been there is runc's.
    node.runc("exit 0");
    assert!(end(node.command(&["delete", "c2"]).spawn().unwrap()).status.success());
    assert!(node.calls()[1].ends_with("delete c2"));
}

#[test]
fn what_stands_still_to_be_moved_is_not_killed() {
    let node = Node::new(1);
    node.pod(None);
    let state = serde_json::json!({ "id": "c1", "config": { "rootfs": "/", "labels": [format!("bundle={}", node.path("task/c1").display())] } });
    fs::write(node.path("runc/c1/state.json"), state.to_string()).unwrap();
    let mut config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(node.path("task/c1/config.json")).unwrap()).unwrap();
    config["ociVersion"] = "1.2.1".into();
    fs::write(node.path("task/c1/config.json"), config.to_string()).unwrap();
    let kill = |words: &[&str]| end(node.command(words).spawn().unwrap()).status.success();
    fs::write(node.path("fenced/u-1"), wrapper::KEEP).unwrap();
    assert!(kill(&["kill", "c1", "15"]) && kill(&["kill", "--all", "c1", "9"]));
    assert!(node.calls().is_empty(), "{:?}", node.calls());
    assert!(kill(&["kill", "other", "9"]), "of another nothing is known");
    fs::write(node.path("fenced/u-1"), "").unwrap();
    assert!(kill(&["kill", "c1", "9"]));
    assert_eq!(node.calls().len(), 2);
}

#[test]
fn a_sandbox_whose_address_is_needed_is_noted_and_not_killed() {
    let node = Node::new(1);
    fs::create_dir_all(node.path("runc/s1")).unwrap();
    let state = serde_json::json!({ "id": "s1", "config": { "rootfs": "/", "labels": [format!("bundle={}", node.path("task/s1").display())] } });
    fs::write(node.path("runc/s1/state.json"), state.to_string()).unwrap();
    let annotations =
        serde_json::json!({ "io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-uid": "u-1" });
    let config = serde_json::json!({ "ociVersion": "1.2.1", "annotations": annotations });
    fs::write(node.path("task/s1/config.json"), config.to_string()).unwrap();
    let kill = || end(node.command(&["kill", "s1", "9"]).spawn().unwrap()).status.success();
    let fence = node.path("fenced/u-1");
    fs::write(&fence, wrapper::STAY).unwrap();
    assert!(kill() && kill());
    assert!(node.calls().is_empty(), "{:?}", node.calls());
    let noted: wrapper::SandboxEnd = serde_json::from_slice(&fs::read(wrapper::asked(&fence)).unwrap()).unwrap();
    assert_eq!(noted, wrapper::SandboxEnd { root: node.path("runc"), id: "s1".to_owned() });
    // A frozen container is another matter: what it needs of its sandbox the agent keeps.
    for word in ["", wrapper::KEEP] {
        fs::write(&fence, word).unwrap();
        assert!(kill());
    }
    assert_eq!(node.calls().len(), 2);
    assert!(!wrapper::asked(&fence).exists(), "it has ended, and nobody has to end it");
}

#[test]
fn nothing_is_started_in_a_pod_that_has_moved() {
    for migration in [None, Some(MIGRATION)] {
        let node = Node::new(1);
        node.pod(migration);
        fs::write(node.path("fenced/u-1"), "").unwrap();
        assert!(!end(node.create()).status.success());
        assert!(
            node.log().contains("pod shop/redis-0 moves to another node") && node.calls().is_empty(),
            "{}",
            node.log()
        );
        fs::remove_file(node.path("fenced/u-1")).unwrap();
        fs::write(node.path("fenced/u-2"), "").unwrap();
        node.pod(None);
        assert!(end(node.create()).status.success(), "another pod's fence");
    }
}
