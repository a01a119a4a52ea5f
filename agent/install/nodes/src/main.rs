//! `podferry-nodes`: runs one pod on each node with a label, waits for all of them, and says what they said.
//!
//! The chart runs it behind `helm uninstall`, when the agents are gone, to take podferry off the nodes.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, ListParams, LogParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};

/// Nodes that are worked on at a time: each may restart its container runtime.
const AT_A_TIME: usize = 20;
const PAUSE: Duration = Duration::from_secs(1);
const LAST_LINES: i64 = 3;
/// How long a node is asked for them: the API server waits for longer for one that cannot be reached, and the job's time would be over.
const LOG_PATIENCE: Duration = Duration::from_secs(10);

/// Runs one pod on each node with a label, waits for all of them, and says what they said.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The label, whatever its value is.
    #[arg(long)]
    label: String,
    /// The pod as JSON; the node's name is put in.
    #[arg(long)]
    pod: PathBuf,
    /// For so many seconds all of them are waited for.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// The name of the pod that this program runs in.
    #[arg(long, requires = "own_uid")]
    own_name: Option<String>,
    /// Its uid.
    #[arg(long, requires = "own_name")]
    own_uid: Option<String>,
    /// Labels whose names begin so are taken off each node where it went well.
    #[arg(long)]
    remove_labels: Option<String>,
}

impl Arguments {
    /// The pod that this program runs in, as an owner.
    fn own(&self) -> Option<OwnerReference> {
        let (name, uid) = self.own_name.clone().zip(self.own_uid.clone())?;
        let (api_version, kind) = ("v1".to_owned(), "Pod".to_owned());
        Some(OwnerReference { api_version, kind, name, uid, ..OwnerReference::default() })
    }
}

