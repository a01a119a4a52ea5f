//! Labels and what is asked of them, in the words that Kubernetes has for both.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Labels: keys and values.
pub type Labels = BTreeMap<String, String>;

/// The longest part of a key behind its prefix, and the longest value.
const MAX_NAME: usize = 63;
/// The longest prefix of a key.
const MAX_PREFIX: usize = 253;

/// What is asked of one label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// The label's key.
    pub key: String,
    /// What is asked of it.
    pub operator: Operator,
}

/// What is asked of a label's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operator {
    /// It is one of these.
    In(Vec<String>),
    /// It is none of these, or not there.
    NotIn(Vec<String>),
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
    /// It is a whole number, and more than this.
    Gt(i64),
    /// It is a whole number, and less than this.
    Lt(i64),
}

/// Requirements that all have to be met. One without any is met by everybody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(pub Vec<Requirement>);

impl Requirement {
    /// Whether these labels meet it.
    pub fn is_met_by(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        let number = || value.and_then(|value| value.parse::<i64>().ok());
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::Gt(least) => number().is_some_and(|number| number > *least),
            Operator::Lt(most) => number().is_some_and(|number| number < *most),
        }
    }
}

impl Selector {
    /// Whether these labels meet all of it.
    pub fn is_met_by(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| requirement.is_met_by(labels))
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        match &self.operator {
            Operator::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0]),
            Operator::In(values) => write!(f, "{key} in ({})", values.join(", ")),
            Operator::NotIn(values) if values.len() == 1 => write!(f, "{key}!={}", values[0]),
            Operator::NotIn(values) => write!(f, "{key} notin ({})", values.join(", ")),
            Operator::Exists => f.write_str(key),
            Operator::DoesNotExist => write!(f, "!{key}"),
            Operator::Gt(number) => write!(f, "{key}>{number}"),
            Operator::Lt(number) => write!(f, "{key}<{number}"),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&all.join(", "))
    }
}

/// Expressions with commas between them.
impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut inside = false;
        let between = |character| {
            inside = (inside || character == '(') && character != ')';
            character == ',' && !inside
        };
        text.split(between).map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

/// As `kubectl` takes selectors: `zone=a`, `zone!=a`, `zone in (a, b)`, `zone notin (a, b)`, `gpu`, `!gpu`, `cores>4`, `cores<64`.
impl FromStr for Requirement {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let said = text.trim();
        let (key, operator) = split(said).ok_or_else(|| {
            format!("{text:?} asks nothing of a label; write zone=a, zone!=a, zone in (a, b), zone notin (a, b), gpu, !gpu, cores>4 or cores<4")
        })?;
        check_key(&key)?;
        let values = match &operator {
            Operator::In(values) | Operator::NotIn(values) => values.as_slice(),
            _ => &[],
        };
        values.iter().try_for_each(|value| check_value(value))?;
        Ok(Self { key, operator })
    }
}

fn split(text: &str) -> Option<(String, Operator)> {
    if let Some(list) = text.strip_suffix(')') {
        let (head, values) = list.split_once('(')?;
        let values: Vec<_> = values.split(',').map(|value| value.trim().to_owned()).collect();
        let (key, word) = head.trim().rsplit_once(char::is_whitespace)?;
        return match word {
            "in" => Some((key.trim().to_owned(), Operator::In(values))),
            "notin" => Some((key.trim().to_owned(), Operator::NotIn(values))),
            _ => None,
        };
    }
    let pair = |at: &str| text.split_once(at).map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()));
    if let Some((key, value)) = pair("!=") {
        return Some((key, Operator::NotIn(vec![value])));
    }
    if let Some((key, value)) = pair("==").or_else(|| pair("=")) {
        return Some((key, Operator::In(vec![value])));
    }
    if let Some((key, value)) = pair(">") {
        return Some((key, Operator::Gt(value.parse().ok()?)));
    }
    if let Some((key, value)) = pair("<") {
        return Some((key, Operator::Lt(value.parse().ok()?)));
    }
    match text.strip_prefix('!') {
        Some(key) => Some((key.trim().to_owned(), Operator::DoesNotExist)),
        None if text.is_empty() => None,
        None => Some((text.to_owned(), Operator::Exists)),
    }
}

