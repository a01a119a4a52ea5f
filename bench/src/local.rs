//! `podferry-bench local`: a cluster to play with, which outlives the command that brought it up.

use std::{
    fs,
    path::PathBuf,
    process::{Command, ExitStatus},
};

use podferry_local::LocalCluster;

use crate::{
    error::{Error, Result},
    stage::{NODES, Program, make_image, options, start_workload},
    summary::columns,
};

/// Tells this cluster apart from those of the demo and of tests.
const SUFFIX: &str = "play";

/// Where the cluster lies.
pub fn folder() -> PathBuf {
    podferry_local::workspace_root().join(".podferry/local")
}

/// Brings the cluster up, with the demo's workloads on the first node.
pub fn up() -> Result<()> {
    let folder = folder();
    let cluster = LocalCluster::up_detached(&options(&folder).with_suffix(SUFFIX))?;
    let started = Program::ALL.into_iter().try_for_each(|program| {
        println!("starting {} at {}", program.name(), program.address());
        start_workload(&cluster, program, &make_image(program, &folder)?)
    });
    if let Err(error) = started {
        down()?;
        return Err(error);
    }
    print!("{}", advice(&cluster));
    Ok(())
}

fn advice(cluster: &LocalCluster) -> String {
    let program = std::env::current_exe().unwrap_or_default();
    let podferry = format!("{} local podferry", program.display());
    format!(
        "\nThe cluster is up. Move something:\n\
         \x20   {podferry} nodes\n\
         \x20   {podferry} workloads\n\
         \x20   {podferry} migrate redis --to {} --wait\n\
         Talk to a workload from the client side:\n\
         \x20   ip netns exec {} curl http://{}/products/1\n\
         Logs are in {}. `make local-down` takes it away.\n",
        NODES[1],
        cluster.client().netns(),
        Program::Catalogue.address(),
        cluster.logs().display()
    )
}

/// Takes the cluster away, whatever state it is in.
pub fn down() -> Result<()> {
    let folder = folder();
    LocalCluster::sweep(&folder)?;
    match fs::remove_dir_all(&folder) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::File { action: "remove", path: folder, source })
        }
        _ => Ok(()),
    }
}

/// What runs where.
pub fn status() -> Result<String> {
    let cluster = LocalCluster::attach(&folder())?;
    let mut rows = vec![["", "address", "process", "containers"].map(str::to_owned).to_vec()];
    let process = |pid: Option<u32>| pid.map_or_else(|| "not running".to_owned(), |pid| pid.to_string());
    let coordinator = cluster.coordinator();
    let pid = coordinator.process().map(|process| process.pid);
    rows.push(vec!["coordinator".to_owned(), coordinator.address(), process(pid), String::new()]);
    for node in cluster.nodes() {
        let running = Program::ALL.into_iter().filter(|program| node.container_process(program.name()).is_ok());
        let names: Vec<&str> = running.map(Program::name).collect();
        rows.push(vec![node.name().to_owned(), node.address().to_string(), process(node.agent_pid()), names.join(" ")]);
    }
    Ok(columns(&rows))
}

/// Runs the command line on the client side; its streams are this process's.
pub fn podferry(arguments: &[String]) -> Result<ExitStatus> {
    let cluster = LocalCluster::attach(&folder())?;
    let mut command: Command = cluster.podferry_command();
    let fail = |source| Error::File { action: "run", path: PathBuf::from("podferry"), source };
    command.args(arguments).status().map_err(fail)
}
