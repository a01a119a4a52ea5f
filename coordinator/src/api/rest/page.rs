//! The page, which asks this API and nobody else. It is whole in this program: what a browser loads comes from here.

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;

use super::problem::Problem;
use super::request::Caller;
use super::routes::Front;
use crate::access::{Action, Verb};

/// Nothing but this page's own files and this API: no inline code, no other site, no frame around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The files, by path, with their media types.
const FILES: [(&str, &str, &str); 3] = [
    ("/", "text/html; charset=utf-8", include_str!("../../../page/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("../../../page/page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("../../../page/page.js")),
];

/// The page's files, for those who may look at what it shows.
pub(super) fn files() -> Router<Front> {
    FILES.into_iter().fold(Router::new(), |router, (path, media_type, text)| {
        let answer =
            async move |State(front): State<Front>, caller: Caller| file(&front, &caller, media_type, text).await;
        router.route(path, get(answer))
    })
}

async fn file(
    front: &Front,
    caller: &Caller,
    media_type: &'static str,
    text: &'static str,
) -> Result<Response, Problem> {
    caller.admit(&front.core, &Action::new(Verb::ListNodes)).await?;
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(media_type)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    Ok((headers, text).into_response())
}
