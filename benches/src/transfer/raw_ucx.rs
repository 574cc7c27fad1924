//! UCX alone, in a program of its own: `benches/transfer/raw_ucx.c`.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};

use super::plan::{Plan, Way};
use super::subject::Subject;

/// How long one command may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Two processes that move the blocks of a plan with bare calls of UCX.
pub(super) struct RawUcx {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl RawUcx {
    /// Starts `program`.
    ///
    /// # Errors
    /// `Io` when it cannot be started.
    pub(super) fn start(program: &Path, plan: &Plan) -> Result<Self> {
        let shape = plan.shape;
        let way = match shape.way {
            Way::Read => "read",
            Way::Write => "write",
        };
        let place = program.display().to_string();
        let failed = |error| Error::io(place.clone(), error);
        let mut child = Command::new(program)
            .args([
                way,
                &shape.blocks().to_string(),
                &shape.block_bytes.to_string(),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::new(ErrorKind::Internal, "pipes that were asked for"));
        };
        // One answer for each command, which is waited for before the next.
        let (sender, answers) = sync_channel(1);
        let listening = move || {
            let lines = BufReader::new(output).lines();
            lines
                .map_while(std::io::Result::ok)
                .take_while(|line| sender.send(line.clone()).is_ok())
                .for_each(drop);
        };
        std::thread::Builder::new()
            .name("raw-ucx".to_owned())
            .spawn(listening)
            .map_err(failed)?;
        let mut own = Self {
            child,
            input,
            answers,
        };
        for places in [&plan.local, &plan.remote] {
            let bytes: Vec<u8> = places
                .iter()
                .flat_map(|place| place.to_ne_bytes())
                .collect();
            own.input.write_all(&bytes).map_err(failed)?;
        }
        Ok(own)
    }

    fn ask(&mut self, command: &[u8]) -> Result<u64> {
        let failed = |text: String| Error::new(ErrorKind::Internal, format!("raw UCX: {text}"));
        self.input
            .write_all(command)
            .map_err(|error| failed(error.to_string()))?;
        let answer = self.answers.recv_timeout(PATIENCE).map_err(|_| {
            let text = format!("no answer within {} s", PATIENCE.as_secs());
            Error::new(ErrorKind::Timeout, format!("raw UCX: {text}"))
        })?;
        let value = answer
            .strip_prefix("ok ")
            .and_then(|text| text.parse().ok());
        value.ok_or_else(|| failed(answer))
    }
}

impl Subject for RawUcx {
    fn name(&self) -> &'static str {
        "raw-ucx"
    }

    fn poison(&mut self) -> Result<()> {
        self.ask(b"p").map(|_| ())
    }

    fn move_all(&mut self) -> Result<u64> {
        self.ask(b"a")
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        let mut command = vec![b'b'];
        command.extend_from_slice(&position.to_ne_bytes());
        self.ask(&command)
    }

    fn verify(&mut self) -> Result<()> {
        match self.ask(b"v")? {
            0 => Ok(()),
            wrong => {
                let text = format!("raw UCX: {wrong} blocks are wrong");
                Err(Error::new(ErrorKind::Corrupt, text))
            }
        }
    }

    fn cpu(&mut self) -> Result<Duration> {
        self.ask(b"c").map(Duration::from_micros)
    }
}

impl Drop for RawUcx {
    fn drop(&mut self) {
        // The other process of it ends with its socket.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
