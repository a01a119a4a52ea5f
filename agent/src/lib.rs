//! The podferry node agent.
