//! Naming the lines of the results that something was made from.

use std::fmt::Write as _;

/// Runs of numbers: `1–3, 7`.
fn ranges(lines: &[usize]) -> Vec<(usize, usize)> {
    let mut sorted = lines.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for line in sorted {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == line => *last = line,
            _ => ranges.push((line, line)),
        }
    }
    ranges
}

/// A command that prints these lines, to be run in the results folder.
pub(crate) fn command(lines: &[usize]) -> String {
    let mut script = String::new();
    for (first, last) in ranges(lines) {
        let separator = if script.is_empty() { "" } else { ";" };
        let range = if first == last { format!("{first}p") } else { format!("{first},{last}p") };
        let _infallible = write!(script, "{separator}{range}");
    }
    format!("sed -n '{script}' results.jsonl")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_ranges_and_doubles_are_named_once() {
        assert_eq!(command(&[7, 2, 1, 3, 2, 9, 10]), "sed -n '1,3p;7p;9,10p' results.jsonl");
    }
}
