//! `podferry-install`: puts podferry onto a Kubernetes node, and takes it off again.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use podferry_install::{
    Bundle, Commands, Direct, Entered, Error, Host, Options, Restart, Runtime, Settings, become_agent, chain, check,
    install, uninstall,
};

/// Containers of the handler still run: not an error, but not the end.
const STILL_RUNNING: u8 = 3;

/// Puts podferry onto a Kubernetes node, and takes it off again.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    node: Node,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Node {
    /// Where the node's root is. Commands run in the namespaces of process 1 unless it is `/`.
    #[arg(long, default_value = "/", global = true, env = "PODFERRY_ROOT")]
    root: PathBuf,
    /// The folder on the node; for nodes whose /opt is read-only.
    #[arg(long, global = true, env = "PODFERRY_DIR")]
    dir: Option<PathBuf>,
    /// The container runtime that the kubelet uses, if it is not found.
    #[arg(long, value_enum, global = true, env = "PODFERRY_RUNTIME")]
    runtime: Option<Runtime>,
    /// containerd's configuration, if it is not where it is looked for.
    #[arg(long, global = true, env = "PODFERRY_CONTAINERD_CONFIG")]
    containerd_config: Option<PathBuf>,
    /// How the runtime is restarted when its configuration has changed: `systemd`, or `never`.
    #[arg(long, default_value = "systemd", global = true, value_parser = ["systemd", "never"], env = "PODFERRY_RESTART")]
    restart: String,
    /// A shell command on the node that restarts the runtime, for nodes without systemd.
    #[arg(long, global = true, env = "PODFERRY_RESTART_COMMAND")]
    restart_command: Option<String>,
    /// Also when migrations are under way.
    #[arg(long, global = true)]
    force: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Installs, or upgrades what is installed.
    Install(Install),
    /// Takes everything off the node.
    Uninstall {
        /// For so many seconds containers of the handler are waited for.
        #[arg(long, default_value_t = 0)]
        wait: u64,
    },
    /// Looks at the node, and changes nothing; the answer is JSON.
    Check,
    /// Enters the node's namespaces, and becomes its agent.
    Agent,
}

#[derive(Args)]
struct Install {
    /// The bundle, a folder here.
    #[arg(long, default_value = "/usr/share/podferry/bundle")]
    bundle: PathBuf,
    /// This node's name.
    #[arg(long, env = "NODE_NAME")]
    node: String,
    /// Where the agent listens.
    #[arg(long)]
    listen: SocketAddr,
    /// Where Prometheus may read figures.
    #[arg(long)]
    metrics_listen: Option<SocketAddr>,
    /// host:port of the coordinator, as the node can resolve it.
    #[arg(long)]
    coordinator: String,
    /// Settings to be laid over `agent.toml`, as TOML.
    #[arg(long, default_value = "", env = "PODFERRY_AGENT_CONFIG", value_parser = table)]
    config: toml::Table,
}

fn table(text: &str) -> Result<toml::Table, toml::de::Error> {
    text.parse()
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("podferry-install: error: {}", chain(&error));
            ExitCode::from(if matches!(error, Error::StillRunning { .. }) { STILL_RUNNING } else { 1 })
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode, Error> {
    let node = arguments.node;
    let commands: Box<dyn Commands> = if node.root == Path::new("/") { Box::new(Direct) } else { Box::new(Entered) };
    let host = Host::new(node.root, commands);
    let restart = match (node.restart_command, node.restart.as_str()) {
        (Some(command), _) => Restart::Command(command),
        (None, "never") => Restart::Never,
        (None, _) => Restart::Systemd,
    };
    let (folder, force) = (node.dir, node.force);
    let options = Options { folder, runtime: node.runtime, containerd_config: node.containerd_config, restart, force };
    match arguments.command {
        Command::Install(asked) => do_install(&host, &options, asked),
        Command::Uninstall { wait } => do_uninstall(&host, &options, Duration::from_secs(wait)),
        Command::Check => do_check(&host, &options),
        Command::Agent => match become_agent(&options.folder(&host)?)? {},
    }
}

fn do_install(host: &Host, options: &Options, asked: Install) -> Result<ExitCode, Error> {
    let bundle = Bundle::open(&asked.bundle)?;
    let settings = Settings {
        node: asked.node,
        listen: asked.listen,
        metrics_listen: asked.metrics_listen,
        coordinator: asked.coordinator,
        extra: asked.config,
    };
    let done = install(host, options, &bundle, &settings)?;
    for warning in &done.warnings {
        eprintln!("podferry-install: warning: {warning}");
    }
    let before = done.before.map(|before| format!(", before {before}")).unwrap_or_default();
    let restarted = if done.restarted { "restarted" } else { "not restarted" };
    println!(
        "installed {}{before}; handler in {}; {} {restarted}",
        done.bundle,
        done.handler.display(),
        done.runtime.name()
    );
    Ok(ExitCode::SUCCESS)
}

fn do_uninstall(host: &Host, options: &Options, wait: Duration) -> Result<ExitCode, Error> {
    let was_there = uninstall(host, options, wait)?;
    println!("{}", if was_there { "uninstalled; the node is as it was" } else { "nothing is installed here" });
    Ok(ExitCode::SUCCESS)
}

fn do_check(host: &Host, options: &Options) -> Result<ExitCode, Error> {
    let report = check(host, options)?;
    println!("{}", serde_json::to_string_pretty(&report).unwrap_or_default());
    Ok(if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
