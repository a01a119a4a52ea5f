//! What people see: columns without lines, sizes and times in units that fit.

use std::fmt::Write;

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use indicatif::HumanBytes;
use podferry_common::Failure;
use podferry_common::identity::IdentityFiles;
use podferry_proto::json::{evacuated_state, evacuation_phase};
use podferry_proto::strategies::offered;
use podferry_proto::v1::{
    EvacuatedWorkload, Evacuation, KeptConnections, Migration, Node, Phase, RelayedConnection, Workload,
};

use super::{Authority, DrainReport, Hurried, Issued};
use crate::words;

fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(header.to_vec());
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = String::new();
    for row in table.lines() {
        line(&mut text, row.trim_end());
    }
    text
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

fn size(bytes: u64) -> String {
    if bytes == 0 { "-".to_owned() } else { HumanBytes(bytes).to_string() }
}

/// `1.234 s`, or `87.1 ms` below a second.
fn time(milliseconds: f64) -> String {
    if milliseconds <= 0.0 {
        "-".to_owned()
    } else if milliseconds < 1000.0 {
        format!("{milliseconds:.1} ms")
    } else {
        format!("{:.3} s", milliseconds / 1000.0)
    }
}

fn state(node: &Node) -> &'static str {
    match (node.reachable, node.fit) {
        (false, _) => "unreachable",
        (true, false) => "unfit",
        (true, true) => "fit",
    }
}

fn strategies(node: &Node) -> String {
    let offered = if node.reachable { offered(node.fit, &node.features) } else { Vec::new() };
    or_dash(&offered.join(","))
}

/// The nodes, one a row.
pub(super) fn nodes(nodes: &[Node]) -> String {
    if nodes.is_empty() {
        return "no nodes".to_owned();
    }
    let header =
        ["NODE", "STATE", "CRIU", "RUNC", "KERNEL", "CPU", "MEMORY FREE", "STRATEGIES", "WORKLOADS", "ADDRESS"];
    let row = |node: &Node| {
        vec![
            node.name.clone(),
            state(node).to_owned(),
            or_dash(&node.criu_version),
            or_dash(&node.runc_version),
            or_dash(&node.kernel),
            or_dash(&node.cpu_model),
            size(node.memory_available),
            strategies(node),
            or_dash(&node.workloads.join(",")),
            node.address.clone(),
        ]
    };
    let mut text = table(&header, nodes.iter().map(row));
    for node in nodes {
        complain(&mut text, node);
    }
    text
}

fn complain(text: &mut String, node: &Node) {
    for complaint in &node.complaints {
        line(text, &format!("{}: {complaint}", node.name));
    }
}

/// What each node can do, a paragraph each, and a summary.
pub(super) fn check(nodes: &[Node]) -> String {
    let mut text = String::new();
    for node in nodes {
        line(&mut text, &format!("{}: {}", node.name, state(node)));
        let facts = [
            ("agent", format!("{} at {}", or_dash(&node.agent_version), node.address)),
            ("CRIU", or_dash(&node.criu_version)),
            ("runc", or_dash(&node.runc_version)),
            ("kernel", format!("{} {}", or_dash(&node.kernel), node.architecture)),
            ("CPU", or_dash(&node.cpu_model)),
            ("cgroup", format!("v{}", node.cgroup_version)),
            ("features", or_dash(&node.features.join(" "))),
            ("memory", format!("{} free of {}", size(node.memory_available), size(node.memory_total))),
        ];
        for (name, value) in facts.iter().filter(|_| node.reachable) {
            line(&mut text, &format!("  {name:<10}{value}"));
        }
        for complaint in &node.complaints {
            line(&mut text, &format!("  ! {complaint}"));
        }
    }
    let fit = nodes.iter().filter(|node| node.reachable && node.fit).count();
    line(&mut text, &format!("{fit} of {} nodes can take part in migrations", nodes.len()));
    text
}

/// The workloads, one a row.
pub(super) fn workloads(workloads: &[Workload]) -> String {
    if workloads.is_empty() {
        return "no workloads".to_owned();
    }
    let row = |workload: &Workload| {
        vec![
            workload.name.clone(),
            or_dash(&workload.node),
            workload.status.clone(),
            size(workload.memory_bytes),
            workload.processes.to_string(),
            or_dash(&workload.addresses.join(",")),
            or_dash(&workload.migration_id),
        ]
    };
    let header = ["WORKLOAD", "NODE", "STATUS", "MEMORY", "PROCESSES", "ADDRESSES", "MIGRATION"];
    table(&header, workloads.iter().map(row))
}

