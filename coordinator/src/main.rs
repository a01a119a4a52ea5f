//! `podferry-coordinator`: serves `CoordinatorService`, and REST if it is asked to, and takes migrations through their phases.

use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use podferry_common::identity::Identity;
use podferry_common::listen::listen;
use podferry_common::metrics::Exporter;
use podferry_common::tls::{Incoming, Protocol};
use podferry_common::{chain, telemetry};
use podferry_coordinator::access::Gate;
use podferry_coordinator::api::{Core, Current, ServeError, rest, serve};
use podferry_coordinator::audit::AuditLog;
use podferry_coordinator::cluster::{Agents, Inventory};
use podferry_coordinator::config::Config;
use podferry_coordinator::evacuation::Evacuator;
use podferry_coordinator::eviction::{self, Parts};
use podferry_coordinator::kubernetes::{KubernetesConfig, Leading};
use podferry_coordinator::metrics::Metrics;
use podferry_coordinator::pods::{Pods, Watched};
use podferry_coordinator::runner::Runner;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How often new certificates are looked for.
const CERTIFICATE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a stop waits for migrations to be undone or completed.
const GRACE: Duration = Duration::from_secs(20);
/// How long the first look at nodes and pods may take.
const CLUSTER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the last answers of a stopping server may take.
const LAST_ANSWERS: Duration = Duration::from_secs(3);

/// One leader that takes migrations through their phases.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    #[arg(
        long,
        short,
        value_name = "FILE",
        default_value = "/etc/podferry/coordinator.toml",
        env = "PODFERRY_COORDINATOR_CONFIG"
    )]
    config: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    telemetry::init();
    match run(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let mut signals = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    let config = Config::load(&arguments.config)?;
    let inventory = config.inventory.as_deref().map(Inventory::load).transpose()?.unwrap_or_default();
    let identity = Identity::load(config.identity.clone())?;
    identity.watch(CERTIFICATE_INTERVAL);
    let stop = CancellationToken::new();
    let Some(mut leading) = Leading::begin(config.kubernetes.as_ref(), &mut signals, &stop).await? else {
        return Ok(());
    };
    let store = leading.store(&config.state_dir).await?;
    let metrics = Metrics::default();
    let audit = AuditLog::open(&config.audit_log_path(), config.audit_bounds(), metrics.clone())?;
    let gate = Gate::new(config.access.clone(), audit.clone(), metrics.clone())?;

    let agents = Agents::new(identity.clone());
    let cluster = match (leading.client(), &config.kubernetes) {
        (Some(client), Some(kubernetes)) if config.inventory.is_none() => Some(look_at(client, kubernetes).await?),
        _ => None,
    };
    let deadlines = if cluster.is_some() { config.deadlines.of_pods() } else { config.deadlines };
    let mut runner = Runner::new(
        store.clone(),
        agents.clone(),
        audit.clone(),
        metrics.clone(),
        deadlines,
        config.limits(),
        stop.clone(),
    );
    if let Some((pods, _)) = &cluster {
        runner = runner.with_pods(pods.clone());
    }
    let core = Core::new(inventory, agents, store.clone(), runner.clone(), deadlines, gate);

    let incoming = accept(Protocol::Grpc, config.listen, &identity).await?;
    let rest = match config.rest_listen {
        Some(address) => Some(accept(Protocol::Http1, address, &identity).await?),
        None => None,
    };
    let open = runner.recover().await?;
    if let Some((pods, _)) = &cluster {
        let (pods, store, stop) = (pods.clone(), store.clone(), stop.clone());
        tokio::spawn(async move { stop.run_until_cancelled(pods.look_after(&store)).await });
    }
    if let Some(rest) = &rest {
        tracing::info!(address = %rest.local_addr()?, "listening for REST");
    }
    tracing::info!(address = %incoming.local_addr()?, peer = %identity.peer(), open_migrations = open, "listening");

    let evacuator = core.evacuator().clone();
    let watched = cluster.map(|(_, watched)| watched);
    let current = match watched.clone() {
        Some(watched) => Current::watching(core, watched),
        None => Current::new(core, config.inventory.clone().unwrap_or_default()),
    };
    let evacuations = evacuator.recover().await?;
    if evacuations > 0 {
        tracing::info!(evacuations, "going on with evacuations");
    }
    if let Some(address) = config.metrics_listen {
        export(address, &metrics, &runner, current.clone()).await?;
    }
    if let (Some(client), Some(settings)) = (leading.client(), config.kubernetes.and_then(|cluster| cluster.eviction)) {
        let (current, store, metrics) = (current.clone(), store.clone(), metrics.clone());
        eviction::begin(Parts { client, current, store, metrics, settings }, &stop).await?;
    }
    tokio::spawn(stop_on_signal(signals, evacuator.clone(), runner.clone()));
    leading.work(&current, &evacuator, &runner, watched, &stop);
    let served = tokio::select! {
        served = serve_all(current, incoming, rest, stop.clone()) => served,
        // Requests under way are finished, but a caller that does not read its answer keeps nobody from stopping.
        () = stopped_for(&stop, LAST_ANSWERS) => Ok(()),
    };
    // The server may have ended by itself.
    stop.cancel();
    evacuator.join().await;
    let joined = runner.join().await;
    audit.flush().await;
    leading.end().await?;
    joined?;
    served?;
    tracing::info!("stopped");
    Ok(())
}

