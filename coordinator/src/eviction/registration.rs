//! Telling the API server whom to trust: the certificate and the path in this coordinator's `ValidatingWebhookConfiguration`.
//!
//! Whoever installs podferry makes that object, with everything else in it. It is looked at again and again: another leader has written its own, or
//! somebody has put it back to what is in a repository.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Uri;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{ValidatingWebhookConfiguration, WebhookClientConfig};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::certificate::{CertificateError, Shown};

/// How often the object is looked at.
const INTERVAL: Duration = Duration::from_secs(15);

/// Why the API server does not know whom to trust.
#[derive(Debug, Error)]
pub(super) enum RegistrationError {
    /// The object cannot be read or written.
    #[error("the API server does not {action} the ValidatingWebhookConfiguration {name}")]
    Api {
        /// What.
        action: &'static str,
        /// Which.
        name: String,
        /// Why not.
        source: kube::Error,
    },
    /// No certificate for what it calls this coordinator.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// What the API server is to be told.
pub(super) struct Registration {
    api: Api<ValidatingWebhookConfiguration>,
    name: String,
    path: String,
    shown: Arc<Shown>,
}

impl Registration {
    pub(super) fn new(client: Client, name: &str, path: &str, shown: Arc<Shown>) -> Self {
        Self { api: Api::all(client), name: name.to_owned(), path: path.to_owned(), shown }
    }

    /// Keeps it told until it is stopped.
    pub(super) async fn keep(self, stop: CancellationToken) {
        let keeping = async {
            loop {
                if let Err(error) = self.look().await {
                    let error = podferry_common::chain(&error);
                    tracing::warn!(error, "the API server does not know whom to ask about evictions: none is answered");
                }
                sleep(INTERVAL).await;
            }
        };
        let _stopped = stop.run_until_cancelled(keeping).await;
    }

    async fn look(&self) -> Result<(), RegistrationError> {
        let failed = |action| move |source| RegistrationError::Api { action, name: self.name.clone(), source };
        let found = self.api.get(&self.name).await.map_err(failed("show"))?;
        let pem = self.shown.for_names(&names(&found))?;
        if let Some(change) = change(&found, &self.path, &pem) {
            let patched = self.api.patch(&self.name, &PatchParams::default(), &Patch::Strategic(change)).await;
            patched.map_err(failed("change"))?;
            tracing::info!(webhook = self.name, "the API server asks this coordinator about evictions");
        }
        Ok(())
    }
}

/// What the API server calls those whom it asks.
fn names(object: &ValidatingWebhookConfiguration) -> Vec<String> {
    let all = object.webhooks.iter().flatten().filter_map(|webhook| server_name(&webhook.client_config));
    let mut names: Vec<_> = all.collect();
    names.sort();
    names.dedup();
    names
}

fn server_name(config: &WebhookClientConfig) -> Option<String> {
    if let Some(service) = &config.service {
        return Some(format!("{}.{}.svc", service.name, service.namespace));
    }
    let uri: Uri = config.url.as_ref()?.parse().ok()?;
    uri.host().map(|host| host.trim_matches(['[', ']']).to_owned())
}

/// What has to be changed so that all its webhooks are this coordinator, by this path; none: nothing.
fn change(object: &ValidatingWebhookConfiguration, path: &str, pem: &str) -> Option<Value> {
    let bundle = ByteString(pem.as_bytes().to_vec());
    let changed = |config: &WebhookClientConfig| {
        let wanted = located(config, path)?;
        (config.ca_bundle.as_ref() != Some(&bundle) || !is_there(config, &wanted)).then_some(wanted)
    };
    let all = object.webhooks.iter().flatten();
    let webhooks: Vec<_> = all
        .filter_map(|webhook| {
            let mut config = changed(&webhook.client_config)?;
            config["caBundle"] = json!(bundle);
            Some(json!({ "name": webhook.name, "clientConfig": config }))
        })
        .collect();
    (!webhooks.is_empty()).then(|| json!({ "webhooks": webhooks }))
}

/// Where it is asked, by this path.
fn located(config: &WebhookClientConfig, path: &str) -> Option<Value> {
    if config.service.is_some() {
        return Some(json!({ "service": { "path": path } }));
    }
    let uri: Uri = config.url.as_ref()?.parse().ok()?;
    Some(json!({ "url": format!("https://{}{path}", uri.authority()?) }))
}

fn is_there(config: &WebhookClientConfig, wanted: &Value) -> bool {
    let path = config.service.as_ref().and_then(|service| service.path.as_deref());
    wanted["service"]["path"].as_str() == path && wanted["url"].as_str() == config.url.as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(config: &Value) -> ValidatingWebhookConfiguration {
        let webhook = json!({
            "name": "eviction.podferry.dev", "clientConfig": config, "sideEffects": "NoneOnDryRun", "admissionReviewVersions": ["v1"],
        });
        serde_json::from_value(json!({ "metadata": { "name": "podferry-eviction" }, "webhooks": [webhook] })).unwrap()
    }

    #[test]
    fn it_answers_to_what_the_api_server_calls_it() {
        let service = json!({ "service": { "name": "podferry-coordinator", "namespace": "podferry", "port": 7446 } });
        assert_eq!(names(&object(&service)), ["podferry-coordinator.podferry.svc"]);
        assert_eq!(names(&object(&json!({ "url": "https://127.0.0.1:4711/x" }))), ["127.0.0.1"]);
        assert_eq!(names(&object(&json!({ "url": "https://[fd00::1]:4711" }))), ["fd00::1"]);
    }

    #[test]
    fn only_what_is_another_is_changed() {
        let service = json!({ "name": "podferry-coordinator", "namespace": "podferry", "port": 7446 });
        let fresh = object(&json!({ "service": service }));
        let wanted = change(&fresh, "/evict/s", "PEM").unwrap();
        let config = json!({ "service": { "path": "/evict/s" }, "caBundle": "UEVN" });
        assert_eq!(wanted, json!({ "webhooks": [{ "name": "eviction.podferry.dev", "clientConfig": config }] }));
        let mut told = json!({ "service": service, "caBundle": "UEVN" });
        told["service"]["path"] = "/evict/s".into();
        assert_eq!(change(&object(&told), "/evict/s", "PEM"), None);
        assert!(change(&object(&told), "/evict/other", "PEM").is_some());
        assert!(change(&object(&told), "/evict/s", "ANOTHER").is_some());
    }

    #[test]
    fn a_url_keeps_its_host_and_gets_the_path() {
        let wanted = change(&object(&json!({ "url": "https://127.0.0.1:4711/old" })), "/evict/s", "PEM").unwrap();
        assert_eq!(wanted["webhooks"][0]["clientConfig"]["url"], "https://127.0.0.1:4711/evict/s");
        let told = object(&json!({ "url": "https://127.0.0.1:4711/evict/s", "caBundle": "UEVN" }));
        assert_eq!(change(&told, "/evict/s", "PEM"), None);
    }
}
