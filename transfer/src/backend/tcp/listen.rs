//! Where peers connect to: a listener for each address.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use kvcache_core::{Error, ErrorKind, Result};

use super::connection::{Connection, Role};
use super::target::TargetSide;
use super::tls::TlsConfig;
use super::{set_congestion, tune};
use crate::agent::Exports;
use crate::backend::spare::Spare;
use crate::reactor::{Interest, Reactor, Source, Token};

/// Connections that a listener accepts.
const CONNECTIONS_MAX: usize = 4096;

/// Accepts connections at one address.
pub(super) struct Listener {
    socket: TcpListener,
    exports: Arc<Exports>,
    reactor: Arc<Reactor>,
    token: OnceLock<Token>,
    accepted: Mutex<Vec<Weak<Connection>>>,
    spare: Spare,
    tls: Option<TlsConfig>,
}

impl Listener {
    pub(super) fn start(
        exports: &Arc<Exports>,
        reactor: &Arc<Reactor>,
        address: SocketAddr,
        congestion: Option<&str>,
        tls: Option<&TlsConfig>,
    ) -> Result<Arc<Self>> {
        let socket = TcpListener::bind(address)
            .map_err(|e| Error::io(format!("listen on tcp {address}"), e))?;
        socket
            .set_nonblocking(true)
            .map_err(|e| Error::io("make a listener non-blocking", e))?;
        if let Some(name) = congestion {
            // Connections that are accepted have their listener's.
            set_congestion(&socket, name)?;
        }
        let spare = Spare::default();
        spare.keep();
        let listener = Arc::new(Self {
            socket,
            exports: exports.clone(),
            reactor: reactor.clone(),
            token: OnceLock::new(),
            accepted: Mutex::default(),
            spare,
            tls: tls.cloned(),
        });
        let token = reactor.add(
            listener.socket.as_fd(),
            Interest::READABLE,
            listener.clone(),
        )?;
        let _ = listener.token.set(token);
        Ok(listener)
    }

    /// Where it listens, with the port that it was given.
    pub(super) fn address(&self) -> Result<SocketAddr> {
        self.socket
            .local_addr()
            .map_err(|e| Error::io("address of a listener", e))
    }

    /// Has every connection that was accepted look whether memory is wanted back.
    pub(super) fn poke(&self) {
        let accepted = self.accepted().clone();
        accepted
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|connection| connection.poke());
    }

    pub(super) fn close(&self) {
        if let Some(token) = self.token.get() {
            self.reactor.remove(*token, self.socket.as_fd());
        }
    }

    fn accepted(&self) -> MutexGuard<'_, Vec<Weak<Connection>>> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, stream: TcpStream) -> Result<()> {
        let mut accepted = self.accepted();
        accepted.retain(|connection| connection.strong_count() > 0);
        for connection in accepted.iter().filter_map(Weak::upgrade) {
            if let Role::Target(target) = &connection.role
                && target.is_stale()
            {
                connection.lose("no greeting in time");
            }
        }
        if accepted.len() >= CONNECTIONS_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{CONNECTIONS_MAX} connections"),
            ));
        }
        tune(&stream)?;
        stream
            .set_nonblocking(true)
            .map_err(|e| Error::io("make it non-blocking", e))?;
        let session = self.tls.as_ref().map(TlsConfig::accept).transpose()?;
        let role = Role::Target(TargetSide::new(self.exports.clone()));
        let connection = Connection::start((stream, session), &self.reactor, role)?;
        accepted.push(Arc::downgrade(&connection));
        drop(accepted);
        Ok(())
    }
}

impl Source for Listener {
    fn ready(&self, _readiness: Interest) {
        loop {
            match self.socket.accept() {
                Ok((stream, from)) => {
                    if let Err(error) = self.accept(stream) {
                        tracing::warn!(%error, %from, "a tcp connection was not accepted");
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "accept a tcp connection");
                    // Whoever is shed sees the connection closed, and tries again or elsewhere.
                    if !self.spare.shed(|| drop(self.socket.accept())) {
                        return;
                    }
                }
            }
        }
    }

    fn orphaned(&self) {}
}
