//! The report as one page of HTML that asks nobody for anything.

mod advice;
mod tables;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::{
    export::Counts,
    figures,
    groups::{Axis, Situation, sweeps},
    guide::Evaluation,
    names::look,
    plot,
    read::{Results, Run},
    results::{Environment, Strategy},
};

/// Everything that the page is made of.
pub(crate) struct Parts<'a> {
    /// What was read.
    pub(crate) results: &'a Results,
    /// Its runs, put together.
    pub(crate) situations: &'a [Situation<'a>],
    /// What was made of them.
    pub(crate) evaluation: Evaluation<'a>,
}

/// A section: its anchor, its title in short and in full, and what is in it.
type Section = (&'static str, &'static str, &'static str, Markup);

/// The whole page.
pub(crate) fn page(parts: &Parts<'_>) -> String {
    let sections = sections(parts);
    let environment = &parts.results.environment;
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                // Nothing is fetched, whatever a text in the results says.
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:";
                title { "podferry: what a migration costs" }
                link rel="icon" href="data:,";
                style { (PreEscaped(include_str!("page.css"))) }
            }
            body {
                a.skip href="#main" { "To the results" }
                header {
                    h1 { "What a migration costs" }
                    p.soft { "podferry " (environment.podferry) " on " (environment.processor) ", Linux " (environment.kernel)
                        ", begun " (when(environment)) "." }
                    (counts(parts))
                }
                nav aria-label="Sections" { ul { @for (anchor, short, ..) in &sections { li { a href=(format!("#{anchor}")) { (short) } } } } }
                main #main {
                    @for note in &parts.results.notes { p.note role="note" { (note) } }
                    @for (anchor, _, title, content) in &sections {
                        section id=(anchor) aria-labelledby=(format!("{anchor}-title")) { h2 id=(format!("{anchor}-title")) { (title) } (content) }
                    }
                }
                footer.soft { p {
                    "Made by " code { "podferry-report" } " from " code { "results.jsonl" } ", " code { "environment.json" } " and " code { "suite.toml" }
                    "; run it again on the folder to make it anew. Beside it: " code { "results.csv" } " and " code { "summary.json" } "."
                } }
            }
        }
    }
    .into_string()
}

fn sections(parts: &Parts<'_>) -> Vec<Section> {
    let situations = parts.situations;
    vec![
        ("guide", "Guide", "Which strategy for which application", advice::guide(parts)),
        ("memory", "Memory", "By memory", swept(situations, Axis::Memory)),
        ("timeline", "Timeline", "One migration, as it went", timelines(situations)),
        ("rounds", "Rounds", "Convergence of pre-copy", rounds(situations)),
        ("gaps", "Gaps", "What clients wait", gaps(situations)),
        ("workloads", "Workloads", "By kind of workload", workloads(situations)),
        ("dirty", "Dirty rate", "By dirty rate", swept(situations, Axis::Dirty)),
        ("bandwidth", "Link", "By bandwidth and round-trip time", link(situations)),
        ("demand", "Demand", "By demand", swept(situations, Axis::Clients)),
        ("peers", "Other tools", "Beside other tools", peers(situations)),
        ("cost", "Cost", "What it costs", tables::cost(situations)),
        ("all", "All", "All scenarios", tables::all(situations)),
        ("failures", "Failures", "Failures, refusals and notes", tables::failures(&parts.results.runs)),
        ("method", "Method", "On what, and how it was measured", method(parts.results)),
    ]
}

fn when(environment: &Environment) -> String {
    #[expect(clippy::cast_possible_truncation, reason = "in range for 292 million years")]
    let time = jiff::Timestamp::from_millisecond(environment.began_unix_ms as i64);
    time.map_or_else(|_| "at an unknown time".into(), |time| time.strftime("%Y-%m-%d %H:%M UTC").to_string())
}

