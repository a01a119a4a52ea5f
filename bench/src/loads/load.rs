//! The loads: what runs in each container, and who asks it.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
};

use podferry_local::{FIRST_CONTAINER_ADDRESS, Place, Workload};

use crate::{
    clients,
    error::{Error, Result},
    load::Kind,
    stage::run_script,
};

/// The program of the loads that are made up.
const MADE_UP: &str = "podferry-hard-load";
/// Whose `PostgreSQL`'s data are in its image.
const POSTGRES_USER: u32 = 70;
/// Where all of them listen.
pub(crate) const PORT: u16 = 7000;

/// A container that is hard to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    name: &'static str,
    description: &'static str,
    content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// `podferry-hard-load` with these arguments.
    MadeUp(&'static [&'static str]),
    /// An image of `deploy/setup/service-image.sh`, and what is run in it.
    Service(&'static [&'static str]),
    /// `PostgreSQL` of such an image, which does not run as root.
    PostgreSql(&'static [&'static str]),
}

use Content::{MadeUp, PostgreSql, Service};

const LOADS: [Load; 12] = [
    Load { name: "dirty-1", description: "512 MiB, 1 %/s written", content: MadeUp(&["--mib", "512"]) },
    Load {
        name: "dirty-25",
        description: "512 MiB, 25 %/s written",
        content: MadeUp(&["--mib", "512", "--percent", "25"]),
    },
    Load {
        name: "dirty-100",
        description: "512 MiB, 100 %/s written",
        content: MadeUp(&["--mib", "512", "--percent", "100"]),
    },
    Load {
        name: "threads-64",
        description: "512 MiB, 1 %/s written by 64 threads",
        content: MadeUp(&["--mib", "512", "--threads", "64"]),
    },
    Load {
        name: "processes-30",
        description: "30 processes with 16 MiB each, 1 %/s written",
        content: MadeUp(&["--mib", "16", "--processes", "30"]),
    },
    Load {
        name: "shared-512",
        description: "512 MiB of shared memory, 1 %/s written",
        content: MadeUp(&["--mib", "512", "--backing", "shared"]),
    },
    Load {
        name: "thp-on",
        description: "512 MiB of huge pages, 25 %/s written",
        content: MadeUp(&["--mib", "512", "--percent", "25", "--backing", "huge"]),
    },
    Load {
        name: "thp-off",
        description: "512 MiB without huge pages, 25 %/s written",
        content: MadeUp(&["--mib", "512", "--percent", "25", "--backing", "small"]),
    },
    Load {
        name: "go",
        description: "a Go service with 256 MiB of live heap",
        content: Service(&["/usr/bin/line-server"]),
    },
    Load {
        name: "node",
        description: "a Node.js service with 128 MiB of live heap",
        content: Service(&["/usr/bin/node", "--max-old-space-size=512", "/srv/line-server.js"]),
    },
    Load {
        name: "jvm",
        description: "a service on OpenJDK 17 with 256 MiB of live heap, 768 MiB at most",
        content: Service(&["/usr/bin/java", "-Xms768m", "-Xmx768m", "-cp", "/srv", "LineServer"]),
    },
    Load {
        name: "postgresql",
        description: "PostgreSQL 15 with 512 MiB of shared_buffers, full",
        content: PostgreSql(&[
            "/usr/lib/postgresql/15/bin/postgres",
            "-D",
            "/data/pg",
            "-p",
            "7000",
            "-c",
            "listen_addresses=*",
            "-c",
            "unix_socket_directories=",
            "-c",
            "shared_buffers=512MB",
            "-c",
            "max_wal_size=4GB",
            "-c",
            "dynamic_shared_memory_type=posix",
            // Its compiler is not in the image.
            "-c",
            "jit=off",
        ]),
    },
];

