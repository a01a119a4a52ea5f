//! Figures, drawn by kuva in the colours of the page's style sheet.

use std::sync::Arc;

use kuva::{
    backend::svg::SvgBackend,
    plot::LineStyle,
    prelude::{Layout, LinePlot, Plot, ScatterPlot, Theme, TickFormat},
    render::{annotations::ShadedRegion, render::render_multiple},
};
use maud::{Markup, PreEscaped, html};

use crate::{
    names::{self, look},
    results::Strategy,
    stats::Spread,
};

/// A small figure, of which several stand side by side; in the units of its view box.
pub(crate) const SMALL: (f64, f64) = (440.0, 310.0);
/// A figure as wide as the page.
pub(crate) const WIDE: f64 = 900.0;
/// Left and right of what is drawn in wide figures, so that they line up.
const WIDE_MARGINS: (f64, f64) = (180.0, 20.0);

/// How much of the colour a part that stands out has.
const SHADE: f64 = 0.14;

/// How a number is written on an axis.
type Words = Arc<dyn Fn(f64) -> String + Send + Sync>;

/// One direction of a figure.
#[derive(Clone)]
pub(crate) struct Scale {
    /// What is measured along it, with its unit.
    pub(crate) title: String,
    /// Logarithmic.
    pub(crate) log: bool,
    /// From and to; what there is when absent.
    pub(crate) range: Option<(f64, f64)>,
    /// From mark to mark; what looks good when absent.
    pub(crate) step: Option<f64>,
    /// How its numbers are written; as they are when absent.
    pub(crate) words: Option<Words>,
}

impl Scale {
    /// Even, as far as the numbers go.
    pub(crate) fn linear(title: impl Into<String>) -> Self {
        Self { title: title.into(), log: false, range: None, step: None, words: None }
    }

    /// Even, from 0.
    pub(crate) fn from_zero(title: impl Into<String>, values: &[f64]) -> Self {
        let most = values.iter().copied().fold(0.0, f64::max);
        Self { range: Some((0.0, if most > 0.0 { most * 1.08 } else { 1.0 })), ..Self::linear(title) }
    }

    /// Logarithmic where all numbers are above 0 and they are far apart, else even from 0.
    pub(crate) fn fitting(title: &str, values: &[f64]) -> Self {
        let (least, most) = bounds(values);
        if least <= 0.0 || most / least < 4.0 {
            return Self::from_zero(title, values);
        }
        Self { log: true, range: Some((round_down(least), round_up(most))), ..Self::linear(logarithmic(title)) }
    }

    /// Places with names, one unit apart, from 0.
    pub(crate) fn named(title: impl Into<String>, names: Vec<String>) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        let last = names.len() as f64 - 1.0;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place")]
        let words = move |place: f64| {
            let is_place = place > -0.01 && (place - place.round()).abs() < 0.01;
            is_place.then(|| names.get(place.round() as usize).cloned()).flatten().unwrap_or_default()
        };
        let range = Some((-0.5, last + 0.5));
        Self { range, step: Some(1.0), words: Some(Arc::new(words)), ..Self::linear(title) }
    }
}

/// `Downtime (ms, log scale)`.
fn logarithmic(title: &str) -> String {
    match title.strip_suffix(')') {
        Some(open) => format!("{open}, log scale)"),
        None => "log scale".to_owned(),
    }
}

fn bounds(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, 0.0), |(least, most), value| (least.min(*value), value.max(most)))
}

/// 1, 2 or 5 times a power of ten.
const STEPS: [f64; 4] = [1.0, 2.0, 5.0, 10.0];

fn round_down(value: f64) -> f64 {
    let decade = 10_f64.powf(value.log10().floor());
    STEPS.into_iter().rev().map(|step| step * decade).find(|bound| *bound <= value * 1.000_001).unwrap_or(decade)
}

fn round_up(value: f64) -> f64 {
    let decade = 10_f64.powf(value.log10().floor());
    STEPS.into_iter().map(|step| step * decade).find(|bound| *bound * 1.000_001 >= value).unwrap_or(decade * 10.0)
}

fn theme() -> Theme {
    Theme {
        background: "none".into(),
        axis_color: "var(--soft)".into(),
        grid_color: "var(--grid)".into(),
        tick_color: "var(--soft)".into(),
        text_color: "var(--text)".into(),
        legend_bg: "var(--card)".into(),
        legend_border: "var(--line)".into(),
        ..Theme::light()
    }
}

/// A figure as SVG. `name` is what is read to who cannot see it.
pub(crate) fn draw(plots: Vec<Plot>, x: &Scale, y: &Scale, size: (f64, f64), name: &str) -> Markup {
    draw_shaded(plots, x, y, size, name, None)
}

