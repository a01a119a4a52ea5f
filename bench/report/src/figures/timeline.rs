//! One migration as it went: its phases, and above them what its clients waited.

use maud::{Markup, html};

use super::figure;
use crate::{
    groups::{Cell, Metric, Situation},
    names::{self, STRATEGIES, look},
    plot::{self, Scale, WIDE},
    read::Run,
    results::{Phase, Slice, Strategy},
};
use kuva::prelude::Plot;

/// Of each strategy the run whose downtime is the median one's: in the situation in which the most strategies have a timeline, or, of those that
/// have none there, where they have the most.
pub(crate) fn timelines(situations: &[Situation<'_>]) -> Vec<(Strategy, Markup)> {
    let tried = |of: &&Situation<'_>| of.cells.iter().filter(|cell| !shown(cell).is_empty()).count();
    let Some(fullest) = situations.iter().max_by_key(tried) else { return Vec::new() };
    let of = |strategy: Strategy| {
        let there = fullest.cell(strategy).map(shown).filter(|runs| !runs.is_empty());
        let elsewhere = || situations.iter().filter_map(|of| of.cell(strategy)).map(shown).max_by_key(Vec::len);
        Some((strategy, timeline(typical(there.or_else(elsewhere)?)?)))
    };
    STRATEGIES.into_iter().filter_map(of).collect()
}

fn shown<'a>(cell: &Cell<'a>) -> Vec<&'a Run> {
    let drawable =
        |run: &&Run| !run.of.phases.is_empty() && run.of.clients.as_ref().is_some_and(|seen| !seen.timeline.is_empty());
    cell.moved().filter(drawable).collect()
}

/// The run in the middle.
fn typical(mut runs: Vec<&Run>) -> Option<&Run> {
    let order = |run: &Run| Metric::Downtime.of(&run.of).or(run.of.total_ms).unwrap_or(f64::INFINITY);
    runs.sort_by(|one, other| order(one).total_cmp(&order(other)));
    let middle = runs.len().checked_sub(1)? / 2;
    runs.get(middle).copied()
}

/// So much is shown before a migration and after it, at least, in ms.
const LEAST_AROUND_MS: f64 = 250.0;

fn timeline(run: &Run) -> Markup {
    let slices = run.of.clients.as_ref().map(|seen| seen.timeline.as_slice()).unwrap_or_default();
    let end = run.of.phases.iter().map(|phase| phase.start_ms + phase.duration_ms).fold(0.0, f64::max);
    let (before, after) = ((0.1 * end).max(LEAST_AROUND_MS), (0.2 * end).max(LEAST_AROUND_MS));
    let range = (-before, end + after);
    let title = format!(
        "{}, {}, line {}",
        look(run.of.scenario.strategy).name,
        names::situation(&run.of.scenario, &[]),
        run.line
    );
    let content = html! {
        h4 { (title) }
        div.scroll tabindex="0" role="region" aria-label=(title) {
            (latency(slices, range, frozen(&run.of.phases)))
            (phases(&run.of.phases, range))
        }
    };
    let downtime = run.of.downtime_ms.map_or("not measured".to_owned(), |ms| format!("{} ms", plot::number(ms)));
    let gap = Metric::Gap.of(&run.of).map_or("not measured".to_owned(), |ms| format!("{} ms", plot::number(ms)));
    let says = format!(
        "n = 1 run: the one with the median downtime of its scenario. Above: the slowest answer that came in each slice of {} ms; no line \
         where none came; shaded: the phases of the freeze. Below: all phases. Downtime {downtime}, longest service gap {gap}.",
        plot::number(slice_ms(slices))
    );
    figure(&content, &says, &[run.line])
}

/// Each slice with answers is as long as it took; those beside each other are joined, and one without answers breaks the line.
fn latency(slices: &[Slice], range: (f64, f64), frozen: Option<(f64, f64)>) -> Markup {
    let width = slice_ms(slices);
    let inside = |slice: &&Slice| slice.start_ms >= range.0 && slice.start_ms + width <= range.1;
    let slices: Vec<Slice> = slices.iter().filter(inside).copied().collect();
    let worst: Vec<f64> = slices.iter().filter_map(|slice| slice.worst_ms).filter(|worst| *worst > 0.0).collect();
    if worst.is_empty() {
        return html! { p.empty { "No answer came in the time that is shown." } };
    }
    let stairs = |piece: &[Slice]| -> Vec<(f64, f64)> {
        let steps = piece.iter().filter_map(|slice| Some((slice.start_ms, slice.worst_ms?)));
        steps.flat_map(|(start, worst)| [(start, worst), (start + width, worst)]).collect()
    };
    let pieces = slices.split(|slice| slice.worst_ms.is_none()).map(stairs).filter(|piece| !piece.is_empty());
    let plots = pieces.map(|piece| Plot::Line(plot::line(piece, "var(--accent)").with_stroke_width(2.0))).collect();
    let x = Scale { range: Some(range), ..Scale::linear("") };
    let y = Scale::fitting("Slowest (ms)", &worst);
    plot::draw_shaded(plots, &x, &y, (WIDE, 240.0), "Slowest answer over time", frozen)
}

/// How long a slice is; those of a run are equally long.
fn slice_ms(slices: &[Slice]) -> f64 {
    let steps = slices.windows(2).map(|pair| pair[1].start_ms - pair[0].start_ms);
    steps.reduce(f64::min).unwrap_or_default()
}

/// From the beginning of the first phase of the freeze to the end of the last.
fn frozen(phases: &[Phase]) -> Option<(f64, f64)> {
    let frozen = phases.iter().filter(|phase| FROZEN.contains(&phase.name.as_str()));
    let spans = frozen.map(|phase| (phase.start_ms, phase.start_ms + phase.duration_ms));
    spans.reduce(|whole, span| (whole.0.min(span.0), whole.1.max(span.1)))
}

/// Phases in which the workload stands still, or may.
const FROZEN: [&str; 6] = ["freeze", "dump", "transfer", "copy", "restore", "commit"];

/// The colour of a phase: memory is copied beside the workload, it stands still, or neither.
fn colour(phase: &str) -> &'static str {
    match phase {
        "precopy" | "fill" => "var(--live)",
        name if FROZEN.contains(&name) => "var(--still)",
        _ => "var(--soft)",
    }
}

fn phases(phases: &[Phase], range: (f64, f64)) -> Markup {
    let labels = phases.iter().rev().map(|phase| format!("{} {} ms", phase.name, plot::number(phase.duration_ms)));
    let y = Scale::named("", labels.collect());
    let bar = |(row, phase): (usize, &Phase)| {
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        let (y, end) = (row as f64, phase.start_ms + phase.duration_ms);
        Plot::Line(plot::line(vec![(phase.start_ms, y), (end, y)], colour(&phase.name)).with_stroke_width(13.0))
    };
    let plots: Vec<Plot> = phases.iter().rev().enumerate().map(bar).collect();
    let x = Scale { range: Some(range), ..Scale::linear("Time since the request (ms)") };
    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    let height = 60.0 + 22.0 * phases.len() as f64;
    plot::draw(plots, &x, &y, (WIDE, height), "Phases over time")
}
