//! The end that owns memory: hands it out by key, takes it back when it is deregistered.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::fs::{Mode, OFlags};
use rustix::net::{SocketFlags, accept_with};

use super::link::{Link, TURN_MESSAGES};
use super::message::{Message, Outcome};
use crate::agent::Exports;
use crate::backend::Operation;
use crate::backend::spare::Spare;
use crate::reactor::{Interest, Reactor, Source};
use crate::region::{RegionCore, RegionId, RegionKey};

/// Processes that may be connected.
const CLIENTS_MAX: usize = 4096;

/// Regions that one client may have mapped.
const MAPPED_MAX: usize = 65_536;

/// Accepts connections.
pub(super) struct Server {
    socket: OwnedFd,
    exports: Arc<Exports>,
    reactor: Arc<Reactor>,
    clients: Mutex<Vec<Weak<Client>>>,
    spare: Spare,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    pub(super) fn new(
        socket: OwnedFd,
        exports: &Arc<Exports>,
        reactor: &Arc<Reactor>,
    ) -> Arc<Self> {
        let spare = Spare::default();
        spare.keep();
        Arc::new(Self {
            socket,
            exports: exports.clone(),
            reactor: reactor.clone(),
            clients: Mutex::default(),
            spare,
        })
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn accept(&self, socket: OwnedFd) -> Result<()> {
        let mut clients = lock(&self.clients);
        clients.retain(|client| client.strong_count() > 0);
        if clients.len() >= CLIENTS_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{CLIENTS_MAX} are connected"),
            ));
        }
        let client = Arc::new(Client {
            link: Link::new(socket, &self.reactor)?,
            exports: self.exports.clone(),
            state: Mutex::default(),
        });
        let messages = Arc::new(Messages(client.clone()));
        client
            .link
            .watch(messages, Arc::new(Death(client.clone())))?;
        clients.push(Arc::downgrade(&client));
        Ok(())
    }

    /// Every client that has the region mapped is told, and counts as its user until it has unmapped it.
    pub(super) fn withdraw(&self, region: &Arc<RegionCore>) {
        let clients = lock(&self.clients).clone();
        for client in clients.iter().filter_map(Weak::upgrade) {
            client.revoke(region);
        }
    }
}

impl Source for Server {
    fn ready(&self, _readiness: Interest) {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.socket, flags) {
                Ok(socket) => {
                    if let Err(error) = self.accept(socket) {
                        tracing::warn!(%error, "a process of this host was not accepted");
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return,
                Err(error) => {
                    tracing::warn!(%error, "accept a process of this host");
                    // Whoever is shed sees the path closed, and tries again or another way.
                    if !self.spare.shed(|| drop(accept_with(&self.socket, flags))) {
                        return;
                    }
                }
            }
        }
    }

    fn orphaned(&self) {}
}

/// A process that maps memory of ours. Lives until it has unmapped everything, or is dead.
struct Client {
    link: Link,
    exports: Arc<Exports>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    name: Option<Arc<str>>,
    /// With the region that waits for it to be unmapped, if it is being deregistered.
    mapped: HashMap<RegionId, Option<Arc<RegionCore>>>,
    /// Nothing can be sent or received any more.
    closed: bool,
}

