//! The settings that every connection has: TLS 1.3 only, certificates on both sides, one application protocol.

use std::error::Error;
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// The only protocol spoken inside: HTTP/2, which gRPC needs.
pub(crate) const ALPN: &[u8] = b"h2";
/// What is spoken with scripts and browsers, on listeners of their own.
pub(crate) const ALPN_HTTP1: &[u8] = b"http/1.1";

/// What cannot be set up: the verifier's own error, or rustls'.
type Refused = Box<dyn Error + Send + Sync>;

/// ring with AES-128-GCM first: the fastest suite on machines with AES instructions, and memory pages are many.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() })
}

/// Settings of the accepting side: a client must show a certificate of one of `roots`.
pub(crate) fn server(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    own: &Arc<CertifiedKey>,
) -> Result<Arc<ServerConfig>, Refused> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider)).build()?;
    let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(own))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ignore_client_order = true;
    // Every connection shows a certificate that is valid now: a resumed session would not.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The same for a listener that speaks HTTP/1.1.
pub(crate) fn with_http1(grpc: &ServerConfig) -> Arc<ServerConfig> {
    let mut config = grpc.clone();
    config.alpn_protocols = vec![ALPN_HTTP1.to_vec()];
    Arc::new(config)
}

/// Settings of the opening side: the server must show a certificate of one of `roots` for the name that is dialled.
pub(crate) fn client(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    own: &Arc<CertifiedKey>,
) -> Result<Arc<ClientConfig>, Refused> {
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider)).build()?;
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(own))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}