/// The connections that have outlived a move, one a row.
pub(super) fn connections(kept: &[KeptConnections]) -> String {
    if kept.is_empty() {
        return "no connections to old addresses".to_owned();
    }
    let bytes = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), size);
    let rows = kept.iter().flat_map(|of| {
        let row = move |one: &RelayedConnection| {
            vec![
                or_dash(&of.workload),
                one.peer.clone(),
                one.local.clone(),
                bytes(one.received_bytes),
                bytes(one.sent_bytes),
                of.home_node.clone(),
                of.node.clone(),
                of.since.clone(),
                of.until.clone(),
            ]
        };
        of.some.iter().map(row)
    });
    let header = ["WORKLOAD", "WITH", "TO", "RECEIVED", "SENT", "THROUGH", "NODE", "SINCE", "ENDS BY"];
    let mut text = table(&header, rows);
    for of in kept.iter().filter(|of| of.connections as usize > of.some.len()) {
        let more = of.connections as usize - of.some.len();
        line(&mut text, &format!("{} has {more} more through {}", or_dash(&of.workload), of.home_node));
    }
    text
}

/// The migrations, one a row.
pub(super) fn migrations(migrations: &[Migration]) -> String {
    if migrations.is_empty() {
        return "no migrations".to_owned();
    }
    let row = |migration: &Migration| {
        vec![
            migration.id.clone(),
            migration.workload.clone(),
            or_dash(&words::strategy(migration)),
            migration.source.clone(),
            or_dash(&migration.target),
            words::phase(migration),
            time(migration.downtime_ms),
            time(migration.total_ms),
            size(migration.wire_bytes),
            or_dash(&migration.created_at),
        ]
    };
    let header =
        ["ID", "WORKLOAD", "STRATEGY", "SOURCE", "TARGET", "PHASE", "DOWNTIME", "TOTAL", "ON THE WIRE", "CREATED"];
    table(&header, migrations.iter().map(row))
}

/// One migration in one or two lines.
pub(super) fn outcome(migration: &Migration) -> String {
    let Migration { id, workload, source, .. } = migration;
    let target = or_dash(&migration.target);
    match migration.phase() {
        Phase::Succeeded => {
            let mut text = format!(
                "{workload} moved from {source} to {target}: down {}, {} in all, {} on the wire ({id})\n",
                time(migration.downtime_ms),
                time(migration.total_ms),
                size(migration.wire_bytes)
            );
            if !migration.keeps_connections {
                line(&mut text, "its TCP connections were closed; clients have to connect again");
            }
            chosen(&mut text, migration);
            text
        }
        Phase::Failed if words::is_lost(migration) => format!(
            "{workload} was lost on its way from {source} to {target}: it runs nowhere; the migration {id} failed behind its commit"
        ),
        Phase::Failed => format!("{workload} stays on {source}: the migration {id} failed and was rolled back"),
        Phase::Cancelled => format!("{workload} stays on {source}: the migration {id} was cancelled"),
        _ => format!("{workload} {source} → {target}: {} ({id})", words::phase(migration)),
    }
}

/// Everything known of a migration, and what lives on of the connections that it took along.
pub(super) fn migration(migration: &Migration, living: Option<&KeptConnections>) -> String {
    let mut text = String::new();
    let connections = if migration.keeps_connections { "move along" } else { "are closed" };
    // Clients see more than the coordinator can: the time until their own packets are answered again.
    let downtime = format!("{} (as the coordinator saw it)", time(migration.downtime_ms));
    let phase =
        if words::is_lost(migration) { "failed, behind the commit".to_owned() } else { words::phase(migration) };
    let facts = [
        ("id", migration.id.clone()),
        ("workload", migration.workload.clone()),
        ("strategy", or_dash(&words::strategy(migration))),
        ("source", migration.source.clone()),
        ("target", or_dash(&migration.target)),
        ("phase", phase),
        ("created", or_dash(&migration.created_at)),
        ("requested by", or_dash(&migration.requested_by)),
        ("downtime", downtime),
        ("total", time(migration.total_ms)),
        ("on the wire", size(migration.wire_bytes)),
        ("connections", connections.to_owned()),
    ];
    for (name, value) in facts {
        line(&mut text, &format!("{name:<13}{value}"));
    }
    if let Some(of) = living {
        let (count, home, until) = (of.connections, &of.home_node, &of.until);
        line(&mut text, &format!("living       {count} through {home}, until {until} at most: podferry connections"));
    }
    chosen(&mut text, migration);
    timings(&mut text, migration);
    if !migration.rounds.is_empty() {
        line(&mut text, "\nrounds");
        text.push_str(&rounds(migration));
    }
    for note in &migration.notes {
        line(&mut text, &format!("note: {note}"));
    }
    if let Some(problem) = words::failure(migration) {
        text.push('\n');
        text.push_str(&failure(&problem));
    }
    text
}

