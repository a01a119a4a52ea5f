//! How the handler gets onto nodes of each kind: what is written, and that all of it goes away again.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;

use insta::assert_snapshot;
use podferry_install::{Error, chain};
use support::Node;

const V2: &str = r#"version = 2
# kubeadm's, with the node's own comments

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.10"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = true"#;

const V3: &str = r#"version = 3
imports = ["conf.d/*.toml"]

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    BinaryName = '/usr/bin/runc'
    SystemdCgroup = true
"#;

const SOCKET: (&str, &str) = ("/run/containerd/containerd.sock", "");

/// Installs, gives what `path` holds then, and sees that uninstalling leaves no trace.
fn installed_and_gone(node: &Node, path: &str, unit: &str) -> String {
    let before = node.contents();
    let done = node.install().unwrap();
    assert_eq!(done.handler.to_str(), Some(path));
    assert!(done.restarted);
    assert_eq!(node.commands(), [&format!("systemctl restart {unit}"), "mount -t tracefs tracefs /sys/kernel/tracing"]);
    let written = node.read(path);

    let again = node.install().unwrap();
    assert!(!again.restarted, "nothing has changed");
    assert_eq!(node.commands(), ["mount -t tracefs tracefs /sys/kernel/tracing"], "the mount of before was none");
    assert_eq!(node.read(path), written);

    assert!(node.uninstall().unwrap());
    assert_eq!(node.commands(), [format!("systemctl restart {unit}")]);
    assert_eq!(node.contents(), before, "the node is as it was");
    assert!(!node.uninstall().unwrap());
    written
}

#[test]
fn a_configuration_of_version_2_gets_a_block_since_containerd_1_7_would_forget_the_rest_for_a_drop_in() {
    let node = Node::new(&[SOCKET, ("/etc/containerd/config.toml", V2)]);
    assert_snapshot!(installed_and_gone(&node, "/etc/containerd/config.toml", "containerd"), @r##"
    version = 2
    # kubeadm's, with the node's own comments

    [plugins."io.containerd.grpc.v1.cri"]
      sandbox_image = "registry.k8s.io/pause:3.10"
      [plugins."io.containerd.grpc.v1.cri".containerd]
        default_runtime_name = "runc"
        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
          runtime_type = "io.containerd.runc.v2"
          [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
            SystemdCgroup = true
    # podferry: this file did not end with a newline
    # >>> podferry: written by podferry-install, taken out by `podferry-install uninstall`
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.podferry]
    container_annotations = ["podferry.dev/*"]
    pod_annotations = ["podferry.dev/*"]
    runtime_type = "io.containerd.runc.v2"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.podferry.options]
    BinaryName = "/opt/podferry/current/bin/podferry-runtime"
    SystemdCgroup = true
    # <<< podferry
    "##);
}

#[test]
fn the_block_goes_into_the_drop_in_whose_section_counts() {
    let main = format!("imports = [\"/etc/containerd/conf.d/*.toml\"]\n{V2}\n");
    let drop_in = V2.replace("default_runtime_name = \"runc\"", "default_runtime_name = \"nvidia\"");
    let node = Node::new(&[
        SOCKET,
        ("/etc/containerd/config.toml", &main),
        ("/etc/containerd/conf.d/99-nvidia.toml", &drop_in),
        ("/etc/containerd/conf.d/99-other.toml", "version = 2\n"),
    ]);
    let written = installed_and_gone(&node, "/etc/containerd/conf.d/99-nvidia.toml", "containerd");
    assert!(written.starts_with(&drop_in));
}

#[test]
fn a_configuration_of_version_3_gets_a_drop_in_where_it_reads_one() {
    let node = Node::new(&[SOCKET, ("/etc/containerd/config.toml", V3)]);
    assert_snapshot!(installed_and_gone(&node, "/etc/containerd/conf.d/podferry.toml", "containerd"), @r##"
    # Written by podferry-install, removed by `podferry-install uninstall`.
    version = 3

    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry]
    container_annotations = ["podferry.dev/*"]
    pod_annotations = ["podferry.dev/*"]
    runtime_type = "io.containerd.runc.v2"

    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry.options]
    BinaryName = "/opt/podferry/current/bin/podferry-runtime"
    SystemdCgroup = true
    "##);
}

