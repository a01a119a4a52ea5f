use std::io;
use std::path::PathBuf;

use crate::CriuFailure;

/// Why something with CRIU did not work.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// The program could not be started.
    #[error("cannot start CRIU at {}: is it there and executable? `deploy/setup/setup.sh` makes one", path.display())]
    Start {
        /// What was to be started.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The RPC conversation broke.
    #[error("the conversation with CRIU broke while {doing}")]
    Conversation {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// CRIU went away without an answer. Its tasks may be without a keeper: look whether they run.
    #[error("CRIU ended before it answered ({status})")]
    Gone {
        /// How it ended.
        status: String,
    },
    /// CRIU sent something that is no answer.
    #[error("CRIU sent a message that cannot be read")]
    Message(#[from] protobuf::Error),
    /// The dump was given up because a notification's handler said so; the tasks run on.
    #[error("the dump was given up on request; the tasks run on")]
    GivenUp,
    /// CRIU said no.
    #[error("CRIU could not dump: {failure}")]
    Dump {
        /// Its own words, from the log.
        failure: CriuFailure,
        /// The errno in its answer, 0 when it gave none.
        errno: i32,
    },
    /// The page stream was not what CRIU's page-server protocol says.
    #[error("CRIU's page stream is broken: {0}")]
    PageStream(String),
    /// Reading the page stream failed.
    #[error("cannot read CRIU's page stream")]
    PageStreamIo(#[source] io::Error),
    /// Whoever was to take the pages could not.
    #[error("the pages could not be passed on")]
    Sink(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An image could not be written.
    #[error("cannot write the image {}", path.display())]
    Image {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// An image could not be read.
    #[error("cannot read the image {}", path.display())]
    ReadImage {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is not the image that its name says.
    #[error("{} is no image of this CRIU's", path.display())]
    NoImage {
        /// Which one.
        path: PathBuf,
    },
    /// Pages arrived in an order that no image can hold.
    #[error("pages at {address:#x} arrived after those up to {end:#x}: the sender is broken")]
    PageOrder {
        /// The address that arrived.
        address: u64,
        /// Where the run before it ended.
        end: u64,
    },
    /// `criu --version` or `criu check` could not be understood.
    #[error("CRIU at {} said something that cannot be understood: {said}", path.display())]
    Probe {
        /// Which CRIU.
        path: PathBuf,
        /// Its words.
        said: String,
    },
}