/// Why it is moved in this way, when nobody asked for it.
fn chosen(text: &mut String, migration: &Migration) {
    if !migration.strategy_reason.is_empty() {
        line(text, &format!("chosen       {}", migration.strategy_reason));
    }
}

fn timings(text: &mut String, migration: &Migration) {
    let Some(timings) = &migration.timings else { return };
    let spent = [
        ("preflight", timings.preflight),
        ("prepare", timings.prepare),
        ("precopy", timings.precopy),
        ("freeze", timings.freeze),
        ("  dump", timings.dump),
        ("  transfer", timings.transfer),
        ("  restore", timings.restore),
        ("commit", timings.commit),
        ("resume", timings.resume),
        ("fill", timings.fill),
    ];
    line(text, "\ntime spent");
    for (name, milliseconds) in spent.into_iter().filter(|(_, milliseconds)| *milliseconds > 0.0) {
        line(text, &format!("  {name:<11}{}", time(milliseconds)));
    }
}

fn rounds(migration: &Migration) -> String {
    let row = |(at, round): (usize, &podferry_proto::v1::Round)| {
        vec![
            format!("  {}", at + 1),
            round.pages.to_string(),
            size(round.raw_bytes),
            size(round.wire_bytes),
            time(round.duration_ms),
            format!("{:.0} pages/s", round.dirty_rate),
            time(round.predicted_ms),
            if round.cpu_limit > 0.0 { format!("{:.2} CPUs", round.cpu_limit) } else { "-".to_owned() },
        ]
    };
    let mut header = vec!["  ROUND", "PAGES", "RAW", "ON THE WIRE", "TIME", "WRITTEN MEANWHILE", "FREEZE WOULD ADD"];
    let throttled = migration.rounds.iter().any(|round| round.cpu_limit > 0.0);
    header.extend(throttled.then_some("THROTTLED TO"));
    let columns = header.len();
    let rows = migration.rounds.iter().enumerate().map(row);
    table(&header, rows.map(|row| row.into_iter().take(columns).collect()))
}

/// The evacuations, one a row.
pub(super) fn evacuations(evacuations: &[Evacuation]) -> String {
    if evacuations.is_empty() {
        return "no evacuations".to_owned();
    }
    let row = |one: &Evacuation| {
        vec![
            one.id.clone(),
            one.node.clone(),
            evacuation_phase(one),
            one.moved.to_string(),
            one.remaining.to_string(),
            one.failed.to_string(),
            or_dash(&one.deadline_at),
            or_dash(&one.created_at),
        ]
    };
    let header = ["ID", "NODE", "PHASE", "MOVED", "REMAINING", "FAILED", "DEADLINE", "CREATED"];
    table(&header, evacuations.iter().map(row))
}

/// An evacuation, and what becomes of each workload.
pub(super) fn evacuation(evacuation: &Evacuation) -> String {
    let mut text = String::new();
    let facts = [
        ("id", evacuation.id.clone()),
        ("node", evacuation.node.clone()),
        ("phase", evacuation_phase(evacuation)),
        ("strategy", podferry_proto::json::strategy_word(evacuation.strategy)),
        ("created", or_dash(&evacuation.created_at)),
        ("deadline", or_dash(&evacuation.deadline_at)),
        ("ended", or_dash(&evacuation.ended_at)),
        ("requested by", or_dash(&evacuation.requested_by)),
    ];
    for (name, value) in facts {
        line(&mut text, &format!("{name:<13}{value}"));
    }
    if evacuation.homes > 0 {
        line(&mut text, &format!("waits for    the connections of {} that have left", evacuation.homes));
    }
    if !evacuation.workloads.is_empty() {
        text.push('\n');
        text.push_str(&evacuated(&evacuation.workloads));
    }
    for one in &evacuation.workloads {
        remarks(&mut text, one);
    }
    text
}

