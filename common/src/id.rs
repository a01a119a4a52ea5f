//! The names of nodes, workloads and migrations, valid by construction.
//!
//! Node names become parts of DNS names in certificates and of file names. So they are DNS names (RFC 1123): labels of 1 to 63 bytes of
//! `a-z`, `0-9` and `-`, neither beginning nor ending with `-`, with dots between them, as Kubernetes has them. A workload is named by
//! one such label or, if it is a pod, by `namespace/name`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::{Uuid, Version};

/// The longest label of a name, in bytes: the limit of DNS.
pub const MAX_LABEL_BYTES: usize = 63;
/// The longest name of a node, in bytes: with `.agent.podferry.internal` behind it, it is a name in DNS, which has 253 bytes at most.
pub const MAX_NAME_BYTES: usize = 227;
/// The longest name of a pod without its namespace, in bytes. Unlike DNS, Kubernetes bounds no part of it.
const MAX_POD_BYTES: usize = 253;
/// The longest name of a workload, in bytes.
pub const MAX_WORKLOAD_BYTES: usize = MAX_LABEL_BYTES + 1 + MAX_POD_BYTES;

/// Why a text is no name of a node or workload, or no id of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum InvalidId {
    /// The text is empty.
    #[error("{kind} is empty; it takes characters of a-z, 0-9 and '-'")]
    Empty {
        /// What the text was meant to name.
        kind: &'static str,
    },
    /// The text is too long.
    #[error("{kind} is {length} bytes long; at most {most} are allowed")]
    TooLong {
        /// What the text was meant to name.
        kind: &'static str,
        /// The text's length in bytes.
        length: usize,
        /// The longest that may be.
        most: usize,
    },
    /// A character that a DNS label cannot have.
    #[error("{kind} {text:?} has {character:?}; only a-z, 0-9 and '-' are allowed")]
    Character {
        /// What the text was meant to name.
        kind: &'static str,
        /// The text.
        text: String,
        /// The first character that is not allowed.
        character: char,
    },
    /// A hyphen at the beginning or end.
    #[error("{kind} {text:?} begins or ends with '-'; begin and end it with a letter or digit")]
    Hyphen {
        /// What the text was meant to name.
        kind: &'static str,
        /// The text.
        text: String,
    },
    /// Not a migration's id.
    #[error("{text:?} is no migration id; one has 32 hexadecimal digits, as `podferry migrations` shows")]
    Migration {
        /// The text, cut after [`MAX_LABEL_BYTES`] characters.
        text: String,
    },
}

/// Checks that `text` is a DNS label; `kind` is what an error calls it.
pub fn check_label(kind: &'static str, text: &str) -> Result<(), InvalidId> {
    if text.is_empty() {
        return Err(InvalidId::Empty { kind });
    }
    if text.len() > MAX_LABEL_BYTES {
        return Err(InvalidId::TooLong { kind, length: text.len(), most: MAX_LABEL_BYTES });
    }
    check_part(kind, text)
}

