//! The ids of evacuations, which cannot be taken for those of migrations.

use std::fmt;
use std::str::FromStr;

use podferry_common::MigrationId;
use podferry_proto::evacuation::ID_PREFIX;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The id of an evacuation: `evac-` and 32 hexadecimal digits. Ids sort by when they were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EvacuationId(MigrationId);

/// What is no id of an evacuation.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is no evacuation id; one is \"evac-\" and 32 hexadecimal digits, as `podferry evacuations` shows")]
pub struct InvalidEvacuationId {
    text: String,
}

/// Characters of a wrong id that are shown.
const MAX_SHOWN: usize = 63;

impl EvacuationId {
    /// A new id, different from every other, with the present time in its front.
    #[expect(clippy::new_without_default, reason = "a default that differs at each call would surprise")]
    pub fn new() -> Self {
        Self(MigrationId::new())
    }
}

impl FromStr for EvacuationId {
    type Err = InvalidEvacuationId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix(ID_PREFIX).and_then(|digits| digits.parse().ok());
        digits.map(Self).ok_or_else(|| InvalidEvacuationId { text: text.chars().take(MAX_SHOWN).collect() })
    }
}

impl TryFrom<String> for EvacuationId {
    type Error = InvalidEvacuationId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<EvacuationId> for String {
    fn from(id: EvacuationId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for EvacuationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{ID_PREFIX}{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_is_written_and_a_migrations_is_none() {
        let id = EvacuationId::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in ["", "evac-", &MigrationId::new().to_string(), "evac-xyz"] {
            assert!(wrong.parse::<EvacuationId>().unwrap_err().to_string().contains("podferry evacuations"), "{wrong}");
        }
    }
}
