//! The files of a report, of a small fixed set of results (`data`).
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

#[path = "support/made_up.rs"]
mod made_up;

use std::{fs, path::Path};

use podferry_report::{ReportError, report};
use tempfile::TempDir;

/// A copy of the fixed results.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    for file in ["environment.json", "suite.toml", "results.jsonl"] {
        fs::copy(data.join(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn made(folder: &TempDir, file: &str) -> String {
    report(folder.path()).unwrap();
    fs::read_to_string(folder.path().join(file)).unwrap()
}

/// kuva counts the figures of a process, other tests' too.
fn without_ids(page: &str) -> String {
    let pieces = page.split("kuva-clip-").map(|piece| piece.trim_start_matches(|letter: char| letter.is_ascii_digit()));
    pieces.collect()
}

#[test]
fn the_csv_has_a_line_for_each_run() {
    insta::assert_snapshot!(made(&folder(), "results.csv"));
}

#[test]
fn the_summary_has_statistics_the_guide_and_thresholds() {
    insta::assert_snapshot!(made(&folder(), "summary.json"));
}

#[test]
fn the_page_has_every_section_and_its_navigation_leads_there() {
    let page = made(&folder(), "report.html");
    let sections = [
        "guide",
        "memory",
        "timeline",
        "rounds",
        "gaps",
        "workloads",
        "dirty",
        "bandwidth",
        "demand",
        "peers",
        "cost",
        "all",
        "failures",
        "method",
    ];
    for section in sections {
        assert!(page.contains(&format!("<section id=\"{section}\"")), "{section}");
        assert!(page.contains(&format!("<a href=\"#{section}\"")), "{section}");
    }
}

#[test]
fn what_a_reason_says_is_text_and_never_markup() {
    let page = made(&folder(), "report.html");
    assert!(!page.contains("<script") && !page.contains("<img"), "something got through");
    assert!(page.contains("&lt;script&gt;alert('x')&lt;/script&gt; &amp; &quot;exit status 1&quot;"));
    assert!(page.contains("&lt;img src=x onerror=alert(1)&gt;"));
}

#[test]
fn names_of_phases_are_text_in_figures_too() {
    let folder = folder();
    let path = folder.path().join("results.jsonl");
    let hostile = fs::read_to_string(&path).unwrap().replace("\"freeze\"", "\"</text><script>alert(1)</script>\"");
    fs::write(&path, hostile).unwrap();
    let page = made(&folder, "report.html");
    assert!(page.contains("&lt;/text&gt;&lt;script&gt;alert(1)") && !page.contains("<script"));
}

#[test]
fn failures_and_refusals_are_shown_with_their_reasons() {
    let page = made(&folder(), "report.html");
    assert!(page.contains("memory is written faster than it is sent"));
    assert!(
        page.contains("Not all moved: podman at 64: 0 of 1, live at 128: 0 of 1."),
        "a figure hides that live was refused"
    );
}

#[test]
fn figures_and_tables_name_the_lines_that_they_are_made_of() {
    let page = made(&folder(), "report.html");
    assert!(page.contains("sed -n '1,9p;12p' results.jsonl"), "the situation with 64 MiB");
    assert!(page.contains("sed -n '10p' results.jsonl"), "the refusal");
}

#[test]
fn the_page_names_nothing_that_would_be_fetched() {
    let page = made(&folder(), "report.html").replace("http://www.w3.org/2000/svg", "");
    for word in ["http://", "https://", "src=\"", "@import"] {
        assert!(!page.contains(word), "{word}");
    }
    // Parts of figures name others of the same figure.
    assert_eq!(page.matches("url(").count(), page.matches("url(#kuva-clip-").count());
}

#[test]
fn the_same_results_make_the_same_report() {
    let folder = tempfile::tempdir().unwrap();
    made_up::write(folder.path());
    let once = without_ids(&made(&folder, "report.html"));
    assert!(once == without_ids(&made(&folder, "report.html")), "they differ");
    assert!(!once.contains("NaN") && !once.contains("inf\""), "a number that is none");
}

#[test]
fn a_broken_off_experiment_is_reported_with_a_note() {
    let folder = folder();
    let path = folder.path().join("results.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 30]).unwrap();
    assert!(made(&folder, "report.html").contains("Line 12 is not whole"));
}

#[test]
fn a_folder_without_results_says_what_it_should_have() {
    let folder = tempfile::tempdir().unwrap();
    let error = report(folder.path()).unwrap_err();
    assert!(matches!(error, ReportError::Read { .. }) && error.to_string().contains("results.jsonl"), "{error}");
    let folder = self::folder();
    fs::write(folder.path().join("results.jsonl"), "").unwrap();
    assert!(matches!(report(folder.path()), Err(ReportError::Empty { .. })));
}
