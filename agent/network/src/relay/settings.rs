//! Settings of the kernel for one network namespace (`/proc/sys/net`).

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A setting below `/proc/sys/net`, with a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Its path, such as `ipv4/conf/all/rp_filter`.
    pub name: String,
    /// Its value, as the file has it.
    pub value: String,
}

impl Setting {
    pub(super) fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into() }
    }

    pub(super) fn set(&self) -> Result<()> {
        let failed = |source| Error::Setting { doing: "change", name: self.name.clone(), source };
        fs::write(path(&self.name), &self.value).map_err(failed)
    }

    /// The same setting with the value that it has.
    fn now(&self) -> Result<Self> {
        read(&self.name).map(|value| Self::new(self.name.clone(), value))
    }
}

/// What those of these settings are that are to be changed.
pub(super) fn differing(wanted: &[Setting]) -> Result<Vec<Setting>> {
    let now: Result<Vec<Setting>> = wanted.iter().map(Setting::now).collect();
    Ok(now?.into_iter().zip(wanted).filter(|(now, wanted)| now.value != wanted.value).map(|(now, _)| now).collect())
}

pub(super) fn apply(wanted: &[Setting]) -> Result<()> {
    wanted.iter().try_for_each(Setting::set)
}

/// Puts settings back, the last one first. Those of an interface that is gone are gone with it.
pub(super) fn restore(before: &[Setting]) -> Result<()> {
    before.iter().rev().try_for_each(|setting| match setting.set() {
        Err(Error::Setting { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        set => set,
    })
}

pub(super) fn read(name: &str) -> Result<String> {
    let failed = |source| Error::Setting { doing: "read", name: name.to_owned(), source };
    fs::read_to_string(path(name)).map(|value| value.trim().to_owned()).map_err(failed)
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(name)
}
