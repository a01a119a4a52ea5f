//! What keeps other sites' pages from using the certificate of a browser. A browser shows a client certificate to whatever page makes
//! it send a request, and a page of another site may send some kinds of them without asking. It may not read answers, so only
//! requests that change something are looked at.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use podferry_common::{Failure, FailureCode};

use super::problem::Problem;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Refuses what another site's page wants changed, and marks answers as nothing to be kept or guessed at.
pub(super) async fn guard(request: Request, next: Next) -> Response {
    let mut response = if request.method().is_safe() || is_of_this_site(request.headers()) {
        next.run(request).await
    } else {
        let failure = Failure::new(FailureCode::PermissionDenied, "the request comes from a page of another site");
        Problem::from(failure.remedy("send it from no page, or from one of this coordinator")).into_response()
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Whether a request comes from a page of this site or from no page. Browsers say so in `Sec-Fetch-Site`, those from before 2023 in
/// `Origin`; programs send neither.
fn is_of_this_site(headers: &HeaderMap) -> bool {
    if let Some(site) = headers.get(SEC_FETCH_SITE) {
        return site == "same-origin" || site == "none";
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let origin = origin.to_str().ok().and_then(|origin| origin.strip_prefix("https://"));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    origin.is_some() && origin == host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(headers: &[(&'static str, &'static str)]) -> bool {
        let pairs =
            headers.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        is_of_this_site(&pairs.collect())
    }

    #[test]
    fn only_pages_of_this_site_and_programs_may_change_something() {
        let host = ("host", "coordinator:7444");
        let own = ("origin", "https://coordinator:7444");
        let foreign = ("origin", "https://evil.example");
        assert!(verdict(&[host]), "a program");
        assert!(verdict(&[host, own]));
        assert!(verdict(&[host, own, ("sec-fetch-site", "same-origin")]));
        assert!(verdict(&[host, ("sec-fetch-site", "none")]));
        assert!(!verdict(&[host, foreign]));
        assert!(!verdict(&[host, ("origin", "null")]));
        assert!(!verdict(&[host, ("origin", "http://coordinator:7444")]));
        assert!(!verdict(&[own]), "no host to be the same as");
        assert!(!verdict(&[host, own, ("sec-fetch-site", "same-site")]));
        assert!(!verdict(&[host, own, ("sec-fetch-site", "cross-site")]));
        assert!(!verdict(&[host, ("sec-fetch-site", "")]));
    }
}
