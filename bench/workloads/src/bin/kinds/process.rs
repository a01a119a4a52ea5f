//! A tree of processes: a child in a session of its own, its child, one that has died, and orphans to be collected.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, getppid, getsid, setsid};

use crate::files::{self, LOCKS};
use crate::memory::{self, Shared};
use crate::{Kind, Outcome, same};

/// Every how many looks an orphan is made.
const ORPHANS: u64 = 8;

/// A conversation in lines.
struct Line(BufReader<UnixStream>);

impl Line {
    fn ask(&mut self, question: &str) -> Outcome<String> {
        self.0.get_mut().write_all(format!("{question}\n").as_bytes())?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        Ok(answer.trim().to_owned())
    }
}

/// Starts this program in another role, with a socket as standard input.
fn start(role: &str, stdin: impl Into<Stdio>, stdout: impl Into<Stdio>) -> Outcome<Child> {
    Ok(Command::new(std::env::current_exe()?).arg(role).stdin(stdin).stdout(stdout).spawn()?)
}

pub(crate) fn make() -> Outcome<Vec<Kind>> {
    let locks = LOCKS.into_iter().map(|(kind, path)| files::take(kind, path)).collect::<Outcome<Vec<_>>>()?;
    let memfd = memory::memfd()?;
    let shared = Shared::map(memfd.try_clone()?)?;
    shared.fill()?;
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(Duration::from_secs(10)))?;
    // The child finds the memfd as its standard output.
    let child = start("child", OwnedFd::from(theirs), memfd)?;
    let mut line = Line(BufReader::new(ours));
    let tree = line.ask("tree")?;
    let mut turn = 0;
    let family = Kind::new("process-tree", move || {
        turn += 1;
        same("the tree", &line.ask("tree")?, &tree)?;
        same("the child's pid", &tree.split(' ').next(), &Some(child.id().to_string().as_str()))?;
        same("the locks that the child gets", &line.ask("locks")?.as_str(), &"none")?;
        let _held = &locks;
        if turn % ORPHANS == 0 {
            collect(line.ask("orphan")?.parse()?)?;
        }
        shared.compare()?;
        shared.set_counter(turn)?;
        same("the child's answer", &line.ask("memfd")?, &turn.to_string())?;
        same("the child's word in shared memory", &shared.counter()?, &(turn + 1_000_000))
    });
    Ok(vec![family, dead()?])
}

/// Waits for an orphan, which has become ours.
fn collect(orphan: i32) -> Outcome {
    let since = Instant::now();
    loop {
        match waitpid(Pid::from_raw(orphan), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, 5)) => return Ok(()),
            Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD | nix::errno::Errno::EINTR) => {}
            other => return Err(format!("the orphan ended as {other:?}").into()),
        }
        if since.elapsed() > Duration::from_secs(5) {
            return Err(format!("the orphan {orphan} was not handed to process 1").into());
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// A child that has ended and was not collected.
fn dead() -> Outcome<Kind> {
    let child = start("end", Stdio::null(), Stdio::null())?;
    let stat = format!("/proc/{}/stat", child.id());
    let state = move || -> Outcome<String> {
        let text = std::fs::read_to_string(&stat)?;
        Ok(text.rsplit_once(") ").map(|(_, rest)| rest[..1].to_owned()).unwrap_or_default())
    };
    while state()? != "Z" {
        thread::sleep(Duration::from_millis(1));
    }
    Ok(Kind::new("zombie", move || {
        let _kept = &child;
        same("its state", &state()?.as_str(), &"Z")
    }))
}

/// What the other processes do.
pub(crate) fn play(role: &str, arguments: &[String]) -> Outcome {
    match role {
        "child" => child(),
        "grandchild" => grandchild(),
        "orphan" => orphan(),
        "end" => Ok(()),
        "nap" => {
            thread::sleep(Duration::from_millis(20));
            std::process::exit(5);
        }
        other => Err(format!("nobody can play {other} {arguments:?}").into()),
    }
}

/// Answers its parent; has the memfd as standard output.
fn child() -> Outcome {
    setsid()?;
    let shared = Shared::map(std::io::stdout().as_fd().try_clone_to_owned()?)?;
    let (ours, theirs) = UnixStream::pair()?;
    let _grandchild = start("grandchild", OwnedFd::from(theirs), Stdio::null())?;
    let mut grandchild = Line(BufReader::new(ours));
    let parent = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut questions = BufReader::new(parent);
    let mut question = String::new();
    while questions.read_line(&mut question)? > 0 {
        let answer = match question.trim() {
            "tree" => format!("{} {} {} {}", getpid(), getppid(), getsid(None)?, grandchild.ask("tree")?),
            "locks" => free_locks(),
            "orphan" => make_orphan()?,
            "memfd" => {
                shared.compare()?;
                let count = shared.counter()?;
                shared.set_counter(count + 1_000_000)?;
                count.to_string()
            }
            other => format!("cannot {other}"),
        };
        questions.get_mut().write_all(format!("{answer}\n").as_bytes())?;
        question.clear();
    }
    Ok(())
}

/// Which of its parent's locks it gets.
fn free_locks() -> String {
    let got = LOCKS.iter().filter(|(kind, path)| Path::new(path).exists() && files::take(kind, path).is_ok());
    let got: Vec<&str> = got.map(|(kind, _)| *kind).collect();
    if got.is_empty() { "none".to_owned() } else { got.join(",") }
}

/// Starts a process whose parent ends at once; gives its pid.
fn make_orphan() -> Outcome<String> {
    let output = Command::new(std::env::current_exe()?).arg("orphan").stdin(Stdio::null()).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn orphan() -> Outcome {
    let nap = start("nap", Stdio::null(), Stdio::null())?;
    println!("{}", nap.id());
    Ok(())
}

fn grandchild() -> Outcome {
    let mut parent = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut questions = BufReader::new(parent.try_clone()?);
    let mut question = String::new();
    while questions.read_line(&mut question)? > 0 {
        parent.write_all(format!("{} {} {}\n", getpid(), getppid(), getsid(None)?).as_bytes())?;
        question.clear();
    }
    Ok(())
}
