//! TCP: a framed protocol of our own, for peers that share no memory. See `docs/wire-format.md`.
//!
//! The side that connects asks, the other one answers; an agent that is asked and asks has a connection for each.
//! Payload moves between socket and region without a copy in between.

mod active;
mod connection;
mod frame;
mod initiator;
mod receive;
mod scatter;
mod target;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::net::sockopt;

use super::spare::Spare;
use super::{Backend, Capabilities, Channel, Fabric, Job, Operation, Refusal};
use crate::agent::{Exports, PeerCard, RemoteRegion};
use crate::reactor::{Interest, Reactor, Source, Token};
use crate::region::{MemoryKind, RegionCore};

use active::Active;
use connection::{Connection, INLINE_BYTES_MAX, Role};
use frame::{Greeting, PREAMBLE_BYTES, decode_outcome, decode_preamble};
use initiator::Initiator;
use target::TargetSide;

const NAME: &str = "tcp";

/// Connections that an agent accepts.
const CONNECTIONS_MAX: usize = 4096;

/// Requests that may wait on one connection; posts above it are told `Busy`.
const REQUESTS_WAITING_MAX: usize = 16_384;

/// How long sent bytes may stay unacknowledged before the peer counts as lost.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);

/// A silent connection is probed after this long, and again in the same intervals.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Listens, and connects.
pub(crate) struct TcpFabric {
    exports: Arc<Exports>,
    reactor: Arc<Reactor>,
    advertised: SocketAddr,
    congestion: Option<String>,
    listener: Arc<Listener>,
}

/// How connections are served and made.
pub(crate) struct Listen {
    pub(crate) address: SocketAddr,
    /// What peers are told; none: the address itself.
    pub(crate) advertised: Option<SocketAddr>,
    /// The congestion control; none: the system's.
    pub(crate) congestion: Option<String>,
}

struct Listener {
    socket: TcpListener,
    exports: Arc<Exports>,
    reactor: Arc<Reactor>,
    token: OnceLock<Token>,
    accepted: Mutex<Vec<Weak<Connection>>>,
    spare: Spare,
}

/// Starts listening.
pub(crate) fn fabric(
    exports: &Arc<Exports>,
    reactor: &Arc<Reactor>,
    listen: Listen,
) -> Result<Arc<dyn Fabric>> {
    let Listen {
        address,
        advertised,
        congestion,
    } = listen;
    let socket =
        TcpListener::bind(address).map_err(|e| Error::io(format!("listen on tcp {address}"), e))?;
    socket
        .set_nonblocking(true)
        .map_err(|e| Error::io("make a listener non-blocking", e))?;
    if let Some(name) = &congestion {
        // Connections that are accepted have their listener's.
        set_congestion(&socket, name)?;
    }
    let bound = socket
        .local_addr()
        .map_err(|e| Error::io("address of a listener", e))?;
    let advertised = advertised.unwrap_or(bound);
    if advertised.ip().is_unspecified() {
        let text = format!("peers cannot connect to {advertised}: name an address to advertise");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    let spare = Spare::default();
    spare.keep();
    let listener = Arc::new(Listener {
        socket,
        exports: exports.clone(),
        reactor: reactor.clone(),
        token: OnceLock::new(),
        accepted: Mutex::default(),
        spare,
    });
    let token = reactor.add(
        listener.socket.as_fd(),
        Interest::READABLE,
        listener.clone(),
    )?;
    let _ = listener.token.set(token);
    Ok(Arc::new(TcpFabric {
        exports: exports.clone(),
        reactor: reactor.clone(),
        advertised,
        congestion,
        listener,
    }))
}

impl Listener {
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
        let role = Role::Target(TargetSide::new(self.exports.clone()));
        let connection = Connection::start(stream, &self.reactor, role)?;
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

/// Small frames go at once; a peer that is gone is noticed.
fn tune(stream: &TcpStream) -> Result<()> {
    let failed = |what: &'static str| move |e: rustix::io::Errno| Error::io(what, e.into());
    stream
        .set_nodelay(true)
        .map_err(|e| Error::io("set TCP_NODELAY", e))?;
    let limit = UNACKNOWLEDGED_MAX.as_millis() as u32;
    sockopt::set_tcp_user_timeout(stream, limit).map_err(failed("set TCP_USER_TIMEOUT"))?;
    sockopt::set_socket_keepalive(stream, true).map_err(failed("set SO_KEEPALIVE"))?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE).map_err(failed("set TCP_KEEPIDLE"))?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE).map_err(failed("set TCP_KEEPINTVL"))
}

fn set_congestion(socket: impl AsFd, name: &str) -> Result<()> {
    const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
    sockopt::set_tcp_congestion(socket, name).map_err(|error| {
        // Privileged processes may use any that is loaded; the others are told what they may.
        let allowed = std::fs::read_to_string(ALLOWED).unwrap_or_default();
        let text = format!(
            "tcp congestion control {name:?} is refused; this system allows: {}",
            allowed.trim()
        );
        Error::new(ErrorKind::Unsupported, text).with_source(std::io::Error::from(error))
    })
}