/// Cold and application-level give up connections by design, and cold what is in memory: what their clients saw is told apart.
fn counts(parts: &Parts<'_>) -> Markup {
    let runs = &parts.results.runs;
    let all = Counts::of(runs);
    let (by_design, others): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| gives_up(run.of.scenario.strategy));
    let (by_design, others) = (Counts::of(by_design), Counts::of(others));
    let scenarios: usize = parts.situations.iter().map(|situation| situation.cells.len()).sum();
    let count = |name: &str, number: u64, besides: u64| {
        let class = if number > 0 { "bad" } else { "good" };
        html! { div { dt { (name) @if besides > 0 { br; "and " (besides) " by design" } } dd class=(class) { (number) } } }
    };
    html! {
        dl.counts {
            div { dt { "scenarios" } dd { (scenarios) } }
            div { dt { "runs" } dd { (all.runs) } }
            div { dt { "moved" } dd { (all.moved) } }
            div { dt { "refused" } dd { (all.refused) } }
            (count("failed", all.failed as u64, 0))
            (count("items lost or doubled", others.lost_items, by_design.lost_items))
            (count("failed requests", others.failed_requests, by_design.failed_requests))
            (count("connections broken", others.connection_resets, by_design.connection_resets))
        }
        p.soft { "By design: cold gives up what is in memory, and cold and application-level give up connections. Peers are counted with the others. "
            a href="#all" { "By scenario" } ", " a href="#failures" { "with the reasons" } "." }
    }
}

fn gives_up(strategy: Strategy) -> bool {
    matches!(strategy, Strategy::Cold | Strategy::Application)
}

/// What a section says that has nothing to show.
fn nothing(what: &str) -> Markup {
    html! { p.empty { "Not enough data: " (what) } }
}