#[test]
fn a_configuration_of_version_3_that_imports_nothing_gets_a_block() {
    let node = Node::new(&[SOCKET, ("/etc/containerd/config.toml", "version = 3\n")]);
    assert_snapshot!(installed_and_gone(&node, "/etc/containerd/config.toml", "containerd"), @r##"
    version = 3
    # >>> podferry: written by podferry-install, taken out by `podferry-install uninstall`
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry]
    container_annotations = ["podferry.dev/*"]
    pod_annotations = ["podferry.dev/*"]
    runtime_type = "io.containerd.runc.v2"

    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry.options]
    BinaryName = "/opt/podferry/current/bin/podferry-runtime"
    # <<< podferry
    "##);
}

#[test]
fn a_containerd_without_a_configuration_gets_one_of_its_version() {
    let node = Node::new(&[SOCKET]);
    node.answer("containerd --version", "containerd github.com/containerd/containerd/v2 2.1.4 75cb2b\n");
    assert_snapshot!(installed_and_gone(&node, "/etc/containerd/config.toml", "containerd"), @r##"
    version = 3
    # >>> podferry: written by podferry-install, taken out by `podferry-install uninstall`
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry]
    container_annotations = ["podferry.dev/*"]
    pod_annotations = ["podferry.dev/*"]
    runtime_type = "io.containerd.runc.v2"

    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry.options]
    BinaryName = "/opt/podferry/current/bin/podferry-runtime"
    # <<< podferry
    "##);
    node.answer("containerd --version", "containerd containerd.io 1.7.27 05044ec\n");
    let written = installed_and_gone(&node, "/etc/containerd/config.toml", "containerd");
    assert!(written.starts_with("version = 2\n# >>> podferry"), "{written}");
}

#[test]
fn what_others_add_to_a_configuration_that_was_made_for_the_handler_stays() {
    let k3s = "/var/lib/rancher/k3s/agent/etc/containerd";
    let rendered = V3.replace("imports = [\"conf.d/*.toml\"]\n", "");
    let own = "/etc/containerd/config.toml";
    let (template, rendered) = (format!("{k3s}/config-v3.toml.tmpl"), (format!("{k3s}/config.toml"), rendered));
    for again in [false, true] {
        let bare = Node::new(&[SOCKET]);
        bare.answer("containerd --version", "containerd github.com/containerd/containerd/v2 2.1.4 75cb2b\n");
        let k3s = Node::new(&[("/run/k3s/containerd/containerd.sock", ""), (&rendered.0, &rendered.1)]);
        for (node, made, head) in [(bare, own, "version = 3\n"), (k3s, &*template, "{{ template \"base\" . }}\n")] {
            node.install().unwrap();
            let with = node.read(made);
            node.write(made, &format!("{with}[metrics]\n"));
            if again {
                node.install().unwrap();
            }
            node.uninstall().unwrap();
            assert_eq!(node.read(made), format!("{head}[metrics]\n"));
            assert!(!node.has(&format!("{made}.before-podferry")));
        }
    }
}

