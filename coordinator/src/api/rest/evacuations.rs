//! The handlers about evacuations.

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::StreamExt as _;
use podferry_common::Failure;
use podferry_proto::json::Evacuation;
use podferry_proto::v1;

use super::problem::{PROBLEM_JSON, Problem};
use super::request::{Caller, Filter, Id, json};
use super::routes::{Front, LAST_EVENT, LAST_EVENT_ID};
use super::types::{EvacuateRequest, EvacuationFilter, Evacuations};
use crate::access::{Action, Verb};
use crate::api::states::evacuation_states;
use crate::evacuation;

fn shown(evacuation: &evacuation::Evacuation) -> Evacuation {
    Evacuation::from(&evacuation.to_wire())
}

/// Evacuations, newest first.
///
/// Those that have not ended, and the last 100 that have, without their workloads.
#[utoipa::path(
    get,
    path = "/api/v1/evacuations",
    params(EvacuationFilter),
    responses(
        (status = 200, body = Evacuations, description = "all of them, or those that are asked for"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
pub(super) async fn evacuations(
    State(front): State<Front>,
    caller: Caller,
    Filter(filter): Filter<EvacuationFilter>,
) -> Result<Json<Evacuations>, Problem> {
    let (core, _) = caller.admit(&front.core, &Action::new(Verb::ListEvacuations)).await?;
    let all = core.evacuations(&filter.node, filter.active).await?;
    Ok(Json(all.as_slice().into()))
}

/// Asks for a node to be emptied.
///
/// It is recorded when the answer comes, and goes on by itself.
#[utoipa::path(
    post,
    path = "/api/v1/evacuations",
    request_body = EvacuateRequest,
    responses(
        (status = 201, body = Evacuation, description = "accepted", headers(("location" = String, description = "its path"))),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal; nothing was recorded"),
    )
)]
pub(super) async fn evacuate(
    State(front): State<Front>,
    caller: Caller,
    request: Request,
) -> Result<Response, Problem> {
    let wanted: v1::EvacuateRequest = json::<EvacuateRequest>(request, front.limits.body).await?.into();
    let (core, peer) = caller.admit(&front.core, &Action::evacuate(&wanted.node)).await?;
    let evacuation = core.evacuate(&wanted, &peer).await?;
    let location = format!("/api/v1/evacuations/{}", evacuation.id);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(shown(&evacuation))).into_response())
}

/// An evacuation, with what became of each workload.
#[utoipa::path(
    get,
    path = "/api/v1/evacuations/{id}",
    params(("id" = String, Path, description = "the evacuation's id")),
    responses(
        (status = 200, body = Evacuation, description = "as it is now"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
pub(super) async fn evacuation(
    State(front): State<Front>,
    caller: Caller,
    Id(id): Id,
) -> Result<Json<Evacuation>, Problem> {
    let (core, _) = caller.admit(&front.core, &Action::on_migration(Verb::GetEvacuation, &id)).await?;
    Ok(Json(shown(&core.evacuation(&id).await?)))
}

/// Stops an evacuation.
///
/// Nothing more is begun, and what it has begun and is not committed is undone. The answer comes when that is recorded.
#[utoipa::path(
    post,
    path = "/api/v1/evacuations/{id}/cancel",
    params(("id" = String, Path, description = "the evacuation's id")),
    responses(
        (status = 202, body = Evacuation, description = "it is being stopped"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
pub(super) async fn cancel_evacuation(
    State(front): State<Front>,
    caller: Caller,
    Id(id): Id,
) -> Result<Response, Problem> {
    let action = Action::on_migration(Verb::CancelEvacuation, &id);
    let (core, peer) = caller.admit(&front.core, &action).await?;
    let evacuation = core.cancel_evacuation(&id, &peer).await?;
    Ok((StatusCode::ACCEPTED, Json(shown(&evacuation))).into_response())
}

/// An evacuation as it changes, as server-sent events.
///
/// As for a migration; the events are called `evacuation`.
#[utoipa::path(
    get,
    path = "/api/v1/evacuations/{id}/watch",
    params(
        ("id" = String, Path, description = "the evacuation's id"),
        ("last-event-id" = Option<String>, Header, description = "the id of the last event that was seen"),
    ),
    responses(
        (status = 200, body = Evacuation, content_type = "text/event-stream", description = "the data of each event `evacuation`"),
        (status = 204, description = "the end was seen already"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
pub(super) async fn watch_evacuation(
    State(front): State<Front>,
    caller: Caller,
    Id(id): Id,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (core, _) = caller.admit(&front.core, &Action::on_migration(Verb::WatchEvacuation, &id)).await?;
    let states = evacuation_states(&core, &id, front.stop.clone()).await?;
    if headers.get(LAST_EVENT_ID).is_some_and(|seen| seen == LAST_EVENT) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let heartbeat = KeepAlive::new().interval(front.limits.heartbeat);
    Ok(Sse::new(states.map(event)).keep_alive(heartbeat).into_response())
}

fn event(state: Result<evacuation::Evacuation, Failure>) -> Result<Event, axum::Error> {
    match state {
        Ok(evacuation) => {
            let event = Event::default().event("evacuation").json_data(shown(&evacuation))?;
            Ok(if evacuation.has_ended() { event.id(LAST_EVENT) } else { event })
        }
        Err(failure) => Event::default().event("problem").json_data(Problem::from(failure)),
    }
}
