//! Shared memory: a peer of this host hands over the memory of its regions once, and copies are plain copies.
//!
//! The memory travels as a sealed memfd over an abstract Unix socket, by region key. A deregistered region is
//! revoked, and counts as used until the peer has unmapped it or its process is proved dead.

mod call;
mod channel;
mod link;
mod message;
mod peer_region;
mod server;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use super::copy::Copier;
use super::{Channel, Fabric};
use crate::agent::{Exports, PeerCard};
use crate::reactor::{Interest, Reactor, Token};
use crate::region::RegionCore;

use link::Link;
use server::Server;

const NAME: &str = "shm";

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Serves the agent's memory to processes of this host, and maps theirs.
struct ShmFabric {
    exports: Arc<Exports>,
    reactor: Arc<Reactor>,
    copier: Arc<Copier>,
    address: Vec<u8>,
    server: Arc<Server>,
    token: OnceLock<Token>,
}

/// Starts listening under a random abstract name.
pub(crate) fn fabric(
    exports: &Arc<Exports>,
    reactor: &Arc<Reactor>,
    copier: Arc<Copier>,
) -> Result<Arc<dyn Fabric>> {
    let mut random = [0; 16];
    getrandom::fill(&mut random)
        .map_err(|e| Error::new(ErrorKind::Io, format!("draw a socket name: {e}")))?;
    let address = format!("kvfabric-{:032x}", u128::from_le_bytes(random)).into_bytes();
    let failed = |what: &'static str| move |e: rustix::io::Errno| Error::io(what, e.into());
    let socket = new_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    bind(&socket, &abstract_name(&address)?).map_err(failed("name a Unix socket"))?;
    listen(&socket, BACKLOG).map_err(failed("listen on a Unix socket"))?;
    let server = Server::new(socket, exports, reactor);
    let token = reactor.add(server.socket(), Interest::READABLE, server.clone())?;
    let fabric = ShmFabric {
        exports: exports.clone(),
        reactor: reactor.clone(),
        copier,
        address,
        server,
        token: OnceLock::new(),
    };
    let _ = fabric.token.set(token);
    Ok(Arc::new(fabric))
}

fn new_socket(flags: SocketFlags) -> Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|e| Error::io("create a Unix socket", e.into()))
}

fn abstract_name(name: &[u8]) -> Result<SocketAddrUnix> {
    SocketAddrUnix::new_abstract_name(name)
        .map_err(|e| Error::io("the name of a Unix socket", e.into()))
}

impl Fabric for ShmFabric {
    fn name(&self) -> &'static str {
        NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        Some(self.address.clone())
    }

    fn connect(&self, peer: &PeerCard, timeout: Duration) -> Result<Arc<dyn Channel>> {
        if peer.host != self.exports.host() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the peer is on another host",
            ));
        }
        let Some(address) = peer.address(NAME) else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the peer shares no memory",
            ));
        };
        let socket = new_socket(SocketFlags::CLOEXEC)?;
        // A peer in another network namespace has another set of abstract names: not found is the answer then.
        connect(&socket, &abstract_name(address)?)
            .map_err(|e| Error::io("connect to the peer's Unix socket", e.into()))?;
        let link = Link::new(socket, &self.reactor)?;
        let channel = channel::ShmChannel::start(
            link,
            self.exports.name(),
            peer.incarnation,
            self.copier.clone(),
            timeout,
        )?;
        Ok(channel)
    }

    fn withdraw(&self, region: &Arc<RegionCore>) {
        self.server.withdraw(region);
    }

    fn close(&self) {
        if let Some(token) = self.token.get() {
            self.reactor.remove(*token, self.server.socket().as_fd());
        }
    }
}
