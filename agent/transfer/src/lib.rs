//! The agent-to-agent stream: framing, compression, rate, both roles.
