//! Where log lines go: standard error, so that standard output stays for results.
//!
//! - `PODFERRY_LOG`: what to show, in the syntax of [`EnvFilter`], for example `debug` or `info,podferry_agent=trace`.
//!   Default: `info`.
//! - `PODFERRY_LOG_FORMAT`: `text` (default) or `json`, one object a line.

use std::env;
use std::io::{self, IsTerminal};

use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt;

/// The variable that says what to log.
pub const FILTER_VARIABLE: &str = "PODFERRY_LOG";
/// The variable that says in which format.
pub const FORMAT_VARIABLE: &str = "PODFERRY_LOG_FORMAT";

/// Starts logging for this process. A second call changes nothing. A variable that makes no sense is reported and its
/// default taken: a typing error in a log setting must not keep an agent from its containers.
pub fn init() {
    init_with_default("info");
}

/// As [`init`], with another default filter for when `PODFERRY_LOG` is not set.
pub fn init_with_default(default: &str) {
    let mut complaint = None;
    let filter = match env::var(FILTER_VARIABLE) {
        Ok(wanted) if !wanted.trim().is_empty() => EnvFilter::try_new(&wanted).unwrap_or_else(|error| {
            complaint = Some(format!("{FILTER_VARIABLE}={wanted:?} is no filter ({error}); {default} is used"));
            EnvFilter::new(default)
        }),
        _ => EnvFilter::new(default),
    };
    let format = env::var(FORMAT_VARIABLE).unwrap_or_default();
    let builder = fmt().with_env_filter(filter).with_writer(io::stderr);
    // A subscriber that is already there (a test's, or an earlier call's) stays.
    let _already_set = match format.as_str() {
        "json" => builder.json().flatten_event(true).try_init(),
        _ => builder.with_ansi(io::stderr().is_terminal()).try_init(),
    };
    if let Some(complaint) = complaint {
        tracing::warn!("{complaint}");
    }
    if !matches!(format.as_str(), "" | "text" | "json") {
        tracing::warn!("{FORMAT_VARIABLE}={format:?} is neither text nor json; text is used");
    }
}
