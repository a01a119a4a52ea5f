//! Driving CRIU: its RPC, its page stream, its images, its log.