/// The same with a part of x that stands out.
pub(crate) fn draw_shaded(
    plots: Vec<Plot>,
    x: &Scale,
    y: &Scale,
    size: (f64, f64),
    name: &str,
    shade: Option<(f64, f64)>,
) -> Markup {
    let mut layout = Layout::auto_from_plots(&plots)
        .with_theme(theme())
        .with_font_family("system-ui, sans-serif")
        .with_width(size.0)
        .with_height(size.1)
        .with_label_size(13)
        .with_tick_size(12)
        .with_body_size(12)
        .with_x_label(&x.title)
        .with_y_label(&y.title);
    layout.show_legend = false;
    if size.0 >= WIDE {
        layout = layout.with_force_margins(WIDE_MARGINS.0, WIDE_MARGINS.1);
    }
    if let Some((from, to)) = shade {
        layout =
            layout.with_shaded_region(ShadedRegion::vertical(from, to).with_color("var(--still)").with_opacity(SHADE));
    }
    layout = along_x(along_y(layout, y), x);
    frame(&SvgBackend::new().render_scene(&render_multiple(plots, layout)), size, name)
}

fn along_x(mut layout: Layout, x: &Scale) -> Layout {
    if x.log {
        layout = layout.with_log_x();
    }
    if let Some((from, to)) = x.range {
        layout = layout.with_x_axis_min(from).with_x_axis_max(to);
    }
    if let Some(step) = x.step {
        layout = layout.with_x_tick_step(step);
    }
    layout.with_x_tick_format(words(x))
}

fn along_y(mut layout: Layout, y: &Scale) -> Layout {
    if y.log {
        layout = layout.with_log_y();
    }
    if let Some((from, to)) = y.range {
        layout = layout.with_y_axis_min(from).with_y_axis_max(to);
    }
    if let Some(step) = y.step {
        layout = layout.with_y_tick_step(step);
    }
    layout.with_y_tick_format(words(y))
}

fn words(scale: &Scale) -> TickFormat {
    match &scale.words {
        Some(words) => TickFormat::Custom(Arc::clone(words)),
        None => TickFormat::Custom(Arc::new(number)),
    }
}

