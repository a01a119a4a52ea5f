//! What failed, where, why and what to do: the one shape in which errors cross processes.
//!
//! Every crate has its own error enums. Where one leaves its process it becomes a [`Failure`], travels as a
//! [`tonic::Status`] with a `google.rpc.ErrorInfo` in its details, and is a [`Failure`] again on the other side.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The `domain` of podferry's `ErrorInfo`.
pub const DOMAIN: &str = "podferry.dev";

/// The longest text of one field in a [`Status`], in bytes. A status travels in HTTP/2 headers, which peers bound
/// (hyper: 16 KiB for all of them), and the message travels twice, percent-encoded and in the details.
pub const MAX_TEXT_BYTES: usize = 1024;

const NODE: &str = "node";
const PHASE: &str = "phase";
const CRIU_LINE: &str = "criu_line";
const REMEDY: &str = "remedy";

/// What kind of failure it is: decides the gRPC code and the CLI's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FailureCode {
    /// The request makes no sense, whatever the state of the world.
    InvalidArgument,
    /// No such workload, node or migration.
    NotFound,
    /// The world is not in the state that the request needs: repeating it helps only after that changed.
    FailedPrecondition,
    /// It is there already, for example a migration of the same workload.
    AlreadyExists,
    /// Memory, disk or a limit is used up.
    ResourceExhausted,
    /// The other side cannot be reached now; trying again may help.
    Unavailable,
    /// The certificate names somebody who may not do this.
    PermissionDenied,
    /// The time for it ran out.
    DeadlineExceeded,
    /// It was stopped in the middle and undone, by a cancel or because something else was faster.
    Aborted,
    /// Something that ought not to happen.
    Internal,
    /// What a workload needs is lost for good: trying again does not help.
    DataLoss,
    /// This side cannot do that: not built in, or of another protocol version.
    Unimplemented,
}

impl FailureCode {
    /// All codes.
    pub const ALL: [Self; 12] = [
        Self::InvalidArgument,
        Self::NotFound,
        Self::FailedPrecondition,
        Self::AlreadyExists,
        Self::ResourceExhausted,
        Self::Unavailable,
        Self::PermissionDenied,
        Self::DeadlineExceeded,
        Self::Aborted,
        Self::Internal,
        Self::DataLoss,
        Self::Unimplemented,
    ];

    /// The name on the wire, which is gRPC's own: `FAILED_PRECONDITION`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::NotFound => "NOT_FOUND",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::Unavailable => "UNAVAILABLE",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::Aborted => "ABORTED",
            Self::Internal => "INTERNAL",
            Self::DataLoss => "DATA_LOSS",
            Self::Unimplemented => "UNIMPLEMENTED",
        }
    }

    /// The code with that name on the wire.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.as_str() == name)
    }
}

impl fmt::Display for FailureCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl From<FailureCode> for Code {
    fn from(code: FailureCode) -> Self {
        match code {
            FailureCode::InvalidArgument => Self::InvalidArgument,
            FailureCode::NotFound => Self::NotFound,
            FailureCode::FailedPrecondition => Self::FailedPrecondition,
            FailureCode::AlreadyExists => Self::AlreadyExists,
            FailureCode::ResourceExhausted => Self::ResourceExhausted,
            FailureCode::Unavailable => Self::Unavailable,
            FailureCode::PermissionDenied => Self::PermissionDenied,
            FailureCode::DeadlineExceeded => Self::DeadlineExceeded,
            FailureCode::Aborted => Self::Aborted,
            FailureCode::Internal => Self::Internal,
            FailureCode::DataLoss => Self::DataLoss,
            FailureCode::Unimplemented => Self::Unimplemented,
        }
    }
}

impl From<Code> for FailureCode {
    /// gRPC has codes that podferry does not say itself, but libraries below it do: each goes to its nearest neighbour.
    fn from(code: Code) -> Self {
        match code {
            Code::InvalidArgument | Code::OutOfRange => Self::InvalidArgument,
            Code::NotFound => Self::NotFound,
            Code::FailedPrecondition => Self::FailedPrecondition,
            Code::AlreadyExists => Self::AlreadyExists,
            Code::ResourceExhausted => Self::ResourceExhausted,
            Code::Unavailable => Self::Unavailable,
            Code::PermissionDenied | Code::Unauthenticated => Self::PermissionDenied,
            Code::DeadlineExceeded => Self::DeadlineExceeded,
            Code::Aborted | Code::Cancelled => Self::Aborted,
            Code::Unimplemented => Self::Unimplemented,
            Code::DataLoss => Self::DataLoss,
            Code::Ok | Code::Unknown | Code::Internal => Self::Internal,
        }
    }
}

