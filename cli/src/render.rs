//! Results on standard output, errors on standard error, for people or for scripts.

mod json;
mod table;

use std::io::{self, Write};

use podferry_common::Failure;
use podferry_proto::v1::{Evacuation, KeptConnections, ListConnectionsResponse, Migration, Node, Workload};
use serde::Serialize;

use crate::arguments::Output;

pub(crate) use json::{Authority, DrainReport, Hurried, Issued, Late, LeftBehind};

/// Prints the nodes.
pub(crate) fn nodes(output: Output, nodes: &[Node]) {
    match output {
        Output::Table => print(&table::nodes(nodes)),
        Output::Json => json(&nodes.iter().map(json::Node::from).collect::<Vec<_>>()),
    }
}

/// Prints what each node can do.
pub(crate) fn check(output: Output, nodes: &[Node]) {
    match output {
        Output::Table => print(&table::check(nodes)),
        Output::Json => json(&nodes.iter().map(json::Node::from).collect::<Vec<_>>()),
    }
}

/// Prints the workloads.
pub(crate) fn workloads(output: Output, workloads: &[Workload]) {
    match output {
        Output::Table => print(&table::workloads(workloads)),
        Output::Json => json(&workloads.iter().map(json::Workload::from).collect::<Vec<_>>()),
    }
}

/// Prints the connections that have outlived a move; that somebody does not say what they have goes to standard error.
pub(crate) fn connections(output: Output, found: &ListConnectionsResponse) {
    match output {
        Output::Table => {
            print(&table::connections(&found.kept));
            for node in &found.silent_nodes {
                eprintln!("{node} does not answer: what lives on there is not known");
            }
        }
        Output::Json => json(&json::Connections::from(found)),
    }
}

/// Prints the migrations.
pub(crate) fn migrations(output: Output, migrations: &[Migration]) {
    match output {
        Output::Table => print(&table::migrations(migrations)),
        Output::Json => json(&migrations.iter().map(json::Migration::from).collect::<Vec<_>>()),
    }
}

/// Prints one migration with everything known of it, and what lives on of the connections that it took along.
pub(crate) fn migration(output: Output, migration: &Migration, living: Option<&KeptConnections>) {
    match output {
        Output::Table => print(&table::migration(migration, living)),
        Output::Json => json(&json::Migration::from(migration)),
    }
}

/// Prints one migration in a line: what was asked for has begun, or ended.
pub(crate) fn outcome(output: Output, migration: &Migration) {
    match output {
        Output::Table => print(&table::outcome(migration)),
        Output::Json => json(&json::Migration::from(migration)),
    }
}

/// Prints the evacuations.
pub(crate) fn evacuations(output: Output, evacuations: &[Evacuation]) {
    match output {
        Output::Table => print(&table::evacuations(evacuations)),
        Output::Json => json(&evacuations.iter().map(json::Evacuation::from).collect::<Vec<_>>()),
    }
}

/// Prints one evacuation with all its workloads.
pub(crate) fn evacuation(output: Output, evacuation: &Evacuation) {
    match output {
        Output::Table => print(&table::evacuation(evacuation)),
        Output::Json => json(&json::Evacuation::from(evacuation)),
    }
}

/// Says on standard error that a workload is not expected to be away in time; the report has it as JSON.
pub(crate) fn late(output: Output, late: &Late) {
    if !output.is_json() {
        eprintln!("{} is not expected to be away by the deadline: {}", late.workload, late.why);
    }
}

/// Prints what a drain did.
pub(crate) fn drain(output: Output, report: &DrainReport) {
    match output {
        Output::Table => print(&table::drain(report)),
        Output::Json => json(report),
    }
}

/// Says on standard error, as progress is, that a workload is moved in another way than was asked for; the report has it as JSON.
pub(crate) fn hurried(output: Output, hurried: &Hurried) {
    if !output.is_json() {
        eprintln!("{} moves {}: {}", hurried.workload, hurried.strategy, hurried.why);
    }
}

/// Prints where the files of a new authority are.
pub(crate) fn authority(output: Output, authority: &Authority) {
    match output {
        Output::Table => print(&table::authority(authority)),
        Output::Json => json(authority),
    }
}

/// Prints where the files of a new certificate are.
pub(crate) fn issued(output: Output, issued: &Issued) {
    match output {
        Output::Table => print(&table::issued(issued)),
        Output::Json => json(issued),
    }
}

/// Prints what failed, where, CRIU's own line and what to do, to standard error.
pub(crate) fn failure(output: Output, failure: &Failure) {
    let text = match output {
        Output::Table => table::failure(failure),
        Output::Json => text(&json::Error { error: failure }),
    };
    eprintln!("{}", text.trim_end());
}

fn json(value: &impl Serialize) {
    print(&text(value));
}

fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| format!("{{\"error\":{{\"message\":\"{error}\"}}}}"))
}

/// Prints a result. A reader that left (`podferry nodes | head -1`) is no error.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _reader_left = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
}
