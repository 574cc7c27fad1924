//! The target's process, as the initiator holds it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};

use super::plan::Shape;
use super::protocol::{Answer, Ask};

/// How long the target may take to answer: it fills and compares its whole memory in that time.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
/// Answers that may wait; there is only ever one.
const ANSWERS_MAX: usize = 1;

/// A running target; killed when dropped.
pub(super) struct TargetProcess {
    child: Child,
    asks: ChildStdin,
    answers: Receiver<std::io::Result<String>>,
}

impl TargetProcess {
    /// Starts this program again as a target.
    pub(super) fn start() -> Result<Self> {
        let failed = |error| Error::io("start the target's process", error);
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .arg("transfer-target")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for the initiator alone: it ends the target when it is done with it.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let (Some(asks), Some(lines)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::new(ErrorKind::Internal, "the target has no pipes"));
        };
        let (sender, answers) = sync_channel(ANSWERS_MAX);
        let read = move || {
            for line in BufReader::new(lines).lines() {
                if sender.send(line).is_err() {
                    return;
                }
            }
        };
        let reading = std::thread::Builder::new()
            .name("answers".to_owned())
            .spawn(read);
        let process = Self {
            child,
            asks,
            answers,
        };
        reading.map_err(|error| Error::io("start a thread", error))?;
        Ok(process)
    }

    fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        let lost = |what: &str| Error::new(ErrorKind::PeerLost, format!("the target {what}"));
        let mut line = serde_json::to_string(ask).map_err(|error| {
            Error::new(ErrorKind::Internal, "encode a message").with_source(error)
        })?;
        line.push('\n');
        self.asks
            .write_all(line.as_bytes())
            .map_err(|error| lost("does not listen").with_source(error))?;
        let answer = self
            .answers
            .recv_timeout(ANSWER_DEADLINE)
            .map_err(|_| lost("ended or does not answer"))?
            .map_err(|error| lost("cannot be read").with_source(error))?;
        match serde_json::from_str(&answer) {
            Ok(Answer::Failed { is_corrupt, text }) => {
                let kind = if is_corrupt {
                    ErrorKind::Corrupt
                } else {
                    ErrorKind::Internal
                };
                Err(Error::new(kind, text).at("target"))
            }
            Ok(answer) => Ok(answer),
            Err(error) => Err(lost(&format!("answered {answer:?}")).with_source(error)),
        }
    }

    /// Lets an agent there export memory for this case: its region and metadata.
    pub(super) fn expose(&mut self, shape: Shape) -> Result<(u64, Vec<u8>)> {
        match self.ask(&Ask::Expose {
            shape,
            is_raw: false,
        })? {
            Answer::Exposed { region, metadata } => Ok((region, metadata)),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets it serve memory for this case over a plain socket: its port on loopback.
    pub(super) fn listen(&mut self, shape: Shape) -> Result<u16> {
        match self.ask(&Ask::Expose {
            shape,
            is_raw: true,
        })? {
            Answer::Listening { port } => Ok(port),
            other => Err(unexpected(&other)),
        }
    }

    /// Overwrites its memory.
    pub(super) fn poison(&mut self) -> Result<()> {
        self.done(&Ask::Poison)
    }

    /// Lets it compare its memory with what it must be.
    pub(super) fn verify(&mut self) -> Result<()> {
        self.done(&Ask::Verify)
    }

    fn done(&mut self, ask: &Ask) -> Result<()> {
        match self.ask(ask)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Its CPU time so far.
    pub(super) fn cpu(&mut self) -> Result<Duration> {
        match self.ask(&Ask::Cpu)? {
            Answer::Cpu { nanoseconds } => Ok(Duration::from_nanos(nanoseconds)),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(answer: &Answer) -> Error {
    Error::new(
        ErrorKind::Internal,
        format!("the target answered {answer:?}"),
    )
}

impl Drop for TargetProcess {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
