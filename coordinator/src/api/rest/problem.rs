//! Refusals as RFC 9457 has them: a failure with everything that gRPC's status would carry.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use podferry_common::{Failure, FailureCode};
use serde::Serialize;
use utoipa::ToSchema;

/// The media type of a problem.
pub(super) const PROBLEM_JSON: &str = "application/problem+json";

/// What went wrong with a request (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Problem {
    /// Always `about:blank`: `code` says what kind of problem it is.
    #[serde(rename = "type")]
    uri: &'static str,
    /// The HTTP status in words.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// What failed and why, for a person.
    detail: String,
    /// gRPC's name of the failure, such as `FAILED_PRECONDITION`.
    code: &'static str,
    /// The node where it failed, if it was on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    /// The phase in which it failed, if it was in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<String>,
    /// The line of CRIU's log that says why, if CRIU had a part in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    criu_line: Option<String>,
    /// What a person can do about it, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Problem {
    /// A failure under another HTTP status than its code has.
    pub(super) fn with_status(status: StatusCode, failure: Failure) -> Self {
        let Failure { code, node, phase, message, criu_line, remedy } = failure.bounded();
        Self {
            uri: "about:blank",
            title: status.canonical_reason().unwrap_or_default(),
            status: status.as_u16(),
            detail: message,
            code: code.as_str(),
            node,
            phase,
            criu_line,
            remedy,
        }
    }
}

/// The HTTP status that fits best. What is in the way of a request is a conflict; what may be gone at the next try without anybody's
/// doing is temporary.
fn status(code: FailureCode) -> StatusCode {
    match code {
        FailureCode::InvalidArgument => StatusCode::BAD_REQUEST,
        FailureCode::NotFound => StatusCode::NOT_FOUND,
        FailureCode::FailedPrecondition | FailureCode::AlreadyExists | FailureCode::Aborted => StatusCode::CONFLICT,
        FailureCode::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        FailureCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        FailureCode::PermissionDenied => StatusCode::FORBIDDEN,
        FailureCode::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        FailureCode::Internal | FailureCode::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
        FailureCode::Unimplemented => StatusCode::NOT_IMPLEMENTED,
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        Self::with_status(status(failure.code), failure)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_string(&self).unwrap_or_default();
        (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_its_status() {
        let said: Vec<_> = FailureCode::ALL.map(|code| format!("{code} {}", status(code))).into();
        insta::assert_snapshot!(said.join("\n"), @r"
        INVALID_ARGUMENT 400 Bad Request
        NOT_FOUND 404 Not Found
        FAILED_PRECONDITION 409 Conflict
        ALREADY_EXISTS 409 Conflict
        RESOURCE_EXHAUSTED 429 Too Many Requests
        UNAVAILABLE 503 Service Unavailable
        PERMISSION_DENIED 403 Forbidden
        DEADLINE_EXCEEDED 504 Gateway Timeout
        ABORTED 409 Conflict
        INTERNAL 500 Internal Server Error
        DATA_LOSS 500 Internal Server Error
        UNIMPLEMENTED 501 Not Implemented
        ");
    }

    #[test]
    fn a_problem_says_all_that_the_failure_does_and_long_texts_are_cut() {
        let failure = Failure::new(FailureCode::FailedPrecondition, "it cannot be dumped")
            .on("n1")
            .in_phase("preflight")
            .criu_line("Error: x")
            .remedy("close it");
        let problem = serde_json::to_string_pretty(&Problem::from(failure)).unwrap();
        insta::assert_snapshot!(problem, @r#"
        {
          "type": "about:blank",
          "title": "Conflict",
          "status": 409,
          "detail": "it cannot be dumped",
          "code": "FAILED_PRECONDITION",
          "node": "n1",
          "phase": "preflight",
          "criu_line": "Error: x",
          "remedy": "close it"
        }
        "#);
        let long = Problem::from(Failure::new(FailureCode::NotFound, "x".repeat(100_000)));
        assert!(serde_json::to_string(&long).unwrap().len() < 2048);
        let short = serde_json::to_value(Problem::from(Failure::new(FailureCode::NotFound, "no"))).unwrap();
        assert!(short.get("remedy").is_none(), "{short}");
    }
}
