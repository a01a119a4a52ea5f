//! Strategies along one parameter.

use maud::{Markup, html};

use super::figure;
use crate::{
    groups::{Axis, Cell, Metric, Sweep},
    names,
    plot::{self, SMALL, Scale},
    results::Strategy,
    stats::Spread,
};

const METRICS: [Metric; 4] = [Metric::Downtime, Metric::Gap, Metric::Total, Metric::Wire];

/// What is the same everywhere on it.
pub(crate) fn title(sweep: &Sweep<'_, '_>) -> String {
    names::situation(sweep.scenario(), &[sweep.axis.part()])
}

/// Downtime, service gap, total time and traffic along a parameter, side by side.
pub(crate) fn sweep(sweep: &Sweep<'_, '_>) -> Markup {
    let strategies = sweep.strategies();
    let content = html! {
        (plot::legend(&strategies))
        div.plots { @for metric in METRICS { (panel(sweep, &strategies, metric)) } }
    };
    let moved = sweep.places.iter().flat_map(|(_, place)| &place.cells).flat_map(Cell::moved).count();
    let lines = sweep.lines();
    let says = format!(
        "n = {moved} runs that moved, of {}.{} Marks: medians; whiskers: 95 % confidence interval of the median from 5 runs on, smallest and \
         largest below.",
        lines.len(),
        not_moved(sweep)
    );
    figure(&content, &says, &lines)
}

/// Where runs of podferry or a peer did not move: such a place has fewer runs behind its mark, or no mark.
fn not_moved(sweep: &Sweep<'_, '_>) -> String {
    let mut places = Vec::new();
    for (place, situation) in &sweep.places {
        for cell in &situation.cells {
            let (moved, all) = (cell.moved().count(), cell.runs.len());
            if moved < all {
                let strategy = names::look(cell.scenario.strategy).name;
                places.push(format!("{strategy} at {}: {moved} of {all}", say(*place)));
            }
        }
    }
    if places.is_empty() { String::new() } else { format!(" Not all moved: {}.", places.join(", ")) }
}

fn panel(sweep: &Sweep<'_, '_>, strategies: &[Strategy], metric: Metric) -> Markup {
    let (x, place) = horizontal(sweep);
    let at = |(x, spread): (f64, Spread)| (place(x), spread);
    let series = strategies.iter().map(|strategy| {
        let points: Vec<_> = sweep.series(*strategy, metric).into_iter().map(at).collect();
        (*strategy, points)
    });
    let series: Vec<_> = series.filter(|(_, points)| !points.is_empty()).collect();
    if series.is_empty() {
        return html! { p.empty { (metric.title()) ": not measured." } };
    }
    let bounds: Vec<f64> = series.iter().flat_map(|(_, points)| points).flat_map(|(_, of)| [of.low, of.high]).collect();
    let plots = series.iter().flat_map(|(strategy, points)| plot::series(*strategy, points)).collect();
    let name = format!("{} by strategy and {}", metric.title(), x.title);
    html! {
        div { h4 { (metric.title()) } (plot::draw(plots, &x, &Scale::fitting("", &bounds), SMALL, &name)) }
    }
}

/// The scale, and where a place of the axis lies on it.
fn horizontal(sweep: &Sweep<'_, '_>) -> (Scale, impl Fn(f64) -> f64) {
    let places: Vec<f64> = sweep.places.iter().map(|(place, _)| *place).collect();
    let doubles = sweep.axis == Axis::Memory;
    let scale = if doubles {
        doubling(&places)
    } else {
        Scale::named(unit(sweep.axis), places.iter().copied().map(say).collect())
    };
    let place = move |value: f64| {
        let index = || places.iter().position(|place| place.total_cmp(&value).is_eq()).unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "a handful of places")]
        if doubles { value.max(1.0).log2() } else { index() as f64 }
    };
    (scale, place)
}

fn say(place: f64) -> String {
    if place.is_infinite() { "not shaped".into() } else { plot::number(place) }
}

fn unit(axis: Axis) -> &'static str {
    match axis {
        Axis::Memory => "Memory (MiB, log)",
        Axis::Bandwidth => "Bandwidth of the link (Mbit/s, in order)",
        Axis::RoundTrip => "Round-trip time (ms, in order)",
        Axis::Dirty => "Memory written in a second (%, in order)",
        Axis::Clients => "Clients (in order)",
    }
}

/// kuva's logarithmic scale marks powers of ten; memory comes in powers of two.
fn doubling(places: &[f64]) -> Scale {
    let logs = places.iter().map(|place| place.max(1.0).log2());
    let (least, most) = logs.fold((f64::INFINITY, 0.0_f64), |(least, most), log| (least.min(log), most.max(log)));
    let words = std::sync::Arc::new(|log: f64| plot::number(log.exp2().round()));
    let step = Some(if most - least > 5.0 { 2.0 } else { 1.0 });
    Scale {
        range: Some((least.floor() - 0.5, most.ceil() + 0.5)),
        step,
        words: Some(words),
        ..Scale::linear(unit(Axis::Memory))
    }
}