impl Client {
    fn handle(&self, message: Message) -> Result<()> {
        match message {
            Message::Hello { name, wanted } => {
                let outcome = self.greet(&name, wanted);
                self.answer(0, Outcome::of(outcome))
            }
            Message::Map { id, region, key } => match self.map(region, &key) {
                Ok((outcome, file)) => self.link.send(&Message::Done { id, outcome }, Some(file)),
                Err(error) => self.answer(id, Outcome::of(Err(error))),
            },
            Message::Unmapped { region } => {
                self.unmapped(region);
                Ok(())
            }
            Message::Notify { id, bytes } => {
                let name = lock(&self.state).name.clone();
                let Some(name) = name else {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        "a notification before a greeting",
                    ));
                };
                self.answer(id, Outcome::of(self.exports.deliver(&name, bytes)))
            }
            Message::Done { .. } | Message::Revoke { .. } => Err(Error::new(
                ErrorKind::Corrupt,
                "a message that only owners of memory send",
            )),
        }
    }

    fn answer(&self, id: u64, outcome: Outcome) -> Result<()> {
        self.link.send(&Message::Done { id, outcome }, None)
    }

    fn greet(&self, name: &str, wanted: crate::metadata::Incarnation) -> Result<()> {
        let own = self.exports.incarnation();
        if wanted != own {
            let text = format!("incarnation {wanted:?} is gone, this is {own:?}");
            return Err(Error::new(ErrorKind::PeerLost, text));
        }
        self.exports.check_allowed(name)?;
        lock(&self.state).name = Some(name.into());
        Ok(())
    }

    /// The memory of a region: a descriptor that allows no more than the region does.
    fn map(&self, id: RegionId, key: &RegionKey) -> Result<(Outcome, OwnedFd)> {
        if lock(&self.state).name.is_none() {
            return Err(Error::new(ErrorKind::Denied, "a map before a greeting"));
        }
        let used = self
            .exports
            .admit(id, key, Operation::Write)
            .or_else(|_| self.exports.admit(id, key, Operation::Read))?;
        let region = used.region();
        let Some(file) = region.host().and_then(|memory| memory.shared_file()) else {
            let text = format!("region {id} is not in shared memory");
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let writable = region.options().remote_write;
        let file = if writable {
            file.try_clone()
                .map_err(|e| Error::io("clone a descriptor", e))
        } else {
            read_only(file)
        }?;
        let mut state = lock(&self.state);
        if state.mapped.len() >= MAPPED_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{MAPPED_MAX} regions are mapped"),
            ));
        }
        // Either this sees that the region was closed, or whoever closed it finds the entry.
        if region.is_closed() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("region {id} is deregistered"),
            ));
        }
        state.mapped.insert(id, None);
        Ok((
            Outcome::Granted {
                bytes: region.bytes(),
                writable,
            },
            file,
        ))
    }

    fn revoke(&self, region: &Arc<RegionCore>) {
        let mut state = lock(&self.state);
        let Some(waiting) = state.mapped.get_mut(&region.id()) else {
            return;
        };
        region.hold();
        *waiting = Some(region.clone());
        let closed = state.closed;
        drop(state);
        // After a failure only the process's death ends its use.
        if !closed
            && let Err(error) = self.link.send(
                &Message::Revoke {
                    region: region.id(),
                },
                None,
            )
        {
            tracing::debug!(%error, pid = self.link.pid(), "revoke shared memory");
        }
    }

    fn unmapped(&self, id: RegionId) {
        let mut state = lock(&self.state);
        if let Some(Some(region)) = state.mapped.remove(&id) {
            region.leave();
        }
        let over = state.closed && state.mapped.is_empty();
        drop(state);
        if over {
            self.link.ignore_death();
        }
    }

    /// Nothing more comes over the socket. What is mapped stays so until the process dies.
    fn hang_up(&self) {
        self.link.ignore_messages();
        let mut state = lock(&self.state);
        state.closed = true;
        let over = state.mapped.is_empty();
        drop(state);
        if over {
            self.link.ignore_death();
        }
    }

    /// A dead process uses nothing.
    fn bury(&self) {
        let mapped = std::mem::take(&mut lock(&self.state).mapped);
        mapped
            .into_values()
            .flatten()
            .for_each(|region| region.leave());
        self.hang_up();
    }
}

/// Opens shared memory again, for reading only.
fn read_only(file: &OwnedFd) -> Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::io(format!("open {path} read-only"), e.into()))
}

/// A client's socket.
struct Messages(Arc<Client>);

impl Source for Messages {
    fn ready(&self, readiness: Interest) {
        if readiness.writable && self.0.link.flush().is_err() {
            return self.0.hang_up();
        }
        for _ in 0..TURN_MESSAGES {
            let outcome = match self.0.link.receive() {
                Ok(None) => return,
                // Descriptors that a client sends are closed: none are asked for.
                Ok(Some((message, _))) => self.0.handle(message),
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                if error.kind() != ErrorKind::PeerLost {
                    tracing::warn!(%error, pid = self.0.link.pid(), "a path through shared memory");
                }
                return self.0.hang_up();
            }
        }
    }

    fn orphaned(&self) {}
}

/// A client's process.
struct Death(Arc<Client>);

impl Source for Death {
    fn ready(&self, _readiness: Interest) {
        self.0.bury();
    }

    fn orphaned(&self) {
        // Nobody hears of its end any more. The memory is ours and not lent, and a process that still has it
        // mapped keeps the pages, not our mapping.
        self.0.bury();
    }
}
