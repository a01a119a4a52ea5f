//! The podferry coordinator: one leader that takes migrations through their phases.
