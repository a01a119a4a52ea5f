//! Whose memory a live migration could follow, for the choice of a strategy. Looks, and touches nobody.

use nix::unistd::Pid;
use podferry_common::failure::chain;
use podferry_memory::hazard;
use podferry_memory::tracker::{self, Preference};
use podferry_proto::v1::Tracking;
use podferry_runtime::Member;

/// Reasons that are told, and the longest of them in bytes.
const MOST_REASONS: usize = 4;
const LONGEST_REASON: usize = 512;

/// Whose memory can be followed in the way that this node's agent is told to. What only following itself would show, such as a
/// process that shares its memory with another, is not seen.
pub(super) fn look(members: &[Member], preference: Preference) -> Tracking {
    judge(members, tracker::of_kernel(preference), |member| match hazard::of(Pid::from_raw(member.pid)) {
        Ok(hazard) => hazard.map(|hazard| hazard.to_string()),
        // One that has ended has nothing to follow; one that cannot be looked at cannot be followed either.
        Err(error) if member.is_alive() => {
            Some(format!("process {} cannot be looked at: {}", member.pid, chain(&error)))
        }
        Err(_) => None,
    })
}

fn judge(members: &[Member], tracker: Option<&str>, mut hazard_of: impl FnMut(&Member) -> Option<String>) -> Tracking {
    let mut tracking = Tracking { tracker: tracker.unwrap_or_default().to_owned(), ..Tracking::default() };
    if tracker.is_none() {
        tracking.reasons.push("the node's kernel has no way to follow writes that its agent may use".to_owned());
    }
    for member in members {
        let hazard = hazard_of(member);
        let bytes =
            if tracker.is_none() || hazard.is_some() { &mut tracking.left_bytes } else { &mut tracking.followed_bytes };
        *bytes = bytes.saturating_add(member.memory_to_move());
        if tracking.reasons.len() < MOST_REASONS {
            tracking.reasons.extend(hazard.map(cut));
        }
    }
    tracking
}

/// Paths of a workload's files are in it, which may be long.
fn cut(mut text: String) -> String {
    const MARK: &str = "…";
    if text.len() > LONGEST_REASON {
        let limit = LONGEST_REASON - MARK.len();
        text.truncate((0..=limit).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0));
        text.push_str(MARK);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(count: usize) -> Vec<Member> {
        let pid = i32::try_from(std::process::id()).unwrap();
        vec![Member { pid, inner: pid, start_time: 0 }; count]
    }

    #[test]
    fn memory_of_whoever_has_a_hazard_is_left_and_the_rest_is_followed() {
        let mut hazards = vec![None, Some("process 7 uses io_uring".to_owned()), None].into_iter();
        let tracking = judge(&members(3), Some("userfaultfd"), |_| hazards.next().unwrap());
        assert!(tracking.left_bytes > 0 && tracking.followed_bytes > tracking.left_bytes, "{tracking:?}");
        assert_eq!((tracking.tracker.as_str(), tracking.reasons.len()), ("userfaultfd", 1));
    }

    #[test]
    fn where_the_kernel_follows_nothing_nobody_is_followed() {
        let tracking = judge(&members(2), None, |_| None);
        assert!(tracking.left_bytes > 0 && tracking.reasons[0].contains("kernel"), "{tracking:?}");
        assert_eq!((tracking.followed_bytes, tracking.tracker.as_str()), (0, ""));
    }

    #[test]
    fn reasons_have_an_end() {
        let tracking = judge(&members(9), Some("userfaultfd"), |_| Some("é".repeat(1000)));
        assert_eq!((tracking.reasons.len(), tracking.followed_bytes), (MOST_REASONS, 0));
        assert!(tracking.reasons.iter().all(|reason| reason.len() <= LONGEST_REASON && reason.ends_with("é…")));
    }
}
