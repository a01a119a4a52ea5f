//! Reading what callers send, within limits. What cannot be read is refused as a problem.

use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use podferry_common::identity::Peer;
use podferry_common::tls::PeerInfo;
use podferry_common::{Failure, FailureCode, chain};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::problem::Problem;
use crate::access::Action;
use crate::api::{Core, Current};

/// The longest body that is taken, in bytes: ten times what the largest sensible request needs.
const MAX_BODY_BYTES: usize = 16 << 10;

/// Who sent the request.
pub(super) struct Caller(Option<PeerInfo>);

impl Caller {
    /// The core and the caller, if the caller may do this: the rule is gRPC's.
    pub(super) async fn admit(&self, core: &Current, action: &Action<'_>) -> Result<(Core, Peer), Problem> {
        Ok(core.admit(self.0.as_ref(), action).await?)
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Ok(Self(parts.extensions.get().cloned()))
    }
}

/// The id in a request's path, not looked at yet.
pub(super) struct Id(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(id) = Path::from_request_parts(parts, state)
            .await
            .map_err(|rejection: PathRejection| senseless(format!("the path is wrong: {}", rejection.body_text())))?;
        Ok(Self(id))
    }
}

/// What a list is to have, from the request's query.
pub(super) struct Filter<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Filter<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(filter) = Query::from_request_parts(parts, state)
            .await
            .map_err(|rejection: QueryRejection| senseless(format!("the query is wrong: {}", rejection.body_text())))?;
        Ok(Self(filter))
    }
}

fn senseless(message: String) -> Problem {
    Failure::new(FailureCode::InvalidArgument, message).remedy("see /api/v1/openapi.json").into()
}

/// The JSON that a request holds.
pub(super) async fn json<T: DeserializeOwned>(request: Request, within: Duration) -> Result<T, Problem> {
    if !is_json(request.headers()) {
        let failure = Failure::new(FailureCode::InvalidArgument, "the body is not said to be JSON")
            .remedy("send it with `Content-Type: application/json`");
        return Err(Problem::with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE, failure));
    }
    let bytes = timeout(within, body(request.into_body())).await.map_err(|_| {
        let message = format!("the body did not arrive within {} s", within.as_secs_f64());
        Problem::with_status(StatusCode::REQUEST_TIMEOUT, Failure::new(FailureCode::DeadlineExceeded, message))
    })??;
    // serde would take an array for the fields in their order.
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Err(senseless("the body is no JSON object".to_owned()));
    }
    serde_json::from_slice(&bytes).map_err(|error| senseless(format!("the body is wrong: {error}")))
}

fn is_json(headers: &HeaderMap) -> bool {
    let named = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = named.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

async fn body(body: Body) -> Result<bytes::Bytes, Problem> {
    match Limited::new(body, MAX_BODY_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("the body has more than {MAX_BODY_BYTES} bytes");
            let failure = Failure::new(FailureCode::InvalidArgument, message);
            Err(Problem::with_status(StatusCode::PAYLOAD_TOO_LARGE, failure))
        }
        Err(error) => Err(senseless(format!("the body cannot be read: {}", chain(&*error)))),
    }
}