#[test]
fn crio_gets_a_drop_in() {
    let defaults = "[crio.runtime]\ndefault_runtime = \"crun\"\n[crio.runtime.runtimes.crun]\nruntime_path = \"/usr/libexec/crio/crun\"\n\
                    [crio.runtime.runtimes.runc]\nruntime_path = \"/usr/bin/runc\"\nmonitor_path = \"/usr/libexec/crio/conmon\"\n";
    let node = Node::new(&[("/run/crio/crio.sock", ""), ("/etc/crio/crio.conf.d/10-crio.conf", defaults)]);
    assert_snapshot!(installed_and_gone(&node, "/etc/crio/crio.conf.d/99-podferry.conf", "crio"), @r##"
    # Written by podferry-install, removed by `podferry-install uninstall`.
    [crio.runtime.runtimes.podferry]
    monitor_path = "/usr/libexec/crio/conmon"
    runtime_path = "/opt/podferry/current/bin/podferry-runtime"
    runtime_root = "/run/runc"
    runtime_type = "oci"
    "##);
}

#[test]
fn k3s_and_rke2_get_a_template_that_has_their_own_in_it() {
    let rendered = V3.replace("imports = [\"conf.d/*.toml\"]\n", "");
    let k3s = "/var/lib/rancher/k3s/agent/etc/containerd";
    let node = Node::new(&[("/run/k3s/containerd/containerd.sock", ""), (&format!("{k3s}/config.toml"), &rendered)]);
    assert_snapshot!(installed_and_gone(&node, &format!("{k3s}/config-v3.toml.tmpl"), "k3s"), @r##"
    {{ template "base" . }}
    # >>> podferry: written by podferry-install, taken out by `podferry-install uninstall`
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry]
    container_annotations = ["podferry.dev/*"]
    pod_annotations = ["podferry.dev/*"]
    runtime_type = "io.containerd.runc.v2"

    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.podferry.options]
    BinaryName = "/opt/podferry/current/bin/podferry-runtime"
    SystemdCgroup = true
    # <<< podferry
    "##);

    let rke2 = "/var/lib/rancher/rke2/agent/etc/containerd";
    let node = Node::new(&[("/run/k3s/containerd/containerd.sock", ""), (&format!("{rke2}/config.toml"), V2)]);
    let own = "{{ template \"base\" . }}\n[metrics]\n  address = \"127.0.0.1:1338\"\n";
    node.write(&format!("{rke2}/config.toml.tmpl"), own);
    let written = installed_and_gone(&node, &format!("{rke2}/config.toml.tmpl"), "rke2-agent");
    assert!(written.starts_with(own));
}

#[test]
fn k3s_that_reads_drop_ins_gets_one() {
    let folder = "/var/lib/rancher/k3s/agent/etc/containerd";
    let rendered = V3.replace("conf.d/*.toml", &format!("{folder}/config-v3.toml.d/*.toml"));
    let node = Node::new(&[("/run/k3s/containerd/containerd.sock", ""), (&format!("{folder}/config.toml"), &rendered)]);
    installed_and_gone(&node, &format!("{folder}/config-v3.toml.d/podferry.toml"), "k3s");
}

#[test]
fn container_optimized_os_has_its_programs_where_it_lets_them_run() {
    let node = Node::new(&[SOCKET, ("/etc/containerd/config.toml", V2), ("/etc/os-release", "NAME=x\nID=cos\n")]);
    node.write("/home/kubernetes/bin/kubelet", "");
    let written = installed_and_gone(&node, "/etc/containerd/config.toml", "containerd");
    assert!(
        written.contains("BinaryName = \"/home/kubernetes/bin/podferry/current/bin/podferry-runtime\""),
        "{written}"
    );
}

