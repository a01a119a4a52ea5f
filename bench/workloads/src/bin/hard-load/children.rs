//! Processes of the same program, which are asked over pipes.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// All of them.
#[derive(Debug)]
pub(crate) struct Children {
    all: Vec<Mutex<Asked>>,
    next: AtomicUsize,
}

#[derive(Debug)]
struct Asked {
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// The last numbers of wrong pages that it told.
    wrong: u64,
    _process: Child,
}

impl Children {
    /// Starts so many with the arguments of this process. They end with it, when their standard input is closed.
    pub(crate) fn start(count: u16) -> io::Result<Self> {
        let all = (1..=count).map(|number| Asked::start(number).map(Mutex::new)).collect::<io::Result<_>>()?;
        Ok(Self { all, next: AtomicUsize::new(0) })
    }

    /// Asks the one whose turn it is; how many wrong pages all have told of so far.
    pub(crate) fn ask_next(&self) -> io::Result<u64> {
        if self.all.is_empty() {
            return Ok(0);
        }
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.all.len();
        ask(&self.all[turn], "check")?;
        Ok(self.all.iter().map(|child| child.lock().unwrap_or_else(PoisonError::into_inner).wrong).sum())
    }

    /// Has all of them look at everything; how many wrong pages there are.
    pub(crate) fn ask_all(&self) -> io::Result<u64> {
        self.all.iter().map(|child| ask(child, "check-all")).sum()
    }
}

fn ask(child: &Mutex<Asked>, question: &str) -> io::Result<u64> {
    child.lock().unwrap_or_else(PoisonError::into_inner).ask(question)
}

impl Asked {
    fn start(number: u16) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1)).args(["--child", &number.to_string()]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let gone = || io::Error::other("a child has no standard streams");
        let (questions, answers) = (process.stdin.take().ok_or_else(gone)?, process.stdout.take().ok_or_else(gone)?);
        Ok(Self { questions, answers: BufReader::new(answers), wrong: 0, _process: process })
    }

    fn ask(&mut self, question: &str) -> io::Result<u64> {
        writeln!(self.questions, "{question}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        self.wrong = answer.trim().parse().map_err(|_| io::Error::other(format!("it answers {answer:?}")))?;
        Ok(self.wrong)
    }
}
