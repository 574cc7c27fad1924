//! TCP: a framed protocol of our own, for peers that share no memory. See `docs/wire-format.md`.
//!
//! The side that connects asks, the other one answers; an agent that is asked and asks has a connection for each.
//! Payload moves between socket and region without a copy in between.

mod active;
mod channel;
mod connection;
mod devices;
mod frame;
mod initiator;
mod lane;
mod listen;
mod outbox;
mod receive;
mod scatter;
mod table;
mod target;
mod tls;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::net::sockopt;

use super::{Capabilities, Channel, Fabric, Kinds};
use crate::agent::{Exports, PeerCard};
use crate::reactor::Reactor;
use crate::region::RegionCore;

use channel::TcpChannel;
use connection::{Connection, Role};
use frame::{Greeting, PREAMBLE_BYTES, decode_outcome, decode_preamble};
use initiator::Initiator;
use lane::Lane;
use listen::Listener;
use tls::{Session, TlsConfig};

pub use tls::TlsOptions;

const NAME: &str = "tcp";

/// The most connections that an agent makes to one peer, and the most addresses that it listens on.
pub(crate) const LANES_MAX: usize = 16;

/// How long sent bytes may stay unacknowledged before the peer counts as lost.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);

/// A silent connection is probed after this long, and again in the same intervals.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// A connection whose other side has said welcome.
type Greeted = (TcpStream, Option<Session>);

/// Listens, and connects.
pub(crate) struct TcpFabric {
    exports: Arc<Exports>,
    reactor: Arc<Reactor>,
    /// What peers are told.
    advertised: Vec<SocketAddr>,
    congestion: Option<String>,
    connections: usize,
    tls: Option<TlsConfig>,
    listeners: Vec<Arc<Listener>>,
}

/// How connections are served and made.
pub(crate) struct Listen {
    pub(crate) address: SocketAddr,
    /// What peers are told; none: the address itself.
    pub(crate) advertised: Option<SocketAddr>,
    /// Further addresses, such as those of other network cards.
    pub(crate) rails: Vec<SocketAddr>,
    /// How many connections are made to a peer; at least one for each of its addresses.
    pub(crate) connections: usize,
    /// The congestion control; none: the system's.
    pub(crate) congestion: Option<String>,
    /// Who the agent is over TLS; none: without TLS.
    pub(crate) tls: Option<TlsOptions>,
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
        rails,
        connections,
        congestion,
        tls,
    } = listen;
    let tls = tls.as_ref().map(TlsConfig::new).transpose()?;
    if connections == 0 || connections > LANES_MAX {
        return Err(Error::invalid(
            "tcp connections to a peer",
            connections,
            1..=LANES_MAX,
        ));
    }
    if rails.len() >= LANES_MAX {
        return Err(Error::invalid("tcp rails", rails.len(), 0..LANES_MAX));
    }
    let start = |address| {
        let congestion = congestion.as_deref();
        Listener::start(exports, reactor, address, congestion, tls.as_ref())
    };
    let mut listeners = vec![start(address)?];
    let mut told = vec![advertised.map_or_else(|| listeners[0].address(), Ok)?];
    for rail in rails {
        let listener = start(rail)?;
        told.push(listener.address()?);
        listeners.push(listener);
    }
    if let Some(unspecified) = told.iter().find(|address| address.ip().is_unspecified()) {
        let text = format!("peers cannot connect to {unspecified}: name an address to advertise");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok(Arc::new(TcpFabric {
        exports: exports.clone(),
        reactor: reactor.clone(),
        advertised: told,
        congestion,
        connections,
        tls,
        listeners,
    }))
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
        let told: Vec<String> = self.advertised.iter().map(SocketAddr::to_string).collect();
        Some(told.join(",").into_bytes())
    }

    fn kinds(&self) -> Kinds {
        Kinds {
            local: Capabilities::HOST,
            remote: channel::REMOTE,
        }
    }

    fn listening(&self) -> Option<SocketAddr> {
        self.listeners.first()?.address().ok()
    }

    fn connect(&self, peer: &PeerCard, timeout: Duration) -> Result<Arc<dyn Channel>> {
        let addresses = addresses_of(peer)?;
        let count = self.connections.max(addresses.len()).min(LANES_MAX);
        let targets: Vec<SocketAddr> = addresses.iter().copied().cycle().take(count).collect();
        let (mut lanes, mut failed): (Vec<Lane>, Vec<Error>) = (Vec::new(), Vec::new());
        let mut congestion = String::new();
        let until = Instant::now() + timeout;
        for (to, outcome) in self.greet_all(&targets, peer, until) {
            let started = outcome.and_then(|stream| {
                congestion =
                    sockopt::tcp_congestion(&stream.0).unwrap_or_else(|_| "unknown".into());
                let role = Role::Initiator(Initiator::default());
                Connection::start(stream, &self.reactor, role)
            });
            match started {
                Ok(connection) => lanes.push(Lane::new(connection, to)),
                Err(error) => failed.push(error.at(format!("tcp {to}"))),
            }
        }
        if lanes.is_empty() {
            let none = || Error::new(ErrorKind::Internal, "no address was tried");
            return Err(failed.into_iter().next().unwrap_or_else(none));
        }
        for error in &failed {
            tracing::warn!(%error, peer = %peer.name, "one connection of several was not made");
        }
        let shown: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
        let mut detail = format!("tcp to {}", shown.join(" and "));
        if self.tls.is_some() {
            detail = format!("{detail}, TLS 1.3");
        }
        if targets.len() > 1 {
            detail = format!("{detail}, {} of {} connections", lanes.len(), targets.len());
        }
        detail = format!("{detail}, congestion control {congestion}");
        if let Some(error) = failed.first() {
            detail = format!("{detail}; {error}");
        }
        Ok(Arc::new(TcpChannel::new(lanes, detail)))
    }

    fn withdraw(&self, _region: &Arc<RegionCore>) {
        self.listeners.iter().for_each(|listener| listener.poke());
    }

    fn close(&self) {
        self.listeners.iter().for_each(|listener| listener.close());
    }
}

