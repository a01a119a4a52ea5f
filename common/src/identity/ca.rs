//! A certificate authority in a folder, for clusters without one of their own: two nodes on one machine, tests.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, NameConstraints, PKCS_ECDSA_P256_SHA256,
};
use tempfile::NamedTempFile;
use thiserror::Error;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{IdentityFiles, Peer, peer};

/// How long the authority itself is valid. Its certificates should live hours.
const CA_LIFETIME: time::Duration = time::Duration::days(3650);
/// How far a certificate's start lies in the past, for peers whose clocks are behind.
const CLOCK_SKEW: time::Duration = time::Duration::minutes(5);

const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca-key.pem";

/// Why the authority cannot be made, read, or cannot issue.
#[derive(Debug, Error)]
pub enum CaError {
    /// A file cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The folder has an authority already; certificates of the old one would stop working if it were replaced.
    #[error("{} has a certificate authority already; load it, or remove {KEY} and {CERTIFICATE} to start anew", folder.display())]
    Exists {
        /// The folder.
        folder: PathBuf,
    },
    /// Key or certificate cannot be made or are not readable as such.
    #[error("cannot {action}")]
    Certificate {
        /// What was tried.
        action: String,
        /// Why not.
        source: rcgen::Error,
    },
    /// The lifetime does not fit into a certificate's dates.
    #[error("a lifetime of {} s is too long for a certificate", lifetime.as_secs())]
    Lifetime {
        /// The lifetime asked for.
        lifetime: Duration,
    },
}

/// A certificate authority of podferry's own. Its certificate may vouch for names under `podferry.internal` only, so that
/// trusting it gives nobody any other name.
pub struct LocalCa {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl LocalCa {
    /// Makes a new authority and writes it to `folder` (made if missing): `ca.pem`, and `ca-key.pem` for the owner only.
    pub fn create(folder: &Path) -> Result<Self, CaError> {
        make_private_folder(folder)?;
        if folder.join(KEY).exists() {
            return Err(CaError::Exists { folder: folder.to_owned() });
        }
        let failed = |source| CaError::Certificate { action: "make the authority's certificate".to_owned(), source };
        let key = new_key()?;
        let certificate = authority_params().self_signed(&key).map_err(failed)?.pem();
        write_atomically(&folder.join(KEY), &key.serialize_pem(), 0o600)?;
        write_atomically(&folder.join(CERTIFICATE), &certificate, 0o644)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(failed)?;
        Ok(Self { issuer, certificate })
    }

    /// Reads the authority that [`LocalCa::create`] wrote to `folder`.
    pub fn load(folder: &Path) -> Result<Self, CaError> {
        let read =
            |path: PathBuf| fs::read_to_string(&path).map_err(|source| CaError::File { action: "read", path, source });
        let failed =
            |source| CaError::Certificate { action: format!("use the authority in {}", folder.display()), source };
        let key = KeyPair::from_pem(&read(folder.join(KEY))?).map_err(failed)?;
        let certificate = read(folder.join(CERTIFICATE))?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(failed)?;
        Ok(Self { issuer, certificate })
    }

    /// The authority's certificate, PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Makes a new key and a certificate that names `peer`, valid from now for `lifetime` (whole seconds), for both ends
    /// of connections, and writes them with the authority's certificate to `files`; folders are made as needed.
    ///
    /// Each file is replaced by rename, so no reader sees half of one, and only when all of them are on disk. A reader that
    /// comes between two renames sees a key without its certificate: [`super::Identity`] then looks again.
    pub fn issue(&self, peer: &Peer, lifetime: Duration, files: &IdentityFiles) -> Result<(), CaError> {
        let failed = |source| CaError::Certificate { action: format!("issue a certificate for {peer}"), source };
        let now = OffsetDateTime::now_utc();
        let not_after = time::Duration::try_from(lifetime).ok().and_then(|lifetime| now.checked_add(lifetime));
        let key = new_key()?;
        let mut params = CertificateParams::new(vec![peer.dns_name()]).map_err(failed)?;
        params.not_before = now - CLOCK_SKEW;
        params.not_after = not_after.ok_or(CaError::Lifetime { lifetime })?;
        params.distinguished_name.push(DnType::CommonName, peer.to_string());
        params.use_authority_key_identifier_extension = true;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        for folder in [&files.ca, &files.certificate, &files.key].into_iter().filter_map(|file| file.parent()) {
            make_private_folder(folder)?;
        }
        let new = [
            NewFile::write(&files.ca, &self.certificate, 0o644)?,
            NewFile::write(&files.key, &key.serialize_pem(), 0o600)?,
            NewFile::write(&files.certificate, &certificate.pem(), 0o644)?,
        ];
        let renamed: Vec<PathBuf> = new.into_iter().map(NewFile::rename).collect::<Result<_, _>>()?;
        renamed.iter().try_for_each(|path| sync_folder(path))
    }
}

fn new_key() -> Result<KeyPair, CaError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|source| CaError::Certificate { action: "make a key".to_owned(), source })
}