/// Whether it can be a label, by Kubernetes' rules.
///
/// # Errors
/// What is wrong with it, for a person.
pub fn check_label(key: &str, value: &str) -> Result<(), String> {
    check_key(key)?;
    check_value(value)
}

pub(super) fn check_key(key: &str) -> Result<(), String> {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let domain = |prefix: &str| {
        !prefix.is_empty() && prefix.len() <= MAX_PREFIX && prefix.split('.').all(|part| is_word(part, "-"))
    };
    if !name.is_empty() && is_word(name, "-_.") && prefix.is_none_or(domain) {
        return Ok(());
    }
    Err(format!(
        "the label key {key:?} is not 1 to {MAX_NAME} characters of [A-Za-z0-9_.-] that begin and end with a letter or digit, with a DNS name and '/' before them or without"
    ))
}

pub(super) fn check_value(value: &str) -> Result<(), String> {
    if value.is_empty() || is_word(value, "-_.") {
        return Ok(());
    }
    Err(format!(
        "the label value {value:?} is not up to {MAX_NAME} characters of [A-Za-z0-9_.-] that begin and end with a letter or digit"
    ))
}

fn is_word(text: &str, between: &str) -> bool {
    let end = |character: Option<char>| character.is_some_and(|character| character.is_ascii_alphanumeric());
    let allowed = |character: char| character.is_ascii_alphanumeric() || between.contains(character);
    text.len() <= MAX_NAME && end(text.chars().next()) && end(text.chars().next_back()) && text.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn met(text: &str, pairs: &[(&str, &str)]) -> bool {
        text.parse::<Requirement>().unwrap().is_met_by(&labels(pairs))
    }

    #[test]
    fn expressions_are_kubernetes_and_judge_as_it_does() {
        let node = [("zone", "a"), ("cores", "8"), ("example.com/gpu", "")];
        for yes in [
            "zone=a",
            "zone == a",
            "zone in (a, b)",
            "zone!=b",
            "disk!=ssd",
            "zone notin (b,c)",
            "disk notin (ssd)",
            "example.com/gpu",
            "!disk",
            "cores>4",
            "cores<16",
        ] {
            assert!(met(yes, &node), "{yes}");
        }
        for no in
            ["zone=b", "zone in (b)", "zone!=a", "disk=ssd", "zone notin (a)", "disk", "!zone", "cores>8", "zone<9"]
        {
            assert!(!met(no, &node), "{no}");
        }
    }

    #[test]
    fn a_selector_is_met_when_all_of_it_is() {
        let selector: Selector = "zone in (a, b), !disk,cores>4".parse().unwrap();
        assert_eq!(selector.to_string(), "zone in (a, b), !disk, cores>4");
        assert!(selector.is_met_by(&labels(&[("zone", "b"), ("cores", "8")])));
        assert!(!selector.is_met_by(&labels(&[("zone", "b"), ("cores", "8"), ("disk", "")])));
        assert!("zone=a,".parse::<Selector>().is_err());
    }

    #[test]
    fn what_is_no_expression_is_refused_with_an_example() {
        for wrong in
            ["", " ", "zone within (a)", "cores>many", "zone in (a b)", "a b", "!", "=a", "-a", "a/b/c", "zone=ä"]
        {
            assert!(wrong.parse::<Requirement>().is_err(), "{wrong}");
        }
        assert!("".parse::<Requirement>().unwrap_err().contains("zone in (a, b)"));
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_as_the_same(
            key in "[a-z]([a-z0-9.-]{0,8}[a-z0-9])?",
            values in prop::collection::vec("[a-z0-9]{1,5}", 1..4),
            number: i64,
            kind in 0..6,
        ) {
            let operator = match kind {
                0 => Operator::In(values),
                1 => Operator::NotIn(values),
                2 => Operator::Exists,
                3 => Operator::DoesNotExist,
                4 => Operator::Gt(number),
                _ => Operator::Lt(number),
            };
            let requirement = Requirement { key, operator };
            prop_assert_eq!(requirement.to_string().parse(), Ok(requirement));
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,60}") {
            let _ = text.parse::<Requirement>();
        }
    }
}
