//! `certificates`: an authority in a folder, and what it issues. Needs no coordinator.

use std::path::Path;
use std::time::Duration;

use podferry_common::identity::{CaError, IdentityFiles, LocalCa, Peer};
use podferry_common::{Failure, FailureCode};

use crate::arguments::{Certificates, Output};
use crate::exit::Exit;
use crate::render::{self, Authority, Issued};

/// Makes an authority, or issues a certificate.
pub(super) fn certificates(output: Output, verb: &Certificates) -> Result<Exit, Failure> {
    match verb {
        Certificates::Ca { folder } => {
            LocalCa::create(folder).map_err(|error| failed(&error))?;
            render::authority(output, &Authority::in_folder(folder));
        }
        Certificates::Issue { name, folder, ca, hours } => {
            render::issued(output, &issue(name, folder, ca, *hours)?);
        }
    }
    Ok(Exit::Done)
}

fn issue(name: &Peer, folder: &Path, ca: &Path, hours: u32) -> Result<Issued, Failure> {
    let authority = LocalCa::load(ca).map_err(|error| {
        failed(&error).remedy(format!("make an authority first: podferry certificates ca {}", ca.display()))
    })?;
    let files = IdentityFiles::in_folder(folder);
    let lifetime = Duration::from_secs(u64::from(hours) * 3600);
    authority.issue(name, lifetime, &files).map_err(|error| failed(&error))?;
    Ok(Issued { name: name.dns_name(), files, hours })
}

fn failed(error: &CaError) -> Failure {
    let code = match error {
        CaError::Exists { .. } => FailureCode::AlreadyExists,
        _ => FailureCode::InvalidArgument,
    };
    Failure::from_error(code, error)
}
