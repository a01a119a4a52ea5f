//! The certificate by which the API server knows who answers.
//!
//! The coordinator makes it itself, for the names that the API server calls it by, and says in its `ValidatingWebhookConfiguration` that it is the one
//! to trust. Its key is in this process's memory and nowhere else, so there is nothing to keep, to renew or to steal: a leader has its own.
//! podferry's authority could not vouch for such a name, which is not under `podferry.internal`.

use std::sync::{Arc, Mutex, PoisonError};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use thiserror::Error;

/// What is spoken above TLS.
const ALPN: &[u8] = b"http/1.1";
/// What the certificate says it is, for who looks at it.
const TITLE: &str = "podferry-coordinator, evictions";

/// Why there is no certificate.
#[derive(Debug, Error)]
pub enum CertificateError {
    /// None can be made for these names.
    #[error("no certificate can be made for {names:?}")]
    Make {
        /// The names.
        names: Vec<String>,
        /// Why not.
        source: rcgen::Error,
    },
    /// TLS cannot be set up.
    #[error("TLS for evictions cannot be set up")]
    Tls {
        /// Why not.
        source: rustls::Error,
    },
}

/// The certificate that is shown now, for these names; none before the names are known.
#[derive(Debug, Default)]
pub(super) struct Shown(Mutex<Option<Current>>);

#[derive(Debug)]
struct Current {
    names: Vec<String>,
    pem: String,
    key: Arc<CertifiedKey>,
}

impl Shown {
    /// The certificate for these names, as PEM; another one than before when the names are others.
    pub(super) fn for_names(&self, names: &[String]) -> Result<String, CertificateError> {
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = shown.as_ref().filter(|current| current.names == names) {
            return Ok(current.pem.clone());
        }
        let current = make(names)?;
        let pem = current.pem.clone();
        *shown = Some(current);
        Ok(pem)
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shown.as_ref().map(|current| Arc::clone(&current.key))
    }
}

fn make(names: &[String]) -> Result<Current, CertificateError> {
    let failed = |source| CertificateError::Make { names: names.to_vec(), source };
    let tls = |source| CertificateError::Tls { source };
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    // It is valid for as long as certificates can be: it ends with the process.
    let mut params = CertificateParams::new(names).map_err(failed)?;
    params.distinguished_name.push(DnType::CommonName, TITLE);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = params.self_signed(&key).map_err(failed)?;
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signing = ring::sign::any_supported_type(&private).map_err(tls)?;
    let chain = vec![CertificateDer::from(certificate.der().to_vec())];
    let key = Arc::new(CertifiedKey::new(chain, signing));
    Ok(Current { names: names.to_vec(), pem: certificate.pem(), key })
}

/// TLS for those who show no certificate, as API servers do not.
pub(super) fn tls(shown: Arc<Shown>) -> Result<Arc<ServerConfig>, CertificateError> {
    let failed = |source| CertificateError::Tls { source };
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_protocol_versions(&[&TLS13]).map_err(failed)?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(shown);
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// What nobody can guess, for the path: whoever does not know it cannot begin a migration.
///
/// # Errors
/// When the machine gives no random numbers.
pub(super) fn secret() -> Result<String, CertificateError> {
    let mut bytes = [0; 16];
    let filled = ring::default_provider().secure_random.fill(&mut bytes);
    filled.map_err(|_| CertificateError::Tls { source: rustls::Error::FailedToGetRandomBytes })?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[&str]) -> Vec<String> {
        all.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_certificate_is_kept_until_the_names_are_others() {
        let shown = Shown::default();
        let first = shown.for_names(&names(&["a.podferry.svc"])).unwrap();
        assert!(first.starts_with("-----BEGIN CERTIFICATE-----"), "{first}");
        assert_eq!(shown.for_names(&names(&["a.podferry.svc"])).unwrap(), first);
        assert_ne!(shown.for_names(&names(&["a.podferry.svc", "127.0.0.1"])).unwrap(), first);
        tls(Arc::new(shown)).unwrap();
    }

    #[test]
    fn no_two_secrets_are_alike() {
        let (one, other) = (secret().unwrap(), secret().unwrap());
        assert!(one.len() == 32 && one != other, "{one} {other}");
    }
}
