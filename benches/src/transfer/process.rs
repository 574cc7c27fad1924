//! The target of transfers, as the one who asks holds it: a process of this host, or one that listens somewhere.

use std::io::{BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::plan::Shape;
use super::protocol::{Answer, Ask, line, read_line};

/// How long a target may take to answer, unless the user names it: it fills and compares its whole memory in that time.
pub(super) const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
/// Answers that may wait; there is only ever one.
const ANSWERS_MAX: usize = 1;

/// Where a target is.
#[derive(Clone, Debug)]
pub(super) enum TargetAt {
    /// Started for this case, on this host.
    Spawned,
    /// A `kv-bench transfer target` that listens.
    Address {
        /// What it is called in errors.
        name: String,
        /// `host:port`.
        address: String,
        /// How long it may take to connect, and to answer.
        deadline: Duration,
    },
}

/// A target that answers; a spawned one is killed when this is dropped, another one forgets this case.
pub(super) struct Target {
    name: String,
    link: Link,
    asks: Box<dyn Write + Send>,
    answers: Receiver<Result<String>>,
    deadline: Duration,
}

enum Link {
    Child(Child),
    Socket(TcpStream),
}

impl Target {
    /// Starts or reaches it.
    ///
    /// # Errors
    /// `Io` or `PeerLost` with its name; `Version` when it is of another version.
    pub(super) fn open(at: &TargetAt) -> Result<Self> {
        let mut target = match at {
            TargetAt::Spawned => Self::start()?,
            TargetAt::Address {
                name,
                address,
                deadline,
            } => Self::connect(name, address, *deadline)?,
        };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        target.done(&Ask::Hello { version })?;
        Ok(target)
    }

    /// Starts this program again as a target.
    fn start() -> Result<Self> {
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
        Self::over(
            "the target".to_owned(),
            Link::Child(child),
            Box::new(asks),
            lines,
            ANSWER_DEADLINE,
        )
    }

    fn connect(name: &str, address: &str, deadline: Duration) -> Result<Self> {
        let failed = |error| Error::io(format!("target {name}"), error);
        let mut places = address.to_socket_addrs().map_err(failed)?;
        let place = places
            .next()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("target {name}: no address")))?;
        let stream = TcpStream::connect_timeout(&place, deadline).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_write_timeout(Some(deadline)).map_err(failed)?;
        let (asks, lines) = (
            stream.try_clone().map_err(failed)?,
            stream.try_clone().map_err(failed)?,
        );
        Self::over(
            format!("target {name}"),
            Link::Socket(stream),
            Box::new(asks),
            lines,
            deadline,
        )
    }

    fn over(
        name: String,
        link: Link,
        asks: Box<dyn Write + Send>,
        lines: impl Read + Send + 'static,
        deadline: Duration,
    ) -> Result<Self> {
        let (sender, answers) = sync_channel(ANSWERS_MAX);
        let read = move || {
            let mut reader = BufReader::new(lines);
            while let Some(line) = read_line(&mut reader).transpose() {
                let is_end = line.is_err();
                if sender.send(line).is_err() || is_end {
                    return;
                }
            }
        };
        let reading = std::thread::Builder::new()
            .name("answers".to_owned())
            .spawn(read);
        let target = Self {
            name,
            link,
            asks,
            answers,
            deadline,
        };
        reading.map_err(|error| Error::io("start a thread", error))?;
        Ok(target)
    }

    /// Where this process is reached by it, and it by this process: the ends of the connection, or loopback.
    pub(super) fn addresses(&self) -> (IpAddr, IpAddr) {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        match &self.link {
            Link::Child(_) => (loopback, loopback),
            Link::Socket(stream) => {
                let ip = |address: std::io::Result<SocketAddr>| {
                    address.map_or(loopback, |address| address.ip())
                };
                (ip(stream.local_addr()), ip(stream.peer_addr()))
            }
        }
    }

    fn lost(&self, what: &str) -> Error {
        Error::new(ErrorKind::PeerLost, format!("{} {what}", self.name))
    }

    /// Asks without waiting for the answer, which [`Target::receive`] takes.
    pub(super) fn send(&mut self, ask: &Ask) -> Result<()> {
        let line = line(ask)?;
        self.asks
            .write_all(line.as_bytes())
            .map_err(|error| self.lost("does not listen").with_source(error))
    }

    /// The answer to what was sent, which must come before the deadline.
    pub(super) fn receive(&mut self) -> Result<Answer> {
        let until = Instant::now() + self.deadline;
        let answer = self
            .answers
            .recv_timeout(until.saturating_duration_since(Instant::now()))
            .map_err(|error| match error {
                std::sync::mpsc::RecvTimeoutError::Timeout => {
                    self.lost(&format!("does not answer within {:?}", self.deadline))
                }
                std::sync::mpsc::RecvTimeoutError::Disconnected => self.lost("ended"),
            })?
            .map_err(|error| self.lost("cannot be read").with_source(error))?;
        match serde_json::from_str(&answer) {
            Ok(Answer::Failed { is_corrupt, text }) => {
                let kind = if is_corrupt {
                    ErrorKind::Corrupt
                } else {
                    ErrorKind::Internal
                };
                Err(Error::new(kind, text).at(self.name.clone()))
            }
            Ok(answer) => Ok(answer),
            Err(error) => {
                let shown: String = answer.chars().take(80).collect();
                Err(self.lost(&format!("answered {shown:?}")).with_source(error))
            }
        }
    }

    fn ask(&mut self, ask: &Ask) -> Result<Answer> {
        self.send(ask)?;
        self.receive()
    }

    fn unexpected(&self, answer: &Answer) -> Error {
        Error::new(
            ErrorKind::Internal,
            format!("{} answered {answer:?}", self.name),
        )
    }

    /// Lets an agent there export memory for this case: its region and metadata.
    pub(super) fn expose(&mut self, shape: Shape) -> Result<(u64, Vec<u8>)> {
        self.exposed(&Ask::Expose {
            shape,
            is_raw: false,
        })
    }

    /// What it exposed for this case, with metadata that are not older than anybody else's.
    pub(super) fn whereabouts(&mut self) -> Result<(u64, Vec<u8>)> {
        self.exposed(&Ask::Whereabouts)
    }

    fn exposed(&mut self, ask: &Ask) -> Result<(u64, Vec<u8>)> {
        match self.ask(ask)? {
            Answer::Exposed { region, metadata } => Ok((region, metadata)),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Lets it serve memory for this case over plain sockets: where.
    pub(super) fn listen(&mut self, shape: Shape) -> Result<SocketAddr> {
        match self.ask(&Ask::Expose {
            shape,
            is_raw: true,
        })? {
            Answer::Listening { port } => Ok(SocketAddr::new(self.addresses().1, port)),
            other => Err(self.unexpected(&other)),
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

    /// Lets it do something that has no other answer than that it is done.
    pub(super) fn done(&mut self, ask: &Ask) -> Result<()> {
        match self.ask(ask)? {
            Answer::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// What a move that was sent came to: bytes, and how long it took there.
    pub(super) fn moved(&mut self) -> Result<(u64, Duration)> {
        match self.receive()? {
            Answer::Moved { bytes, nanoseconds } => Ok((bytes, Duration::from_nanos(nanoseconds))),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Its CPU time so far.
    pub(super) fn cpu(&mut self) -> Result<Duration> {
        match self.ask(&Ask::Cpu)? {
            Answer::Cpu { nanoseconds } => Ok(Duration::from_nanos(nanoseconds)),
            other => Err(self.unexpected(&other)),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // It may have ended already.
        match &mut self.link {
            Link::Child(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Link::Socket(stream) => {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
    }
}
