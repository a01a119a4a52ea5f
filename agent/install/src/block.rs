//! A block of our own in a file of somebody else's.

const BEGIN: &str = "# >>> podferry: written by podferry-install, taken out by `podferry-install uninstall`\n";
const END: &str = "# <<< podferry\n";
/// Says that the newline before it is ours, too.
const NO_NEWLINE: &str = "# podferry: this file did not end with a newline\n";

/// The file with the block at its end, in place of one that it has.
pub(crate) fn insert(text: &str, body: &str) -> String {
    let text = remove(text);
    let gap = if text.is_empty() || text.ends_with('\n') { String::new() } else { format!("\n{NO_NEWLINE}") };
    format!("{text}{gap}{BEGIN}{}\n{END}", body.trim_end())
}

/// The file without the block, byte for byte as it was.
pub(crate) fn remove(text: &str) -> String {
    let Some((before, rest)) = text.split_once(BEGIN) else { return text.to_owned() };
    let Some((_, after)) = rest.split_once(END) else { return text.to_owned() };
    let before = match before.strip_suffix(NO_NEWLINE) {
        Some(before) => before.strip_suffix('\n').unwrap_or(before),
        None => before,
    };
    format!("{before}{after}")
}

/// Whether the file has a block of ours.
pub(crate) fn is_in(text: &str) -> bool {
    text.contains(BEGIN) && text.contains(END)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_and_goes_without_a_trace() {
        for text in ["", "version = 2\n", "version = 2", "a = 1\n\n\n", "\n"] {
            let with = insert(text, "[b]\nc = 1\n");
            assert!(is_in(&with) && with.contains("\n[b]\nc = 1\n# <<<"), "{with}");
            assert_eq!(remove(&with), text);
            assert_eq!(insert(&with, "[b]\nc = 1"), with, "a second time changes nothing");
        }
    }

    #[test]
    fn what_others_write_behind_it_stays() {
        let with = insert("a = 1\n", "b = 2");
        assert_eq!(remove(&format!("{with}[theirs]\n")), "a = 1\n[theirs]\n");
    }

    #[test]
    fn half_a_block_is_left_alone() {
        let text = format!("a = 1\n{BEGIN}b = 2\n");
        assert_eq!(remove(&text), text);
    }
}
