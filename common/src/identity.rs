//! Who this process is: its certificate and key, the authority it trusts, and how they are replaced while it runs.

mod ca;
mod peer;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::task::JoinHandle;
use tracing::{info, warn};
use x509_parser::parse_x509_certificate;

pub use ca::{CaError, LocalCa};
pub use peer::{DOMAIN, InvalidPeer, Peer};

use crate::failure::chain;
use crate::tls::{Protocol, config};

/// A certificate file larger than this is none (and would only take memory).
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Key and certificate are two files, and so two renames when they are replaced: how often, and after which pause, they are
/// read again when they do not go together.
const RELOADS: u32 = 20;
const RELOAD_PAUSE: Duration = Duration::from_millis(10);

/// The three PEM files that make an identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityFiles {
    /// The authorities that other peers' certificates must come from.
    pub ca: PathBuf,
    /// This process' certificate, followed by intermediate ones if there are any.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
}

impl IdentityFiles {
    /// `ca.pem`, `cert.pem` and `key.pem` in that folder.
    pub fn in_folder(folder: impl AsRef<Path>) -> Self {
        let folder = folder.as_ref();
        Self { ca: folder.join("ca.pem"), certificate: folder.join("cert.pem"), key: folder.join("key.pem") }
    }
}

/// Why an identity cannot be loaded.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// A file cannot be read.
    #[error("cannot read {}; it needs ca.pem, cert.pem and key.pem that this user may read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not PEM, or lacks what it should hold.
    #[error("{} holds no usable {what} in PEM", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What is wrong.
        source: pem::Error,
    },
    /// A file is far too large for what it should be.
    #[error("{} is larger than {MAX_FILE_BYTES} bytes, so it is no certificate or key", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The certificate names nobody of podferry's.
    #[error("{} names no peer", path.display())]
    Peer {
        /// The file.
        path: PathBuf,
        /// What is wrong with the name.
        source: InvalidPeer,
    },
    /// Certificate, key and authority are readable but do not go together.
    #[error("{} and {} cannot be used together for TLS", certificate.display(), key.display())]
    Unusable {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// What rustls says.
        source: rustls::Error,
    },
    /// No certificate authority to check others with.
    #[error("{} cannot be used to check other peers' certificates", path.display())]
    Authority {
        /// The authorities' file.
        path: PathBuf,
        /// What rustls says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// New files name somebody else than the process has been so far.
    #[error("the new certificate is for {new}, but this process is {current}; restart it to change who it is")]
    OtherPeer {
        /// Whom the process has been.
        current: Peer,
        /// Whom the new certificate names.
        new: Peer,
    },
}

/// The bytes of the three files, to tell whether they changed.
#[derive(PartialEq, Eq)]
struct Contents {
    ca: Vec<u8>,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Contents {
    fn read(files: &IdentityFiles) -> Result<Self, IdentityError> {
        Ok(Self { ca: read(&files.ca)?, certificate: read(&files.certificate)?, key: read(&files.key)? })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    let failed = |source| IdentityError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > MAX_FILE_BYTES {
        return Err(IdentityError::TooLarge { path: path.to_owned() });
    }
    fs::read(path).map_err(failed)
}

/// One state of the files, ready for handshakes.
struct Loaded {
    contents: Contents,
    peer: Peer,
    not_after: SystemTime,
    server: Arc<ServerConfig>,
    http1_server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Loaded {
    fn build(files: &IdentityFiles, contents: Contents) -> Result<Self, IdentityError> {
        let roots = authorities(files, &contents.ca)?;
        let chain = certificates(&files.certificate, &contents.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key).map_err(|source| IdentityError::Pem {
            path: files.key.clone(),
            what: "private key",
            source,
        })?;
        let unnamed = |source| IdentityError::Peer { path: files.certificate.clone(), source };
        let peer = Peer::from_certificate(&chain[0]).map_err(unnamed)?;
        let not_after = not_after(&chain[0]).map_err(unnamed)?;
        let unusable =
            |source| IdentityError::Unusable { certificate: files.certificate.clone(), key: files.key.clone(), source };
        let provider = config::provider();
        // Checks that the key is the certificate's.
        let certified = CertifiedKey::from_der(chain, key, &provider).map_err(unusable)?;
        let certified = Arc::new(certified);
        let server = config::server(&provider, &roots, &certified)
            .map_err(|source| IdentityError::Authority { path: files.ca.clone(), source })?;
        let client = config::client(&provider, &roots, &certified)
            .map_err(|source| IdentityError::Authority { path: files.ca.clone(), source })?;
        if not_after <= SystemTime::now() {
            warn!(certificate = %files.certificate.display(), %peer, "the certificate has expired: peers will refuse it");
        }
        let http1_server = config::with_http1(&server);
        Ok(Self { contents, peer, not_after, server, http1_server, client })
    }
}

/// All certificates of a PEM file, at least one.
fn certificates(path: &Path, content: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let failed = |source| IdentityError::Pem { path: path.to_owned(), what: "certificate", source };
    let found: Vec<_> = CertificateDer::pem_slice_iter(content).collect::<Result<_, _>>().map_err(failed)?;
    if found.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(found) }
}

fn authorities(files: &IdentityFiles, content: &[u8]) -> Result<Arc<RootCertStore>, IdentityError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.ca, content)? {
        roots
            .add(certificate)
            .map_err(|source| IdentityError::Authority { path: files.ca.clone(), source: source.into() })?;
    }
    Ok(Arc::new(roots))
}