/// What is done with pods, and what is seen of the cluster: once all of it has been read.
async fn look_at(client: kube::Client, settings: &KubernetesConfig) -> Result<(Pods, Watched), Box<dyn Error>> {
    let watched = Watched::begin(client.clone(), settings.agent_port);
    let read = tokio::time::timeout(CLUSTER_TIMEOUT, watched.is_whole()).await;
    read.map_err(|_| "nodes and pods cannot be read from the API server: see the warnings above")?;
    Ok((Pods::new(client), watched))
}

async fn accept(protocol: Protocol, address: SocketAddr, identity: &Identity) -> Result<Incoming, Box<dyn Error>> {
    let listener = listen(address).await.map_err(|error| format!("cannot listen on {address}: {error}"))?;
    Ok(Incoming::speaking(protocol, listener, identity))
}

/// Serves gRPC, and REST where there is a listener for it, until `stop` is cancelled or gRPC cannot be served.
async fn serve_all(
    core: Current,
    incoming: Incoming,
    rest: Option<Incoming>,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let rest = rest.map(|incoming| rest::serve(core.clone(), incoming, rest::Limits::default(), stop.clone()));
    let rest = async {
        if let Some(rest) = rest {
            rest.await;
        }
        Ok(())
    };
    tokio::try_join!(serve(core, incoming, stop), rest).map(|((), ())| ())
}

/// Lets Prometheus read, until the process ends.
async fn export(
    address: SocketAddr,
    metrics: &Metrics,
    runner: &Runner,
    current: Current,
) -> Result<(), Box<dyn Error>> {
    let bound = Exporter::bind(address, metrics.registry(runner)).await;
    let exporter = bound.map_err(|error| format!("cannot listen on {address} for metrics: {error}"))?;
    tracing::info!(address = %exporter.local_addr()?, "metrics can be read");
    tokio::spawn(exporter.run());
    let metrics = metrics.clone();
    tokio::spawn(async move { current.watch_agents(&metrics).await });
    Ok(())
}

async fn stopped_for(stop: &CancellationToken, time: Duration) {
    stop.cancelled().await;
    tokio::time::sleep(time).await;
}

async fn stop_on_signal([mut terminate, mut interrupt]: [Signal; 2], evacuator: Evacuator, runner: Runner) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    // First: what is undone now is no outcome of an evacuation.
    evacuator.shut_down();
    runner.shut_down(GRACE).await;
}
