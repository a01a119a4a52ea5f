//! What a container of the cluster is, and its OCI specification.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Capabilities, Capability, Linux, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder, LinuxDeviceCgroupBuilder,
    LinuxMemoryBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResourcesBuilder, LinuxSeccomp,
    Mount, MountBuilder, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder, get_default_maskedpaths,
    get_default_mounts, get_default_readonly_paths,
};

use crate::cgroup;
use crate::error::{Error, Result};

/// Where a container finds programs unless its environment says otherwise.
const SEARCH_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a CPU quota is of, in microseconds; the kernel's own default.
const CPU_PERIOD: u64 = 100_000;

/// A folder or file of the machine that is seen inside a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    /// The path on the node.
    pub source: PathBuf,
    /// The path in the container.
    pub destination: PathBuf,
    /// Whether the container can only read it.
    pub read_only: bool,
}

/// Which network a container is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Network {
    /// A namespace of its own that its specification gives by path, linked to the node's bridge. It moves along.
    #[default]
    Linked,
    /// A namespace that runc makes, with a loopback and nothing else.
    Lonely,
    /// The node's own, so that its address is the node's.
    OfNode,
}

/// A container to be run on a node, or to be awaited by one.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Its name: the runc id, the name of bundle, network namespace and cgroup. A DNS label.
    pub name: String,
    /// The root filesystem that its writable layer lies over; never written to.
    pub rootfs: PathBuf,
    /// Program and arguments.
    pub args: Vec<String>,
    /// Environment, `NAME=value`. A `PATH` is added when there is none.
    pub env: Vec<String>,
    /// The working directory in the container.
    pub cwd: PathBuf,
    /// Its address on the flat network, from [`crate::FIRST_CONTAINER_ADDRESS`] on; counts when it is linked.
    pub ip: Ipv4Addr,
    /// Its network; linked by default.
    pub network: Network,
    /// Whose user and group number its first process has; root's by default.
    pub user: u32,
    /// What of the machine it sees besides its root filesystem.
    pub mounts: Vec<BindMount>,
    /// Where it has volumes: directories of each node's own that move with it.
    pub volumes: Vec<PathBuf>,
    /// Whether its standard streams are a terminal.
    pub terminal: bool,
    /// System call filter; none by default.
    pub seccomp: Option<LinuxSeccomp>,
    /// Capabilities; by default those that Docker grants.
    pub capabilities: Option<Vec<Capability>>,
    /// Memory limit in bytes.
    pub memory_limit: Option<i64>,
    /// CPU time in microseconds of each 100 ms.
    pub cpu_quota: Option<i64>,
    /// Annotations of its specification: name and value.
    pub annotations: Vec<(String, String)>,
}

impl Workload {
    /// A workload with the usual settings.
    pub fn new<W: Into<String>>(
        name: impl Into<String>,
        rootfs: impl Into<PathBuf>,
        args: impl IntoIterator<Item = W>,
        ip: Ipv4Addr,
    ) -> Self {
        Self {
            name: name.into(),
            rootfs: rootfs.into(),
            args: args.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: PathBuf::from("/"),
            ip,
            network: Network::default(),
            user: 0,
            mounts: Vec::new(),
            volumes: Vec::new(),
            terminal: false,
            seccomp: None,
            capabilities: None,
            memory_limit: None,
            cpu_quota: None,
            annotations: Vec::new(),
        }
    }

    /// Its OCI specification on a node. `cgroups_path` is absolute, from the root of every hierarchy.
    pub fn spec(&self, cgroups_path: &Path) -> Result<Spec> {
        let failed = |reason: oci_spec::OciSpecError| Error::Document {
            what: format!("the OCI specification of {}", self.name),
            reason: reason.to_string(),
        };
        let root = RootBuilder::default().path("rootfs").readonly(false).build().map_err(failed)?;
        let mut mounts = get_default_mounts();
        for mount in &self.mounts {
            mounts.push(bind(mount).map_err(failed)?);
        }
        SpecBuilder::default()
            .root(root)
            .hostname(self.name.clone())
            .mounts(mounts)
            .process(self.process().map_err(failed)?)
            .linux(self.linux(cgroups_path).map_err(failed)?)
            .annotations(self.annotations.iter().cloned().collect::<HashMap<_, _>>())
            .build()
            .map_err(failed)
    }

