//! The podferry command line.
