//! The agent as a process: one port for everything, until it is told to stop.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::time::Duration;

use futures::TryStreamExt as _;
use podferry_common::identity::Identity;
use podferry_common::listen::listen;
use podferry_common::metrics::Exporter;
use podferry_proto::DESCRIPTORS;
use podferry_proto::v1::agent_service_server::AgentServiceServer;
use podferry_proto::v1::application_service_server::ApplicationServiceServer;
use podferry_proto::v1::delivery_service_server::DeliveryServiceServer;
use podferry_proto::v1::fetch_service_server::FetchServiceServer;
use podferry_proto::v1::relay_service_server::RelayServiceServer;
use podferry_transfer::TransferServer;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::context::Context;
use crate::parts::Parts;
use crate::recovery;
use crate::service::{Agent, Application, Delivery, Fetch, Relay};

/// How often the certificate's files are looked at.
const IDENTITY_INTERVAL: Duration = Duration::from_secs(10);
/// `f_type` of a tmpfs (`TMPFS_MAGIC` of `linux/magic.h`).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Serves until SIGTERM or SIGINT. Parts of migrations that go on then are taken up by the next agent.
///
/// # Errors
/// When the agent cannot start: its message says what is wrong.
pub async fn serve(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    make_folders(&config)?;
    let identity = Identity::load(config.identity.clone())?;
    let _watching = identity.watch(IDENTITY_INTERVAL);
    let listener =
        listen(config.listen).await.map_err(|error| format!("cannot listen on {}: {error}", config.listen))?;
    let context = Context::new(config, identity);
    let parts = Parts::default();
    recovery::recover(&context, &parts).await;
    if let Some(kubernetes) = &context.config.kubernetes {
        let served = context.visitors.serve(kubernetes, parts.clone());
        served.map_err(|error| format!("cannot listen at {}: {error}", kubernetes.socket.display()))?;
    }

    if let Some(address) = context.config.metrics_listen {
        export(address, &context).await?;
    }
    let delivery = Delivery::new(context.clone(), parts.clone());
    let relay = Relay::new(context.clone());
    let fetch = Fetch::new(context.clone(), parts.clone());
    let application = Application::new(context.clone(), parts.clone());
    let agent = Agent::new(context.clone(), parts).await;
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<AgentServiceServer<Agent>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    tracing::info!(node = %context.config.node, listen = %context.config.listen, "listening");
    let (mut server, incoming) = podferry_transfer::server(listener, &context.identity);
    let metrics = context.metrics.clone();
    let incoming = incoming.inspect_ok(move |_| metrics.connected());
    server
        .add_service(AgentServiceServer::new(agent))
        .add_service(ApplicationServiceServer::new(application))
        .add_service(DeliveryServiceServer::new(delivery))
        .add_service(RelayServiceServer::new(relay))
        .add_service(FetchServiceServer::new(fetch))
        .add_service(TransferServer::new(std::sync::Arc::new(context.admissions.clone())))
        .add_service(health_service)
        .add_service(reflection)
        .serve_with_incoming_shutdown(incoming, stopped())
        .await?;
    Ok(())
}

/// Lets Prometheus read, until the process ends.
async fn export(address: SocketAddr, context: &Context) -> Result<(), Box<dyn std::error::Error>> {
    let bound = Exporter::bind(address, context.metrics.registry()).await;
    let exporter = bound.map_err(|error| format!("cannot listen on {address} for metrics: {error}"))?;
    tracing::info!(address = %exporter.local_addr()?, "metrics can be read");
    tokio::spawn(exporter.run());
    Ok(())
}

async fn stopped() {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signals) => signals.recv().await,
            Err(error) => {
                tracing::error!(%error, "a signal cannot be waited for");
                std::future::pending().await
            }
        }
    };
    tokio::select! {
        _ = wait(SignalKind::terminate()) => {}
        _ = wait(SignalKind::interrupt()) => {}
    }
    tracing::info!("stopping");
}

/// Makes the agent's folders. Images have to be in memory: what is written there is a workload's memory in the clear.
fn make_folders(config: &Config) -> Result<(), Box<dyn std::error::Error>> {
    let parts = config.parts_dir();
    for dir in [&config.images_dir, &parts, &config.runtime_dir, &config.runtime.bundles_dir] {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| format!("{} cannot be made: {error}", dir.display()))?;
    }
    if !is_tmpfs(&config.images_dir)? {
        mount_tmpfs(&config.images_dir)?;
    }
    Ok(())
}

fn is_tmpfs(dir: &Path) -> rustix::io::Result<bool> {
    let kind = rustix::fs::statfs(dir)?.f_type;
    Ok(u64::try_from(kind).is_ok_and(|kind| kind == TMPFS_MAGIC))
}

fn mount_tmpfs(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    use rustix::mount::{MountFlags, mount};
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let mounted = mount("podferry-images", dir, "tmpfs", flags, Some(c"mode=0700,size=75%"));
    mounted.map_err(|error| format!("no tmpfs can be mounted at {}: {error}", dir.display()).into())
}