    fn process(&self) -> Result<Process, oci_spec::OciSpecError> {
        let mut env = self.env.clone();
        if !env.iter().any(|entry| entry.starts_with("PATH=")) {
            env.push(SEARCH_PATH.to_owned());
        }
        let granted: Capabilities = match &self.capabilities {
            Some(capabilities) => capabilities.iter().copied().collect(),
            None => usual_capabilities().into_iter().collect(),
        };
        let capabilities = LinuxCapabilitiesBuilder::default()
            .bounding(granted.clone())
            .effective(granted.clone())
            .permitted(granted)
            .inheritable(Capabilities::new())
            .ambient(Capabilities::new())
            .build()?;
        let mut process = ProcessBuilder::default()
            .terminal(self.terminal)
            .user(UserBuilder::default().uid(self.user).gid(self.user).build()?)
            .args(self.args.clone())
            .env(env)
            .cwd(self.cwd.clone())
            .capabilities(capabilities)
            .no_new_privileges(true)
            .build()?;
        // The builder's default sets RLIMIT_NOFILE, which needs CAP_SYS_RESOURCE where the hard limit is lower.
        process.set_rlimits(None);
        Ok(process)
    }

    fn linux(&self, cgroups_path: &Path) -> Result<Linux, oci_spec::OciSpecError> {
        let no_devices = LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?;
        let mut resources = LinuxResourcesBuilder::default().devices(vec![no_devices]);
        if let Some(limit) = self.memory_limit {
            resources = resources.memory(LinuxMemoryBuilder::default().limit(limit).build()?);
        }
        if let Some(quota) = self.cpu_quota {
            resources = resources.cpu(LinuxCpuBuilder::default().quota(quota).period(CPU_PERIOD).build()?);
        }
        let mut linux = LinuxBuilder::default()
            .cgroups_path(cgroups_path)
            .namespaces(self.namespaces()?)
            .resources(resources.build()?)
            .masked_paths(get_default_maskedpaths())
            .readonly_paths(get_default_readonly_paths());
        if let Some(seccomp) = &self.seccomp {
            linux = linux.seccomp(seccomp.clone());
        }
        linux.build()
    }

    fn namespaces(&self) -> Result<Vec<LinuxNamespace>, oci_spec::OciSpecError> {
        use LinuxNamespaceType::{Cgroup, Ipc, Mount, Pid, Uts};
        let mut kinds = vec![Pid, Ipc, Uts, Mount];
        // As Docker does: a cgroup namespace on v2, none on v1.
        if cgroup::is_unified() {
            kinds.push(Cgroup);
        }
        let plain = |kind| LinuxNamespaceBuilder::default().typ(kind).build();
        let mut namespaces = kinds.into_iter().map(plain).collect::<Result<Vec<_>, _>>()?;
        let network = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
        match self.network {
            Network::Linked => {
                let path = Path::new(crate::network::NETNS_FOLDER).join(&self.name);
                namespaces.push(network.path(path).build()?);
            }
            Network::Lonely => namespaces.push(network.build()?),
            Network::OfNode => {}
        }
        Ok(namespaces)
    }
}

fn bind(mount: &BindMount) -> Result<Mount, oci_spec::OciSpecError> {
    let access = if mount.read_only { "ro" } else { "rw" };
    MountBuilder::default()
        .destination(mount.destination.clone())
        .source(mount.source.clone())
        .typ("bind")
        .options(["rbind", "rprivate", access].map(str::to_owned).to_vec())
        .build()
}

