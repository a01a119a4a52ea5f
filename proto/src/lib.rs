//! The podferry.v1 protocol: definitions, generated code and its specification.