/// A number with three digits, and thousands apart.
pub(crate) fn number(value: f64) -> String {
    let size = value.abs();
    let digits = match size {
        size if size >= 100.0 || (size - size.round()).abs() < 1e-9 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    if size > 0.0 && size < 0.000_5 {
        return if value > 0.0 { "<0.001".into() } else { ">-0.001".into() };
    }
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_once('.').unwrap_or((&text, ""));
    let rest = rest.trim_end_matches('0');
    let mut grouped = String::new();
    for (place, digit) in whole.chars().enumerate() {
        let left = whole.len() - place;
        // A narrow space that does not break.
        if place > 0 && left.is_multiple_of(3) && whole.as_bytes()[place - 1] != b'-' {
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    if rest.is_empty() { grouped } else { format!("{grouped}.{rest}") }
}

/// kuva gives a fixed size; the page wants one that adapts, and a name.
fn frame(svg: &str, (width, height): (f64, f64), name: &str) -> Markup {
    let (tag, content) = svg.split_once('>').unwrap_or(("", svg));
    let content = content.trim_end().trim_end_matches("</svg>");
    let fill = if tag.contains("fill=") { "var(--text)" } else { "currentColor" };
    html! {
        svg.wide[width >= WIDE] viewBox=(format!("0 0 {width} {height}")) role="img" aria-label=(name)
            font-family="system-ui, sans-serif" fill=(fill) { (PreEscaped(content)) }
    }
}

/// A line with its marks; whiskers are the bounds of the medians.
pub(crate) fn series(strategy: Strategy, points: &[(f64, Spread)]) -> Vec<Plot> {
    let look = look(strategy);
    let places: Vec<(f64, f64)> = points.iter().map(|(x, spread)| (*x, spread.median)).collect();
    let style = if names::is_peer(strategy) { LineStyle::Dashed } else { LineStyle::Solid };
    let line = line(places.clone(), look.colour).with_line_style(style).with_stroke_width(1.8);
    let marks = Plot::Scatter(medians(strategy, points.iter().copied()));
    [Plot::Line(line), marks].into_iter().chain(hollow(strategy, places)).collect()
}

fn medians(strategy: Strategy, points: impl Iterator<Item = (f64, Spread)>) -> ScatterPlot {
    let points: Vec<(f64, Spread)> = points.collect();
    let errors = points.iter().map(|(_, spread)| (spread.median - spread.low, spread.high - spread.median));
    let plot = mark(strategy, points.iter().map(|(x, spread)| (*x, spread.median)).collect());
    let tips = points.iter().map(|(_, spread)| tip(strategy, spread));
    plot.with_y_err_asymmetric(errors).with_tooltips().with_tooltip_labels(tips)
}

fn tip(strategy: Strategy, spread: &Spread) -> String {
    let (median, low, high) = (number(spread.median), number(spread.low), number(spread.high));
    format!("{}: {median} ({low} to {high}), n = {}", look(strategy).name, spread.n)
}

fn mark(strategy: Strategy, points: Vec<(f64, f64)>) -> ScatterPlot {
    let look = look(strategy);
    ScatterPlot::new().with_data(points).with_color(look.colour).with_marker(look.marker).with_size(5.0)
}

/// What makes the marks of peers hollow; kuva fills all but circles.
fn hollow(strategy: Strategy, points: Vec<(f64, f64)>) -> Option<Plot> {
    let inside = || mark(strategy, points).with_color("var(--card)").with_size(3.0);
    names::is_peer(strategy).then(|| Plot::Scatter(inside()))
}

/// A median in a row `y`, with whiskers along x.
pub(crate) fn in_row(strategy: Strategy, y: f64, spread: &Spread) -> Vec<Plot> {
    let place = vec![(spread.median, y)];
    let errors = [(spread.median - spread.low, spread.high - spread.median)];
    let marks = mark(strategy, place.clone()).with_x_err_asymmetric(errors);
    let marks = Plot::Scatter(marks.with_tooltips().with_tooltip_labels([tip(strategy, spread)]));
    std::iter::once(marks).chain(hollow(strategy, place)).collect()
}

/// A plain line.
pub(crate) fn line(points: Vec<(f64, f64)>, colour: &str) -> LinePlot {
    LinePlot::new().with_data(points).with_color(colour).with_stroke_width(1.6)
}

/// How much of the values lies at or below each of them, as a staircase.
pub(crate) fn cumulated(strategy: Strategy, mut values: Vec<f64>) -> Plot {
    values.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "counts of clients")]
    let share = |below: usize| below as f64 / values.len() as f64;
    let stairs: Vec<(f64, f64)> = values
        .iter()
        .enumerate()
        .flat_map(|(index, value)| [(*value, share(index)), (*value, share(index + 1))])
        .collect();
    let style = if names::is_peer(strategy) { LineStyle::Dashed } else { LineStyle::Solid };
    Plot::Line(line(stairs, look(strategy).colour).with_line_style(style).with_stroke_width(2.0))
}

/// What the marks mean.
pub(crate) fn legend(strategies: &[Strategy]) -> Markup {
    html! {
        ul.legend aria-label="Legend" {
            @for strategy in strategies {
                @let look = look(*strategy);
                li { span style=(format!("color:{}", look.colour)) aria-hidden="true" { (look.sign) } " " (look.name)
                    @if names::is_peer(*strategy) { " " small.peer { "peer" } } }
            }
        }
    }
}

/// Small dots.
pub(crate) fn dots(points: Vec<(f64, f64)>, colour: &str) -> Plot {
    Plot::Scatter(ScatterPlot::new().with_data(points).with_color(colour).with_size(3.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_thousands_apart() {
        let said = [0.0, 0.000_4, 0.25, 9.876, 10.0, 98.76, 987.6, 1_234_567.8, -1_234.0].map(number);
        let thin = ["1\u{202f}234\u{202f}568", "-1\u{202f}234"];
        assert_eq!(said, ["0", "<0.001", "0.25", "9.88", "10", "98.8", "988", thin[0], thin[1]]);
    }

    #[test]
    fn a_scale_is_logarithmic_only_where_everything_is_above_zero_and_far_apart() {
        assert_eq!(Scale::fitting("Downtime (ms)", &[30.0, 700.0]).range, Some((20.0, 1000.0)));
        assert_eq!(Scale::fitting("Downtime (ms)", &[30.0, 700.0]).title, "Downtime (ms, log scale)");
        assert!(Scale::fitting("", &[1.0, 1000.0]).log);
        assert!(!Scale::fitting("", &[0.0, 1000.0]).log, "0 has no logarithm");
        assert!(!Scale::fitting("", &[100.0, 300.0]).log);
        assert_eq!(Scale::fitting("", &[0.0]).range, Some((0.0, 1.0)));
    }

    #[test]
    fn bounds_of_a_scale_enclose_what_they_are_of() {
        for value in [0.001, 0.02, 0.7, 1.0, 3.0, 10.0, 99.9, 100.0, 101.0, 123_456.0] {
            assert!(round_down(value) <= value * 1.000_01 && value <= round_up(value) * 1.000_01, "{value}");
        }
    }
}