#[test]
fn what_cannot_be_is_refused_with_the_reason_and_nothing_is_touched() {
    let refused = |node: &Node| {
        let before = node.contents();
        let said = chain(&node.install().unwrap_err());
        assert_eq!(node.contents(), before);
        said.replace(&node.root().display().to_string(), "ROOT")
    };
    let with = |config: &str| Node::new(&[SOCKET, ("/etc/containerd/config.toml", config)]);
    let unsafe_restart = with(V2);
    unsafe_restart.answer("systemctl show --property KillMode --value containerd", "control-group\n");
    let busy = with(V2);
    busy.install().unwrap();
    busy.write("/etc/containerd/config.toml", V2);
    busy.write("/var/lib/podferry/parts/m1/part.json", "{}");
    let with_folder = |path: &str| Node::new(&[SOCKET, ("/etc/containerd/config.toml", V2), (path, "")]);
    let mut without_systemd = with(V2);
    fs::remove_dir_all(without_systemd.root().join("run/systemd")).unwrap();
    without_systemd.options.restart = podferry_install::Restart::Systemd;
    let mut elsewhere = with(V2);
    elsewhere.config =
        "give_way = false\nstate_dir = '/srv'\n[runtime]\nlogs_dir = '/srv/logs'\n[kubernetes]\nfence_dir = '/srv/f'\n";
    let said = [
        refused(&Node::new(&[SOCKET, ("/etc/os-release", "ID=bottlerocket\n")])),
        refused(&Node::new(&[])),
        refused(&Node::new(&[SOCKET, ("/run/crio/crio.sock", "")])),
        refused(&with("[plugins.cri]\n")),
        refused(&with("version = 2\ndisabled_plugins = [\"cri\"]\n")),
        refused(&with("version = 3\nplugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.podferry = {}\n")),
        refused(&with(&V2.replace("io.containerd.runc.v2", "io.containerd.kata.v2"))),
        refused(&with("version = 2\nplugins = { \"io.containerd.grpc.v1.cri\" = {} }\n")),
        refused(&with(&V3.replace("/usr/bin/runc", "/opt/none/runc"))),
        refused(&Node::new(&[
            SOCKET,
            ("/etc/containerd/config.toml", V3),
            ("/etc/containerd/conf.d/podferry.toml", "version = 3\n"),
        ])),
        refused(&Node::new(&[
            SOCKET,
            ("/etc/containerd/config.toml", V2),
            ("/etc/podferry/agent.toml", "node = \"n1\"\n"),
        ])),
        refused(&with_folder("/var/lib/podferry/parts/m1/part.json")),
        refused(&with_folder("/etc/podferry/tls/key.pem")),
        refused(&unsafe_restart),
        refused(&busy),
        refused(&without_systemd),
        refused(&elsewhere),
    ];
    assert_snapshot!(said.join("\n"), @r##"
    nodes with bottlerocket are not supported: its root is verified and read-only, and it writes containerd's configuration anew from its own settings, which have no place for a handler. Use nodes with another system for pods that move
    no container runtime was found below ROOT: there is none of /run/k3s/containerd/containerd.sock, /run/containerd/containerd.sock, /run/crio/crio.sock, /etc/containerd/config.toml. Name it with --runtime, and its configuration with --containerd-config
    containerd and CRI-O are both here: name the one that the kubelet uses with --runtime
    /etc/containerd/config.toml has version 1 of containerd's configuration, at least 2 is needed: write it anew with `containerd config migrate`
    /etc/containerd/config.toml disables containerd's CRI plugin: this is not the runtime that the kubelet uses; name that with --runtime
    /etc/containerd/config.toml has a handler `podferry` that podferry-install did not write: remove it first
    no handler of this node runs containers by runc (runc): podferry moves containers of runc only; configure a handler that does
    /etc/containerd/config.toml cannot be extended by a handler: TOML parse error at line 4, column 2
      |
    4 | [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.podferry]
      |  ^^^^^^^
    cannot extend value of type inline table with a dotted key

    runc was not found: looked for /opt/none/runc. Install it, or name it as BinaryName of the node's runc handler
    /etc/containerd/conf.d/podferry.toml is there, and podferry-install did not write it: move it away
    /etc/podferry/agent.toml is there, and podferry-install did not write it: move it away
    /var/lib/podferry is there, and podferry-install did not make it: another installation of podferry has its journal or certificates there, and uninstalling this one would remove them. Stop and remove that one first; if it is gone already, move the folder away
    /etc/podferry/tls is there, and podferry-install did not make it: another installation of podferry has its journal or certificates there, and uninstalling this one would remove them. Stop and remove that one first; if it is gone already, move the folder away
    containerd has KillMode=control-group: restarting it would end every container of the node. Set KillMode=process, or restart it yourself on the drained node and run this again with --restart never
    1 parts of migrations are under way on this node, or pods that have moved away are still here (/var/lib/podferry/parts): wait for their end, or insist with --force
    containerd has to be restarted to know a new handler, and no systemd of this node runs it: give a command that restarts it with --restart-command
    the settings to be laid over agent.toml (--config or PODFERRY_AGENT_CONFIG; the chart's value agent.config) have state_dir, runtime.logs_dir, kubernetes.fence_dir: podferry-install decides that itself, for podferry-runtime and uninstalling look there. Take it out
    "##);
    let node = with("version = ");
    assert!(matches!(node.install(), Err(Error::Toml { .. })));
}
