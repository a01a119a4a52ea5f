//! `/proc/self/mountinfo`, described in the kernel's Documentation/filesystems/proc.rst, section 3.5.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// One mount of this process' mount namespace.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) point: PathBuf,
    pub(crate) filesystem: Vec<u8>,
    /// The file system's own options, still escaped: a comma inside a value is `\054` here, one between options is not.
    pub(crate) options: Vec<u8>,
}

/// All mounts, in the order in which the kernel lists them: of two on one point the later one hides the earlier.
pub(crate) fn mounts() -> Result<Vec<Mount>> {
    let text = fs::read(MOUNTINFO).map_err(|source| Error::Io { doing: "read", path: MOUNTINFO.into(), source })?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The mount on exactly this path.
pub(crate) fn mounted_on(path: &Path) -> Result<Option<Mount>> {
    Ok(mounts()?.into_iter().rfind(|mount| mount.point == path))
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let point = path(&unescape(fields.nth(4)?));
    // Optional fields end with a lone hyphen.
    fields.find(|field| *field == b"-")?;
    let filesystem = fields.next()?.to_vec();
    Some(Mount { point, filesystem, options: fields.nth(1)?.to_vec() })
}

/// Undoes the kernel's octal escapes (`mangle_path`, `seq_escape`): `\040` is a space.
pub(crate) fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let escape = if first == b'\\' { octal(tail) } else { None };
        plain.push(escape.unwrap_or(first));
        rest = if escape.is_some() { &tail[3..] } else { tail };
    }
    plain
}

fn octal(digits: &[u8]) -> Option<u8> {
    digits.get(..3)?.iter().try_fold(0_u8, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        value.checked_mul(8)?.checked_add(digit)
    })
}

pub(crate) fn path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}

/// Whether something is mounted on a path strictly below this one.
pub(crate) fn mount_below(dir: &Path) -> Result<Option<PathBuf>> {
    let below = |mount: &Mount| {
        mount.point.starts_with(dir) && mount.point.as_os_str().as_bytes() != dir.as_os_str().as_bytes()
    };
    Ok(mounts()?.into_iter().find(below).map(|mount| mount.point))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_line_with_escapes_and_optional_fields() {
        let line =
            br"36 35 98:0 /mnt1 /with\040space rw,noatime shared:1 master:2 - overlay overlay rw,lowerdir=/a\054b";
        let mount = parse(line).expect("a whole line");
        assert_eq!(mount.point, Path::new("/with space"));
        assert_eq!(mount.filesystem, b"overlay");
        assert_eq!(mount.options, br"rw,lowerdir=/a\054b");
    }

    #[test]
    fn leaves_alone_what_is_no_escape() {
        assert_eq!(unescape(br"a\:b\134\04"), br"a\:b\\04");
        assert_eq!(unescape(br"\777"), br"\777");
        assert_eq!(parse(b"1 2 3"), None);
    }
}