/// Checks a label but for its length.
fn check_part(kind: &'static str, text: &str) -> Result<(), InvalidId> {
    if text.is_empty() {
        return Err(InvalidId::Empty { kind });
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if let Some(character) = text.chars().find(|&c| !allowed(c)) {
        return Err(InvalidId::Character { kind, text: text.to_owned(), character });
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err(InvalidId::Hyphen { kind, text: text.to_owned() });
    }
    Ok(())
}

/// Checks that `text` is a DNS name: labels with dots between them.
fn check_node(kind: &'static str, text: &str) -> Result<(), InvalidId> {
    if text.len() > MAX_NAME_BYTES {
        return Err(InvalidId::TooLong { kind, length: text.len(), most: MAX_NAME_BYTES });
    }
    text.split('.').try_for_each(|label| check_label(kind, label))
}

/// Checks that `text` names a workload: a DNS label, or a pod as `namespace/name`.
fn check_workload(kind: &'static str, text: &str) -> Result<(), InvalidId> {
    match text.split_once('/') {
        None => check_label(kind, text),
        Some((namespace, pod)) => {
            check_label(kind, namespace)?;
            if pod.len() > MAX_POD_BYTES {
                return Err(InvalidId::TooLong { kind, length: pod.len(), most: MAX_POD_BYTES });
            }
            pod.split('.').try_for_each(|part| check_part(kind, part))
        }
    }
}

/// A name type: a checked string with the conversions that names need.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $check:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                $check($kind, &text)?;
                Ok(Self(text))
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                $check($kind, text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(
    /// The name of a node: a DNS name.
    NodeName,
    "node name",
    check_node
);
name!(
    /// The name of a workload: a DNS label, or a pod's `namespace/name`.
    WorkloadName,
    "workload name",
    check_workload
);

/// The id of a migration: a version 7 UUID written as 32 lowercase hexadecimal digits. Ids sort by when they were made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId(Uuid);

impl MigrationId {
    /// A new id, different from every other, with the present time in its front.
    #[expect(clippy::new_without_default, reason = "a default that differs at each call would surprise")]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl FromStr for MigrationId {
    type Err = InvalidId;

    /// Takes the 32 digits only, so that one migration has one spelling (it is a key in stores and file names).
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId::Migration { text: text.chars().take(MAX_LABEL_BYTES).collect() };
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !digits {
            return Err(invalid());
        }
        let id = Uuid::try_parse(text).map_err(|_| invalid())?;
        if id.get_version() == Some(Version::SortRand) { Ok(Self(id)) } else { Err(invalid()) }
    }
}

impl TryFrom<String> for MigrationId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<MigrationId> for String {
    fn from(id: MigrationId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0.simple().encode_lower(&mut Uuid::encode_buffer()))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MigrationId({self})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_label_is_a_name(text in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?") {
            let node: NodeName = text.parse().unwrap();
            prop_assert_eq!(node.as_str(), text.as_str());
            prop_assert_eq!(serde_json::to_string(&node).unwrap(), format!("\"{text}\""));
            let workload: WorkloadName = serde_json::from_str(&format!("\"{text}\"")).unwrap();
            prop_assert_eq!(workload.to_string(), text);
        }

        #[test]
        fn a_name_is_safe_in_paths_and_dns(text in any::<String>()) {
            if let Ok(name) = NodeName::try_from(text.clone()) {
                prop_assert_eq!(name.as_str(), text.as_str());
                prop_assert!(!text.is_empty() && text.len() <= MAX_NAME_BYTES);
                prop_assert!(!text.contains(['/', '\0', '*', ' ']) && !text.contains("..") && !text.starts_with('.'));
            }
        }

        #[test]
        fn one_foreign_character_spoils_a_name(front in "[a-z]{1,10}", wrong in "[^a-z0-9/-]", back in "[a-z]{1,10}") {
            let refused = format!("{front}{wrong}{back}").parse::<WorkloadName>();
            prop_assert!(matches!(refused, Err(InvalidId::Character { .. })), "{refused:?}");
        }

        #[test]
        fn a_migration_id_has_one_spelling(text in any::<String>()) {
            if let Ok(id) = text.parse::<MigrationId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }

    #[test]
    fn edges_of_names() {
        assert!("a".repeat(63).parse::<NodeName>().is_ok());
        let too_long = Err(InvalidId::TooLong { kind: "node name", length: 64, most: 63 });
        assert_eq!("a".repeat(64).parse::<NodeName>(), too_long);
        let too_long = Err(InvalidId::TooLong { kind: "node name", length: 228, most: 227 });
        assert_eq!(("a.".repeat(113) + "aa").parse::<NodeName>(), too_long);
        assert!("ip-10-0-0-1.eu-central-1.compute.internal".parse::<NodeName>().is_ok());
        for pod in ["shop/redis-0", "kube-system/etcd-ip-10-0-0-1.ec2.internal"] {
            assert_eq!(pod.parse::<WorkloadName>().unwrap().as_str(), pod);
        }
        for wrong in ["/", "a/", "/a", "a/b/c", "a.b/c", "../a", "a/..", "a/b."] {
            assert!(wrong.parse::<WorkloadName>().is_err(), "{wrong}");
        }
        assert_eq!("".parse::<NodeName>(), Err(InvalidId::Empty { kind: "node name" }));
        for hyphen in ["-a", "a-", "-"] {
            assert!(matches!(hyphen.parse::<NodeName>(), Err(InvalidId::Hyphen { .. })), "{hyphen}");
        }
        assert!(serde_json::from_str::<NodeName>("\"../etc\"").is_err());
    }

    #[test]
    fn a_pod_is_named_by_namespace_and_name() {
        for name in ["shop/cart-0", "default/web-7c5.2", &format!("a/{}", "b".repeat(253))] {
            assert_eq!(name.parse::<WorkloadName>().unwrap().as_str(), name);
        }
        for wrong in
            ["/cart", "shop/", "a/b/c", "a/../b", "a/.", "A/b", "a/b..c", "a.b/c", &format!("a/{}", "b".repeat(254))]
        {
            assert!(wrong.parse::<WorkloadName>().is_err(), "{wrong}");
        }
        assert!("shop/cart".parse::<NodeName>().is_err());
    }

    #[test]
    fn migration_ids_are_distinct_sorted_and_round_trip() {
        let ids: Vec<MigrationId> = (0..2000).map(|_| MigrationId::new()).collect();
        assert!(ids.is_sorted_by(|a, b| a < b && a.to_string() < b.to_string()));
        for id in ids {
            let text = id.to_string();
            assert_eq!(text.len(), 32);
            assert_eq!(text.parse::<MigrationId>().unwrap(), id);
            assert_eq!(serde_json::from_str::<MigrationId>(&serde_json::to_string(&id).unwrap()).unwrap(), id);
            assert!(text.to_uppercase() == text || text.to_uppercase().parse::<MigrationId>().is_err());
        }
        assert!(Uuid::nil().simple().to_string().parse::<MigrationId>().is_err(), "not version 7");
    }
}