/// Why it cannot be done on any node.
#[derive(Debug, Error)]
enum Error {
    /// The pod's file cannot be read.
    #[error("cannot read the pod {}: {source}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is no pod.
    #[error("{} is no pod: {source}", path.display())]
    NoPod {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// The API server cannot be asked.
    #[error("cannot {action}: {source}; see that the account of this pod has the chart's rights")]
    Api {
        /// What was tried.
        action: &'static str,
        /// What it said.
        source: Box<kube::Error>,
    },
}

fn api(action: &'static str) -> impl FnOnce(kube::Error) -> Error {
    move |source| Error::Api { action, source: Box::new(source) }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("podferry-nodes: error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<bool, Error> {
    let pod = owned(read(&arguments.pod)?, arguments.own());
    let client = Client::try_default().await.map_err(api("reach the API server"))?;
    let end = Instant::now() + Duration::from_secs(arguments.timeout);
    on_all(&client, arguments, &pod, end).await
}

fn read(path: &Path) -> Result<Pod, Error> {
    let text = fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::NoPod { path: path.to_owned(), source })
}

/// The pod, as one that goes with this program's own, however that ends: it is privileged, and must not stay.
fn owned(mut pod: Pod, own: Option<OwnerReference>) -> Pod {
    pod.metadata.owner_references = own.map(|own| vec![own]);
    pod
}

/// Whether it went well on all nodes.
async fn on_all(client: &Client, arguments: &Arguments, pod: &Pod, end: Instant) -> Result<bool, Error> {
    let api_of_nodes: Api<Node> = Api::all(client.clone());
    let with_label = ListParams::default().labels(&arguments.label);
    let nodes = api_of_nodes.list_metadata(&with_label).await.map_err(api("list the nodes"))?.items;
    let work = nodes.iter().map(|node| {
        let (name, labels) = (node.name_any(), own_labels(node.labels(), arguments.remove_labels.as_deref()));
        let nodes = &api_of_nodes;
        async move {
            let mut went = on_one(client, pod, &name, end).await;
            if let (Ok(Went::Well(_)), Some(labels)) = (&went, labels)
                && let Err(error) = nodes.patch_metadata(&name, &PatchParams::default(), &labels).await
            {
                went = Err(api("take labels off a node")(error));
            }
            report(&name, went)
        }
    });
    let went: Vec<bool> = futures::stream::iter(work).buffer_unordered(AT_A_TIME).collect().await;
    println!("{} of {} nodes done", went.iter().filter(|well| **well).count(), went.len());
    Ok(went.iter().all(|well| *well))
}

/// What takes the labels off that begin so; none when there are none.
fn own_labels(labels: &BTreeMap<String, String>, prefix: Option<&str>) -> Option<Patch<Value>> {
    let names = labels.keys().filter(|name| prefix.is_some_and(|prefix| name.starts_with(prefix)));
    let gone: Map<String, Value> = names.map(|name| (name.clone(), Value::Null)).collect();
    (!gone.is_empty()).then(|| Patch::Merge(json!({ "metadata": { "labels": gone } })))
}

fn report(node: &str, went: Result<Went, Error>) -> bool {
    let well = matches!(went, Ok(Went::Well(_)));
    match went {
        Ok(Went::Well(said)) => println!("{node}: {said}"),
        Ok(Went::Wrong(said)) => println!("{node}: not done: {said}"),
        Err(error) => println!("{node}: not done: {error}"),
        Ok(Went::Unfinished(said)) => println!("{node}: not done in time: {said}"),
    }
    well
}

/// How it went on a node, with the pod's last lines.
#[derive(Debug, PartialEq, Eq)]
enum Went {
    Well(String),
    Wrong(String),
    Unfinished(String),
}

async fn on_one(client: &Client, pod: &Pod, node: &str, end: Instant) -> Result<Went, Error> {
    if Instant::now() >= end {
        return Ok(Went::Unfinished("nothing was begun there".to_owned()));
    }
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let mut wanted = pod.clone();
    wanted.spec.get_or_insert_default().node_name = Some(node.to_owned());
    let made = pods.create(&PostParams::default(), &wanted).await.map_err(api("create a pod"))?.name_any();
    let ended = wait(&pods, &made, end).await;
    let said = last_lines(&pods, &made).await;
    let deleted = pods.delete(&made, &DeleteParams::default()).await.map(drop).map_err(api("delete a pod"));
    let went = match ended?.as_deref() {
        Some("Succeeded") => Went::Well(said),
        Some(_) => Went::Wrong(said),
        None => Went::Unfinished(said),
    };
    deleted.map(|()| went)
}

async fn last_lines(pods: &Api<Pod>, name: &str) -> String {
    let lines = LogParams { tail_lines: Some(LAST_LINES), ..LogParams::default() };
    match timeout(LOG_PATIENCE, pods.logs(name, &lines)).await {
        Ok(Ok(said)) => said.trim().to_owned(),
        Ok(Err(error)) => format!("no log: {error}"),
        Err(_) => "no log: the node does not answer".to_owned(),
    }
}

/// The phase that the pod ended in; none if it did not in time. That the API server does not answer for a while is no end: its node may be
/// the one whose runtime is restarted.
async fn wait(pods: &Api<Pod>, name: &str, end: Instant) -> Result<Option<String>, Error> {
    loop {
        let found = pods.get(name).await.map_err(api("look at a pod"));
        let phase = found.as_ref().ok().and_then(|pod| pod.status.as_ref()?.phase.clone());
        if let Some(phase) = phase.filter(|phase| phase == "Succeeded" || phase == "Failed") {
            return Ok(Some(phase));
        }
        if Instant::now() >= end {
            return found.map(|_| None);
        }
        sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_labels_that_begin_so_are_taken_off() {
        let labels = [("podferry.dev/strategy-warm", "true"), ("podferry.dev/enabled", "true")];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let off = own_labels(&labels, Some("podferry.dev/strategy-"));
        let gone = json!({ "metadata": { "labels": { "podferry.dev/strategy-warm": null } } });
        assert_eq!(off, Some(Patch::Merge(gone)));
        assert!(own_labels(&labels, None).is_none() && own_labels(&labels, Some("other")).is_none());
    }

    #[test]
    fn what_runs_on_a_node_goes_with_the_pod_that_made_it() {
        let parse = |more: &[&str]| Arguments::try_parse_from([&["nodes", "--label=a", "--pod=b"], more].concat());
        let own = parse(&["--own-name=uninstall-x7k2p", "--own-uid=u-1"]).unwrap().own();
        let pod = owned(Pod::default(), own);
        let [owner] = pod.metadata.owner_references.as_deref().unwrap() else { panic!("one owner") };
        let OwnerReference { api_version, kind, name, uid, .. } = owner;
        assert_eq!([&**api_version, kind, name, uid], ["v1", "Pod", "uninstall-x7k2p", "u-1"]);
        assert_eq!(owner.block_owner_deletion, None, "nothing waits for it");
        assert_eq!(parse(&[]).unwrap().own(), None);
        assert!(parse(&["--own-name=a"]).is_err());
    }
}