fn authority_params() -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + CA_LIFETIME;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    // Each authority has a name of its own, so that a peer of another one is told "unknown issuer", not "bad signature".
    params.distinguished_name.push(DnType::CommonName, format!("podferry local CA {}", Uuid::now_v7().simple()));
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DnsName(peer::DOMAIN.to_owned())],
        excluded_subtrees: Vec::new(),
    });
    params
}

/// Makes a folder that only its owner may enter; one that is there stays as it is.
fn make_private_folder(folder: &Path) -> Result<(), CaError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|source| CaError::File { action: "make the folder", path: folder.to_owned(), source })
}

/// Writes a file so that readers see the old content or the new, also after a power cut.
fn write_atomically(path: &Path, content: &str, mode: u32) -> Result<(), CaError> {
    sync_folder(&NewFile::write(path, content, mode)?.rename()?)
}

/// A file's new content, on disk beside the old one; gone when it is not renamed.
struct NewFile {
    path: PathBuf,
    content: NamedTempFile,
}

impl NewFile {
    fn write(path: &Path, content: &str, mode: u32) -> Result<Self, CaError> {
        let write = || {
            let permissions = Permissions::from_mode(mode);
            let mut file = tempfile::Builder::new().permissions(permissions).tempfile_in(folder_of(path))?;
            file.write_all(content.as_bytes())?;
            file.as_file().sync_all()?;
            Ok(Self { path: path.to_owned(), content: file })
        };
        write().map_err(unwritten(path))
    }

    /// From here on readers see it. Gives its path; only [`sync_folder`] makes it outlive a power cut.
    fn rename(self) -> Result<PathBuf, CaError> {
        match self.content.persist(&self.path) {
            Ok(_) => Ok(self.path),
            Err(error) => Err(unwritten(&self.path)(error.error)),
        }
    }
}

fn sync_folder(path: &Path) -> Result<(), CaError> {
    File::open(folder_of(path)).and_then(|folder| folder.sync_all()).map_err(unwritten(path))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn unwritten(path: &Path) -> impl Fn(io::Error) -> CaError {
    move |source| CaError::File { action: "write", path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::super::Identity;
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn keys_are_for_the_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let ca = LocalCa::create(&folder.path().join("ca")).unwrap();
        let files = IdentityFiles::in_folder(folder.path().join("c/d"));
        ca.issue(&Peer::Coordinator, Duration::from_secs(60), &files).unwrap();
        assert_eq!(mode(&folder.path().join("ca/ca-key.pem")), 0o600);
        assert_eq!(mode(&files.key), 0o600);
        assert_eq!(mode(&folder.path().join("c/d")), 0o700);
        let left: Vec<_> = fs::read_dir(folder.path().join("c/d")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }

    #[test]
    fn an_authority_is_not_overwritten_and_can_be_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let first = LocalCa::create(folder.path()).unwrap();
        assert!(matches!(LocalCa::create(folder.path()), Err(CaError::Exists { .. })));
        let again = LocalCa::load(folder.path()).unwrap();
        assert_eq!(again.certificate(), first.certificate());
        let files = IdentityFiles::in_folder(folder.path().join("me"));
        again.issue(&Peer::client("me").unwrap(), Duration::from_secs(60), &files).unwrap();
        assert_eq!(Identity::load(files).unwrap().peer(), Peer::client("me").unwrap());
    }

    #[test]
    fn a_certificate_begins_before_now_for_clocks_that_are_behind() {
        let folder = tempfile::tempdir().unwrap();
        let files = IdentityFiles::in_folder(folder.path().join("me"));
        let ca = LocalCa::create(folder.path()).unwrap();
        ca.issue(&Peer::Coordinator, Duration::from_secs(60), &files).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(&fs::read(&files.certificate).unwrap()).unwrap();
        let begins = pem.parse_x509().unwrap().validity().not_before.to_datetime();
        let age = OffsetDateTime::now_utc() - begins;
        assert!(age >= CLOCK_SKEW && age < CLOCK_SKEW + time::Duration::minutes(1), "{age}");
    }

    #[test]
    fn who_loads_while_certificates_are_replaced_gets_a_pair_that_goes_together() {
        let folder = tempfile::tempdir().unwrap();
        let files = IdentityFiles::in_folder(folder.path().join("me"));
        let ca = LocalCa::create(folder.path()).unwrap();
        let issue = || ca.issue(&Peer::Coordinator, Duration::from_secs(60), &files).unwrap();
        issue();
        std::thread::scope(|scope| {
            let issuer = scope.spawn(|| {
                for _ in 0..100 {
                    issue();
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            while !issuer.is_finished() {
                Identity::load(files.clone()).unwrap();
            }
        });
    }

    #[test]
    fn an_endless_lifetime_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let ca = LocalCa::create(folder.path()).unwrap();
        let files = IdentityFiles::in_folder(folder.path().join("me"));
        let refused = ca.issue(&Peer::Coordinator, Duration::MAX, &files);
        assert!(matches!(refused, Err(CaError::Lifetime { .. })), "{refused:?}");
    }
}