fn evacuated(workloads: &[EvacuatedWorkload]) -> String {
    let row = |one: &EvacuatedWorkload| {
        vec![
            one.workload.clone(),
            evacuated_state(one),
            one.priority.to_string(),
            size(one.memory_bytes),
            or_dash(&one.target),
            time(one.downtime_ms),
            time(one.total_ms),
            or_dash(one.migration_ids.last().map_or("", String::as_str)),
        ]
    };
    let header = ["WORKLOAD", "STATE", "PRIORITY", "MEMORY", "TARGET", "DOWNTIME", "TOTAL", "MIGRATION"];
    table(&header, workloads.iter().map(row))
}

/// What is to be said of a workload besides its row.
fn remarks(text: &mut String, one: &EvacuatedWorkload) {
    let problem = one.problem.as_ref().map(|problem| problem.message.as_str()).unwrap_or_default();
    let hurried = podferry_proto::json::strategy_word(one.hurried_strategy);
    for (what, why) in [
        (format!("moves {hurried}"), one.hurried_why.as_str()),
        ("is not expected to be away by the deadline".to_owned(), one.late.as_str()),
        ("waits".to_owned(), one.waits_for.as_str()),
        ("was left behind".to_owned(), problem),
    ] {
        if !why.is_empty() {
            line(text, &format!("{} {what}: {why}", one.workload));
        }
    }
}

/// What a drain did: a line for each workload, then the sum.
pub(super) fn drain(report: &DrainReport) -> String {
    let mut text = String::new();
    for workload in &report.not_running {
        line(&mut text, &format!("{workload} does not run: it stays where it is"));
    }
    for workload in &report.lost {
        line(&mut text, &format!("{workload} was lost on its way: it runs nowhere"));
    }
    for Hurried { workload, strategy, why } in &report.hurried {
        line(&mut text, &format!("{workload} was moved {strategy}: {why}"));
    }
    let DrainReport { node, left_behind, .. } = report;
    let moved = report.moved();
    let names: Vec<&str> = left_behind.iter().map(|left| left.workload.as_str()).collect();
    let sum = if report.cancelled {
        format!(
            "{node} is not drained: it was cancelled; {moved} workloads moved, {} left: {}",
            names.len(),
            names.join(", ")
        )
    } else if report.is_complete() {
        format!("{node} is drained: {moved} workloads moved")
    } else if names.is_empty() && !report.lost_sight {
        format!("{node} is empty: {moved} workloads moved, {} lost: {}", report.lost.len(), report.lost.join(", "))
    } else if names.is_empty() {
        format!("{node} may not be empty: {moved} workloads moved, then it could not be asked again")
    } else {
        format!("{node} is not drained: {moved} workloads moved, {} left: {}", names.len(), names.join(", "))
    };
    line(&mut text, &sum);
    text
}

/// Where a new authority is.
pub(super) fn authority(authority: &Authority) -> String {
    let Authority { ca, ca_key } = authority;
    format!("made {}; keep {} to yourself: who has it can be anybody", ca.display(), ca_key.display())
}

/// Where a new certificate is.
pub(super) fn issued(issued: &Issued) -> String {
    let IdentityFiles { ca, certificate, key } = &issued.files;
    let (ca, certificate, key) = (ca.display(), certificate.display(), key.display());
    format!(
        "issued {certificate} for {}, valid for {} h; its key is {key}, its authority {ca}",
        issued.name, issued.hours
    )
}

/// What failed, where, CRIU's own line and what to do.
pub(super) fn failure(failure: &Failure) -> String {
    let mut text = format!("error: {}\n", failure.message);
    let parts = [
        ("node", &failure.node),
        ("phase", &failure.phase),
        ("CRIU", &failure.criu_line),
        ("what to do", &failure.remedy),
    ];
    for (name, value) in parts {
        if let Some(value) = value {
            line(&mut text, &format!("  {:<12}{value}", format!("{name}:")));
        }
    }
    text
}

fn line(text: &mut String, line: &str) {
    // Writing to a String cannot fail.
    let _infallible = writeln!(text, "{line}");
}
