//! Pieces of schemas that no type of Rust says.

use schemars::{Schema, SchemaGenerator, json_schema};

/// An object that the API server keeps as it is.
pub(crate) fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}

/// A rule in CEL that these fields of `spec` stay as they are; also one that is not there. (Comparing CEL's optional values is shorter, and the API
/// server thinks it too dear.)
pub(crate) fn unchanged(fields: &[&str]) -> String {
    let stays = |field: &&str| {
        format!(
            "has(self.spec.{field}) == has(oldSelf.spec.{field}) && (!has(self.spec.{field}) || self.spec.{field} == oldSelf.spec.{field})"
        )
    };
    fields.iter().map(stays).collect::<Vec<_>>().join(" && ")
}