fn not_after(certificate: &CertificateDer<'_>) -> Result<SystemTime, InvalidPeer> {
    let (_, parsed) =
        parse_x509_certificate(certificate).map_err(|error| InvalidPeer::Certificate { reason: error.to_string() })?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

struct Inner {
    files: IdentityFiles,
    current: ArcSwap<Loaded>,
    /// Reloads come one after the other, so that an older state never replaces a newer one.
    reloading: Mutex<()>,
}

/// Who this process is. Clones are cheap and share the state: after a reload all of them have the new certificate, which
/// new connections use; connections that stand go on with the certificate they began with.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

impl Identity {
    /// Reads the files and checks that they go together. Those that are just being replaced are read again, for a fifth of
    /// a second at most.
    ///
    /// An expired certificate is loaded, with a warning: its renewal may be on the way, and until then peers refuse it.
    pub fn load(files: IdentityFiles) -> Result<Self, IdentityError> {
        let read = || Loaded::build(&files, Contents::read(&files)?);
        let mut loaded = read();
        for _ in 0..RELOADS {
            if !matches!(loaded, Err(IdentityError::Unusable { .. })) {
                break;
            }
            thread::sleep(RELOAD_PAUSE);
            loaded = read();
        }
        let loaded = loaded?;
        Ok(Self(Arc::new(Inner { files, current: ArcSwap::from_pointee(loaded), reloading: Mutex::new(()) })))
    }

    /// Reads the files again and takes them if they changed, go together, and name the same peer: `Ok(true)`. On an error
    /// the identity stays what it was.
    pub fn reload(&self) -> Result<bool, IdentityError> {
        let _one_at_a_time = self.0.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        let contents = Contents::read(&self.0.files)?;
        let current = self.0.current.load();
        if contents == current.contents {
            return Ok(false);
        }
        let new = Loaded::build(&self.0.files, contents)?;
        if new.peer != current.peer {
            return Err(IdentityError::OtherPeer { current: current.peer.clone(), new: new.peer });
        }
        self.0.current.store(Arc::new(new));
        Ok(true)
    }

    /// Looks at the files at every `interval` and takes new ones without a restart. What is broken is reported once and
    /// tried again at the next look. The task ends when the last clone of this identity is gone.
    pub fn watch(&self, interval: Duration) -> JoinHandle<()> {
        let identity = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(interval);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut complaint = None;
            loop {
                ticks.tick().await;
                let Some(inner) = identity.upgrade() else { return };
                complaint = Self(inner).look(complaint.as_deref());
            }
        })
    }

    /// One look of [`Identity::watch`]; takes and returns what was last complained about.
    fn look(&self, complaint: Option<&str>) -> Option<String> {
        match self.reload() {
            Ok(false) => None,
            Ok(true) => {
                info!(peer = %self.peer(), certificate = %self.0.files.certificate.display(), "certificate replaced");
                None
            }
            Err(error) => {
                let text = chain(&error);
                if complaint != Some(text.as_str()) {
                    warn!(error = %text, "new certificate files cannot be used, the old ones stay in use");
                }
                Some(text)
            }
        }
    }

    /// Whom the certificate names.
    pub fn peer(&self) -> Peer {
        self.0.current.load().peer.clone()
    }

    /// When the certificate ends.
    pub fn not_after(&self) -> SystemTime {
        self.0.current.load().not_after
    }

    /// The files that this identity is read from.
    pub fn files(&self) -> &IdentityFiles {
        &self.0.files
    }

    /// The current settings for accepting connections that speak this protocol.
    pub(crate) fn server_config(&self, protocol: Protocol) -> Arc<ServerConfig> {
        let current = self.0.current.load();
        Arc::clone(match protocol {
            Protocol::Grpc => &current.server,
            Protocol::Http1 => &current.http1_server,
        })
    }

    /// The current settings for opening connections.
    pub(crate) fn client_config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.0.current.load().client)
    }
}

impl std::fmt::Debug for Identity {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.0.current.load();
        f.debug_struct("Identity")
            .field("peer", &state.peer)
            .field("not_after", &state.not_after)
            .finish_non_exhaustive()
    }
}
