//! Two agents of one host and the Unix socket between them: who is there, whose memory may be used, notifications.
//!
//! How the memory is then used is an [`Access`]: mapped (`shm`), or read and written from outside (`cma`). Either way a
//! process asks once for each region, by its key, and tells when it has stopped using it. A deregistered region is
//! revoked, and counts as used until every process that has it has said so or is proved dead.

mod call;
mod channel;
mod client;
mod held;
mod link;
mod message;
mod server;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use super::copy::{Copier, Go, Place, Progress};
use super::{Capabilities, Channel, Fabric, Job, Kinds, Refusal};
use crate::agent::{Exports, PeerCard, RemoteRegion};
use crate::plan::Plan;
use crate::reactor::{Interest, Reactor, Token};
use crate::region::{MemoryKind, RegionCore};

pub(super) use call::{Call, Unanswered, Waiting};
pub(crate) use channel::Copying;
use channel::UnixChannel;
pub(crate) use held::Held;
pub(crate) use link::Link;
pub(super) use message::Message;
pub(crate) use message::{Outcome, SUMS_MAX};
use server::Server;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// How memory of another process of this host is used.
pub(crate) trait Access: Send + Sync + Sized + 'static {
    /// The backend's name.
    const NAME: &'static str;

    /// Whether peers use the very memory that is registered, which may be lent, rather than a mapping of their own.
    /// An agent that goes must then wait for them.
    const IN_PLACE: bool;

    /// What it moves on the side of whoever asks.
    const LOCAL: &'static [MemoryKind] = Capabilities::HOST;

    /// What it moves on the side of whoever is asked.
    const REMOTE: &'static [MemoryKind] = Capabilities::HOST;

    /// Why no checksums are compared; none if they are.
    const UNCHECKED: Option<&'static str> = None;

    /// What is known of the process at the other end.
    type Peer: Send + Sync;

    /// A region of it.
    type Memory: Send + Sync;

    /// What a process that connects is told.
    fn welcome(&self) -> Outcome;

    /// What a process of this number, which may use a region, is told, and the descriptor that goes along.
    fn grant(&self, region: &RegionCore, process: i32) -> Result<(Outcome, Option<OwnedFd>)>;

    /// As [`Access::grant`], of one piece of a region that was granted in pieces.
    fn grant_piece(&self, region: &RegionCore, number: u32) -> Result<(Outcome, Option<OwnedFd>)> {
        let _ = number;
        let text = format!("region {} is not handed out in pieces", region.id());
        Err(Error::new(ErrorKind::Unsupported, text))
    }

    /// The other side of [`Access::welcome`]. The error is the reason why the path is not used.
    fn meet(link: &Link, welcome: Outcome) -> Result<Self::Peer>;

    /// The other side of [`Access::grant`]; `piece` asks for one.
    fn accept(
        &self,
        remote: &RemoteRegion,
        granted: (Outcome, Option<OwnedFd>),
        piece: &mut dyn FnMut(u32) -> Result<(Outcome, Option<OwnedFd>)>,
    ) -> Result<Self::Memory>;

    /// Whether this region can be reached; the reason otherwise.
    fn reaches(region: &RemoteRegion) -> Result<(), String>;

    /// Moves a job's bytes from `place` on; `memory` is in the order of the plan's remote side. Asks `go_on` from time to
    /// time, gives its error back, and does as it says.
    fn copy(
        peer: &Self::Peer,
        plan: &Plan,
        memory: &[Arc<Held<Self>>],
        place: &mut Place,
        go_on: &dyn Fn() -> Result<Go>,
    ) -> Result<Progress>;

    /// Makes ready for requests with this plan; `memory` as for [`Access::copy`].
    fn make_ready(&self, plan: &Plan, memory: &[Arc<Held<Self>>]) -> Result<()> {
        let _ = (plan, memory);
        Ok(())
    }

    /// Has a job's bytes moved: by the threads that copy, and [`Access::copy`], unless somebody else does it.
    fn post(&self, copier: &Copier, job: Job, copying: Copying<Self>) -> Result<(), Refusal> {
        copier.post(job, copying)
    }

    /// Lets go of a region; its last copy may not be over.
    fn let_go(&self, held: Arc<Held<Self>>) {
        drop(held);
    }

    /// What is worth telling of the path.
    fn detail(link: &Link) -> String;
}

/// Serves the agent's memory to processes of this host, and uses theirs.
struct UnixFabric<A: Access> {
    exports: Arc<Exports>,
    reactor: Arc<Reactor>,
    copier: Arc<Copier>,
    access: Arc<A>,
    address: Vec<u8>,
    server: Arc<Server<A>>,
    token: OnceLock<Token>,
}

/// Starts listening under a random abstract name.
pub(crate) fn fabric<A: Access>(
    access: A,
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
    let access = Arc::new(access);
    let server = Server::new(socket, access.clone(), exports, reactor);
    let token = reactor.add(server.socket(), Interest::READABLE, server.clone())?;
    let fabric = UnixFabric {
        exports: exports.clone(),
        reactor: reactor.clone(),
        copier,
        access,
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

impl<A: Access> Fabric for UnixFabric<A> {
    fn name(&self) -> &'static str {
        A::NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        Some(self.address.clone())
    }

    fn kinds(&self) -> Kinds {
        Kinds {
            local: A::LOCAL,
            remote: A::REMOTE,
        }
    }

    fn unchecked(&self) -> Option<&'static str> {
        A::UNCHECKED
    }

    fn connect(&self, peer: &PeerCard, timeout: Duration) -> Result<Arc<dyn Channel>> {
        if peer.host != self.exports.host() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the peer is on another host",
            ));
        }
        let Some(address) = peer.address(A::NAME) else {
            let text = format!("the peer does not offer {}", A::NAME);
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let socket = new_socket(SocketFlags::CLOEXEC)?;
        // A peer in another network namespace has another set of abstract names: not found is the answer then.
        connect(&socket, &abstract_name(address)?)
            .map_err(|e| Error::io("connect to the peer's Unix socket", e.into()))?;
        let link = Link::new(socket, &self.reactor)?;
        let channel = UnixChannel::<A>::start(
            link,
            self.exports.name(),
            peer.incarnation,
            (self.access.clone(), self.copier.clone()),
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
        self.server.close();
    }
}

/// An answer that does not fit the question.
pub(crate) fn corrupt(text: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}