fn swept(situations: &[Situation<'_>], axis: Axis) -> Markup {
    let sweeps = sweeps(situations, axis);
    if sweeps.is_empty() {
        return nothing("no strategy was measured at two places of this parameter with all else the same.");
    }
    html! {
        @for (index, sweep) in sweeps.iter().enumerate() {
            @let title = figures::title(sweep);
            details open[index < 2] { summary { h3 { (title) } } (figures::sweep(sweep)) }
        }
    }
}

fn link(situations: &[Situation<'_>]) -> Markup {
    html! {
        (swept(situations, Axis::Bandwidth))
        h3 { "Round-trip time" }
        (swept(situations, Axis::RoundTrip))
    }
}

fn timelines(situations: &[Situation<'_>]) -> Markup {
    let timelines = figures::timelines(situations);
    if timelines.is_empty() {
        return nothing("no run has both phases and a timeline of its clients.");
    }
    html! {
        p { "For each strategy one run. Phases in " span.still { "orange" } " are those of the freeze, in " span.copying { "blue" }
            " memory is copied while the workload runs." }
        @for (strategy, figure) in timelines {
            details open[strategy == Strategy::Live] { summary { h3 { (look(strategy).name) } } (figure) }
        }
    }
}

fn rounds(situations: &[Situation<'_>]) -> Markup {
    let rounds = figures::rounds(situations);
    if rounds.is_empty() {
        return nothing("no run of live or hybrid has more than one round.");
    }
    html! { @for (_, figure) in rounds { (figure) } }
}

fn gaps(situations: &[Situation<'_>]) -> Markup {
    let intro = html! {
        p { "The service gap of a client is the longest time in which it got no right answer, seen to 1 ms. Of each workload the situation in which "
            "the most strategies were tried. A line further to the left is better; a steep one is dependable." }
    };
    figures::gaps(situations).map_or_else(|| nothing("no run has clients."), |figures| html! { (intro) (figures) })
}

fn workloads(situations: &[Situation<'_>]) -> Markup {
    html! {
        p { "Of each workload the situation in which the most strategies were tried, on a link that is not shaped. Memory differs from one to "
            "the next, so strategies are to be compared within a row." }
        (figures::by_workload(situations))
    }
}

fn peers(situations: &[Situation<'_>]) -> Markup {
    let intro = html! {
        p { "Situations in which other tools were run, too, on the same machine and with the same clients. "
            strong { "Hollow marks are peers" } ": " code { "criu" } ", " code { "runc" } " and " code { "podman" }
            " as a careful administrator would use them (" code { "docs/experiments.md" } "): images in memory, copied by one plain TCP connection; podferry encrypts its own. Filled marks are podferry's strategies." }
    };
    figures::peers(situations).map_or_else(|| nothing("no peer was run."), |figures| html! { (intro) (figures) })
}

/// Each measure, and how it is taken.
const MEASURES: [(&str, &str); 14] = [
    ("Downtime", "From the freeze to the first instruction on the target, as seen from outside the process. ms"),
    (
        "Service gap",
        "The longest time without a right answer, for each client, seen to 1 ms. Of a run: the longest of its clients'. ms",
    ),
    (
        "Total time",
        "The whole migration, from the request to the end: from the start of the command line until it has its answer. ms",
    ),
    (
        "Deployment latency",
        "From the request until the workload is fully operational on the target, its last page there. ms",
    ),
    ("Phases", "Those of the protocol, as the coordinator saw them; of a peer: prepare, dump, copy, restore. ms"),
    ("Rounds", "Of pre-copy; the last is that of the freeze. Pages, bytes before packing, ms"),
    ("Bytes, raw", "Pages and files that were moved, before packing. MiB"),
    (
        "Bytes on the wire",
        "What went between the nodes in either direction, IP headers included; nothing of the clients. MiB",
    ),
    ("CPU", "Of the agent and all that it started, on each node, the workload not counted. s"),
    ("Peak memory", "The most that they held at once, on each node. MiB"),
    ("Failed requests", "Without a right answer. Every answer is checked"),
    ("Retried requests, connections broken", "Sent once more; closed, reset or silent for too long"),
    ("Items lost or doubled", "What was confirmed to a client and is gone, or is there twice"),
    ("Latency", "From request to answer: before, during and after the migration. ms"),
];

fn method(results: &Results) -> Markup {
    let environment = &results.environment;
    html! {
        div.scroll tabindex="0" role="region" aria-label="Environment" { table.facts { tbody {
            tr { th scope="row" { "podferry" } td { (environment.podferry) } }
            tr { th scope="row" { "Kernel" } td { (environment.kernel) } }
            tr { th scope="row" { "Processor" } td { (environment.processor) ", " (environment.cpus) " CPUs" } }
            tr { th scope="row" { "Memory" } td { (plot::number(crate::groups::mib(environment.memory_bytes))) " MiB" } }
            tr { th scope="row" { "Begun" } td { (when(environment)) } }
            @for (name, version) in &environment.versions { tr { th scope="row" { (name) } td { (version) } } }
            @for note in &environment.notes { tr { th scope="row" { "Note" } td { (note) } } }
        } } }
        h3 { "Measures" }
        p { "In short; the whole method, and what threatens it, is in " code { "docs/experiments.md" } "." }
        dl.measures { @for (name, how) in MEASURES { dt { (name) } dd { (how) } } }
        h3 { "Statistics" }
        ul {
            li { "Statistics are of the runs that moved. Runs that were refused or failed are counted, and listed with their reasons." }
            li { "Medians and quartiles lie between two values in proportion (type 7 of Hyndman and Fan)." }
            li { "From 5 runs on, bounds are the 95 % confidence interval of the median by a percentile bootstrap of 2,000 samples with a fixed seed; with so few \
                  runs it is a rough one. Below 5 they are the smallest and the largest, and say so by their n." }
            li { "A number that was not taken is absent: it is not 0. What has no place on a logarithmic axis makes the axis even." }
        }
        details { summary { h3 { "The suite as it was run" } } pre tabindex="0" { code { (results.suite) } } }
    }
}
