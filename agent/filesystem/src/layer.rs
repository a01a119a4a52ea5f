//! Overlay mounts: finding the one under a container, and making one.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount, move_mount,
};

use crate::error::{Error, Result, failed};
use crate::mountinfo::{self, Mount, unescape};

/// mount(2) takes one page of options and the byte that ends it.
const MOUNT_DATA_MAX: usize = 4095;
/// Both ends must show the same content for files whose metadata alone was changed, and hard links must not be counted
/// against the other node's lower layers.
const OPTIONS: &str = "index=off,metacopy=off";

/// The directories of one overlay mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// The read-only layers, the topmost first.
    pub lower: Vec<PathBuf>,
    /// What the container wrote.
    pub upper: PathBuf,
    /// overlayfs' work directory, on the upper's file system.
    pub work: PathBuf,
}

/// Where a container's writes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WritableLayer {
    /// Into the upper directory of an overlay mount.
    Overlay(Overlay),
    /// Straight into the root directory, or nowhere: it is no writable overlay.
    Plain {
        /// The container's root directory.
        rootfs: PathBuf,
    },
    /// Into a directory of the node that is mounted in the container.
    Volume {
        /// The directory.
        dir: PathBuf,
    },
}

impl WritableLayer {
    /// Finds the writable layer of a root directory that this process sees mounted.
    pub fn of(rootfs: &Path) -> Result<Self> {
        let real =
            rootfs.canonicalize().map_err(|source| Error::Io { doing: "find", path: rootfs.to_owned(), source })?;
        let mount = mountinfo::mounted_on(&real)?.filter(|mount| mount.filesystem == b"overlay");
        let overlay = mount.map(|mount| parse(&mount)).transpose()?.flatten();
        Ok(overlay.map_or_else(|| Self::Plain { rootfs: rootfs.to_owned() }, Self::Overlay))
    }

    /// The directory with all that moves.
    ///
    /// # Errors
    /// [`Error::NotAnOverlay`] when that cannot be told from what does not.
    pub fn moved(&self) -> Result<&Path> {
        match self {
            Self::Overlay(overlay) => Ok(&overlay.upper),
            Self::Volume { dir } => Ok(dir),
            Self::Plain { rootfs } => Err(Error::NotAnOverlay { rootfs: rootfs.clone() }),
        }
    }
}

impl Overlay {
    /// Mounts the layers on a directory.
    pub fn mount(&self, target: &Path) -> Result<()> {
        let options = self.options();
        if options.len() > MOUNT_DATA_MAX {
            return self.mount_one_by_one(target);
        }
        let options = CString::new(options).map_err(|_| failed("mount an overlay on", target)(Errno::INVAL))?;
        mount("overlay", target, "overlay", MountFlags::empty(), Some(options.as_c_str()))
            .map_err(failed("mount an overlay on", target))
    }

    fn options(&self) -> Vec<u8> {
        let lower: Vec<Vec<u8>> = self.lower.iter().map(|path| escape(path, b"\\,:")).collect();
        let mut options = b"lowerdir=".to_vec();
        options.extend(lower.join(&b':'));
        for (name, path) in [(",upperdir=", &self.upper), (",workdir=", &self.work)] {
            options.extend(name.as_bytes());
            options.extend(escape(path, b"\\,"));
        }
        options.push(b',');
        options.extend(OPTIONS.as_bytes());
        options
    }

    /// More layers than fit in one page go in one by one (`lowerdir+`, Linux 6.5), each at most 255 bytes long.
    fn mount_one_by_one(&self, target: &Path) -> Result<()> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("make an overlay for", target))?;
        let context = &context;
        for lower in &self.lower {
            fsconfig_set_string(context, "lowerdir+", lower).map_err(failed("add the lower layer", lower))?;
        }
        for (name, path) in [("upperdir", &self.upper), ("workdir", &self.work)] {
            fsconfig_set_string(context, name, path).map_err(failed("add the directory", path))?;
        }
        for (name, value) in OPTIONS.split(',').filter_map(|option| option.split_once('=')) {
            fsconfig_set_string(context, name, value).map_err(failed("set the options of", target))?;
        }
        fsconfig_create(context).map_err(failed("make an overlay for", target))?;
        let made = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
            .map_err(failed("make an overlay for", target))?;
        move_mount(made, "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(failed("mount an overlay on", target))
    }
}

impl Overlay {
    /// Mounts on a directory what the root will be like, with an empty writable layer in `scratch` instead of its own: for whoever needs
    /// a root before that layer is here. Links on the way to mount points lead where they will.
    pub fn mount_placeholder(&self, target: &Path, scratch: &Path) -> Result<()> {
        let placeholder = Self { lower: self.lower.clone(), upper: scratch.join("upper"), work: scratch.join("work") };
        for dir in [&placeholder.upper, &placeholder.work] {
            std::fs::create_dir_all(dir).map_err(|source| Error::Io { doing: "make", path: dir.clone(), source })?;
        }
        placeholder.mount(target)
    }
}

