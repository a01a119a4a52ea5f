//! Results of experiments: their [format](results), and the [`report`] that is made of them.

mod export;
mod figures;
mod groups;
mod guide;
mod lines;
mod model;
mod names;
mod page;
mod plot;
mod read;
pub mod results;
mod stats;

use std::{
    fs,
    path::{Path, PathBuf},
};

pub use read::ReportError;

use crate::{
    groups::{Axis, sweeps},
    guide::{Advice, Evaluation, Threshold},
    model::Growth,
    read::Results,
    results::Strategy,
};

/// Makes the report of a results folder, and puts it there: `report.html`, `results.csv` and `summary.json`. What was there of an earlier one is
/// replaced. Returns the path of `report.html`.
///
/// # Errors
/// When the folder has no results that can be read, or cannot be written to.
pub fn report(folder: &Path) -> Result<PathBuf, ReportError> {
    let results = Results::read(folder)?;
    let situations = groups::situations(&results.runs);
    let advice: Vec<Advice> = situations.iter().map(Advice::of).collect();
    let axes = [Axis::Memory, Axis::Bandwidth, Axis::RoundTrip, Axis::Dirty, Axis::Clients];
    let swept = axes.into_iter().flat_map(|axis| sweeps(&situations, axis));
    let thresholds: Vec<Threshold> = swept.filter_map(|sweep| Threshold::live_against_warm(&sweep)).collect();
    let growth: Vec<Growth> =
        sweeps(&situations, Axis::Memory).iter().filter_map(|sweep| Growth::of(sweep, Strategy::Warm)).collect();
    let evaluation = Evaluation { advice: &advice, thresholds: &thresholds, warm_growth: &growth };
    let csv_path = folder.join("results.csv");
    let csv = export::csv(&results.runs).map_err(|source| other(&csv_path, source))?;
    write(&csv_path, &csv)?;
    let summary_path = folder.join("summary.json");
    let summary = export::summary(&results, &situations, evaluation);
    write(&summary_path, summary.map_err(|source| other(&summary_path, source))?.as_bytes())?;
    let parts = page::Parts { results: &results, situations: &situations, evaluation };
    let path = folder.join("report.html");
    write(&path, page::page(&parts).as_bytes())?;
    Ok(path)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), ReportError> {
    fs::write(path, bytes).map_err(|source| ReportError::Write { path: path.to_owned(), source })
}

fn other(path: &Path, source: impl std::error::Error + Send + Sync + 'static) -> ReportError {
    ReportError::Write { path: path.to_owned(), source: std::io::Error::other(source) }
}
