//! How much a coordinator with thousands of nodes and a thousand migrations at once takes: `make bench-scale`.
//!
//! Real are the coordinator (its process, with its store on a disk), the protocol, TLS and each node's certificate, over loopback. The
//! agents are in this process, and their containers are entries in a table.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a program for a person at a terminal")]
#![allow(unreachable_pub, reason = "a program has no readers of its modules")]

mod agent;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Parser;
use futures::{StreamExt as _, stream};
use podferry_common::identity::{Identity, IdentityFiles, LocalCa, Peer};
use podferry_common::tls::{self, Incoming};
use podferry_proto::v1::agent_service_server::AgentServiceServer;
use podferry_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use podferry_proto::v1::{ListMigrationsRequest, ListNodesRequest, MigrateRequest};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::sleep;
use tonic::transport::{Channel, Server};

use agent::{Agent, Cluster};

type Client = CoordinatorServiceClient<Channel>;

const DAY: Duration = Duration::from_secs(86_400);
/// Requests that are under way at a time.
const ASKING: usize = 64;
/// The largest answer: a node has some 300 bytes.
const MOST_BYTES: usize = 64 << 20;

/// How much a coordinator with many nodes and migrations takes.
#[derive(Parser)]
struct Options {
    /// Nodes.
    #[arg(long, default_value_t = 5000)]
    nodes: usize,
    /// Migrations at once; each takes two nodes.
    #[arg(long, default_value_t = 1000)]
    migrations: usize,
    /// Seconds that each transfer takes.
    #[arg(long, default_value_t = 60)]
    transfer: u64,
}

/// What the kernel says that the coordinator has used.
#[derive(Clone, Copy, Default)]
struct Used {
    cpu: f64,
    resident_kib: u64,
    most_kib: u64,
    written: u64,
    writes: u64,
}

#[tokio::main]
async fn main() {
    let options = Options::parse();
    assert!(options.migrations * 2 <= options.nodes, "each migration takes two nodes");
    let folder = tempfile::tempdir().unwrap();
    let begun = Instant::now();
    let cluster = Arc::new(Cluster::new(Duration::from_secs(options.transfer)));
    let ca = LocalCa::create(&folder.path().join("ca")).unwrap();
    let addresses = start_agents(&ca, folder.path(), &cluster, &options).await;
    println!("{} agents with certificates of their own in {:.1} s", options.nodes, begun.elapsed().as_secs_f64());
    let configuration = configure(&ca, folder.path(), &addresses, options.migrations);
    let (mut child, address) = start_coordinator(&configuration).await;
    let pid = child.id().unwrap();
    let identity = identity(&ca, folder.path(), &Peer::client("bench").unwrap());
    let channel = tls::connect(&address, &identity, &Peer::Coordinator).await.unwrap();
    let client = Client::new(channel).max_decoding_message_size(MOST_BYTES);
    show("started", Used::default(), used(pid), Duration::ZERO);
    survey(&client, pid, options.nodes).await;
    migrate(&client, pid, &cluster, options.migrations).await;
    let store = std::fs::metadata(folder.path().join("state/coordinator.redb")).unwrap().len();
    println!("store: {} KiB; calls to agents: {}", store >> 10, cluster.calls.load(Ordering::Relaxed));
    child.start_kill().unwrap();
    child.wait().await.unwrap();
    assert_eq!(cluster.violations.load(Ordering::SeqCst), 0, "two copies ran");
    assert_eq!(cluster.resumed.load(Ordering::SeqCst), options.migrations);
}

fn identity(ca: &LocalCa, folder: &Path, peer: &Peer) -> Identity {
    let files = IdentityFiles::in_folder(folder.join(peer.dns_name()));
    ca.issue(peer, DAY, &files).unwrap();
    Identity::load(files).unwrap()
}

async fn start_agents(ca: &LocalCa, folder: &Path, cluster: &Arc<Cluster>, options: &Options) -> Vec<String> {
    let mut addresses = Vec::with_capacity(options.nodes);
    for number in 0..options.nodes {
        let node = format!("n{number}");
        let identity = identity(ca, folder, &Peer::Agent(node.parse().unwrap()));
        let incoming = Incoming::new(TcpListener::bind("127.0.0.1:0").await.unwrap(), &identity);
        addresses.push(incoming.local_addr().unwrap().to_string());
        let container = (number < options.migrations).then(|| format!("c{number}"));
        let agent = Agent { node, cluster: Arc::clone(cluster), container: Arc::new(Mutex::new(container)) };
        let server = Server::builder().add_service(AgentServiceServer::new(agent));
        tokio::spawn(server.serve_with_incoming(incoming));
    }
    addresses
}

