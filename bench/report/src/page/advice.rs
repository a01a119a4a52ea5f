//! The decision guide.

use maud::{Markup, html};

use super::Parts;
use crate::{
    figures::source,
    groups::Axis,
    guide::{self, Advice, Auto, Evaluation, Judged, Kind, RULES, Threshold, Which},
    names::{self, look},
    plot::number,
    results::Strategy,
    stats::Spread,
};

/// By kind of application, then by situation, then what `auto` should go by.
pub(crate) fn guide(parts: &Parts<'_>) -> Markup {
    let advice = parts.evaluation.advice;
    let kinds = guide::kinds(advice);
    html! {
        div.cards { @for kind in &kinds { (card(kind, advice)) } }
        details { summary { h3 { "The rules" } }
            ol { @for rule in RULES { li { (rule) } } }
            p { "They are applied to each situation, that is workload, memory, dirty rate, demand, limits and link. A kind of application has a "
                "strategy where that wins in two thirds of the situations that were decided." }
        }
        details open[parts.situations.len() < 12] { summary { h3 { "Each situation" } } (situations(parts)) }
        details { summary { h3 { "Where live begins to pay, against warm" } } (thresholds(parts.evaluation.thresholds)) }
        details { summary { h3 { "What auto reckons with" } } (reckoning(&parts.evaluation)) }
    }
}

fn card(kind: &Kind, advice: &[Advice]) -> Markup {
    let decided: usize = kind.wins.values().sum();
    let of_kind = || advice.iter().filter(|one| one.workload == kind.workload);
    html! {
        article.card {
            h3 { (names::kind(kind.workload)) }
            p.soft { "measured with " (names::workload(kind.workload)) }
            p.verdict { @match kind.take {
                Some(strategy) => { (mark(strategy)) }
                None if decided == 0 => { span.unknown { "Not enough data" } }
                None => { "It depends: " @for (index, (strategy, count)) in kind.wins.iter().enumerate() {
                    @if index > 0 { ", " } (mark(*strategy)) " in " (count) } }
            } }
            p { @if decided > 0 { (gap_of(kind, of_kind())) } "Decided in " (decided) " of " (kind.situations)
                @if kind.situations == 1 { " situation." } @else { " situations." } }
            @let risky = with_loss(of_kind());
            @if !risky.is_empty() { p.soft { "Shorter, where a loss is accepted: " @for (strategy, count) in risky { (mark(strategy)) " (" (count) ") " } } }
        }
    }
}

/// How long clients waited with what is recommended.
fn gap_of<'a>(kind: &Kind, advice: impl Iterator<Item = &'a Advice>) -> Markup {
    let taken = advice.filter(|one| kind.take.is_none() || one.take == kind.take);
    let medians: Vec<f64> = taken.filter_map(|one| one.judged(one.take?)?.gap_ms).map(|gap| gap.median).collect();
    let Some(spread) = Spread::of(medians) else { return html! {} };
    if spread.n == 1 {
        return html! { "Clients waited " (number(spread.median)) " ms at the longest (median). " };
    }
    html! { "Clients waited " (number(spread.min)) " to " (number(spread.max)) " ms at the longest (medians). " }
}

fn with_loss<'a>(advice: impl Iterator<Item = &'a Advice>) -> Vec<(Strategy, usize)> {
    let all: Vec<Strategy> = advice.flat_map(|one| one.with_loss.iter().copied()).collect();
    let count = |strategy: Strategy| all.iter().filter(|one| **one == strategy).count();
    let risky = [Strategy::PostCopy, Strategy::Hybrid].map(|strategy| (strategy, count(strategy)));
    risky.into_iter().filter(|(_, count)| *count > 0).collect()
}

/// A strategy's mark and name.
pub(crate) fn mark(strategy: Strategy) -> Markup {
    let look = look(strategy);
    html! { span.strategy { span style=(format!("color:{}", look.colour)) aria-hidden="true" { (look.sign) } " " (look.name)
    @if names::is_peer(strategy) { " " small.peer { "peer" } } } }
}

fn situations(parts: &Parts<'_>) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label="Decision guide by situation" { table {
            thead { tr { th scope="col" { "Situation" } th scope="col" { "Take" } th scope="col" { "As good" }
                th scope="col" { "Shorter, with a loss accepted" } th scope="col" { "auto chose" } th scope="col" { "What was compared" } } }
            tbody { @for (one, situation) in parts.evaluation.advice.iter().zip(parts.situations) { tr {
                th scope="row" { (one.situation) details.lines { summary { "lines" } (source(&situation.lines())) } }
                td { @match one.take { Some(strategy) => (mark(strategy)), None => span.unknown { "not enough data" } } }
                td { (marks(&one.as_good)) }
                td { (marks(&one.with_loss)) }
                td { (auto(one)) }
                td.judged { div.soft { (one.by) } @for judged in &one.judged { div { (judgement(judged)) } } }
            } } }
        } }
    }
}

