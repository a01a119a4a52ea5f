//! Taints, which keep workloads away from nodes, and what tolerates them.

use std::fmt;
use std::str::FromStr;

use super::labels::{check_key, check_value};

/// What a taint does to those who do not tolerate it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// They do not come.
    NoSchedule,
    /// They come when there is no other node.
    PreferNoSchedule,
    /// They do not come. Kubernetes sends away who is there, too; podferry does not.
    NoExecute,
}

/// A mark of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taint {
    /// What it is about.
    pub key: String,
    /// More of it; may be empty.
    pub value: String,
    /// What it does.
    pub effect: Effect,
}

/// What a workload puts up with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Toleration {
    /// Of which taints; none: of all.
    pub key: Option<String>,
    /// With which value; none: any.
    pub value: Option<String>,
    /// With which effect; none: any.
    pub effect: Option<Effect>,
}

impl Effect {
    fn as_str(self) -> &'static str {
        match self {
            Self::NoSchedule => "NoSchedule",
            Self::PreferNoSchedule => "PreferNoSchedule",
            Self::NoExecute => "NoExecute",
        }
    }
}

impl Toleration {
    /// Whether it is about that taint.
    pub fn tolerates(&self, taint: &Taint) -> bool {
        self.key.as_ref().is_none_or(|key| *key == taint.key)
            && self.value.as_ref().is_none_or(|value| *value == taint.value)
            && self.effect.is_none_or(|effect| effect == taint.effect)
    }
}

impl FromStr for Effect {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::NoSchedule, Self::PreferNoSchedule, Self::NoExecute];
        let found = all.into_iter().find(|effect| effect.as_str() == text);
        found.ok_or_else(|| format!("there is no effect {text:?}; one is NoSchedule, PreferNoSchedule or NoExecute"))
    }
}

/// As `kubectl taint` takes them: `key=value:Effect` or `key:Effect`.
impl FromStr for Taint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no taint; write \"key=value:NoSchedule\" or \"key:NoSchedule\"");
        let (pair, effect) = text.rsplit_once(':').ok_or_else(wrong)?;
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        check_key(key)?;
        check_value(value)?;
        Ok(Self { key: key.to_owned(), value: value.to_owned(), effect: effect.parse()? })
    }
}

/// `key=value:Effect`; without a value, an effect or both: any. `*` tolerates everything.
impl FromStr for Toleration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::default());
        }
        let (pair, effect) = text.rsplit_once(':').map_or((text, None), |(pair, effect)| (pair, Some(effect)));
        let (key, value) = pair.split_once('=').map_or((pair, None), |(key, value)| (key, Some(value)));
        check_key(key)?;
        check_value(value.unwrap_or_default())?;
        let effect = effect.map(str::parse).transpose()?;
        Ok(Self { key: Some(key.to_owned()), value: value.map(str::to_owned), effect })
    }
}

impl fmt::Display for Taint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, value, effect } = self;
        let equals = if value.is_empty() { "" } else { "=" };
        write!(f, "{key}{equals}{value}:{}", effect.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tolerates(toleration: &str, taint: &str) -> bool {
        toleration.parse::<Toleration>().unwrap().tolerates(&taint.parse().unwrap())
    }

    #[test]
    fn a_toleration_is_about_what_it_says_and_any_of_what_it_does_not() {
        for toleration in ["*", "spot", "spot=true", "spot:NoSchedule", "spot=true:NoSchedule"] {
            assert!(tolerates(toleration, "spot=true:NoSchedule"), "{toleration}");
        }
        for toleration in ["gpu", "spot=false", "spot:NoExecute", "spot=true:PreferNoSchedule", "spot=:NoSchedule"] {
            assert!(!tolerates(toleration, "spot=true:NoSchedule"), "{toleration}");
        }
    }

    #[test]
    fn taints_are_read_as_they_are_shown_and_what_is_none_is_said() {
        for taint in ["spot=true:NoSchedule", "example.com/gpu:PreferNoSchedule", "x:NoExecute"] {
            assert_eq!(taint.parse::<Taint>().unwrap().to_string(), taint);
        }
        for wrong in ["spot", "spot=true", "spot:Never", ":NoSchedule", "a b:NoSchedule"] {
            assert!(wrong.parse::<Taint>().is_err(), "{wrong}");
        }
        for wrong in ["", "spot:Never", "a b"] {
            assert!(wrong.parse::<Toleration>().is_err(), "{wrong}");
        }
    }
}
