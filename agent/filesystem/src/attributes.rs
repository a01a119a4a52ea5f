//! Which extended attributes travel with a layer.

/// The longest redirect the kernel follows (`OVL_REDIRECT_MAX` in `fs/overlayfs/overlayfs.h`).
const REDIRECT_MAX: usize = 256;

/// What becomes of an attribute that the source has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It travels.
    Keep,
    /// It means something on its own node only.
    Drop,
    /// Without it, and with it, the target would show other content than the source.
    Unmovable(&'static str),
}

/// Decides by name and value. The receiver takes what this keeps and refuses everything else, so that a hostile source
/// can set nothing here that an honest one could not.
pub(crate) fn fate(name: &[u8], value: &[u8]) -> Fate {
    // With the mount option userxattr overlayfs keeps its marks under user.overlay.
    for prefix in [b"trusted.overlay.".as_slice(), b"user.overlay."] {
        if let Some(mark) = name.strip_prefix(prefix) {
            return overlay_mark(mark, value);
        }
    }
    let kept = name.strip_prefix(b"user.").is_some_and(|rest| !rest.is_empty())
        || matches!(name, b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default");
    if kept && !name.contains(&0) { Fate::Keep } else { Fate::Drop }
}

/// The kernel's Documentation/filesystems/overlayfs.rst names these marks.
fn overlay_mark(mark: &[u8], value: &[u8]) -> Fate {
    match mark {
        b"opaque" if matches!(value, b"y" | b"x") => Fate::Keep,
        b"whiteout" if value.is_empty() || value == b"y" => Fate::Keep,
        b"redirect" if is_safe_redirect(value) => Fate::Keep,
        b"redirect" => Fate::Unmovable("its overlay redirect leads out of the layer"),
        b"metacopy" => Fate::Unmovable(
            "it holds metadata only, its content is in a lower layer (overlay option metacopy=on): \
             mount the container's root with metacopy=off",
        ),
        // origin, impure, nlink, uuid: file handles and counts that hold for the source's lower layers.
        _ => Fate::Drop,
    }
}

/// A renamed directory's old place: one name, or a path from the layer's root. The kernel resolves it inside the lower
/// layers and takes no `..`; nothing else is let through to it all the same.
fn is_safe_redirect(value: &[u8]) -> bool {
    let path = value.strip_prefix(b"/").unwrap_or(value);
    let absolute = path.len() < value.len();
    let mut components = path.split(|byte| *byte == b'/');
    value.len() <= REDIRECT_MAX
        && !value.contains(&0)
        && components.clone().all(|name| !matches!(name, b"" | b"." | b".."))
        && (absolute || components.nth(1).is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_the_container_or_the_overlay_wrote() {
        for (name, value) in [
            (b"user.comment".as_slice(), b"\0\xff".as_slice()),
            (b"trusted.overlay.opaque", b"y"),
            (b"user.overlay.opaque", b"y"),
            (b"trusted.overlay.redirect", b"/usr/share/old"),
            (b"trusted.overlay.redirect", b"old"),
            (b"security.capability", b"\x01\0\0\x02"),
            (b"system.posix_acl_default", b"\x02\0\0\0"),
        ] {
            assert_eq!(fate(name, value), Fate::Keep, "{}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn drops_what_belongs_to_one_node() {
        for name in ["trusted.overlay.origin", "trusted.overlay.impure", "security.selinux", "trusted.other", "user."] {
            assert_eq!(fate(name.as_bytes(), b"y"), Fate::Drop, "{name}");
        }
    }

    #[test]
    fn redirects_stay_inside() {
        for value in ["../etc", "/a/../b", "/", "a/b", "", "/a//b", "/.", "a\0"] {
            assert!(!is_safe_redirect(value.as_bytes()), "{value:?}");
        }
        assert!(!is_safe_redirect(&[b'a'; REDIRECT_MAX + 1]));
    }
}