fn marks(strategies: &[Strategy]) -> Markup {
    html! { @for strategy in strategies { (mark(*strategy)) " " } }
}

fn auto(one: &Advice) -> Markup {
    html! {
        @for (chosen, count) in &one.auto_chose { div { (chosen) " × " (count) } }
        @match one.auto_agrees() {
            Some(true) => span.good { "agrees" },
            Some(false) => span.bad { "differs" },
            None => "",
        }
    }
}

fn judgement(judged: &Judged) -> Markup {
    html! {
        (mark(judged.strategy)) " "
        @if let Some(gap) = &judged.gap_ms { (number(gap.median)) " (" (number(gap.low)) "–" (number(gap.high)) "), n = " (gap.n) }
        @if !judged.unseen { " " span.soft { "clients saw failures" } }
        @if let Some(why) = &judged.ruled_out { " " span.bad { (why) } }
    }
}

fn thresholds(thresholds: &[Threshold]) -> Markup {
    if thresholds.is_empty() {
        return super::nothing("live and warm were not measured at two places of a parameter with all else the same.");
    }
    html! {
        p { "Where the median downtime of live is below that of warm. " code { "--strategy auto" } " weighs the two by what copying beforehand would spare." }
        div.scroll tabindex="0" role="region" aria-label="Thresholds" { table {
            thead { tr { th scope="col" { "Situation" } th scope="col" { "Along" } th scope="col" { "Live is shorter at" } th scope="col" { "Not shorter at" } th scope="col" { "Live did not move at" } } }
            tbody { @for one in thresholds { tr {
                th scope="row" { (one.situation) details.lines { summary { "lines" } (source(&one.lines)) } }
                td { (along(one.axis)) }
                @for which in [Which::Better, Which::NotBetter, Which::DidNotMove] { td { (places(one, which)) } }
            } } }
        } }
    }
}

/// Whether auto chose well, and the growth of warm's downtime, which it weighs copying beforehand against.
fn reckoning(evaluation: &Evaluation<'_>) -> Markup {
    let auto = Auto::of(evaluation.advice);
    html! {
        p { "Where auto chose and something is recommended, it chose that, something as good, or better in " strong { (auto.agrees) " of " (auto.judged) }
            @if auto.judged == 1 { " situation." } @else { " situations." } }
        @if !auto.differs.is_empty() { p { "Otherwise in: " } ul { @for situation in &auto.differs { li { (situation) } } } }
        p { "auto takes the downtime of warm for a fixed part and one that grows with memory. Measured, by a line through all runs (Theil–Sen, so that a "
            "run that took far too long does not bend it):" }
        @if evaluation.warm_growth.is_empty() { (super::nothing("warm was not measured with two sizes of memory and all else the same.")) }
        @else { div.scroll tabindex="0" role="region" aria-label="Growth of the downtime of warm" { table {
            thead { tr { th scope="col" { "Situation" } th scope="col" { "n" } th scope="col" { "Fixed (ms)" } th scope="col" { "Memory (MiB/s)" } } }
            tbody { @for one in evaluation.warm_growth { tr {
                th scope="row" { (mark(one.strategy)) ", " (one.situation) details.lines { summary { "lines" } (source(&one.lines)) } }
                td.number { (one.n) } td.number { (number(one.fixed_ms)) } td.number { (one.mib_per_s.map_or_else(|| "does not grow".into(), number)) }
            } } }
        } } }
    }
}

fn places(threshold: &Threshold, which: Which) -> String {
    let places = threshold.places.iter().filter(|(_, is)| *is == which);
    let words: Vec<String> = places.map(|(place, _)| place.map_or_else(|| "not shaped".into(), number)).collect();
    if words.is_empty() { "–".into() } else { words.join(", ") }
}

fn along(axis: Axis) -> &'static str {
    match axis {
        Axis::Memory => "memory, MiB",
        Axis::Bandwidth => "bandwidth, Mbit/s",
        Axis::RoundTrip => "round-trip time, ms",
        Axis::Dirty => "dirty rate, % in a second",
        Axis::Clients => "clients",
    }
}