/// What failed, where, why, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The kind.
    pub code: FailureCode,
    /// The node where it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The phase of the migration in which it failed: `preflight`, `dump`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// What failed and why, for a person.
    pub message: String,
    /// The line of CRIU's log that says why, as CRIU wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu_line: Option<String>,
    /// What a person can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Failure {
    /// A failure of that kind. Say where and what to do with the methods that follow.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self { code, node: None, phase: None, message: message.into(), criu_line: None, remedy: None }
    }

    /// A failure whose message is that error with everything that caused it.
    pub fn from_error(code: FailureCode, error: &(dyn Error + 'static)) -> Self {
        Self::new(code, chain(error))
    }

    /// Says on which node it failed.
    #[must_use]
    pub fn on(mut self, node: impl Into<String>) -> Self {
        self.node = Some(node.into());
        self
    }

    /// Says in which phase it failed.
    #[must_use]
    pub fn in_phase(mut self, phase: impl Into<String>) -> Self {
        self.phase = Some(phase.into());
        self
    }

    /// Adds CRIU's own line.
    #[must_use]
    pub fn criu_line(mut self, line: impl Into<String>) -> Self {
        self.criu_line = Some(line.into());
        self
    }

    /// Says what a person can do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// The same with each text in at most [`MAX_TEXT_BYTES`], as failures leave a process.
    #[must_use]
    pub fn bounded(self) -> Self {
        Self {
            code: self.code,
            node: self.node.map(cut),
            phase: self.phase.map(cut),
            message: cut(self.message),
            criu_line: self.criu_line.map(cut),
            remedy: self.remedy.map(cut),
        }
    }

    /// As a gRPC status: the message is the status' message, everything else goes to an `ErrorInfo` whose reason is the
    /// code and whose metadata keys are `node`, `phase`, `criu_line` and `remedy`. Texts longer than [`MAX_TEXT_BYTES`]
    /// are cut.
    pub fn into_status(self) -> Status {
        let Self { code, node, phase, message, criu_line, remedy } = self.bounded();
        let fields = [(NODE, node), (PHASE, phase), (CRIU_LINE, criu_line), (REMEDY, remedy)].into_iter();
        let metadata: HashMap<String, String> =
            fields.filter_map(|(key, value)| value.map(|value| (key.to_owned(), value))).collect();
        let details = ErrorDetails::with_error_info(code.as_str(), DOMAIN, metadata);
        Status::with_error_details(code.into(), message, details)
    }

    /// What [`Failure::into_status`] made, again. From any other status (a library's, or a broken connection's) the code
    /// and the message with all its causes.
    pub fn from_status(status: &Status) -> Self {
        let ours = status.get_details_error_info().filter(|info| info.domain == DOMAIN);
        let Some(mut info) = ours else {
            let message = if status.message().is_empty() { status.code().description() } else { status.message() };
            let causes = status.source().map(chain).filter(|causes| !message.contains(causes.as_str()));
            let message = causes.map_or_else(|| message.to_owned(), |causes| format!("{message}: {causes}"));
            return Self::new(status.code().into(), message);
        };
        let mut take = |key| info.metadata.remove(key);
        Self {
            node: take(NODE),
            phase: take(PHASE),
            criu_line: take(CRIU_LINE),
            remedy: take(REMEDY),
            code: FailureCode::from_name(&info.reason).unwrap_or_else(|| status.code().into()),
            message: status.message().to_owned(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match (&self.node, &self.phase) {
            (Some(node), Some(phase)) => write!(f, " (on {node}, in {phase})")?,
            (Some(node), None) => write!(f, " (on {node})")?,
            (None, Some(phase)) => write!(f, " (in {phase})")?,
            (None, None) => {}
        }
        if let Some(line) = &self.criu_line {
            write!(f, "; CRIU: {line}")?;
        }
        if let Some(remedy) = &self.remedy {
            write!(f, "; what to do: {remedy}")?;
        }
        Ok(())
    }
}

impl Error for Failure {}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        failure.into_status()
    }
}