/// Whether anything is mounted on a directory. One that does not exist has nothing.
pub fn is_mounted(target: &Path) -> Result<bool> {
    match target.canonicalize() {
        Ok(real) => Ok(mountinfo::mounted_on(&real)?.is_some()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Io { doing: "find", path: target.to_owned(), source }),
    }
}

/// Unmounts all that is mounted on a directory. That nothing is, or that it does not exist, is no error.
pub fn unmount(target: &Path) -> Result<()> {
    loop {
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(failed("unmount", target)(errno)),
        }
    }
}

fn escape(path: &Path, special: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if special.contains(&byte) {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    escaped
}

/// The directories in the mount's options; none when it has no upper directory and so is read-only.
fn parse(mount: &Mount) -> Result<Option<Overlay>> {
    let mut lower = Vec::new();
    let (mut upper, mut work) = (None, None);
    for option in mount.options.split(|byte| *byte == b',') {
        let Some(equals) = option.iter().position(|byte| *byte == b'=') else { continue };
        let value = unescape(&option[equals + 1..]);
        match &option[..equals] {
            b"lowerdir" => lower.extend(split_layers(&value)),
            // Since Linux 6.7 each layer can have an option of its own; its value is the path as it is.
            b"lowerdir+" => lower.push(value),
            b"upperdir" => upper = Some(value),
            b"workdir" => work = Some(value),
            _ => {}
        }
    }
    let Some(upper) = upper else { return Ok(None) };
    let wrong = |why| Error::MountOptions { rootfs: mount.point.clone(), why };
    let work = work.ok_or_else(|| wrong("it has an upperdir and no workdir".into()))?;
    Ok(Some(Overlay {
        lower: lower.iter().map(|value| locate(value, &mount.point)).collect::<Result<_>>()?,
        upper: locate(&upper, &mount.point)?,
        work: locate(&work, &mount.point)?,
    }))
}

/// Splits `lowerdir` at the colons that no backslash escapes.
fn split_layers(value: &[u8]) -> Vec<Vec<u8>> {
    let mut layers = vec![Vec::new()];
    let mut bytes = value.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b':' => layers.push(Vec::new()),
            b'\\' => layers.last_mut().into_iter().for_each(|layer| layer.extend(bytes.next())),
            byte => layers.last_mut().into_iter().for_each(|layer| layer.push(byte)),
        }
    }
    // Data-only layers stand behind a double colon: an empty name between two colons.
    layers.retain(|layer| !layer.is_empty());
    layers
}

/// An option's directory. Whoever mounted may have given it relative to a working directory, to fit more layers into a
/// page (containerd and Docker do), and kernels differ in whether they show their own escapes.
fn locate(value: &[u8], mount_point: &Path) -> Result<PathBuf> {
    let unescaped: PathBuf = mountinfo::path(&split_escapes(value));
    let shown = mountinfo::path(value);
    let candidates = [shown.clone(), unescaped];
    let bases = std::iter::once(Path::new("/")).chain(mount_point.ancestors());
    for base in bases {
        let found =
            candidates.iter().find(|path| (path.is_absolute() || base.parent().is_some()) && base.join(path).is_dir());
        if let Some(path) = found {
            return Ok(base.join(path));
        }
    }
    Err(Error::MountOptions {
        rootfs: mount_point.to_owned(),
        why: format!("its directory {} is not found from here (is it in another mount namespace?)", shown.display()),
    })
}

fn split_escapes(value: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(&byte) = bytes.next() {
        plain.extend(if byte == b'\\' { bytes.next() } else { Some(&byte) });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_split_at_unescaped_colons() {
        assert_eq!(split_layers(br"/a\:b:/c\\d::/e"), [b"/a:b".to_vec(), br"/c\d".to_vec(), b"/e".to_vec()]);
    }

    #[test]
    fn options_escape_what_overlayfs_splits_at() {
        let overlay = Overlay { lower: vec!["/a:b".into(), "/c".into()], upper: "/u,v".into(), work: r"/w\x".into() };
        let options = String::from_utf8(overlay.options()).unwrap();
        assert_eq!(options, format!(r"lowerdir=/a\:b:/c,upperdir=/u\,v,workdir=/w\\x,{OPTIONS}"));
    }

    #[test]
    fn a_read_only_overlay_has_no_writable_layer() {
        let options = b"ro,lowerdir=/usr:/etc".to_vec();
        let mount = Mount { point: "/".into(), filesystem: b"overlay".to_vec(), options };
        assert_eq!(parse(&mount).unwrap(), None);
    }

    #[test]
    fn a_lost_directory_is_named() {
        let options = b"rw,lowerdir=/usr,upperdir=/nowhere-at-all,workdir=/usr".to_vec();
        let mount = Mount { point: "/".into(), filesystem: b"overlay".to_vec(), options };
        let error = parse(&mount).unwrap_err().to_string();
        assert!(error.contains("/nowhere-at-all"), "{error}");
    }
}