fn configure(ca: &LocalCa, folder: &Path, addresses: &[String], migrations: usize) -> PathBuf {
    identity(ca, folder, &Peer::Coordinator);
    let mut inventory = String::new();
    for (number, address) in addresses.iter().enumerate() {
        writeln!(inventory, "[[nodes]]\nname = \"n{number}\"\naddress = \"{address}\"\n").unwrap();
    }
    for number in 0..migrations {
        let workload =
            format!("[[workloads]]\nname = \"w{number}\"\ncontainer = \"c{number}\"\nnode = \"n{number}\"\n");
        writeln!(inventory, "{workload}").unwrap();
    }
    std::fs::write(folder.join("inventory.toml"), inventory).unwrap();
    let dns = Peer::Coordinator.dns_name();
    let text = format!(
        "listen = \"127.0.0.1:0\"\nstate_dir = \"state\"\ninventory = \"inventory.toml\"\n\
         [identity]\nca = \"{dns}/ca.pem\"\ncertificate = \"{dns}/cert.pem\"\nkey = \"{dns}/key.pem\"\n"
    );
    let path = folder.join("coordinator.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// The one beside this program: `target/<profile>/podferry-coordinator`.
async fn start_coordinator(configuration: &Path) -> (Child, String) {
    let own = std::env::current_exe().unwrap();
    let program = own.parent().and_then(Path::parent).unwrap().join("podferry-coordinator");
    let mut command = Command::new(&program);
    command.arg("--config").arg(configuration).stderr(Stdio::piped()).kill_on_drop(true);
    command.env("PODFERRY_LOG", "info").env("PODFERRY_LOG_FORMAT", "json");
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = loop {
        let line = lines.next_line().await.unwrap().expect("the coordinator ended before it listened");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        if line["message"] == "listening" {
            break line["address"].as_str().unwrap().to_owned();
        }
    };
    // Its log is read, as a journal would.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    (child, address)
}

async fn survey(client: &Client, pid: u32, nodes: usize) {
    for what in ["nodes, the first time", "nodes, again"] {
        let (begun, before) = (Instant::now(), used(pid));
        let listed = client.clone().list_nodes(ListNodesRequest::default()).await.unwrap().into_inner().nodes;
        let reachable = listed.iter().filter(|node| node.reachable).count();
        show(what, before, used(pid), begun.elapsed());
        println!("  {reachable} of {nodes} answered in time");
    }
}

async fn migrate(client: &Client, pid: u32, cluster: &Cluster, migrations: usize) {
    let (begun, before) = (Instant::now(), used(pid));
    let asked = stream::iter(0..migrations).map(|number| {
        let mut client = client.clone();
        async move {
            let (workload, target) = (format!("w{number}"), format!("n{}", migrations + number));
            let asked = Instant::now();
            client.migrate(MigrateRequest { workload, target, ..MigrateRequest::default() }).await.unwrap();
            asked.elapsed()
        }
    });
    let mut waits: Vec<Duration> = asked.buffer_unordered(ASKING).collect().await;
    waits.sort_unstable();
    show("all accepted", before, used(pid), begun.elapsed());
    let of = |hundredth: usize| waits[(waits.len() - 1) * hundredth / 100].as_secs_f64() * 1e3;
    println!("  a request took {:.0} ms (median), {:.0} ms (99th), {:.0} ms (longest)", of(50), of(99), of(100));
    let mut highest = 0;
    while cluster.resumed.load(Ordering::SeqCst) < migrations || !all_ended(client).await {
        highest = highest.max(used(pid).resident_kib);
        sleep(Duration::from_millis(500)).await;
        assert!(begun.elapsed() < Duration::from_secs(1800), "they do not end");
    }
    show("all ended", before, used(pid), begun.elapsed());
    println!("  {} froze at a time; {highest} KiB at most meanwhile", cluster.most.load(Ordering::SeqCst));
}

async fn all_ended(client: &Client) -> bool {
    let active = ListMigrationsRequest { active_only: true, ..ListMigrationsRequest::default() };
    client.clone().list_migrations(active).await.unwrap().into_inner().migrations.is_empty()
}

fn show(what: &str, before: Used, now: Used, took: Duration) {
    let (seconds, written) = (took.as_secs_f64(), now.written - before.written);
    println!(
        "{what}: {seconds:.1} s, {:.1} s of CPU, {} MiB resident ({} MiB at most), {} KiB written in {} writes",
        now.cpu - before.cpu,
        now.resident_kib >> 10,
        now.most_kib >> 10,
        written >> 10,
        now.writes - before.writes
    );
}

/// `/proc/<pid>/{stat,status,io}`
fn used(pid: u32) -> Used {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let stat = read("stat");
    // Behind the name, which may have blanks: utime and stime are the 12th and 13th.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    let (status, io) = (read("status"), read("io"));
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or_default()
    };
    Used {
        // 100 ticks a second on every Linux that this runs on.
        cpu: (ticks(11) + ticks(12)) / 100.0,
        resident_kib: field(&status, "VmRSS:"),
        most_kib: field(&status, "VmHWM:"),
        written: field(&io, "write_bytes:"),
        writes: field(&io, "syscw:"),
    }
}
