//! One handler for each question. The `OpenAPI` document is made from them.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, middleware};
use futures::StreamExt as _;
use podferry_common::{Failure, FailureCode};
use podferry_proto::json::Connections;
use podferry_proto::v1;
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa::openapi::security::{SecurityRequirement, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::problem::{PROBLEM_JSON, Problem};
use super::request::{Caller, Filter, Id, json};
use super::types::{
    ConnectionFilter, MigrateRequest, MigrationDetails, MigrationFilter, Migrations, Nodes, Version, WorkloadFilter,
    Workloads,
};
use super::{Limits, browser, evacuations, page};
use crate::access::{Action, Verb};
use crate::api::Current;
use crate::api::states::states;
use crate::store::Record;

/// The id of the event that a watch ends with: who comes back with it has seen everything.
pub(super) const LAST_EVENT: &str = "end";
pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// What all handlers share.
#[derive(Clone)]
pub(super) struct Front {
    pub(super) core: Current,
    pub(super) limits: Limits,
    pub(super) stop: CancellationToken,
    document: Arc<str>,
}

impl Front {
    /// The front of that core. Watches end when `stop` is cancelled.
    pub(super) fn new(core: Current, limits: Limits, stop: CancellationToken) -> Self {
        Self { core, limits, stop, document: document().into() }
    }

    /// Everything that can be asked, by path.
    pub(super) fn router(self) -> Router {
        let (router, _document) = api().split_for_parts();
        router
            .merge(page::files())
            .fallback(unknown_path)
            .method_not_allowed_fallback(unknown_method)
            .layer(middleware::from_fn(browser::guard))
            .with_state(self)
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "podferry",
        description = "What a podferry coordinator can be asked: the same as its gRPC service, with the same identities. Sizes are \
                       bytes, times milliseconds. Every refusal is a problem (RFC 9457) with gRPC's code in it.",
        version = "1",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "/"))
)]
struct Description;

fn api() -> OpenApiRouter<Front> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(version))
        .routes(routes!(openapi))
        .routes(routes!(nodes))
        .routes(routes!(workloads))
        .routes(routes!(connections))
        .routes(routes!(migrations, migrate))
        .routes(routes!(migration))
        .routes(routes!(cancel))
        .routes(routes!(watch))
        .routes(routes!(evacuations::evacuations, evacuations::evacuate))
        .routes(routes!(evacuations::evacuation))
        .routes(routes!(evacuations::cancel_evacuation))
        .routes(routes!(evacuations::watch_evacuation))
}

/// The `OpenAPI` document, as JSON.
fn document() -> String {
    let mut document = api().into_openapi();
    let certificate = SecurityScheme::MutualTls {
        description: Some("A certificate for `<user>.client.podferry.internal` of the cluster's authority.".to_owned()),
        deprecated: None,
        extensions: None,
    };
    document.components.get_or_insert_default().add_security_scheme("certificate", certificate);
    document.security = Some(vec![SecurityRequirement::new("certificate", Vec::<String>::new())]);
    document.to_pretty_json().unwrap_or_default()
}

