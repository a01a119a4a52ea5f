//! Selectors of labels as people write them: what `kubectl get -l` takes. Pure.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

/// Why a text is no selector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{part:?} is no requirement of labels: write it as key=value, key!=value, key in (a, b), key notin (a, b), key or !key"
)]
pub(crate) struct WrongSelector {
    part: String,
}

/// Reads one; the empty text selects everything.
///
/// # Errors
/// When a part of it is none that `kubectl` knows. Whether keys and values are names that labels can have is for the API server to say.
pub(crate) fn parse(text: &str) -> Result<Option<LabelSelector>, WrongSelector> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let (mut labels, mut expressions) = (BTreeMap::new(), Vec::new());
    for part in parts(text) {
        match requirement(part.trim()).ok_or_else(|| WrongSelector { part: part.trim().to_owned() })? {
            // Two values of one label: nothing has both.
            Requirement::Is(key, value) if !labels.contains_key(&key) => drop(labels.insert(key, value)),
            Requirement::Is(key, value) => expressions.push(expression(key, "In", vec![value])),
            Requirement::Other(expression) => expressions.push(expression),
        }
    }
    let match_labels = (!labels.is_empty()).then_some(labels);
    let match_expressions = (!expressions.is_empty()).then_some(expressions);
    Ok(Some(LabelSelector { match_labels, match_expressions }))
}

enum Requirement {
    Is(String, String),
    Other(LabelSelectorRequirement),
}

/// Divides at commas that are in no parentheses.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_usize;
    text.split(move |letter| {
        match letter {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        letter == ',' && depth == 0
    })
}

fn requirement(part: &str) -> Option<Requirement> {
    if let Some(listed) = part.strip_suffix(')') {
        let (before, list) = listed.split_once('(')?;
        let mut words = before.split_whitespace();
        let (key, word) = (label(words.next()?)?, words.next()?);
        let operator = match word {
            "in" => "In",
            "notin" => "NotIn",
            _ => return None,
        };
        let values: Option<Vec<String>> = list.split(',').map(|value| value_of(value.trim())).collect();
        return words.next().is_none().then_some(Requirement::Other(expression(key, operator, values?)));
    }
    if let Some((key, value)) = part.split_once("!=") {
        return Some(Requirement::Other(expression(label(key.trim())?, "NotIn", vec![value_of(value.trim())?])));
    }
    if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Some(Requirement::Is(label(key.trim())?, value_of(value.trim())?));
    }
    if let Some(key) = part.strip_prefix('!') {
        return Some(Requirement::Other(expression(label(key.trim())?, "DoesNotExist", Vec::new())));
    }
    Some(Requirement::Other(expression(label(part)?, "Exists", Vec::new())))
}

fn expression(key: String, operator: &str, values: Vec<String>) -> LabelSelectorRequirement {
    LabelSelectorRequirement { key, operator: operator.to_owned(), values: (!values.is_empty()).then_some(values) }
}

fn label(text: &str) -> Option<String> {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./".contains(letter);
    (!text.is_empty() && text.chars().all(plain)).then(|| text.to_owned())
}

/// A label may have no value.
fn value_of(text: &str) -> Option<String> {
    if text.is_empty() { Some(String::new()) } else { label(text).filter(|value| !value.contains('/')) }
}

#[cfg(test)]
mod tests {
    use kube::core::{Selector, SelectorExt as _};
    use proptest::prelude::*;

    use super::*;

    fn selects(text: &str, labels: &[(&str, &str)]) -> bool {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Selector::try_from(parse(text).unwrap().unwrap()).unwrap().matches(&labels)
    }

    #[test]
    fn what_kubectl_takes_selects_the_same() {
        let shop = [("app", "shop"), ("tier", "back"), ("podferry.dev/x", "")];
        for text in [
            "app=shop",
            "app==shop",
            "app = shop , tier in (front, back)",
            "tier notin (front)",
            "tier!=front",
            "none!=x",
            "!canary",
            "app",
            "podferry.dev/x",
            "podferry.dev/x=",
            "app=shop,app in (shop)",
            "tier in (back),!canary,app!=bar",
        ] {
            assert!(selects(text, &shop), "{text}");
        }
        for text in [
            "app=bar",
            "tier in (front, middle)",
            "tier notin (front, back)",
            "!app",
            "canary",
            "app=shop,app=bar",
            "app!=shop",
        ] {
            assert!(!selects(text, &shop), "{text}");
        }
        assert_eq!((parse(""), parse("  ")), (Ok(None), Ok(None)));
    }

    #[test]
    fn what_is_none_is_named() {
        for (text, part) in [
            ("app=shop,", ""),
            ("=x", "=x"),
            ("a in b", "a in b"),
            ("a on (b)", "a on (b)"),
            ("a in (b),c d", "c d"),
            ("a=(b", "a=(b"),
            ("!", "!"),
            ("a=b/c", "a=b/c"),
            ("a in c (b)", "a in c (b)"),
        ] {
            assert_eq!(parse(text), Err(WrongSelector { part: part.to_owned() }), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[a-c!=, ()/]{0,24}") {
            let _ = parse(&text);
        }

        #[test]
        fn what_a_selector_says_of_itself_is_read_as_the_same(
            keys in prop::collection::vec(("[a-z]{1,3}", 0..5_u8, "[a-z]{1,3}"), 1..4),
            labels in prop::collection::btree_map("[a-z]{1,3}", "[a-z]{1,3}", 0..4),
        ) {
            let part = |(key, kind, value): (String, u8, String)| match kind {
                0 => format!("{key}={value}"),
                1 => format!("{key}!={value}"),
                2 => format!("{key} in ({value},x)"),
                3 => format!("!{key}"),
                _ => key,
            };
            let text = keys.into_iter().map(part).collect::<Vec<_>>().join(",");
            let first = Selector::try_from(parse(&text).unwrap().unwrap()).unwrap();
            let again = Selector::try_from(parse(&first.to_string()).unwrap().unwrap()).unwrap();
            prop_assert_eq!(first.matches(&labels), again.matches(&labels), "{} and {}", text, first);
        }
    }
}
