//! `AdmissionReview` of `admission.k8s.io/v1`, as far as an eviction needs it. Kubernetes' description of its API does not have it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Status};
use serde::{Deserialize, Serialize};

/// The API of questions and answers.
const API_VERSION: &str = "admission.k8s.io/v1";
/// Their kind.
const KIND: &str = "AdmissionReview";
/// What an evictor tries again upon.
const TOO_MANY_REQUESTS: i32 = 429;
/// Characters of a warning: the API server passes on 4096 in all.
const MAX_WARNING: usize = 1000;

/// A question of the API server's.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Question {
    /// Whose API it is.
    pub(super) api_version: String,
    /// Its kind.
    pub(super) kind: String,
    /// What somebody asks of the API server.
    pub(super) request: Request,
}

/// What somebody asks of the API server.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Request {
    /// The question's own id, which its answer repeats.
    pub(super) uid: String,
    /// The pod's namespace.
    pub(super) namespace: String,
    /// The pod's name.
    pub(super) name: String,
    /// What it asks for beside the pod: `eviction`.
    pub(super) sub_resource: String,
    /// Nothing is to come of it.
    pub(super) dry_run: bool,
    /// Who asks.
    pub(super) user_info: User,
    /// The eviction.
    pub(super) object: Option<Eviction>,
}

/// Who asks.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct User {
    /// By that name.
    pub(super) username: String,
}

/// An `Eviction`, of `policy/v1` or older.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Eviction {
    /// How the pod is to be deleted.
    pub(super) delete_options: Option<DeleteOptions>,
}

impl Question {
    /// What is asked, if it is a question that can be answered here.
    pub(super) fn of_eviction(&self) -> Option<&Request> {
        let understood = self.api_version == API_VERSION && self.kind == KIND;
        Some(&self.request).filter(|request| understood && request.sub_resource == "eviction")
    }
}

impl Request {
    /// Whether nothing is to come of it. `kubectl drain --dry-run=server` says so in the eviction alone.
    pub(super) fn is_dry_run(&self) -> bool {
        let options = self.delete_options().and_then(|options| options.dry_run.as_ref());
        self.dry_run || options.is_some_and(|all| !all.is_empty())
    }

    /// The pod that is meant and no other of its name.
    pub(super) fn wanted_uid(&self) -> Option<&str> {
        self.delete_options()?.preconditions.as_ref()?.uid.as_deref()
    }

    fn delete_options(&self) -> Option<&DeleteOptions> {
        self.object.as_ref()?.delete_options.as_ref()
    }
}

/// The answer to a question.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Answer {
    api_version: &'static str,
    kind: &'static str,
    response: Response,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    uid: String,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

impl Answer {
    /// It may be, with a word for who has asked.
    pub(super) fn allow(uid: &str, warning: Option<&str>) -> Self {
        let warnings = warning.map(one_line).into_iter().collect();
        Self::of(Response { uid: uid.to_owned(), allowed: true, status: None, warnings })
    }

    /// Not now: 429. No `Retry-After` goes with it: clients that know it would wait by themselves, unseen, and evictors have pauses of their own.
    pub(super) fn not_now(uid: &str, message: &str) -> Self {
        let status = Status {
            status: Some("Failure".to_owned()),
            code: Some(TOO_MANY_REQUESTS),
            reason: Some("TooManyRequests".to_owned()),
            message: Some(message.to_owned()),
            ..Status::default()
        };
        Self::of(Response { uid: uid.to_owned(), allowed: false, status: Some(status), warnings: Vec::new() })
    }

    fn of(response: Response) -> Self {
        Self { api_version: API_VERSION, kind: KIND, response }
    }
}

/// As a header can have it.
fn one_line(text: &str) -> String {
    let printable = |character: char| if character.is_control() { ' ' } else { character };
    text.chars().map(printable).take(MAX_WARNING).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(eviction: &serde_json::Value, dry_run: bool) -> Question {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "request": {
                "uid": "q-1",
                "kind": { "group": "policy", "version": "v1", "kind": "Eviction" },
                "resource": { "group": "", "version": "v1", "resource": "pods" },
                "subResource": "eviction",
                "operation": "CREATE",
                "namespace": "shop",
                "name": "web-1",
                "userInfo": { "username": "ada", "groups": ["system:authenticated"] },
                "object": eviction,
                "oldObject": null,
                "dryRun": dry_run,
                "options": { "kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1" },
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_dry_run_is_one_wherever_it_says_so() {
        let of =
            |eviction: &serde_json::Value, dry_run| question(eviction, dry_run).of_eviction().unwrap().is_dry_run();
        let plain = serde_json::json!({ "metadata": { "name": "web-1" } });
        let body = serde_json::json!({ "deleteOptions": { "dryRun": ["All"] } });
        assert!(!of(&plain, false) && of(&plain, true) && of(&body, false));
    }

    #[test]
    fn what_is_asked_is_read_and_another_question_is_not_taken_for_one() {
        let eviction = serde_json::json!({ "deleteOptions": { "preconditions": { "uid": "u-1" } } });
        let mut asked = question(&eviction, false);
        let request = asked.of_eviction().unwrap();
        assert_eq!((request.namespace.as_str(), request.name.as_str()), ("shop", "web-1"));
        assert_eq!((request.wanted_uid(), request.user_info.username.as_str()), (Some("u-1"), "ada"));
        asked.request.sub_resource = "binding".to_owned();
        assert!(asked.of_eviction().is_none());
        asked.request.sub_resource = "eviction".to_owned();
        asked.api_version = "admission.k8s.io/v2".to_owned();
        assert!(asked.of_eviction().is_none());
    }

    #[test]
    fn answers_are_what_the_api_server_reads() {
        let denied = serde_json::to_value(Answer::not_now("q-1", "later")).unwrap();
        let expected = serde_json::json!({
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "response": { "uid": "q-1", "allowed": false, "status": {
                "status": "Failure", "code": 429, "reason": "TooManyRequests", "message": "later",
            } },
        });
        let mut said = denied.clone();
        // A Status names its own kind as well.
        let status = said["response"]["status"].as_object_mut().unwrap();
        status.retain(|name, _| !["apiVersion", "kind", "metadata"].contains(&name.as_str()));
        assert_eq!(said, expected);
        assert!(denied["response"]["status"].get("details").is_none(), "no Retry-After comes of it");
        let allowed = serde_json::to_value(Answer::allow("q-2", Some("a\nb"))).unwrap();
        let response = serde_json::json!({ "uid": "q-2", "allowed": true, "warnings": ["a b"] });
        assert_eq!(allowed["response"], response);
        assert!(serde_json::to_value(Answer::allow("q-3", None)).unwrap()["response"].get("warnings").is_none());
    }
}
