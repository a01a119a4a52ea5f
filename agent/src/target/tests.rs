//! A target's part whose hook is played by the test.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use oci_spec::runtime::Spec;
use podferry_common::NodeName;
use podferry_common::identity::{Identity, IdentityFiles, LocalCa};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::*;
use crate::config::{Config, Network, PostCopy, Runtime, Tools, Tracker, Transfer};
use crate::parts::{Part, Parts};

const WORKLOAD: &str = "w";

/// An agent's context with folders of its own, and a bundle; its programs are nowhere.
pub(crate) fn context(folder: &Path) -> Context {
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
        kubernetes: None,
        network: Network { bridge: "pf-no-bridge".to_owned() },
        post_copy: PostCopy::default(),
        transfer: Transfer::default(),
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
            takes_over: false,
            cold: false,
            volumes: Vec::new(),
            pod: None,
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

fn order(volumes: Vec<Volume>) -> PrepareOrder {
    let source: NodeName = "n2".parse().unwrap();
    PrepareOrder {
        migration: MigrationId::new(),
        workload: WORKLOAD.to_owned(),
        source: Peer::Agent(source),
        source_node: "n2".to_owned(),
        link: None,
        keep_connections: false,
        fetch_from: None,
        take_over: None,
        cold: false,
        volumes,
        stands_in: false,
        visitor: None,
        relayed: None,
    }
}

fn volume(dir: &Path) -> Volume {
    Volume { destination: "/data".into(), dir: dir.to_owned(), made: false }
}

/// Preflight has found it empty, and somebody was faster than the migration.
#[tokio::test]
async fn what_is_in_a_volume_when_a_migration_is_prepared_is_nobodys_to_delete() {
    let folder = tempfile::tempdir().unwrap();
    let context = context(folder.path());
    let [taken, free] = ["taken", "free"].map(|name| folder.path().join(name));
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("file"), "precious").unwrap();
    let failure = TargetPart::prepare(&context, order(vec![volume(&free), volume(&taken)])).await.unwrap_err();
    assert!(failure.message.contains("not empty") && failure.message.contains("taken"), "{failure}");
    assert_eq!(fs::read_to_string(taken.join("file")).unwrap(), "precious");
    assert!(!free.exists(), "nothing is left of what was not prepared");
}

/// Each of the two would empty it when it is undone.
#[tokio::test]
async fn a_volume_that_another_migration_fills_is_not_for_this_one() {
    let folder = tempfile::tempdir().unwrap();
    let (context, parts) = (context(folder.path()), Parts::default());
    let ours = folder.path().join("ours");
    let order = order(vec![volume(&ours)]);
    let migration = order.migration;
    parts.check_volumes(&order.volumes).unwrap();
    let reservation = parts.reserve(migration, WORKLOAD).unwrap();
    let part = Arc::new(TargetPart::prepare(&context, order).await.unwrap());
    reservation.fill(Part::Target(Arc::clone(&part)));
    for taken in [ours.clone(), ours.join("in"), folder.path().to_owned()] {
        let failure = parts.check_volumes(&[volume(&taken)]).unwrap_err();
        assert!(failure.message.contains(&migration.to_string()), "{failure}");
    }
    parts.check_volumes(&[volume(&folder.path().join("other"))]).unwrap();
    part.abort(Authority::Own).await.unwrap();
    parts.ended(migration, part.standing());
    parts.check_volumes(&[volume(&ours)]).unwrap();
}
