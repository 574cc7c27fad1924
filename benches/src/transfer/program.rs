//! Other programs that move the blocks of a plan: bare UCX, NIXL and Mooncake, each with two processes of its own, and PyTorch.
//!
//! Such a program gets the way, the number of blocks and their size as its last arguments, and the places of all blocks
//! on both sides on its standard input. Then come commands of one letter, each answered by one line: `ok` and numbers,
//! or what went wrong. It times its moves itself, so that what is said between the processes costs it nothing.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};

use super::args::RivalArgs;
use super::plan::{BackendKind, Plan};
use super::process::TargetAt;
use super::subject::{Cpu, Subject};

/// How long one command may take; the first waits until everything is set up.
const PATIENCE: Duration = Duration::from_secs(120);
/// Lines that a program may say beside its answers, before it is given up.
const CHATTER_MAX: usize = 1000;

const NIXL: &str = concat!(
    include_str!("../../transfer/rival.py"),
    "\n\n",
    include_str!("../../transfer/nixl.py")
);
const MOONCAKE: &str = concat!(
    include_str!("../../transfer/rival.py"),
    "\n\n",
    include_str!("../../transfer/mooncake.py")
);
const TORCH: &str = concat!(
    include_str!("../../transfer/rival.py"),
    "\n\n",
    include_str!("../../transfer/torch_copies.py")
);

/// A program that can be asked.
#[derive(Clone, Debug)]
pub(super) struct Rival {
    /// As in reports.
    pub(super) name: &'static str,
    /// What it stands beside.
    backend: BackendKind,
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
}

impl Rival {
    /// Those that the user named; for memory of the GPU with this number.
    pub(super) fn chosen(args: &RivalArgs, gpu: u32) -> Vec<Self> {
        let mut rivals = Vec::new();
        if let Some(program) = &args.raw_ucx {
            rivals.push(Self {
                name: "raw-ucx",
                backend: BackendKind::Ucx,
                program: program.clone(),
                arguments: Vec::new(),
                environment: Vec::new(),
            });
        }
        let python = |name, backend, script: &str, folder: &Path| Self {
            name,
            backend,
            program: args.python.clone(),
            arguments: vec!["-c".to_owned(), script.to_owned()],
            environment: vec![("PYTHONPATH", folder.display().to_string())],
        };
        if let Some(folder) = &args.nixl {
            rivals.push(python("nixl", BackendKind::Shm, NIXL, folder));
            let mut over_tcp = python("nixl-tcp", BackendKind::Tcp, NIXL, folder);
            over_tcp.environment.push(("UCX_TLS", "tcp".to_owned()));
            rivals.push(over_tcp);
        }
        if let Some(folder) = &args.mooncake {
            rivals.push(python("mooncake", BackendKind::Tcp, MOONCAKE, folder));
        }
        let sides = [
            (BackendKind::Cuda, "host"),
            (BackendKind::CudaWithin, "within"),
        ];
        for (backend, other) in sides {
            rivals.extend(args.torch.iter().map(|program| Self {
                name: "torch",
                backend,
                program: program.clone(),
                arguments: vec![
                    "-c".to_owned(),
                    TORCH.to_owned(),
                    format!("cuda:{gpu}"),
                    other.to_owned(),
                ],
                environment: Vec::new(),
            }));
        }
        rivals
    }

    /// Whether it moves what this plan moves: from one process of this host to another.
    pub(super) fn is_beside(&self, plan: &Plan, at: &TargetAt) -> bool {
        self.backend == plan.shape.backend && matches!(at, TargetAt::Spawned)
    }
}

/// A running rival.
pub(super) struct Program {
    name: &'static str,
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
    own_time: Option<Duration>,
}