/// What Docker grants a container by default.
fn usual_capabilities() -> [Capability; 14] {
    use Capability as C;
    [
        C::AuditWrite,
        C::Chown,
        C::DacOverride,
        C::Fowner,
        C::Fsetid,
        C::Kill,
        C::Mknod,
        C::NetBindService,
        C::NetRaw,
        C::Setfcap,
        C::Setgid,
        C::Setpcap,
        C::Setuid,
        C::SysChroot,
    ]
}

/// Whether a text can be a host name, a file name and a part of a link's name: a DNS label of at most `longest`.
pub(crate) fn check_label(what: &str, label: &str, longest: usize) -> Result<()> {
    let plain = label.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if plain && !label.is_empty() && label.len() <= longest && !label.starts_with('-') && !label.ends_with('-') {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{what} {label:?} will not do: it must have 1 to {longest} of a-z, 0-9 and -, and no - at either end"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Workload {
        Workload::new("shop", "/images/shop", ["/bin/shop", "--port", "80"], Ipv4Addr::new(10, 88, 0, 100))
    }

    #[test]
    fn specification_has_no_rlimits_and_joins_the_named_network() {
        let spec = sample().spec(Path::new("/podferry-local-x-node-a/shop")).unwrap();
        let json = serde_json::to_value(&spec).unwrap();
        assert!(json["process"].get("rlimits").is_none());
        assert!(json["process"].get("oomScoreAdj").is_none());
        assert_eq!(json["linux"]["cgroupsPath"], "/podferry-local-x-node-a/shop");
        let namespaces = json["linux"]["namespaces"].as_array().unwrap();
        let network = namespaces.iter().find(|namespace| namespace["type"] == "network").unwrap();
        assert_eq!(network["path"], "/run/netns/shop");
        assert_eq!(json["process"]["env"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn another_network_has_no_path() {
        let namespace = |network| {
            let spec = Workload { network, ..sample() }.spec(Path::new("/c")).unwrap();
            let json = serde_json::to_value(&spec).unwrap();
            let namespaces = json["linux"]["namespaces"].as_array().unwrap().clone();
            namespaces.into_iter().find(|namespace| namespace["type"] == "network")
        };
        assert_eq!(namespace(Network::Lonely), Some(serde_json::json!({"type": "network"})));
        assert_eq!(namespace(Network::OfNode), None);
    }

    #[test]
    fn own_settings_reach_the_specification() {
        let mut workload = sample();
        workload.capabilities = Some(vec![Capability::Kill]);
        workload.env = vec!["PATH=/only".to_owned()];
        workload.memory_limit = Some(1 << 30);
        workload.cpu_quota = Some(150_000);
        workload.user = 70;
        workload.mounts = vec![BindMount { source: "/host".into(), destination: "/data".into(), read_only: true }];
        let json = serde_json::to_value(workload.spec(Path::new("/c")).unwrap()).unwrap();
        assert_eq!(json["process"]["capabilities"]["bounding"], serde_json::json!(["CAP_KILL"]));
        assert_eq!((&json["process"]["user"]["uid"], &json["process"]["user"]["gid"]), (&70.into(), &70.into()));
        assert_eq!(json["process"]["env"], serde_json::json!(["PATH=/only"]));
        assert_eq!(json["linux"]["resources"]["memory"]["limit"], 1 << 30);
        let cpu = &json["linux"]["resources"]["cpu"];
        assert_eq!((&cpu["quota"], &cpu["period"]), (&150_000.into(), &100_000.into()));
        let mount = json["mounts"].as_array().unwrap().last().unwrap();
        assert_eq!(mount["destination"], "/data");
        assert_eq!(mount["options"], serde_json::json!(["rbind", "rprivate", "ro"]));
    }

    #[test]
    fn labels() {
        for good in ["a", "node-a", "0x"] {
            check_label("name", good, 12).unwrap();
        }
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a b", "thirteenchars"] {
            assert!(check_label("name", bad, 12).is_err(), "{bad:?}");
        }
    }
}