impl From<&Status> for Failure {
    fn from(status: &Status) -> Self {
        Self::from_status(status)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::from_status(&status)
    }
}

/// An error and everything that caused it, joined by `: `. A cause that the text already ends with is not said twice
/// (many libraries put their source into their own message).
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// `text`, cut to [`MAX_TEXT_BYTES`] at a character's border.
fn cut(mut text: String) -> String {
    const MARK: &str = "…";
    if text.len() > MAX_TEXT_BYTES {
        let limit = MAX_TEXT_BYTES - MARK.len();
        let border = (0..=limit).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(border);
        text.push_str(MARK);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use proptest::option;
    use proptest::prelude::*;
    use thiserror::Error;

    use super::*;

    fn any_failure() -> impl Strategy<Value = Failure> {
        let text = || option::of("\\PC{0,80}");
        let code = prop::sample::select(FailureCode::ALL.to_vec());
        (code, text(), text(), "\\PC{0,200}", text(), text()).prop_map(
            |(code, node, phase, message, criu_line, remedy)| Failure { code, node, phase, message, criu_line, remedy },
        )
    }

    proptest! {
        #[test]
        fn a_failure_survives_a_status(failure in any_failure()) {
            let status = failure.clone().into_status();
            prop_assert_eq!(status.code(), Code::from(failure.code));
            prop_assert_eq!(Failure::from_status(&status), failure);
        }

        #[test]
        fn a_failure_survives_http_headers(failure in any_failure()) {
            let response = failure.clone().into_status().into_http::<()>();
            let status = Status::from_header_map(response.headers()).unwrap();
            prop_assert_eq!(Failure::from_status(&status), failure);
        }

        #[test]
        fn a_failure_survives_json(failure in any_failure()) {
            let json = serde_json::to_string(&failure).unwrap();
            prop_assert_eq!(serde_json::from_str::<Failure>(&json).unwrap(), failure);
        }

        #[test]
        fn long_texts_fit_into_headers(text in "\\PC{900,3000}") {
            let failure = Failure::new(FailureCode::Internal, &text).on(&text).in_phase(&text).criu_line(&text).remedy(&text);
            let response = failure.into_status().into_http::<()>();
            let size: usize = response.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
            prop_assert!(size < 16 << 10, "{size} bytes of headers");
            let again = Failure::from_status(&Status::from_header_map(response.headers()).unwrap());
            let front = again.message.strip_suffix('…').unwrap_or(&again.message);
            prop_assert!(text.starts_with(front) && again.message.len() <= MAX_TEXT_BYTES);
        }
    }

    #[test]
    fn the_name_on_the_wire_is_the_name_in_json() {
        for code in FailureCode::ALL {
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("\"{code}\""));
            assert_eq!(FailureCode::from_name(code.as_str()), Some(code));
            assert_eq!(FailureCode::from(Code::from(code)), code);
        }
    }

    #[test]
    fn a_foreign_status_keeps_its_message() {
        let failure = Failure::from_status(&Status::unauthenticated("who are you"));
        assert_eq!(failure, Failure::new(FailureCode::PermissionDenied, "who are you"));
        assert_eq!(Failure::from_status(&Status::new(Code::NotFound, "")).message, Code::NotFound.description());
    }

    #[test]
    fn display_says_everything() {
        let failure = Failure::new(FailureCode::Internal, "the dump failed")
            .on("n1")
            .in_phase("dump")
            .criu_line("Error (criu/x.c:1): no")
            .remedy("close it");
        let text = "the dump failed (on n1, in dump); CRIU: Error (criu/x.c:1): no; what to do: close it";
        assert_eq!(failure.to_string(), text);
    }

    #[derive(Debug, Error)]
    enum Outer {
        #[error("cannot read it")]
        Plain(#[source] io::Error),
        #[error("cannot read it: {0}")]
        Repeating(#[source] io::Error),
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        for outer in [Outer::Plain(io::Error::other("disk")), Outer::Repeating(io::Error::other("disk"))] {
            assert_eq!(chain(&outer), "cannot read it: disk");
        }
    }
}