impl Load {
    /// All of them, in the order in which they are measured.
    pub fn all() -> &'static [Self] {
        &LOADS
    }

    /// Those with these names; all without any.
    pub fn named(names: &[String]) -> Result<Vec<Self>> {
        if names.is_empty() {
            return Ok(LOADS.into());
        }
        let find = |name: &String| {
            let known = || LOADS.map(|load| load.name).join(", ");
            let found = LOADS.into_iter().find(|load| load.name == *name);
            found.ok_or_else(|| Error::Misplaced(format!("there is no load {name:?}: there are {}", known())))
        };
        names.iter().map(find).collect()
    }

    /// Its name, which is the workload's.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// What it is, in a few words.
    pub fn description(self) -> &'static str {
        self.description
    }

    /// The address it has on every node.
    pub fn address(self) -> SocketAddr {
        SocketAddr::from((self.ip(), PORT))
    }

    /// What its client does.
    pub fn kind(self) -> Kind {
        match self.content {
            MadeUp(_) | Service(_) => Kind::Lines,
            PostgreSql(_) => Kind::Sql,
        }
    }

    fn ip(self) -> Ipv4Addr {
        let offset = LOADS.iter().position(|load| load.name == self.name).and_then(|place| u32::try_from(place).ok());
        Ipv4Addr::from(u32::from(FIRST_CONTAINER_ADDRESS) + offset.unwrap_or_default())
    }

    /// Its container; an image that is made up lies below `folder`.
    pub(crate) fn workload(self, folder: &Path) -> Result<Workload> {
        let service = |arguments: &[&str]| {
            Ok(Workload::new(self.name, service_image(self.name)?, arguments.iter().copied(), self.ip()))
        };
        match self.content {
            MadeUp(arguments) => made_up(folder, self.name, arguments, self.ip()),
            Service(arguments) => service(arguments),
            PostgreSql(arguments) => Ok(Workload { user: POSTGRES_USER, ..service(arguments)? }),
        }
    }

    /// Does from the client side what has to be done once before it is moved.
    pub(crate) fn prepare(self, client: &Place) -> Result<()> {
        if matches!(self.content, PostgreSql(_)) { clients::fill_sql(client, self.address()) } else { Ok(()) }
    }
}

/// A container with `podferry-hard-load` and these arguments of it.
pub(crate) fn made_up(folder: &Path, name: &str, arguments: &[&str], ip: Ipv4Addr) -> Result<Workload> {
    let program = format!("/usr/bin/{MADE_UP}");
    let words = [&[program.as_str()], arguments].concat();
    Ok(Workload::new(name, made_up_image(folder)?, words, ip))
}

fn made_up_image(folder: &Path) -> Result<PathBuf> {
    let image = folder.join("images").join(MADE_UP);
    let rootfs = image.join("rootfs");
    if rootfs.exists() {
        return Ok(rootfs);
    }
    fs::create_dir_all(&image).map_err(|source| Error::File { action: "create", path: image.clone(), source })?;
    let script = podferry_local::workspace_root().join("deploy/setup/image.sh");
    let program = podferry_local::default_binaries().join(MADE_UP);
    run_script(Command::new(script).arg(MADE_UP).arg(&image).arg("--").arg(program))?;
    Ok(rootfs)
}

fn service_image(name: &str) -> Result<PathBuf> {
    let root = podferry_local::workspace_root();
    run_script(Command::new(root.join("deploy/setup/service-image.sh")).arg(name))?;
    Ok(root.join(".podferry/images").join(name).join("rootfs"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn loads_are_found_by_their_names_and_differ_in_them_and_in_their_addresses() {
        assert_eq!(Load::named(&[]).unwrap(), LOADS);
        let one = Load::named(&["thp-on".to_owned()]).unwrap();
        assert_eq!(one.iter().map(|load| load.name()).collect::<Vec<_>>(), ["thp-on"]);
        assert!(Load::named(&["x".to_owned()]).unwrap_err().to_string().contains("dirty-25"));
        assert_eq!(LOADS.map(Load::name).into_iter().collect::<BTreeSet<_>>().len(), LOADS.len());
        assert_eq!(LOADS.map(Load::address).into_iter().collect::<BTreeSet<_>>().len(), LOADS.len());
    }
}
