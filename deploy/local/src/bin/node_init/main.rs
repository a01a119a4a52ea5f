//! `podferry-node-init`: the first process of a local node.
//!
//! `launch` enters the node's network namespace, makes its mount, pid, uts and ipc namespaces and starts `init` in
//! them, which sets up the node's own mounts and from then on reaps: CRIU's restore fails with `File exists` in a pid
//! namespace whose first process does not.
//!
//! The creator reads the number of init's process from standard output, records it and answers `go`. A creator that
//! was killed in between leaves an end of file there, and the node goes away by itself.

mod streams;

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use clap::{Parser, Subcommand};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sethostname, setsid};

/// First process of a podferry node that lives in namespaces of this machine.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Make the namespaces, start `init` in them and wait for it.
    Launch {
        /// The node's network namespace, a file under /run/netns.
        #[arg(long)]
        netns: PathBuf,
        #[command(flatten)]
        node: Node,
    },
    /// Run `runc create` with its streams on a pipe, or a terminal, whose other end a keeper holds.
    Create {
        /// The file that the container's output is appended to.
        #[arg(long)]
        log: PathBuf,
        /// `podferry-stdio-keeper`, for a pipe.
        #[arg(long, required_unless_present = "console_socket")]
        keeper: Option<PathBuf>,
        /// The socket on which runc hands over the terminal, for a terminal; made here.
        #[arg(long)]
        console_socket: Option<PathBuf>,
        /// runc and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// Hold a container's terminal, which is handed over on the socket that standard input is, and write what comes to
    /// standard error. Started by `create` only.
    Keep,
    /// Issue the certificates of a cluster anew when half of their lifetime is over, while it is up. Started by the
    /// library.
    KeepCertificates {
        /// The cluster's folder.
        folder: PathBuf,
    },
    /// Set up the node's mounts, then reap. Started by `launch` only.
    Init {
        #[command(flatten)]
        node: Node,
    },
}

#[derive(clap::Args, Clone)]
struct Node {
    /// The node's host name.
    #[arg(long)]
    hostname: String,
    /// A folder that becomes a tmpfs of the node's own; may be repeated.
    #[arg(long)]
    tmpfs: Vec<PathBuf>,
}

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let outcome = match Arguments::parse().role {
        Role::Launch { netns, node } => launch(&netns, &node),
        Role::Init { node } => init(&node),
        Role::Create { log, keeper, console_socket, command } => match (console_socket, keeper) {
            (Some(socket), _) => streams::create_on_terminal(&socket, &log, &command),
            (None, Some(keeper)) => streams::create_on_pipe(&keeper, &log, &command),
            (None, None) => Err("neither a keeper nor a console socket".into()),
        },
        Role::Keep => streams::keep(),
        Role::KeepCertificates { folder } => {
            podferry_local::keep_certificates(&folder).map(|()| ExitCode::SUCCESS).map_err(Into::into)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("podferry-node-init: {error}");
        ExitCode::FAILURE
    })
}

fn launch(netns: &Path, node: &Node) -> Outcome<ExitCode> {
    // No terminal's Ctrl-C may reach the node. Fails only for a leader of a process group, who has none to lose.
    let _ = setsid();
    let binary = std::env::current_exe()?;
    let namespace = File::open(netns).map_err(|error| format!("cannot open {}: {error}", netns.display()))?;
    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
    // Held open, it would keep the machine's mount of the namespace busy.
    drop(namespace);
    let namespaces =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
    unshare(namespaces).map_err(|error| format!("cannot make the node's namespaces (root is needed): {error}"))?;

    let mut child = Command::new(binary)
        .args(["init", "--hostname", &node.hostname])
        .args(node.tmpfs.iter().flat_map(|folder| [Path::new("--tmpfs"), folder]))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let answer = announce(&mut child);
    if answer.is_err() {
        // Its namespaces end with it.
        let _ = child.kill();
    }
    let status = child.wait()?;
    answer?;
    // Killing init is how a node is taken down.
    Ok(if status.signal().is_some() { ExitCode::SUCCESS } else { exit_code(status) })
}

fn exit_code(status: ExitStatus) -> ExitCode {
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// Tells the creator who init is, once init is ready, and waits until the creator has made a note of it.
fn announce(child: &mut Child) -> Outcome<()> {
    let stdout = child.stdout.take().ok_or("init has no standard output")?;
    let mut ready = String::new();
    BufReader::new(stdout).read_line(&mut ready)?;
    if ready.trim() != "ready" {
        return Err("init did not get ready; its own words are above".into());
    }
    println!("{}", child.id());
    io::stdout().flush()?;
    let mut go = String::new();
    io::stdin().lock().read_line(&mut go)?;
    if go.trim() == "go" { Ok(()) } else { Err("the creator of the node is gone".into()) }
}

fn init(node: &Node) -> Outcome<ExitCode> {
    // Blocked before there is a child, so that no end of one is missed between looking and waiting.
    let signals = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGTERM]);
    signals.thread_block()?;
    set_up_mounts(node)?;
    sethostname(&node.hostname)?;
    println!("ready");
    io::stdout().flush()?;
    loop {
        reap()?;
        if signals.wait()? == Signal::SIGTERM {
            // The kernel kills all that is left in the pid namespace.
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn reap() -> Outcome<()> {
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn set_up_mounts(node: &Node) -> Outcome<()> {
    let unset = None::<&str>;
    mount(unset, "/", unset, MsFlags::MS_REC | MsFlags::MS_PRIVATE, unset)?;
    // The machine's own mounts below /run would be hidden only, and keep its network namespaces alive.
    for point in mount_points_below("/run")? {
        // One below another may have gone with it.
        let _ = umount2(point.as_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    // CRIU keeps what it found out about the kernel in /run, but only when that is a tmpfs.
    tmpfs(Path::new("/run"), "mode=755")?;
    for folder in ["/run/runc", "/run/netns", "/run/lock"] {
        fs::create_dir_all(folder)?;
    }
    // As `ip netns add` would do at its first use, so that a later look at the node's mounts finds no more than now.
    mount(Some("/run/netns"), "/run/netns", unset, MsFlags::MS_BIND, unset)?;
    mount(unset, "/run/netns", unset, MsFlags::MS_SHARED, unset)?;
    for folder in &node.tmpfs {
        fs::create_dir_all(folder)?;
        tmpfs(folder, "mode=700")?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, unset)
        .map_err(|error| format!("cannot mount the node's own /proc: {error}"))?;
    Ok(())
}

fn tmpfs(folder: &Path, options: &str) -> Outcome<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), folder, Some("tmpfs"), flags, Some(options))
        .map_err(|error| format!("cannot mount a tmpfs on {}: {error}", folder.display()).into())
}

/// The innermost first. `proc_pid_mountinfo(5)`: field 5, blanks and such as octal escapes.
fn mount_points_below(folder: &str) -> Outcome<Vec<String>> {
    let prefix = format!("{folder}/");
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split_whitespace().nth(4));
    let mut below: Vec<String> = points
        .filter(|point| point.starts_with(&prefix))
        .map(|point| point.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        .collect();
    below.reverse();
    Ok(below)
}
