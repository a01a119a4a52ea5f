//! The signal by which a container is asked to end.

use std::collections::BTreeMap;
use std::str::FromStr as _;

use rustix::process::Signal;

/// Where runtimes note an image's `STOPSIGNAL` (OCI image specification, "Conversion to OCI Runtime Configuration").
pub const STOP_SIGNAL: &str = "org.opencontainers.image.stopSignal";

/// A container's configuration names a signal that podferry cannot send.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the annotation {STOP_SIGNAL} is {named:?}, which is no signal with a name (such as SIGQUIT or 3)")]
pub struct UnknownSignal {
    /// What stands there.
    pub named: String,
}

/// The number of the signal that asks a container with these annotations to end; SIGTERM unless they name another, with or without
/// `SIG`, or as a number. Real-time signals are not known.
///
/// # Errors
/// When what they name is no signal.
pub fn stop_signal(annotations: &BTreeMap<String, String>) -> Result<i32, UnknownSignal> {
    let Some(named) = annotations.get(STOP_SIGNAL).map(|named| named.trim()).filter(|named| !named.is_empty()) else {
        return Ok(Signal::TERM.as_raw());
    };
    let unknown = || UnknownSignal { named: named.chars().take(64).collect() };
    if let Ok(number) = named.parse() {
        return Signal::from_named_raw(number).map(Signal::as_raw).ok_or_else(unknown);
    }
    let upper = named.to_ascii_uppercase();
    let name = format!("SIG{}", upper.strip_prefix("SIG").unwrap_or(&upper));
    nix::sys::signal::Signal::from_str(&name).map(|signal| signal as i32).map_err(|_| unknown())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name_or_number_and_nothing_else_is_taken_for_one() {
        let of = |named: &str| stop_signal(&BTreeMap::from([(STOP_SIGNAL.to_owned(), named.to_owned())]));
        assert_eq!(stop_signal(&BTreeMap::new()), Ok(15));
        for (named, number) in [("SIGQUIT", 3), ("quit", 3), ("INT", 2), ("28", 28), ("SIGWINCH", 28), (" ", 15)] {
            assert_eq!(of(named), Ok(number), "{named}");
        }
        for wrong in ["SIGRTMIN+3", "0", "-9", "99", "SIGSIGTERM", "TERMINATE", "3.5"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
