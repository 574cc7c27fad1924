//! The end that owns memory: accepts processes that want to use it, takes it back when it is deregistered.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::net::{SocketFlags, accept_with};

use super::Access;
use super::client::{Client, Lender};
use crate::agent::Exports;
use crate::backend::spare::Spare;
use crate::reactor::{Interest, Reactor, Source};
use crate::region::RegionCore;

/// Processes that may be connected.
const CLIENTS_MAX: usize = 4096;

/// Accepts connections.
pub(super) struct Server<A: Access> {
    socket: OwnedFd,
    lender: Arc<Lender<A>>,
    reactor: Arc<Reactor>,
    clients: Mutex<Clients<A>>,
    spare: Spare,
}

struct Clients<A> {
    known: Vec<Weak<Client<A>>>,
    /// No more are accepted.
    closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<A: Access> Server<A> {
    pub(super) fn new(
        socket: OwnedFd,
        access: Arc<A>,
        exports: &Arc<Exports>,
        reactor: &Arc<Reactor>,
    ) -> Arc<Self> {
        let spare = Spare::default();
        spare.keep();
        Arc::new(Self {
            socket,
            lender: Arc::new(Lender {
                access,
                exports: exports.clone(),
                parting: OnceLock::new(),
            }),
            reactor: reactor.clone(),
            clients: Mutex::new(Clients {
                known: Vec::new(),
                closed: false,
            }),
            spare,
        })
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn accept(&self, socket: OwnedFd) -> Result<()> {
        let mut clients = lock(&self.clients);
        if clients.closed {
            return Err(Error::new(ErrorKind::Cancelled, "the agent is closed"));
        }
        clients.known.retain(|client| client.strong_count() > 0);
        if clients.known.len() >= CLIENTS_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{CLIENTS_MAX} are connected"),
            ));
        }
        let client = Client::start(socket, &self.lender, &self.reactor)?;
        clients.known.push(Arc::downgrade(&client));
        Ok(())
    }

    /// Every client that uses the region is told, and counts as its user until it has let go of it.
    pub(super) fn withdraw(&self, region: &Arc<RegionCore>) {
        let clients = lock(&self.clients).known.clone();
        for client in clients.iter().filter_map(Weak::upgrade) {
            client.revoke(region);
        }
    }

    /// Nothing is handed out any more. Memory that others use in place counts as used until they have let go of it, even
    /// when it is deregistered only after the agent is gone.
    pub(super) fn close(&self) {
        let mut clients = lock(&self.clients);
        clients.closed = true;
        let known = clients.known.clone();
        drop(clients);
        for client in known.iter().filter_map(Weak::upgrade) {
            client.part();
        }
    }
}

impl<A: Access> Source for Server<A> {
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