impl Program {
    /// Starts it, and waits until it is ready.
    ///
    /// # Errors
    /// `Io` when it cannot be started, `Internal` with what it said when it ends, `Timeout` when it is silent.
    pub(super) fn start(rival: &Rival, plan: &Plan) -> Result<Self> {
        let shape = plan.shape;
        let failed = |error| Error::io(rival.program.display().to_string(), error);
        let mut child = Command::new(&rival.program)
            .args(&rival.arguments)
            .args([
                shape.way.name(),
                &shape.blocks().to_string(),
                &shape.block_bytes.to_string(),
            ])
            .envs(rival.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::new(ErrorKind::Internal, "pipes that were asked for"));
        };
        // One answer for each command, which is waited for before the next.
        let (sender, answers) = sync_channel(CHATTER_MAX);
        let listening = move || {
            let lines = BufReader::new(output).lines();
            lines
                .map_while(std::io::Result::ok)
                .take_while(|line| sender.send(line.clone()).is_ok())
                .for_each(drop);
        };
        std::thread::Builder::new()
            .name("answers".to_owned())
            .spawn(listening)
            .map_err(failed)?;
        let mut own = Self {
            name: rival.name,
            child,
            input,
            answers,
            own_time: None,
        };
        for places in [&plan.local, &plan.remote] {
            let bytes: Vec<u8> = places
                .iter()
                .flat_map(|place| place.to_ne_bytes())
                .collect();
            // What it says before it ends tells more than that it does not read.
            if own.input.write_all(&bytes).is_err() {
                break;
            }
        }
        own.ask(b"c")?;
        Ok(own)
    }

    fn ask(&mut self, command: &[u8]) -> Result<[u64; 2]> {
        let name = self.name;
        let failed = |text: String| Error::new(ErrorKind::Internal, format!("{name}: {text}"));
        let written = self.input.write_all(command);
        let mut said = Vec::new();
        // Libraries write to the standard output too.
        for _ in 0..CHATTER_MAX {
            let line = match self.answers.recv_timeout(PATIENCE) {
                Ok(line) => line,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                    let text = format!("{name}: no answer within {} s", PATIENCE.as_secs());
                    return Err(Error::new(ErrorKind::Timeout, text));
                }
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            };
            if let Some(numbers) = line.strip_prefix("ok ") {
                let mut numbers = numbers.split(' ').map(str::parse);
                if let (Some(Ok(first)), Some(Ok(second))) = (numbers.next(), numbers.next()) {
                    return Ok([first, second]);
                }
            }
            said.push(line);
        }
        written.map_err(|error| failed(format!("{}: {error}", said.join("; "))))?;
        Err(failed(format!("ended: {}", said.join("; "))))
    }

    /// Bytes, of a move that it timed.
    fn moved(&mut self, command: &[u8]) -> Result<u64> {
        let [bytes, nanoseconds] = self.ask(command)?;
        self.own_time = Some(Duration::from_nanos(nanoseconds));
        Ok(bytes)
    }
}

impl Subject for Program {
    fn name(&self) -> &'static str {
        self.name
    }

    fn poison(&mut self) -> Result<()> {
        self.ask(b"p").map(|_| ())
    }

    fn move_all(&mut self) -> Result<u64> {
        self.moved(b"a")
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        let mut command = vec![b'b'];
        command.extend_from_slice(&position.to_ne_bytes());
        self.moved(&command)
    }

    fn verify(&mut self) -> Result<()> {
        match self.ask(b"v")? {
            [0, _] => Ok(()),
            [wrong, _] => {
                let text = format!("{}: {wrong} blocks are wrong", self.name);
                Err(Error::new(ErrorKind::Corrupt, text))
            }
        }
    }

    fn cpu(&mut self) -> Result<Cpu> {
        let [initiator, target] = self.ask(b"c")?;
        Ok(Cpu {
            initiator: Duration::from_micros(initiator),
            target: Some(Duration::from_micros(target)),
        })
    }

    fn is_rival(&self) -> bool {
        true
    }

    fn own_time(&self) -> Option<Duration> {
        self.own_time
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // The other process of it ends with its socket.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
