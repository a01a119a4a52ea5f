//! How fast pre-copy comes to an end.

use std::collections::HashSet;

use kuva::prelude::Plot;
use maud::{Markup, html};

use super::figure;
use crate::{
    groups::{Cell, Metric, Situation, mib},
    names,
    plot::{self, Scale, WIDE},
    read::Run,
    results::Strategy,
};

/// No more lines than can be told apart.
const MOST: usize = 8;

/// What each round sent, of live and of hybrid.
pub(crate) fn rounds(situations: &[Situation<'_>]) -> Vec<(Strategy, Markup)> {
    let of = |strategy| {
        let runs: Vec<&Run> = situations.iter().filter_map(|of| of.cell(strategy)).filter_map(typical).collect();
        (!runs.is_empty()).then(|| (strategy, figure_of(strategy, runs)))
    };
    [Strategy::Live, Strategy::Hybrid].into_iter().filter_map(of).collect()
}

/// Of the runs with rounds, that whose total time is the median.
fn typical<'a>(cell: &Cell<'a>) -> Option<&'a Run> {
    let mut runs: Vec<&Run> = cell.runs.iter().copied().filter(|run| run.of.rounds.len() > 1).collect();
    let order = |run: &Run| Metric::Total.of(&run.of).unwrap_or(f64::INFINITY);
    runs.sort_by(|one, other| order(one).total_cmp(&order(other)));
    runs.get(runs.len().checked_sub(1)? / 2).copied()
}

fn figure_of(strategy: Strategy, mut runs: Vec<&Run>) -> Markup {
    runs.sort_by_key(|run| std::cmp::Reverse(run.of.rounds.len()));
    let all = runs.len();
    let mut seen = HashSet::new();
    runs.retain(|run| {
        let of = &run.of.scenario;
        seen.insert((of.workload, of.memory_mib, of.dirty_percent.map(f64::to_bits)))
    });
    runs.truncate(MOST);
    let left_out = all - runs.len();
    let lines: Vec<Vec<(f64, f64)>> = runs.iter().map(|run| points(run)).collect();
    let sizes: Vec<f64> = lines.iter().flatten().map(|(_, size)| *size).collect();
    let mut plots = Vec::new();
    for (index, line) in lines.into_iter().enumerate() {
        let colour = format!("var(--series-{index})");
        plots.push(Plot::Line(plot::line(line.clone(), &colour)));
        plots.push(plot::dots(line, &colour));
    }
    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    let most = runs.iter().map(|run| run.of.rounds.len()).max().unwrap_or(1) as f64;
    let x = Scale {
        range: Some((0.5, most + 0.5)),
        step: Some((most / 16.0).ceil()),
        ..Scale::linear("Round; the last is that of the freeze")
    };
    let title = format!("{}: memory sent in each round", names::look(strategy).name);
    let content = html! {
        h3 { (title) }
        ul.legend { @for (index, run) in runs.iter().enumerate() {
            li { span style=(format!("color:var(--series-{index})")) aria-hidden="true" { "●" } " " (names::situation(&run.of.scenario, &[])) }
        } }
        div.scroll tabindex="0" role="region" aria-label=(title) {
            (plot::draw(plots, &x, &Scale::fitting("Sent, before packing (MiB)", &sizes), (WIDE, 340.0), &title))
        }
    };
    let rest = if left_out == 0 {
        String::new()
    } else {
        format!(" Not drawn: {left_out} with fewer rounds, or alike but for link and demand.")
    };
    let says = format!(
        "n = {} runs, of each scenario the one with the median total time, moved or given up. A line that falls up to the freeze converges; the round of the freeze has more \
         than what is left to send, such as what cannot be copied before.{rest}",
        runs.len()
    );
    figure(&content, &says, &runs.iter().map(|run| run.line).collect::<Vec<_>>())
}

/// Round and MiB; a round that sent nothing is left out, as a logarithmic scale has no 0.
fn points(run: &Run) -> Vec<(f64, f64)> {
    let numbered = (1_u32..).zip(&run.of.rounds);
    numbered
        .filter(|(_, round)| round.raw_bytes > 0)
        .map(|(number, round)| (number.into(), mib(round.raw_bytes)))
        .collect()
}
