//! Who is at the end of a connection: the one DNS name in its certificate.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::{CertificateDer, ServerName};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;

use crate::id::{InvalidId, NodeName, check_label};

/// The domain under which all of podferry's names lie. It is in no public DNS (`.internal` is reserved for such use).
pub const DOMAIN: &str = "podferry.internal";

const AGENT: &str = ".agent.podferry.internal";
const CLIENT: &str = ".client.podferry.internal";
const COORDINATOR: &str = "coordinator.podferry.internal";

/// Somebody who has a certificate of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Peer {
    /// The agent of that node: `<node>.agent.podferry.internal`.
    Agent(NodeName),
    /// The coordinator: `coordinator.podferry.internal`.
    Coordinator,
    /// A person or script that talks to the coordinator: `<user>.client.podferry.internal`. Made by [`Peer::client`].
    Client(String),
}

/// Why a name or certificate is no peer's.
#[derive(Debug, Error)]
pub enum InvalidPeer {
    /// Not one of the three kinds of name.
    #[error(
        "{name:?} names no peer; expected <node>{AGENT}, {COORDINATOR} or <user>{CLIENT}: issue the certificate with \
         podferry's CA"
    )]
    Name {
        /// The name found.
        name: String,
    },
    /// The node's or user's part of the name is not valid.
    #[error("the name {name:?} of a peer is not valid")]
    Label {
        /// The name found.
        name: String,
        /// What is wrong with it.
        source: InvalidId,
    },
    /// The certificate cannot be read.
    #[error("the certificate is no X.509 certificate: {reason}")]
    Certificate {
        /// What the parser says.
        reason: String,
    },
    /// A certificate must name exactly one peer, so that nobody is two.
    #[error("the certificate has {found} subject alternative names, it must have one DNS name: {names}")]
    NotOneName {
        /// How many names it has.
        found: usize,
        /// The names, as the parser shows them.
        names: String,
    },
}

impl Peer {
    /// A client of that name, which must be a DNS label like a node's.
    pub fn client(user: impl Into<String>) -> Result<Self, InvalidPeer> {
        let user = user.into();
        match check_label("user name", &user) {
            Ok(()) => Ok(Self::Client(user)),
            Err(source) => Err(InvalidPeer::Label { name: user, source }),
        }
    }

    /// The DNS name in this peer's certificate.
    pub fn dns_name(&self) -> String {
        match self {
            Self::Agent(node) => format!("{node}{AGENT}"),
            Self::Coordinator => COORDINATOR.to_owned(),
            Self::Client(user) => format!("{user}{CLIENT}"),
        }
    }

    /// The DNS name as rustls takes it.
    pub fn server_name(&self) -> Result<ServerName<'static>, InvalidPeer> {
        let name = self.dns_name();
        ServerName::try_from(name.clone()).map_err(|_| InvalidPeer::Name { name })
    }

    /// The peer that a certificate names. Says nothing of whether to trust the certificate.
    pub fn from_certificate(certificate: &CertificateDer<'_>) -> Result<Self, InvalidPeer> {
        let unreadable = |reason: String| InvalidPeer::Certificate { reason };
        let (_, parsed) = parse_x509_certificate(certificate).map_err(|error| unreadable(error.to_string()))?;
        let extension = parsed.subject_alternative_name().map_err(|error| unreadable(error.to_string()))?;
        let names = extension.map(|extension| extension.value.general_names.as_slice()).unwrap_or_default();
        match names {
            [GeneralName::DNSName(name)] => name.parse(),
            _ => Err(InvalidPeer::NotOneName { found: names.len(), names: format!("{names:?}") }),
        }
    }
}

impl FromStr for Peer {
    type Err = InvalidPeer;

    /// Reads the DNS name.
    fn from_str(name: &str) -> Result<Self, InvalidPeer> {
        let label = |source| InvalidPeer::Label { name: name.to_owned(), source };
        if name == COORDINATOR {
            return Ok(Self::Coordinator);
        }
        if let Some(node) = name.strip_suffix(AGENT) {
            return Ok(Self::Agent(node.parse().map_err(label)?));
        }
        if let Some(user) = name.strip_suffix(CLIENT) {
            check_label("user name", user).map_err(label)?;
            return Ok(Self::Client(user.to_owned()));
        }
        Err(InvalidPeer::Name { name: name.to_owned() })
    }
}

impl TryFrom<String> for Peer {
    type Error = InvalidPeer;

    fn try_from(name: String) -> Result<Self, InvalidPeer> {
        name.parse()
    }
}

impl From<Peer> for String {
    fn from(peer: Peer) -> Self {
        peer.dns_name()
    }
}

impl fmt::Display for Peer {
    /// For a person: `agent n1`, `coordinator`, `client alice`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(node) => write!(f, "agent {node}"),
            Self::Coordinator => f.write_str("coordinator"),
            Self::Client(user) => write!(f, "client {user}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let with_dots = Peer::Agent("ip-10-0-0-1.ec2.internal".parse().unwrap());
        let peers = [Peer::Agent("n1".parse().unwrap()), with_dots, Peer::Coordinator, Peer::client("alice").unwrap()];
        for peer in peers {
            assert_eq!(peer.dns_name().parse::<Peer>().unwrap(), peer);
            assert_eq!(serde_json::from_str::<Peer>(&serde_json::to_string(&peer).unwrap()).unwrap(), peer);
            peer.server_name().unwrap();
        }
    }

    #[test]
    fn other_names_are_refused() {
        let wrong = [
            "",
            "n1",
            "*.agent.podferry.internal",
            "a..b.agent.podferry.internal",
            ".agent.podferry.internal",
            "agent.podferry.internal",
            "x.coordinator.podferry.internal",
            "coordinator.podferry.internal.",
            "COORDINATOR.podferry.internal",
            "n1.agent.podferry.internal.evil.example",
        ];
        for name in wrong {
            assert!(name.parse::<Peer>().is_err(), "{name:?}");
        }
        assert!(Peer::client("a.b").is_err());
    }
}
