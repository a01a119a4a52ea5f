//! The figures: what is drawn of which runs.

mod rounds;
mod rows;
mod sweep;
mod timeline;

pub(crate) use self::{
    rounds::rounds,
    rows::{by_workload, gaps, peers},
    sweep::{sweep, title},
    timeline::timelines,
};

use maud::{Markup, html};

use crate::lines;

/// A figure with where its numbers come from.
pub(crate) fn figure(content: &Markup, says: &str, lines: &[usize]) -> Markup {
    html! {
        figure {
            (content)
            figcaption { (says) " " (source(lines)) }
        }
    }
}

/// The command that shows the lines that something was made from.
pub(crate) fn source(lines: &[usize]) -> Markup {
    html! { span.source { "From: " code { (lines::command(lines)) } } }
}
