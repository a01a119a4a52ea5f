use crate::v1::ProtocolVersion;

/// The versions of `podferry.v1` that one side speaks: the newest and the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The newest it speaks.
    pub current: u32,
    /// The oldest it still speaks.
    pub oldest: u32,
}

impl Version {
    /// What this build speaks. Version 2 added pre-copy: memory that is sent while its process runs.
    pub const OURS: Self = Self { current: 2, oldest: 1 };
    /// The version from which on memory can be sent before the freeze.
    pub const PRE_COPY: u32 = 2;

    /// The newest version that both sides speak.
    ///
    /// # Errors
    /// When the ranges do not meet, or the peer sent none or an empty one.
    pub fn agree(self, peer: Option<&ProtocolVersion>) -> Result<u32, VersionMismatch> {
        let theirs = peer.map_or(Self { current: 0, oldest: 0 }, |peer| Self::from(*peer));
        let newest = self.current.min(theirs.current);
        let meets = theirs.oldest >= 1 && theirs.oldest <= theirs.current;
        if meets && newest >= self.oldest.max(theirs.oldest) {
            Ok(newest)
        } else {
            Err(VersionMismatch { ours: self, theirs })
        }
    }
}

impl From<ProtocolVersion> for Version {
    fn from(message: ProtocolVersion) -> Self {
        Self { current: message.current, oldest: message.oldest }
    }
}

impl From<Version> for ProtocolVersion {
    fn from(version: Version) -> Self {
        Self { current: version.current, oldest: version.oldest }
    }
}

/// Two sides have no version of the protocol in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionMismatch {
    /// What this side speaks.
    pub ours: Version,
    /// What the other side said it speaks.
    pub theirs: Version,
}

impl std::fmt::Display for VersionMismatch {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ours, theirs } = self;
        write!(
            out,
            "no common protocol version: this side speaks {} to {}, the other {} to {}; update the older one",
            ours.oldest, ours.current, theirs.oldest, theirs.current
        )
    }
}

impl std::error::Error for VersionMismatch {}

#[cfg(test)]
mod tests {
    use super::*;

    const NEWER: Version = Version { current: 5, oldest: 4 };

    fn said(current: u32, oldest: u32) -> ProtocolVersion {
        ProtocolVersion { current, oldest }
    }

    #[test]
    fn the_previous_version_is_spoken() {
        assert_eq!(NEWER.agree(Some(&said(4, 3))), Ok(4));
        assert_eq!(NEWER.agree(Some(&said(6, 5))), Ok(5));
    }

    #[test]
    fn anything_older_newer_or_malformed_is_refused() {
        for peer in [said(3, 2), said(7, 6), said(0, 0), said(4, 5), said(5, 0)] {
            assert!(NEWER.agree(Some(&peer)).is_err(), "{peer:?}");
        }
        assert!(NEWER.agree(None).is_err());
    }
}