impl Fabric for TcpFabric {
    fn name(&self) -> &'static str {
        NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        Some(self.advertised.to_string().into_bytes())
    }

    fn listening(&self) -> Option<SocketAddr> {
        self.listener.socket.local_addr().ok()
    }

    fn connect(&self, peer: &PeerCard, timeout: Duration) -> Result<Arc<dyn Channel>> {
        let Some(address) = peer.address(NAME) else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the peer does not listen on tcp",
            ));
        };
        let address = std::str::from_utf8(address)
            .ok()
            .and_then(|text| text.parse().ok());
        let Some(address) = address else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the peer's tcp address is malformed",
            ));
        };
        let until = Instant::now() + timeout;
        let stream = self
            .greet(address, peer, until)
            .map_err(|e| e.at(format!("tcp {address}")))?;
        let congestion = sockopt::tcp_congestion(&stream).unwrap_or_else(|_| "unknown".into());
        let role = Role::Initiator(Initiator::default());
        let connection = Connection::start(stream, &self.reactor, role)?;
        Ok(Arc::new(TcpChannel {
            connection,
            detail: format!("tcp to {address}, congestion control {congestion}"),
            capabilities: Capabilities {
                remote: &[MemoryKind::Host],
                notifications: true,
                checksums: true,
            },
        }))
    }

    fn withdraw(&self, _region: &Arc<RegionCore>) {
        let accepted = self.listener.accepted().clone();
        accepted
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|connection| connection.poke());
    }

    fn close(&self) {
        if let Some(token) = self.listener.token.get() {
            self.reactor.remove(*token, self.listener.socket.as_fd());
        }
    }
}

impl TcpFabric {
    fn greet(&self, address: SocketAddr, peer: &PeerCard, until: Instant) -> Result<TcpStream> {
        let left = || {
            let left = until.saturating_duration_since(Instant::now());
            left.max(Duration::from_millis(1))
        };
        let mut stream =
            TcpStream::connect_timeout(&address, left()).map_err(|e| Error::io("connect", e))?;
        tune(&stream)?;
        if let Some(name) = &self.congestion {
            set_congestion(&stream, name)?;
        }
        let greeting = Greeting {
            name: self.exports.name().to_string(),
            incarnation: self.exports.incarnation(),
            wanted: peer.incarnation,
        };
        stream
            .set_write_timeout(Some(left()))
            .map_err(|e| Error::io("set a timeout", e))?;
        stream
            .write_all(&greeting.encode())
            .map_err(|e| Error::io("send the greeting", e))?;
        stream
            .set_read_timeout(Some(left()))
            .map_err(|e| Error::io("set a timeout", e))?;
        let mut preamble = [0; PREAMBLE_BYTES];
        stream.read_exact(&mut preamble).map_err(no_welcome)?;
        let mut welcome = vec![0; decode_preamble(&preamble)?];
        stream.read_exact(&mut welcome).map_err(no_welcome)?;
        decode_outcome(&welcome)??;
        stream
            .set_nonblocking(true)
            .map_err(|e| Error::io("make it non-blocking", e))?;
        Ok(stream)
    }
}

/// Why a peer that let this side connect did not let it in.
fn no_welcome(error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::new(
            ErrorKind::PeerLost,
            "the peer closed the connection without a welcome: it has no room for more connections",
        ),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            Error::new(ErrorKind::Timeout, "the peer does not answer the greeting")
        }
        _ => Error::io("receive the welcome", error),
    }
}

struct TcpChannel {
    connection: Arc<Connection>,
    detail: String,
    capabilities: Capabilities,
}

impl Backend for TcpChannel {
    fn name(&self) -> &'static str {
        NAME
    }

    /// What was sent of a write may still be on its way when the connection has ended.
    fn fences(&self, operation: Operation) -> bool {
        operation == Operation::Read
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        if let Err(error) = self.connection.check() {
            return Err(job.refuse(error));
        }
        let Role::Initiator(initiator) = &self.connection.role else {
            return Err(job.refuse(Error::new(ErrorKind::Internal, "a target cannot ask")));
        };
        let small = job.whole().bytes <= INLINE_BYTES_MAX;
        let mut outbox = self.connection.outbox();
        if outbox.ended {
            return Err(job.refuse(Error::new(ErrorKind::PeerLost, "the connection has ended")));
        }
        if outbox.waiting() >= REQUESTS_WAITING_MAX {
            let text = format!("{REQUESTS_WAITING_MAX} requests wait on this connection");
            return Err(job.refuse(Error::new(ErrorKind::Busy, text)));
        }
        let active = Arc::new(Active::new(job));
        initiator.start(&self.connection, active, small, &mut outbox);
        connection::settle(outbox);
        if small {
            self.connection.pump(INLINE_BYTES_MAX);
        }
        Ok(())
    }

    fn reap(&self) {
        self.connection.poke();
    }

    fn progress(&self) -> Option<u64> {
        Some(self.connection.progress())
    }

    fn assist(&self, until: Instant, done: &dyn Fn() -> bool) {
        self.connection.assist(until, done);
    }
}

impl Channel for TcpChannel {
    fn check(&self) -> Result<()> {
        self.connection.check()
    }

    fn reaches(&self, _region: &RemoteRegion) -> Result<(), String> {
        Ok(())
    }

    fn detail(&self) -> String {
        self.detail.clone()
    }

    fn close(&self) {
        self.connection.lose("the peer was forgotten");
    }
}

impl Drop for TcpChannel {
    fn drop(&mut self) {
        self.connection.lose("nobody uses the connection any more");
    }
}
