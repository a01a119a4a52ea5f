//! Patterns of names.

use podferry_common::id::{MAX_LABEL_BYTES, MAX_WORKLOAD_BYTES};

/// What stands for any characters in a pattern, and for none.
const ANY: char = '*';

/// A pattern of names: a name, with `*` for any run of characters. Made by [`Pattern::parse`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Checks a pattern of clients: the characters that labels may have (`a-z`, `0-9`, `-`), and `*`. The error says what is wrong, for a
    /// person.
    pub fn of_clients(text: &str) -> Result<Self, String> {
        Self::checked(text, MAX_LABEL_BYTES, &['-'], "a-z, 0-9 and '-'")
    }

    /// The same of workloads or nodes, which may have `.` and `/`, too.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::checked(text, MAX_WORKLOAD_BYTES, &['-', '.', '/'], "a-z, 0-9, '-', '.' and '/'")
    }

    fn checked(text: &str, most: usize, marks: &[char], named: &str) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == ANY || marks.contains(&c);
        if text.is_empty() || text.len() > most || !text.chars().all(allowed) {
            return Err(format!(
                "{text:?} matches no name; write 1 to {most} characters of {named}, with '{ANY}' for any run of them"
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// Whether the whole of `name` is such a name. Takes time proportional to the product of both lengths at most.
    pub fn matches(&self, name: &str) -> bool {
        let mut pieces = self.0.split(ANY);
        let Some(mut rest) = pieces.next().and_then(|first| name.strip_prefix(first)) else { return false };
        let mut pieces = pieces.peekable();
        if pieces.peek().is_none() {
            return rest.is_empty();
        }
        while let Some(piece) = pieces.next() {
            if pieces.peek().is_none() {
                return rest.ends_with(piece);
            }
            // The first place is as good as any later one: what follows begins with "any characters".
            let Some(at) = rest.find(piece) else { return false };
            rest = &rest[at + piece.len()..];
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, as short as it can be said.
    fn defined(pattern: &[u8], name: &[u8]) -> bool {
        match pattern {
            [] => name.is_empty(),
            [b'*', rest @ ..] => (0..=name.len()).any(|skipped| defined(rest, &name[skipped..])),
            [first, rest @ ..] => name.first() == Some(first) && defined(rest, &name[1..]),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 5_000, ..ProptestConfig::default() })]

        #[test]
        fn a_pattern_matches_what_its_definition_says(pattern in "[ab*]{1,7}", name in "[ab]{0,8}") {
            let expected = defined(pattern.as_bytes(), name.as_bytes());
            prop_assert_eq!(Pattern::parse(&pattern).unwrap().matches(&name), expected);
        }

        #[test]
        fn a_name_matches_itself_and_everything_matches_a_star(name in "[a-z0-9-]{1,63}") {
            prop_assert!(Pattern::parse(&name).unwrap().matches(&name));
            prop_assert!(Pattern::parse("*").unwrap().matches(&name));
            let longer = format!("{name}x");
            prop_assert!(!Pattern::parse(&name).unwrap().matches(&longer));
        }
    }

    #[test]
    fn pods_are_matched_by_namespace_and_name() {
        let pattern = |text: &str| Pattern::parse(text).unwrap();
        assert!(pattern("shop/*").matches("shop/cart-0") && pattern("shop/cart.x-*").matches("shop/cart.x-0"));
        assert!(!pattern("shop/*").matches("shop-2/cart-0") && !pattern("shop/cart").matches("shop/cart-0"));
    }

    #[test]
    fn what_no_name_can_match_is_no_pattern() {
        for wrong in ["", "Shop", "shop?", "a b", "ä*", &"a".repeat(318)] {
            assert!(Pattern::parse(wrong).is_err() && Pattern::of_clients(wrong).is_err(), "{wrong:?}");
        }
        for wrong in ["bob.client.podferry.internal", "shop/*", &"a".repeat(64)] {
            assert!(Pattern::parse(wrong).is_ok() && Pattern::of_clients(wrong).is_err(), "{wrong:?}");
        }
    }
}
