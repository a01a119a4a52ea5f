//! The tables: cost, all scenarios, and what did not go well.

use std::collections::BTreeMap;

use maud::{Markup, html};

use super::advice::mark;
use crate::{
    export::{Counts, outcome},
    figures::source,
    groups::{Cell, Metric, Situation, mib},
    names,
    plot::number,
    read::Run,
    results::{Cost, Strategy},
    stats::Spread,
};

/// A median with its bounds, or a dash.
fn spread(spread: Option<Spread>) -> Markup {
    html! { td.number { @match spread {
        Some(spread) => { (number(spread.median)) @if spread.n > 1 { small { " " (number(spread.low)) "–" (number(spread.high)) } } },
        None => "–",
    } } }
}

fn head(columns: &[&str]) -> Markup {
    html! { thead { tr { th scope="col" { "Strategy" } @for column in columns { th.number scope="col" { (column) } } } } }
}

/// A table for each situation; those of a workload together.
fn by_situation(
    situations: &[Situation<'_>],
    name: &str,
    columns: &[&str],
    row: impl Fn(&Cell<'_>) -> Markup,
) -> Markup {
    html! {
        div.scroll.tall tabindex="0" role="region" aria-label=(name) { table {
            (head(columns))
            @for situation in situations { tbody {
                tr.group { th colspan=(columns.len() + 1) scope="rowgroup" { (names::situation(&situation.scenario, &[]))
                    " " details.lines { summary { "lines" } (source(&situation.lines())) } } }
                @for cell in &situation.cells { tr { th scope="row" { (mark(cell.scenario.strategy)) } (row(cell)) } }
            } }
        } }
    }
}

/// CPU, memory and bytes of each node.
pub(crate) fn cost(situations: &[Situation<'_>]) -> Markup {
    let columns = [
        "n",
        "CPU source (s)",
        "CPU target (s)",
        "Peak memory source (MiB)",
        "Peak memory target (MiB)",
        "Bytes, raw (MiB)",
        "On the wire (MiB)",
        "Wire/raw",
    ];
    let row = |cell: &Cell<'_>| {
        let node = |node: usize, of: fn(Cost) -> f64| {
            Spread::of(cell.moved().filter_map(|run| run.of.cost).map(|cost| of(cost[node])))
        };
        let (raw, wire) = (cell.spread(Metric::Raw), cell.spread(Metric::Wire));
        let ratio = raw.zip(wire).filter(|(raw, _)| raw.median > 0.0).map(|(raw, wire)| wire.median / raw.median);
        html! {
            td.number { (cell.moved().count()) }
            (spread(node(0, |cost| cost.cpu_s))) (spread(node(1, |cost| cost.cpu_s)))
            (spread(node(0, |cost| mib(cost.peak_memory_bytes)))) (spread(node(1, |cost| mib(cost.peak_memory_bytes))))
            (spread(raw)) (spread(wire))
            td.number { (ratio.map_or_else(|| "–".into(), number)) }
        }
    };
    html! {
        p { "Medians, with bounds in small print. Of the agent and all that it starts; the workload is not counted." }
        (by_situation(situations, "Cost by scenario", &columns, row))
    }
}

/// Everything, with what went wrong.
pub(crate) fn all(situations: &[Situation<'_>]) -> Markup {
    let columns = [
        "Moved",
        "Refused",
        "Failed",
        "Downtime (ms)",
        "Longest gap (ms)",
        "Total (ms)",
        "Deployment (ms)",
        "p99 before (ms)",
        "p99 during (ms)",
        "p99 after (ms)",
        "Requests",
        "Failed requests",
        "Retried",
        "Broken connections",
        "Lost items",
    ];
    let row = |cell: &Cell<'_>| {
        let counts = Counts::of(cell.runs.iter().copied());
        let latency = |span: usize| {
            let seen = cell.moved().filter_map(|run| run.of.clients.as_ref()).map(|seen| seen.latency[span]);
            Spread::of(seen.filter(|latency| latency.count > 0).map(|latency| latency.p99_ms))
        };
        html! {
            td.number { (counts.moved) "/" (counts.runs) }
            (bad(counts.refused as u64)) (bad(counts.failed as u64))
            (spread(cell.spread(Metric::Downtime))) (spread(cell.spread(Metric::Gap)))
            (spread(cell.spread(Metric::Total))) (spread(cell.spread(Metric::Deployment)))
            (spread(latency(0))) (spread(latency(1))) (spread(latency(2)))
            td.number { (cell.sum(|seen| seen.requests)) }
            (bad(counts.failed_requests)) td.number { (cell.sum(|seen| seen.retried_requests)) }
            (bad(counts.connection_resets)) (bad(counts.lost_items))
        }
    };
    html! {
        p { "Medians of the runs that moved, with bounds in small print; counts are sums of all runs." }
        (by_situation(situations, "All scenarios", &columns, row))
    }
}

/// A count that should be 0.
fn bad(count: u64) -> Markup {
    html! { td.number.bad[count > 0] { (count) } }
}

/// What ended otherwise than on the target, why; and what runs noted.
pub(crate) fn failures(runs: &[Run]) -> Markup {
    let mut ended: BTreeMap<(Strategy, String, &str, &str), Vec<usize>> = BTreeMap::new();
    for run in runs.iter().filter(|run| !run.moved()) {
        let (word, reason) = outcome(&run.of.outcome);
        let situation = names::situation(&run.of.scenario, &[]);
        ended.entry((run.of.scenario.strategy, situation, word, reason)).or_default().push(run.line);
    }
    html! {
        h3 { "Runs that did not move" }
        @if ended.is_empty() { p { "All " (runs.len()) " runs ended on the target." } }
        @else { div.scroll tabindex="0" role="region" aria-label="Runs that did not move" { table {
            thead { tr { th scope="col" { "Strategy" } th scope="col" { "Situation" } th scope="col" { "Ended" } th scope="col" { "Runs" }
                th scope="col" { "Reason" } } }
            tbody { @for ((strategy, situation, word, reason), lines) in &ended { tr {
                td { (mark(*strategy)) } td { (situation) }
                td.bad[*word == "failed"] { (word) } td.number { (lines.len()) }
                td.reason { (reason) " " details.lines { summary { "lines" } (source(lines)) } }
            } } }
        } } }
        h3 { "Notes of the runs" }
        (notes(runs))
    }
}

/// Equal ones once. Figures in them differ from run to run, so that they are compared without digits.
fn notes(runs: &[Run]) -> Markup {
    let mut notes: BTreeMap<(Strategy, String), Vec<(usize, &str)>> = BTreeMap::new();
    for run in runs {
        for note in &run.of.notes {
            let alike = note.chars().filter(|letter| !letter.is_ascii_digit()).collect();
            notes.entry((run.of.scenario.strategy, alike)).or_default().push((run.line, note));
        }
    }
    if notes.is_empty() {
        return html! { p { "None." } };
    }
    html! {
        p { "Equal ones are shown once, with the figures of the first." }
        div.scroll.tall tabindex="0" role="region" aria-label="Notes of the runs" { table {
            thead { tr { th scope="col" { "Strategy" } th scope="col" { "How often" } th scope="col" { "Note" } } }
            tbody { @for ((strategy, _), which) in &notes { tr {
                td { (mark(*strategy)) }
                td.number { (which.len()) }
                td.reason { (which[0].1) details.lines { summary { "lines" } (source(&which.iter().map(|(line, _)| *line).collect::<Vec<_>>())) } }
            } } }
        } }
    }
}
