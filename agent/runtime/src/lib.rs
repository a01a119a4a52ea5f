//! Finding, inspecting, freezing, restoring and deleting runc containers.
