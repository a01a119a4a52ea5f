//! A target's part whose hook is played by the test.

use std::fs;
use std::net::Ipv4Addr;

use oci_spec::runtime::Spec;
use podferry_common::NodeName;
use podferry_common::identity::{Identity, IdentityFiles, LocalCa};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::*;
use crate::config::{Config, Network, PostCopy, Runtime, Tools, Tracker};

const WORKLOAD: &str = "w";

/// An agent's context with folders of its own, and a bundle; its programs are nowhere.
fn context(folder: &Path) -> Context {
    let node: NodeName = "n1".parse().unwrap();
    let files = IdentityFiles::in_folder(folder.join("identity"));
    let authority = LocalCa::create(&folder.join("authority")).unwrap();
    authority.issue(&Peer::Agent(node.clone()), Duration::from_secs(3600), &files).unwrap();
    let nowhere = || PathBuf::from("/nowhere");
    let config = Config {
        node,
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        metrics_listen: None,
        state_dir: folder.join("state"),
        images_dir: folder.join("images"),
        runtime_dir: folder.join("run"),
        coordinator: "127.0.0.1:1".to_owned(),
        tracker: Tracker::default(),
        give_way: true,
        identity: files.clone(),
        tools: Tools {
            criu: nowhere(),
            runc: nowhere(),
            hook: nowhere(),
            stdio_keeper: nowhere(),
            dump_worker: nowhere(),
            criu_shim: nowhere(),
            tar: nowhere(),
            pager: nowhere(),
        },
        runtime: Runtime {
            roots: vec![folder.join("runc")],
            bundles_dir: folder.join("bundles"),
            logs_dir: folder.join("logs"),
            volume_dirs: vec![folder.join("volumes")],
        },
        network: Network { bridge: "pf-no-bridge".to_owned() },
        post_copy: PostCopy::default(),
    };
    let bundle = config.runtime.bundles_dir.join(WORKLOAD);
    fs::create_dir_all(bundle.join("lower")).unwrap();
    Spec::default().save(bundle.join("config.json")).unwrap();
    Context::new(config, Identity::load(files).unwrap())
}

/// Whoever was told to go and then failed to get its link, or died in between, gets it before the word: also from the
/// second call.
#[tokio::test]
async fn a_held_container_is_never_let_go_without_its_link() {
    let folder = tempfile::tempdir().unwrap();
    let context = context(folder.path());
    let migration = MigrationId::new();
    let record = PartRecord {
        migration,
        workload: WORKLOAD.to_owned(),
        standing: Standing::Sealed,
        tidied: false,
        going: true,
        written: SystemTime::now(),
        role: Role::Target {
            source_node: "n2".to_owned(),
            keep_connections: true,
            link: Some(LinkHandle::new("pf-no-link")),
            plan: None,
            netns: None,
            fetch_from: None,
            cold: false,
            volumes: Vec::new(),
        },
    };
    let part = TargetPart::resumed(&context, record).unwrap();
    let mut hook = UnixStream::connect(part.dirs.hook_socket()).await.unwrap();
    hook.write_all(format!("post-restore-sealed 1 {migration}\n").as_bytes()).await.unwrap();
    assert_eq!(part.hook.until(HOOK_TIMEOUT, |hold| hold.pid().is_some()).await, Hold::Sealed { pid: 1 });
    for _ in 0..2 {
        let failure = part.resume().await.unwrap_err();
        assert!(failure.message.contains("cannot join the bridge"), "{failure}");
        let told = tokio::time::timeout(Duration::from_millis(100), hook.read_u8()).await;
        assert!(told.is_err(), "it was told something: {told:?}");
        assert_eq!(part.standing(), Standing::Sealed);
    }
}
