//! An installation's life: upgrades, kills in the middle, and leaving while pods run.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use insta::assert_snapshot;
use podferry_install::{Error, Restart, check};
use support::Node;

const V3: &str = "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n";

fn node() -> Node {
    Node::new(&[("/run/containerd/containerd.sock", ""), ("/etc/containerd/config.toml", V3)])
}

fn bundles(node: &Node) -> Vec<String> {
    let names = fs::read_dir(node.root().join("opt/podferry")).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name.starts_with(|first: char| first.is_ascii_digit() || first == '.'));
    names.sort();
    names
}

#[test]
fn the_agents_configuration_names_the_bundle_and_has_the_operators_settings_over_it() {
    let mut node = node();
    node.config = "give_way = false\n[kubernetes]\narrive_within_s = 60\n";
    let done = node.install().unwrap();
    assert_snapshot!(node.read("/etc/podferry/agent.toml").replace(&done.bundle, "BUNDLE"), @r##"
    # Written by podferry-install; changes are lost. The chart's value agent.config is laid over it.
    coordinator = "10.96.0.7:7443"
    give_way = false
    images_dir = "/run/podferry-images"
    listen = "10.0.0.1:7443"
    node = "node-a"
    runtime_dir = "/run/podferry"
    state_dir = "/var/lib/podferry"

    [identity]
    ca = "/etc/podferry/tls/ca.pem"
    certificate = "/etc/podferry/tls/cert.pem"
    key = "/etc/podferry/tls/key.pem"

    [kubernetes]
    arrive_within_s = 60
    fence_dir = "/var/lib/podferry/fenced"
    layers_dir = "/var/lib/containerd"
    socket = "/run/podferry/runtime.sock"

    [runtime]
    bundles_dir = "/var/lib/podferry/bundles"
    logs_dir = "/var/lib/podferry/logs"
    roots = ["/run/containerd/runc/k8s.io"]
    volume_dirs = []

    [tools]
    criu = "/opt/podferry/BUNDLE/tools/bin/criu"
    criu_shim = "/opt/podferry/BUNDLE/bin/libpodferry_criu_shim.so"
    dump_worker = "/opt/podferry/BUNDLE/bin/podferry-dump-worker"
    hook = "/opt/podferry/BUNDLE/bin/podferry-hook"
    pager = "/opt/podferry/BUNDLE/bin/podferry-pager"
    runc = "/usr/bin/runc"
    stdio_keeper = "/opt/podferry/BUNDLE/bin/podferry-stdio-keeper"
    tar = "/opt/podferry/BUNDLE/bin/podferry-tar"
    "##);
    let bundle = format!("/opt/podferry/{}", done.bundle);
    assert_snapshot!(node.read(&format!("{bundle}/bin/runtime.json")), @r##"
    {
      "runc": "/usr/bin/runc",
      "socket": "/run/podferry/runtime.sock",
      "fence_dir": "/var/lib/podferry/fenced",
      "wait_s": 100
    }
    "##);
    assert_snapshot!(node.read(&format!("{bundle}/tools/bin/criu")).replace(&done.bundle, "BUNDLE"), @r##"
    #!/opt/podferry/BUNDLE/tools/libexec/busybox sh
    # Written by podferry-install: CRIU with its own libraries and loader.
    exec /opt/podferry/BUNDLE/tools/lib/criu/ld-linux-x86-64.so.2 --inhibit-cache --library-path /opt/podferry/BUNDLE/tools/lib/criu --argv0 criu /opt/podferry/BUNDLE/tools/libexec/criu "$@"
    "##);
}

#[test]
fn an_upgrade_switches_the_link_and_leaves_the_runtime_and_the_bundle_before_alone() {
    let node = node();
    let first = node.install().unwrap().bundle;
    node.make_bundle("1.1.0", "second");
    node.commands();
    let second = node.install().unwrap();
    assert_eq!(second.before.as_deref(), Some(first.as_str()));
    assert!(!second.restarted);
    assert_eq!(node.read("/opt/podferry/current/bin/podferry-agent"), "second");
    assert_eq!(bundles(&node), [first.clone(), second.bundle.clone()]);

    node.make_bundle("1.1.0", "third: another build of the same version");
    let third = node.install().unwrap();
    assert_eq!(bundles(&node).len(), 2, "the first is gone: {:?}", bundles(&node));
    assert!(!bundles(&node).contains(&first) && third.bundle != second.bundle);
}

#[test]
fn a_containerd_that_does_not_come_back_is_restarted_by_the_next_try() {
    let node = node();
    node.told.borrow_mut().failing.push("systemctl restart".to_owned());
    let error = node.install().unwrap_err();
    assert!(matches!(&error, Error::Command { .. }), "{error}");
    node.told.borrow_mut().failing.retain(|failing| failing != "systemctl restart");
    assert!(node.install().unwrap().restarted);
    assert!(!node.install().unwrap().restarted);
}

#[test]
fn a_runtime_that_somebody_else_restarts_is_left_alone() {
    let mut node = node();
    node.options.restart = Restart::Never;
    let before = node.contents();
    node.commands();
    assert!(!node.install().unwrap().restarted);
    assert!(node.commands().iter().all(|command| command.starts_with("mount ")));
    let needs_restart = |node: &Node| {
        let problems = check(&node.host(), &node.options).unwrap().problems;
        problems.iter().any(|problem| problem.contains("has not been restarted"))
    };
    assert!(needs_restart(&node));
    node.install().unwrap();
    assert!(!needs_restart(&node));
    assert!(node.uninstall().unwrap());
    assert_eq!(node.contents(), before);
}

#[test]
fn containers_of_the_handler_keep_a_runc_until_they_are_gone() {
    let node = node();
    let before = node.contents();
    node.install().unwrap();
    let task = "/run/containerd/io.containerd.runtime.v2.task/k8s.io";
    node.write(&format!("{task}/a1/options.json"), r#"{"binary_name":"/opt/podferry/current/bin/podferry-runtime"}"#);
    node.write(&format!("{task}/b2/options.json"), r#"{"binary_name":"/usr/bin/runc"}"#);
    node.commands();
    let error = node.uninstall().unwrap_err();
    assert!(matches!(error, Error::StillRunning { count: 1 }), "{error}");
    assert_eq!(node.commands(), Vec::<String>::new(), "the handler stays, so the runtime is not restarted");
    let link = fs::read_link(node.root().join("opt/podferry/current/bin/podferry-runtime")).unwrap();
    assert_eq!(link.to_str(), Some("/usr/bin/runc"));
    assert_eq!(bundles(&node), Vec::<String>::new());
    assert!(node.has("/etc/containerd/conf.d/podferry.toml"));
    let report = check(&node.host(), &node.options).unwrap();
    assert!(report.problems[0].contains("waits for the last containers"), "{report:?}");

    fs::remove_dir_all(node.root().join("run/containerd/io.containerd.runtime.v2.task")).unwrap();
    assert!(node.uninstall().unwrap());
    assert_eq!(node.contents(), before);
}

#[test]
fn installing_again_after_that_brings_the_wrapper_back() {
    let node = node();
    node.install().unwrap();
    let options = "/run/containerd/io.containerd.runtime.v2.task/k8s.io/a1/options.json";
    node.write(options, r#"{"binary_name":"/opt/podferry/current/bin/podferry-runtime"}"#);
    node.uninstall().unwrap_err();
    node.install().unwrap();
    assert_eq!(node.read("/opt/podferry/current/bin/podferry-runtime"), "first");
    assert!(!node.has("/opt/podferry/leftover"));
}

#[test]
fn what_others_wrote_into_the_same_file_meanwhile_stays() {
    let node = Node::new(&[("/run/containerd/containerd.sock", ""), ("/etc/containerd/config.toml", "version = 3\n")]);
    node.install().unwrap();
    let with = node.read("/etc/containerd/config.toml");
    node.write("/etc/containerd/config.toml", &format!("# theirs\n{with}[metrics]\n"));
    node.uninstall().unwrap();
    assert_eq!(node.read("/etc/containerd/config.toml"), "# theirs\nversion = 3\n[metrics]\n");
}

#[test]
fn what_the_agent_left_goes_with_it() {
    let node = node();
    let before = node.contents();
    node.install().unwrap();
    node.write("/etc/podferry/tls/key.pem", "secret");
    node.write("/run/podferry/runtime.sock", "");
    node.write("/var/lib/podferry/logs/a.log", "");
    let mounts = "tmpfs /run/podferry-images tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
    node.write("/proc/1/mounts", mounts);
    fs::create_dir_all(node.root().join("sys/fs/cgroup/podferry")).unwrap();
    node.commands();
    node.uninstall().unwrap();
    assert!(node.commands().contains(&"umount /run/podferry-images".to_owned()));
    fs::remove_dir_all(node.root().join("proc")).unwrap();
    assert!(!node.has("/sys/fs/cgroup/podferry"));
    fs::remove_dir_all(node.root().join("sys/fs")).unwrap();
    assert_eq!(node.contents(), before);
}

#[test]
fn a_pod_that_has_moved_away_but_is_still_here_keeps_its_fence() {
    let node = node();
    node.install().unwrap();
    node.write("/var/lib/podferry/fenced/u-1", "");
    node.write("/var/lib/kubelet/pods/u-1/etc-hosts", "");
    assert!(matches!(node.uninstall(), Err(Error::Busy { count: 1, .. })));
    fs::remove_dir_all(node.root().join("var/lib/kubelet")).unwrap();
    assert!(node.uninstall().unwrap());
}

/// Copies a node's files as they are when it is killed, which is between any two of its writes. What is written in which order is what
/// matters, so a failing write at each place stands for the kill.
#[test]
fn a_kill_at_any_place_is_made_good_by_installing_or_uninstalling_again() {
    // A file that cannot be replaced, one for each place where something is written.
    let places = [
        "/opt/podferry/.current.new",
        "/etc/podferry/agent.toml.podferry-new",
        "/etc/containerd/conf.d/podferry.toml.podferry-new",
    ];
    for place in places {
        for finish in [true, false] {
            let node = node();
            let before = node.contents();
            // A folder with something in it cannot be removed as a file.
            node.write(&format!("{place}/block"), "");
            let result = catch_unwind(AssertUnwindSafe(|| node.install()));
            assert!(result.is_ok_and(|result| result.is_err()), "{place} did not stop it");
            fs::remove_dir_all(node.root().join(place.trim_start_matches('/'))).unwrap();
            if finish {
                assert!(node.install().unwrap().restarted, "{place}");
                assert!(check(&node.host(), &node.options).unwrap().bundle.is_some());
            }
            assert!(node.uninstall().unwrap(), "{place}");
            let mut after = node.contents();
            // The folders that the block itself was in.
            after.retain(|path, _| {
                before.contains_key(path) || !path.ends_with("conf.d") && !path.ends_with("etc/podferry")
            });
            assert_eq!(after, before, "{place}");
        }
    }
}

#[test]
fn what_a_killed_installer_was_writing_goes_with_the_next_run() {
    let containerd =
        |config| Node::new(&[("/run/containerd/containerd.sock", ""), ("/etc/containerd/config.toml", config)]);
    let crio = || {
        let config = "[crio.runtime.runtimes.runc]\nruntime_path = \"/usr/bin/runc\"\n";
        Node::new(&[("/run/crio/crio.sock", ""), ("/etc/crio/crio.conf.d/10-crio.conf", config)])
    };
    // Of the record itself, of a file of podferry's, and of each kind of handler.
    let cases: [(&dyn Fn() -> Node, &[&str]); 3] = [
        (
            &|| containerd(V3),
            &["/opt/podferry/install.json", "/etc/podferry/agent.toml", "/etc/containerd/conf.d/podferry.toml"],
        ),
        (
            &|| containerd("version = 3\n"),
            &["/etc/containerd/config.toml", "/etc/containerd/config.toml.before-podferry"],
        ),
        (&crio, &["/etc/crio/crio.conf.d/99-podferry.conf"]),
    ];
    for (node, places) in cases {
        let node = node();
        let before = node.contents();
        node.install().unwrap();
        let installed = node.contents();
        let half =
            |place: &&str| node.write(&format!("{place}.podferry-new"), "[crio.runtime.runtimes.podferry]\nhalf = ");
        places.iter().for_each(half);
        check(&node.host(), &node.options).unwrap();
        node.install().unwrap();
        assert_eq!(node.contents(), installed, "{places:?}");
        places.iter().for_each(half);
        node.uninstall().unwrap();
        assert_eq!(node.contents(), before, "{places:?}");
    }
    let node = node();
    let before = node.contents();
    node.write("/opt/podferry/install.json.podferry-new", "{");
    assert!(!node.uninstall().unwrap());
    assert_eq!(node.contents(), before, "nothing had been noted yet");
}

#[test]
fn a_check_says_what_is_missing() {
    let node = node();
    node.answer("/usr/bin/runc --version", "runc version 1.2.5\ncommit: x\n");
    let report = check(&node.host(), &node.options).unwrap();
    assert_snapshot!(report.problems.join("\n"), @r##"
    podferry is not installed here
    /usr/bin/runc is runc 1.2.5, and 1.3 or newer is needed for pods that arrive
    "##);
    node.install().unwrap();
    node.answer("/usr/bin/runc --version", "runc version 1.3.0-rc.1\n");
    fs::remove_file(node.root().join("etc/containerd/conf.d/podferry.toml")).unwrap();
    let report = check(&node.host(), &node.options).unwrap();
    assert_snapshot!(report.problems.join("\n"), @r##"
    /etc/containerd/conf.d/podferry.toml does not have the handler as it should be: install again
    /etc/podferry/tls/cert.pem is missing: the agent cannot start
    /etc/podferry/tls/key.pem is missing: the agent cannot start
    /etc/podferry/tls/ca.pem is missing: the agent cannot start
    "##);
}
