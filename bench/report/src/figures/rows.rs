//! Strategies beside each other: by kind of workload, against peers, and how the service gaps are spread.

use std::collections::BTreeMap;

use maud::{Markup, html};

use super::figure;
use crate::{
    groups::{Cell, Metric, Situation},
    names::{self, STRATEGIES, is_peer},
    plot::{self, Scale, WIDE},
    results::{Strategy, Workload},
};

/// The situation of each workload in which the most strategies were tried, on a link that is not shaped where there is one.
fn fullest<'a, 'b>(situations: &'b [Situation<'a>]) -> Vec<&'b Situation<'a>> {
    let mut best: BTreeMap<Workload, &Situation<'_>> = BTreeMap::new();
    let rank = |of: &Situation<'_>| {
        let plain = of.scenario.link_mbit.is_none() && of.scenario.cpu_limit.is_none();
        (plain, of.cells.len(), of.lines().len())
    };
    for situation in situations {
        let best = best.entry(situation.scenario.workload).or_insert(situation);
        if rank(situation) > rank(best) {
            *best = situation;
        }
    }
    best.into_values().collect()
}

/// Downtime and service gap of each workload.
pub(crate) fn by_workload(situations: &[Situation<'_>]) -> Markup {
    let rows = fullest(situations);
    html! {
        @for metric in [Metric::Gap, Metric::Downtime] { (in_rows(&rows, &STRATEGIES, metric)) }
    }
}

/// Where peers were measured: they and podferry, without auto, which is one of the others.
pub(crate) fn peers(situations: &[Situation<'_>]) -> Option<Markup> {
    let has_peer = |of: &&Situation<'_>| of.cells.iter().any(|cell| is_peer(cell.scenario.strategy));
    let rows: Vec<&Situation<'_>> = situations.iter().filter(has_peer).collect();
    let shown: Vec<Strategy> = STRATEGIES.into_iter().filter(|strategy| *strategy != Strategy::Auto).collect();
    (!rows.is_empty()).then(|| {
        html! {
            @for metric in [Metric::Gap, Metric::Downtime, Metric::Total] { (in_rows(&rows, &shown, metric)) }
        }
    })
}

fn in_rows(rows: &[&Situation<'_>], strategies: &[Strategy], metric: Metric) -> Markup {
    let mut plots = Vec::new();
    let (mut bounds, mut shown, mut labels, mut lines, mut n) = (vec![], vec![], vec![], vec![], 0);
    for (row, situation) in rows.iter().rev().enumerate() {
        labels.push(names::workload(situation.scenario.workload).to_owned() + &short(situation));
        for (index, strategy) in strategies.iter().enumerate() {
            let Some(cell) = situation.cell(*strategy) else { continue };
            let Some(spread) = cell.spread(metric) else { continue };
            #[expect(clippy::cast_precision_loss, reason = "a handful")]
            let y = row as f64 + 0.36 - 0.72 * index as f64 / (strategies.len() - 1) as f64;
            plots.extend(plot::in_row(*strategy, y, &spread));
            bounds.extend([spread.low, spread.high]);
            lines.extend(cell.runs.iter().map(|run| run.line));
            n += spread.n;
            shown.push(*strategy);
        }
    }
    if plots.is_empty() {
        return html! { p.empty { (metric.title()) ": not measured." } };
    }
    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    let height = 70.0 + 88.0 * rows.len() as f64;
    let (x, y) = (Scale::fitting(metric.title(), &bounds), Scale::named("", labels));
    let order: Vec<Strategy> = strategies.iter().copied().filter(|strategy| shown.contains(strategy)).collect();
    let content = html! {
        h3 { (metric.title()) }
        (plot::legend(&order))
        div.scroll tabindex="0" role="region" aria-label=(metric.title()) {
            (plot::draw(plots, &x, &y, (WIDE, height), &format!("{} by situation and strategy", metric.title())))
        }
    };
    let says = format!(
        "n = {n} runs that moved. Marks: medians; whiskers: 95 % confidence interval of the median from 5 runs on, smallest and largest below. Less is better."
    );
    figure(&content, &says, &lines)
}

/// What tells a situation from others of its workload, in few letters.
fn short(situation: &Situation<'_>) -> String {
    let of = &situation.scenario;
    let dirty = of.dirty_percent.map(|percent| format!(" {percent} %/s"));
    let link = of.link_mbit.map(|mbit| format!(" {mbit} Mb/s"));
    format!(" {} MiB{}{}", of.memory_mib, dirty.unwrap_or_default(), link.unwrap_or_default())
}

/// The spread of the service gaps of all clients, by strategy.
pub(crate) fn gaps(situations: &[Situation<'_>]) -> Option<Markup> {
    let panels: Vec<Markup> = fullest(situations).into_iter().filter_map(cumulated).collect();
    (!panels.is_empty()).then(|| html! { @for panel in panels { (panel) } })
}

fn cumulated(situation: &Situation<'_>) -> Option<Markup> {
    let gaps = |strategy: Strategy| -> Vec<f64> {
        let runs = situation.cell(strategy).into_iter().flat_map(Cell::moved);
        runs.filter_map(|run| run.of.clients.as_ref()).flat_map(|seen| seen.gaps_ms.iter().copied()).collect()
    };
    let all: Vec<_> = STRATEGIES
        .map(|strategy| (strategy, gaps(strategy)))
        .into_iter()
        .filter(|(_, gaps)| !gaps.is_empty())
        .collect();
    let values: Vec<f64> = all.iter().flat_map(|(_, gaps)| gaps.iter().copied()).collect();
    if values.is_empty() {
        return None;
    }
    let title = names::situation(&situation.scenario, &[]);
    let strategies: Vec<Strategy> = all.iter().map(|(strategy, _)| *strategy).collect();
    let plots = all.into_iter().map(|(strategy, gaps)| plot::cumulated(strategy, gaps)).collect();
    let percent = std::sync::Arc::new(|share: f64| format!("{:.0} %", share * 100.0));
    let y = Scale { range: Some((0.0, 1.0)), step: Some(0.25), words: Some(percent), ..Scale::linear("Clients") };
    let x = Scale::fitting("Longest time without a right answer (ms)", &values);
    let content = html! {
        h3 { (title) }
        (plot::legend(&strategies))
        div.scroll tabindex="0" role="region" aria-label=(title) {
            (plot::draw(plots, &x, &y, (WIDE, 320.0), &format!("Share of clients by service gap; {title}")))
        }
    };
    let says = format!(
        "n = {} clients of all runs that moved. How many of them waited so long at the most, or less.",
        values.len()
    );
    Some(figure(&content, &says, &situation.lines()))
}