/// Who answers.
#[utoipa::path(
    get,
    path = "/api/v1/version",
    responses(
        (status = 200, body = Version, description = "the coordinator"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
async fn version(State(front): State<Front>, caller: Caller) -> Result<Json<Version>, Problem> {
    caller.admit(&front.core, &Action::new(Verb::Hello)).await?;
    Ok(Json(Version { coordinator_version: env!("CARGO_PKG_VERSION") }))
}

/// This document.
#[utoipa::path(
    get,
    path = "/api/v1/openapi.json",
    responses(
        (status = 200, body = serde_json::Value, description = "an OpenAPI document"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
async fn openapi(State(front): State<Front>, caller: Caller) -> Result<Response, Problem> {
    caller.admit(&front.core, &Action::new(Verb::Hello)).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], front.document.to_string()).into_response())
}

/// All nodes, and what their agents say now.
#[utoipa::path(
    get,
    path = "/api/v1/nodes",
    responses(
        (status = 200, body = Nodes, description = "all of them, also those that do not answer"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
async fn nodes(State(front): State<Front>, caller: Caller) -> Result<Json<Nodes>, Problem> {
    let (core, _) = caller.admit(&front.core, &Action::new(Verb::ListNodes)).await?;
    Ok(Json(core.nodes().await.into()))
}

/// Workloads, and where they are now.
#[utoipa::path(
    get,
    path = "/api/v1/workloads",
    params(WorkloadFilter),
    responses(
        (status = 200, body = Workloads, description = "all of them, or those of one node"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
async fn workloads(
    State(front): State<Front>,
    caller: Caller,
    Filter(filter): Filter<WorkloadFilter>,
) -> Result<Json<Workloads>, Problem> {
    let (core, _) = caller.admit(&front.core, &Action::new(Verb::ListWorkloads)).await?;
    Ok(Json(core.workloads(&filter.node).await?.into()))
}

/// Connections that have outlived the move of their pod.
///
/// They go to the address that it had before, and need the node that it came from.
#[utoipa::path(
    get,
    path = "/api/v1/connections",
    params(ConnectionFilter),
    responses(
        (status = 200, body = Connections, description = "all of them that agents which answer know, or those that are asked for"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
async fn connections(
    State(front): State<Front>,
    caller: Caller,
    Filter(filter): Filter<ConnectionFilter>,
) -> Result<Json<Connections>, Problem> {
    let (core, _) = caller.admit(&front.core, &Action::new(Verb::ListConnections)).await?;
    Ok(Json((&core.connections(&filter.workload, &filter.node).await?).into()))
}

/// Migrations, newest first.
///
/// Those that have not ended, and the last 1000 that have. Long texts in them are cut.
#[utoipa::path(
    get,
    path = "/api/v1/migrations",
    params(MigrationFilter),
    responses(
        (status = 200, body = Migrations, description = "all of them, or those that are asked for"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
async fn migrations(
    State(front): State<Front>,
    caller: Caller,
    Filter(filter): Filter<MigrationFilter>,
) -> Result<Json<Migrations>, Problem> {
    let (core, _) = caller.admit(&front.core, &Action::new(Verb::ListMigrations)).await?;
    let records = core.migrations(&filter.workload, filter.active).await?;
    Ok(Json(records.as_slice().into()))
}

/// Asks for a migration.
///
/// It is recorded when the answer comes. Preflight is a part of it: what it finds stands in the migration.
#[utoipa::path(
    post,
    path = "/api/v1/migrations",
    request_body = MigrateRequest,
    responses(
        (status = 201, body = MigrationDetails, description = "accepted", headers(("location" = String, description = "its path"))),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal; nothing was recorded"),
    )
)]
async fn migrate(State(front): State<Front>, caller: Caller, request: Request) -> Result<Response, Problem> {
    let wanted: v1::MigrateRequest = json::<MigrateRequest>(request, front.limits.body).await?.into();
    let (core, peer) = caller.admit(&front.core, &Action::migrate(&wanted.workload, &wanted.target)).await?;
    let record = core.migrate(&wanted, &peer).await?;
    let location = format!("/api/v1/migrations/{}", record.id);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(MigrationDetails::from(&record))).into_response())
}

/// A migration with all its texts.
#[utoipa::path(
    get,
    path = "/api/v1/migrations/{id}",
    params(("id" = String, Path, description = "the migration's id")),
    responses(
        (status = 200, body = MigrationDetails, description = "as it is now"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
async fn migration(State(front): State<Front>, caller: Caller, Id(id): Id) -> Result<Json<MigrationDetails>, Problem> {
    let (core, _) = caller.admit(&front.core, &Action::on_migration(Verb::GetMigration, &id)).await?;
    let record = core.migration(&id).await?;
    Ok(Json(MigrationDetails::from(&record)))
}

/// Undoes a migration that has not been committed.
///
/// The answer comes when that is recorded, not when it is done.
#[utoipa::path(
    post,
    path = "/api/v1/migrations/{id}/cancel",
    params(("id" = String, Path, description = "the migration's id")),
    responses(
        (status = 202, body = MigrationDetails, description = "it is being undone"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
async fn cancel(State(front): State<Front>, caller: Caller, Id(id): Id) -> Result<Response, Problem> {
    let (core, peer) = caller.admit(&front.core, &Action::on_migration(Verb::CancelMigration, &id)).await?;
    let record = core.cancel(&id, &peer).await?;
    Ok((StatusCode::ACCEPTED, Json(MigrationDetails::from(&record))).into_response())
}

/// A migration as it changes, as server-sent events.
///
/// Each event `migration` has its state, the first one that of now. The last one, with the outcome, has the id `end`; who comes back
/// with that in `Last-Event-ID`, as browsers do, gets 204. A stream without it has broken off, and an event `problem` may say why:
/// watch again then.
#[utoipa::path(
    get,
    path = "/api/v1/migrations/{id}/watch",
    params(
        ("id" = String, Path, description = "the migration's id"),
        ("last-event-id" = Option<String>, Header, description = "the id of the last event that was seen"),
    ),
    responses(
        (status = 200, body = MigrationDetails, content_type = "text/event-stream", description = "the data of each event `migration`"),
        (status = 204, description = "the end was seen already"),
        (status = "default", body = Problem, content_type = PROBLEM_JSON, description = "a refusal"),
    )
)]
async fn watch(
    State(front): State<Front>,
    caller: Caller,
    Id(id): Id,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (core, _) = caller.admit(&front.core, &Action::on_migration(Verb::WatchMigration, &id)).await?;
    let states = states(&core, &id, front.stop.clone()).await?;
    if headers.get(LAST_EVENT_ID).is_some_and(|seen| seen == LAST_EVENT) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let heartbeat = KeepAlive::new().interval(front.limits.heartbeat);
    Ok(Sse::new(states.map(event)).keep_alive(heartbeat).into_response())
}

fn event(state: Result<Record, Failure>) -> Result<Event, axum::Error> {
    match state {
        Ok(record) => {
            let event = Event::default().event("migration").json_data(MigrationDetails::from(&record))?;
            Ok(if record.state.is_settled() { event.id(LAST_EVENT) } else { event })
        }
        Err(failure) => Event::default().event("problem").json_data(Problem::from(failure)),
    }
}

async fn unknown_path() -> Problem {
    Failure::new(FailureCode::NotFound, "there is nothing at this path").remedy("see /api/v1/openapi.json").into()
}

async fn unknown_method() -> Problem {
    let failure = Failure::new(FailureCode::Unimplemented, "this path does not take this method");
    Problem::with_status(StatusCode::METHOD_NOT_ALLOWED, failure.remedy("see /api/v1/openapi.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_pinned() {
        let document: serde_json::Value = serde_json::from_str(&document()).unwrap();
        insta::assert_json_snapshot!("openapi", document);
    }
}
