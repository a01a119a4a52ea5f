//! The transfer service: what a source agent says to a target agent.
