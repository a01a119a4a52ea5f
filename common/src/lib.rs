//! What agent, coordinator and CLI share: ids, TLS identity, errors' common ground, telemetry.
