//! The targets of a mesh, by name: those that the user started somewhere, or some that are started here.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};

use super::super::process::{Target, TargetAt};

/// A target that listens.
pub(super) struct Peer {
    name: String,
    address: String,
    deadline: Duration,
    /// If it was started here; killed when this is dropped.
    child: Option<Child>,
}

/// All of them.
pub(super) struct Peers(Vec<Peer>);

impl Peers {
    /// Those that `[name=]host:port` name.
    ///
    /// # Errors
    /// `Invalid` for two of one name, and for less than two.
    pub(super) fn named(peers: &[String], deadline: Duration) -> Result<Self> {
        let peer = |text: &String| {
            let (name, address) = text.split_once('=').unwrap_or((text, text));
            Peer {
                name: name.to_owned(),
                address: address.to_owned(),
                deadline,
                child: None,
            }
        };
        let peers: Vec<Peer> = peers.iter().map(peer).collect();
        if peers.len() < 2 {
            return Err(Error::new(ErrorKind::Invalid, "--peers: less than two"));
        }
        for (number, peer) in peers.iter().enumerate() {
            if peers[..number].iter().any(|other| other.name == peer.name) {
                let context = format!("--peers: {} is there twice", peer.name);
                return Err(Error::new(ErrorKind::Invalid, context));
            }
        }
        Ok(Self(peers))
    }

    /// Starts some on loopback: `p0`, `p1`, …
    ///
    /// # Errors
    /// `Io` when one cannot be started, `Timeout` when it does not say where it listens.
    pub(super) fn spawn(count: u32, deadline: Duration) -> Result<Self> {
        let peers = (0..count).map(|number| Peer::spawn(format!("p{number}"), deadline));
        peers.collect::<Result<_>>().map(Self)
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    pub(super) fn name(&self, number: usize) -> &str {
        &self.0[number].name
    }

    /// A session with one.
    pub(super) fn open(&self, number: usize) -> Result<Target> {
        self.0[number].open(self.0[number].deadline)
    }

    /// A session with each.
    pub(super) fn open_all(&self) -> Result<Vec<Target>> {
        (0..self.count()).map(|number| self.open(number)).collect()
    }

    /// The error, and the names of those that do not answer any more.
    pub(super) fn with_the_silent(&self, error: Error, patience: Duration) -> Error {
        let is_silent = |peer: &&Peer| peer.open(patience).is_err();
        let silent = self.0.iter().filter(is_silent);
        let names: Vec<String> = silent.map(Peer::to_string).collect();
        if names.is_empty() {
            return error;
        }
        error.at(format!("no answer any more from {}", names.join(", ")))
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.name == self.address {
            f.write_str(&self.name)
        } else {
            write!(f, "{}={}", self.name, self.address)
        }
    }
}

impl Peer {
    fn open(&self, deadline: Duration) -> Result<Target> {
        Target::open(&TargetAt::Address {
            name: self.to_string(),
            address: self.address.clone(),
            deadline,
        })
    }

    fn spawn(name: String, deadline: Duration) -> Result<Self> {
        let failed = |error| Error::io("start a target", error);
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .args(["transfer", "target", "--listen", "127.0.0.1:0"])
            .args(["--session-bytes", "64G", "--end-with-input"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let output = child.stdout.take();
        let mut peer = Self {
            name,
            address: String::new(),
            deadline,
            child: Some(child),
        };
        let (sender, said) = sync_channel(1);
        let listen = move || {
            let mut line = String::new();
            if let Some(output) = output {
                // What cannot be read has no address in it.
                let _ = BufReader::new(output).read_line(&mut line);
            }
            let _ = sender.send(line);
        };
        std::thread::Builder::new()
            .name("listening".to_owned())
            .spawn(listen)
            .map_err(failed)?;
        let line = said.recv_timeout(deadline).unwrap_or_default();
        let address = line.trim().strip_prefix("listening on ");
        peer.address = address
            .ok_or_else(|| {
                let context = format!("target {} does not say where it listens", peer.name);
                Error::new(ErrorKind::Timeout, context)
            })?
            .to_owned();
        Ok(peer)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
