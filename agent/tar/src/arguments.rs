//! The two calls that CRIU makes, in `criu/filesystems.c`: `tmpfs_dump` and `tmpfs_restore`.

use std::ffi::{OsStr, OsString};
use std::path::Path;

/// How CRIU asks for an archive. Standard input is the directory, standard output the image.
pub const CREATE: [&str; 12] = [
    "--create",
    "--gzip",
    "--no-unquote",
    "--no-wildcards",
    "--one-file-system",
    "--check-links",
    "--preserve-permissions",
    "--sparse",
    "--numeric-owner",
    "--directory",
    "/proc/self/fd/0",
    ".",
];

/// How CRIU asks for an archive to be unpacked; the directory follows. Standard input is the image.
pub const EXTRACT: [&str; 5] = ["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"];

/// Variables that change what GNU tar does with the same arguments: more options, and another archive than standard
/// input or output.
const MEANINGFUL_TO_TAR: [&str; 2] = ["TAR_OPTIONS", "TAPE"];

/// What a command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call<'a> {
    /// An archive of the directory at standard input.
    Create,
    /// The archive at standard input, unpacked.
    Extract {
        /// Where to.
        directory: &'a Path,
    },
    /// Something for the real tar.
    Other,
}

impl<'a> Call<'a> {
    /// Reads the arguments, without the program's name, and the environment. Anything but CRIU's exact words is
    /// [`Call::Other`]: another version of CRIU may mean something else by them.
    pub fn of(arguments: &'a [OsString]) -> Self {
        if MEANINGFUL_TO_TAR.iter().any(|name| std::env::var_os(name).is_some()) {
            return Self::Other;
        }
        Self::of_arguments(arguments)
    }

    fn of_arguments(arguments: &'a [OsString]) -> Self {
        if arguments.iter().map(OsString::as_os_str).eq(CREATE.map(OsStr::new)) {
            return Self::Create;
        }
        match arguments.split_last() {
            Some((directory, rest)) if rest.iter().map(OsString::as_os_str).eq(EXTRACT.map(OsStr::new)) => {
                Self::Extract { directory: Path::new(directory) }
            }
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn criu_s_own_calls_are_known() {
        assert_eq!(Call::of_arguments(&arguments(&CREATE)), Call::Create);
        let extract = arguments(&[&EXTRACT[..], &["/some/where"]].concat());
        assert_eq!(Call::of_arguments(&extract), Call::Extract { directory: Path::new("/some/where") });
    }

    #[test]
    fn every_other_call_is_for_the_real_tar() {
        let extract = [&EXTRACT[..], &["/some/where"]].concat();
        for words in [&CREATE[..], &extract] {
            for missing in words {
                let rest: Vec<_> = words.iter().filter(|word| *word != missing).copied().collect();
                assert_eq!(Call::of_arguments(&arguments(&rest)), Call::Other, "without {missing}");
            }
        }
        let mut more = arguments(&extract);
        more.push("one/member".into());
        assert_eq!(Call::of_arguments(&more), Call::Other);
        assert_eq!(Call::of_arguments(&arguments(&["--version"])), Call::Other);
        assert_eq!(Call::of_arguments(&[]), Call::Other);
    }
}