/// Where a peer listens.
fn addresses_of(peer: &PeerCard) -> Result<Vec<SocketAddr>> {
    let Some(told) = peer.address(NAME) else {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the peer does not listen on tcp",
        ));
    };
    let malformed = || Error::new(ErrorKind::Corrupt, "the peer's tcp address is malformed");
    let text = std::str::from_utf8(told).map_err(|_| malformed())?;
    let parse = |text: &str| text.parse().map_err(|_| malformed());
    let addresses: Vec<SocketAddr> = text.split(',').map(parse).collect::<Result<_>>()?;
    if addresses.len() > LANES_MAX {
        return Err(Error::invalid(
            "tcp addresses of a peer",
            addresses.len(),
            1..=LANES_MAX,
        ));
    }
    Ok(addresses)
}

impl TcpFabric {
    /// All connections at once, so that an address that does not answer delays no other.
    fn greet_all(
        &self,
        targets: &[SocketAddr],
        peer: &PeerCard,
        until: Instant,
    ) -> Vec<(SocketAddr, Result<Greeted>)> {
        if let [target] = targets {
            return vec![(*target, self.greet(*target, peer, until))];
        }
        std::thread::scope(|scope| {
            let begin = |&target: &SocketAddr| {
                let greeting = std::thread::Builder::new()
                    .name("kvf-connect".into())
                    .spawn_scoped(scope, move || self.greet(target, peer, until));
                (target, greeting)
            };
            let begun: Vec<_> = targets.iter().map(begin).collect();
            let end = |greeting: std::io::Result<std::thread::ScopedJoinHandle<'_, _>>| {
                let greeting = greeting.map_err(|e| Error::io("start a thread", e))?;
                let panicked = |_| Error::new(ErrorKind::Internal, "connecting panicked");
                greeting.join().map_err(panicked)?
            };
            begun
                .into_iter()
                .map(|(target, greeting)| (target, end(greeting)))
                .collect()
        })
    }

    fn greet(&self, address: SocketAddr, peer: &PeerCard, until: Instant) -> Result<Greeted> {
        let left = || {
            let left = until.saturating_duration_since(Instant::now());
            left.max(Duration::from_millis(1))
        };
        let patience = left();
        let no_welcome = |error| no_welcome(error, patience);
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
            .set_read_timeout(Some(left()))
            .map_err(|e| Error::io("set a timeout", e))?;
        let session = match &self.tls {
            None => {
                exchange(&mut stream, &greeting, no_welcome)?;
                None
            }
            Some(tls) => {
                let mut session = tls.connect(&mut stream, &peer.name)?;
                let mut encrypted = rustls::Stream::new(&mut session, &mut stream);
                exchange(&mut encrypted, &greeting, |error| {
                    tls::not_welcome(&error).unwrap_or_else(|| no_welcome(error))
                })?;
                Some(Session::new(session.into()))
            }
        };
        stream
            .set_nonblocking(true)
            .map_err(|e| Error::io("make it non-blocking", e))?;
        Ok((stream, session))
    }
}

/// Sends the greeting and hears the welcome.
fn exchange(
    mut stream: impl Read + Write,
    greeting: &Greeting,
    unheard: impl Fn(std::io::Error) -> Error,
) -> Result<()> {
    stream
        .write_all(&greeting.encode())
        .map_err(|e| Error::io("send the greeting", e))?;
    let mut preamble = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut preamble).map_err(&unheard)?;
    let mut welcome = vec![0; decode_preamble(&preamble)?];
    stream.read_exact(&mut welcome).map_err(&unheard)?;
    decode_outcome(&welcome)?
}

/// Why a peer that let this side connect did not let it in.
fn no_welcome(error: std::io::Error, patience: Duration) -> Error {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::new(
            ErrorKind::PeerLost,
            "the peer closed the connection without a welcome: it has no room for more connections",
        ),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            let text = format!("the peer does not answer the greeting within {patience:.0?}");
            Error::new(ErrorKind::Timeout, text)
        }
        _ => Error::io("receive the welcome", error),
    }
}
