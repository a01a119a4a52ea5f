//! Why a transfer fails, as its sender sees it.

use std::io;
use std::sync::Arc;

use podferry_common::tls::TlsError;
use podferry_common::{Failure, FailureCode, chain};
use thiserror::Error;

use crate::object::InvalidObject;

/// Why a transfer failed. Clones share the causes.
#[derive(Debug, Clone, Error)]
pub enum TransferError {
    /// No connection came to be.
    #[error("the target agent cannot be reached for the transfer")]
    Connect(#[source] Arc<TlsError>),
    /// The socket could not be set up.
    #[error("the transfer's socket cannot be set up")]
    Socket(#[source] Arc<io::Error>),
    /// The receiver says why it does not go on.
    #[error("the target agent refused or ended the transfer: {0}")]
    Refused(Box<Failure>),
    /// The connection ended in the middle, or the receiver did not answer any more.
    #[error(
        "the transfer's connection broke: {reason}; check the network between the nodes and whether the target runs"
    )]
    Broken {
        /// What was seen of it.
        reason: String,
    },
    /// The receiver says something that it must not.
    #[error("the target agent broke the transfer protocol: {reason}")]
    Protocol {
        /// What it said.
        reason: String,
    },
    /// The receiver did not answer the greeting in time.
    #[error("the target agent did not answer the transfer's first frame in {} s", crate::limits::GREETING_TIMEOUT.as_secs())]
    Timeout,
    /// The object cannot be sent.
    #[error(transparent)]
    InvalidObject(#[from] InvalidObject),
    /// Bytes that cannot be pages: not a multiple of 4096 long, none, at an odd address, or for an object of another sort.
    #[error("{length} bytes at {vaddr:#x} are no run of pages for {object}")]
    NoPages {
        /// The object.
        object: String,
        /// The address.
        vaddr: u64,
        /// How many bytes.
        length: usize,
    },
    /// More objects than a transfer may have.
    #[error("a transfer has at most {} objects", crate::limits::MAX_OBJECTS)]
    TooManyObjects,
    /// zstd failed, for lack of memory.
    #[error("memory cannot be packed with zstd")]
    Pack(#[source] Arc<io::Error>),
    /// This side gave up.
    #[error("the transfer was given up: {reason}")]
    Aborted {
        /// Why.
        reason: String,
    },
}

impl TransferError {
    pub(crate) fn broken(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::Broken { reason: chain(error) }
    }

    pub(crate) fn protocol(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::Protocol { reason: chain(error) }
    }
}

impl From<TransferError> for Failure {
    /// What the receiver said stays as it said it.
    fn from(error: TransferError) -> Self {
        let code = match error {
            TransferError::Refused(failure) => return *failure,
            TransferError::Connect(_) | TransferError::Broken { .. } | TransferError::Timeout => {
                FailureCode::Unavailable
            }
            TransferError::Aborted { .. } => FailureCode::Aborted,
            TransferError::TooManyObjects => FailureCode::ResourceExhausted,
            TransferError::InvalidObject(_) | TransferError::NoPages { .. } => FailureCode::InvalidArgument,
            TransferError::Socket(_) | TransferError::Protocol { .. } | TransferError::Pack(_) => FailureCode::Internal,
        };
        Self::from_error(code, &error)
    }
}
