//! Running a service as process 1 of a container.
//!
//! Process 1 gets no default action for signals and inherits orphans, so it has to take SIGTERM and to reap: a zombie in
//! the pid namespace makes a later restore fail (CRIU finds the pid taken: "File exists").

use std::{io, net::SocketAddr, sync::Arc};

use axum::{Router, serve::ListenerExt};
use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, waitpid},
    unistd::Pid,
};
use thiserror::Error;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::ballast::{self, Ballast};

/// The environment variable that gives the port; 0 takes a free one.
pub const PORT_VARIABLE: &str = "PORT";
const DEFAULT_PORT: u16 = 8080;
/// What the line that tells the address begins with, after the service's name.
pub const LISTENING: &str = "listening on ";

/// Why a service did not start or go on.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// An environment variable has a value that cannot be used.
    #[error("environment variable {name} is `{value}`: {expected}")]
    Variable {
        /// Name of the variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The port cannot be listened on.
    #[error("cannot listen on port {port}: {source}; set PORT to a free one")]
    Listen {
        /// The port.
        port: u16,
        /// What the system said.
        source: io::Error,
    },
    /// The order log cannot be used.
    #[error(transparent)]
    Log(#[from] crate::order_log::LogError),
    /// The runtime, the server or a signal handler failed.
    #[error("the service stopped: {0}")]
    Io(#[from] io::Error),
}

/// Reads a number from the environment; `default` when the variable is not set.
pub fn number_from_environment<T: std::str::FromStr>(
    name: &'static str,
    default: T,
    expected: &'static str,
) -> Result<T, ServiceError> {
    match std::env::var(name) {
        Ok(value) => value.parse().map_err(|_| ServiceError::Variable { name, value, expected }),
        Err(_) => Ok(default),
    }
}

/// Logs to standard output, which is the container's log; `RUST_LOG` sets what.
pub fn log_to_stdout() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(io::stdout).init();
}

/// What becomes of open connections at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtEnd {
    /// They break off: some never end by themselves.
    BreakOff,
    /// What is being asked is answered; idle ones are closed.
    Answer,
}

/// Listens on all addresses and serves until SIGTERM or SIGINT.
pub async fn serve(name: &str, router: Router, at_end: AtEnd) -> Result<(), ServiceError> {
    // Handlers first: as process 1, a SIGTERM that comes before them would be ignored.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let child = signal(SignalKind::child())?;

    let port = number_from_environment(PORT_VARIABLE, DEFAULT_PORT, "give a port number, 0 to 65535")?;
    let mib = number_from_environment(ballast::SIZE_VARIABLE, 0_usize, "give a size in MiB")?;
    let memory = Arc::new(Ballast::new(mib, 1));
    let router = router.merge(ballast::router(memory));

    let listener = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port)))
        .await
        .map_err(|source| ServiceError::Listen { port, source })?;
    tracing::info!(ballast_mib = mib, "{name} {LISTENING}{}", listener.local_addr()?);
    // Small answers must not wait for the client's acknowledgement of the one before.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::warn!(%error, "cannot set TCP_NODELAY");
        }
    });
    let is_first = std::process::id() == 1;
    let told = async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: ending"),
            _ = interrupt.recv() => tracing::info!("SIGINT: ending"),
        }
    };
    let serving = async {
        let serving = axum::serve(listener, router);
        match at_end {
            AtEnd::Answer => serving.with_graceful_shutdown(told).await,
            AtEnd::BreakOff => tokio::select! {
                served = serving => served,
                () = told => Ok(()),
            },
        }
    };
    tokio::select! {
        served = serving => served.map_err(ServiceError::from),
        () = reap(child), if is_first => Ok(()),
    }
}

/// Collects every child that ended, for as long as the process lives.
async fn reap(mut child: Signal) {
    while child.recv().await.is_some() {
        reap_all();
    }
}

/// Signals of several children can come as one, so all that ended are collected.
fn reap_all() {
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(status) => match status.pid() {
                Some(pid) => tracing::info!(%pid, "reaped"),
                None => return,
            },
            Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

/// Runs `service` on two threads, enough for a workload in a container, and gives the process's exit code.
pub fn run<F>(name: &str, service: impl FnOnce() -> F) -> std::process::ExitCode
where
    F: Future<Output = Result<(), ServiceError>>,
{
    log_to_stdout();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let outcome = runtime.map_err(ServiceError::from).and_then(|runtime| {
        let outcome = runtime.block_on(service());
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{name}: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
