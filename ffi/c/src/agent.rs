//! Agents: what registers memory, knows peers and moves bytes.

use std::ffi::{c_char, c_void};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use bytes::Bytes;
use kvfabric::transfer::{Agent, PeerHandle, RegionId};
use kvfabric::{AttachedNode, Error, ErrorKind, Result};

use crate::agent_options::{self, kvf_agent_options};
use crate::boundary::{
    Handle, Listing, Out, OutArray, boundary, enter, enter_optional, into_raw, milliseconds, slice,
    take,
};
use crate::inbox::Inbox;
use crate::peer::kvf_peer;
use crate::status::kvf_status;
use crate::transfer::parse_priority;
use kvfabric::life::Life;

/// Moves bytes between registered memory of this process and its peers.
pub struct kvf_agent {
    pub(crate) life: Arc<Life>,
    pub(crate) agent: Agent,
    inbox: Inbox,
    /// The node that it belongs to, if it does.
    _node: Option<Arc<AttachedNode>>,
}

impl kvf_agent {
    /// The agent of a node, whose fate it shares.
    pub(crate) fn of_node(node: &Arc<AttachedNode>) -> Self {
        Self {
            life: node.life().clone(),
            agent: node.node().agent().clone(),
            inbox: Inbox::default(),
            _node: Some(node.clone()),
        }
    }
}

impl Handle for kvf_agent {
    const NAME: &'static str = "agent";

    fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

/// Starts an agent.
///
/// KVF_INVALID for a bad name, address, certificate or store and for a way that is not enabled, KVF_NOT_FOUND for a file of
/// `tls` that is not there, which is named, KVF_IO when the address is in use, KVF_UNSUPPORTED when UCX, RDMA or a congestion
/// control is asked for that the system does not have.
///
/// # Safety
/// Each pointer is null or valid: `options` with what it points to for reads, `agent_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_create(
    options: *const kvf_agent_options,
    agent_out: *mut *mut kvf_agent,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for its size, what it points to null or valid, by contract.
        let builder = unsafe { agent_options::builder(options) }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(agent_out, "agent_out") }?;
        let agent = builder.build()?;
        out.write(into_raw(kvf_agent {
            life: Life::begin(),
            agent,
            inbox: Inbox::default(),
            _node: None,
        }));
        Ok(())
    })
}

/// Gives an agent back. It ends when its regions, peers and transfers are freed too.
///
/// # Safety
/// `agent` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_free(agent: *mut kvf_agent) -> kvf_status {
    boundary(|| take(agent, "agent", |_| Ok(())))
}

/// Copies out what peers need to reach this agent and the regions that it exports now: hand it to kvf_peer_load there. It
/// contains the regions' keys, so whoever has it may do what the regions allow.
///
/// With `buffer` NULL only the length is told. KVF_INVALID when `capacity` is too small; `len_out` is written then too.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `buffer` for `capacity` writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_metadata(
    agent: *const kvf_agent,
    buffer: *mut c_void,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        listing.fill(&agent.agent.metadata(), "metadata")
    })
}

/// As kvf_agent_metadata, with `count` regions of kvf_region_id alone. A peer that has loaded metadata of this agent before
/// keeps the regions that it knows: so regions can be added, or shown to some peers only.
///
/// KVF_NOT_FOUND for a region that is not registered with this agent, or not exported.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `regions` for `count` reads, `buffer` for `capacity` writes, `len_out` for a
/// write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_metadata_of(
    agent: *const kvf_agent,
    regions: *const u64,
    count: usize,
    buffer: *mut c_void,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        // SAFETY: null or readable for `count` values, by contract.
        let regions = unsafe { slice(regions, count, "regions") }?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        let regions: Vec<RegionId> = regions.iter().map(|&id| RegionId(id)).collect();
        listing.fill(&agent.agent.metadata_of(&regions)?, "metadata")
    })
}

/// Sends a message to a peer and waits until its agent has taken it, at most `timeout_ms`.
///
/// While the peer's inbox is full it waits for room. KVF_INVALID above 65,536 bytes. After KVF_TIMEOUT it may still arrive.
///
/// # Safety
/// Each pointer is null or valid: `agent` and `peer` live, `message` for `len` reads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_notify(
    agent: *const kvf_agent,
    peer: *const kvf_peer,
    message: *const c_void,
    len: usize,
    timeout_ms: u32,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let peer = enter(peer, "peer")?;
        // SAFETY: null or readable for `len` bytes, by contract.
        let message = unsafe { slice(message.cast::<u8>(), len, "message") }?;
        let peer = agent.own(&peer)?;
        let request = agent.agent.notify(peer, Bytes::copy_from_slice(message))?;
        request.wait(milliseconds(timeout_ms))?;
        Ok(())
    })
}

/// Takes the oldest message that a peer sent, waiting for one at most `timeout_ms`; KVF_TIMEOUT if there is none.
///
/// The sender's name goes to `peer_buffer` with a terminating NUL, if that is not NULL; names have at most 255 bytes. With
/// `buffer` NULL only the length is told, and the message stays. KVF_INVALID when a buffer is too small: the message stays,
/// and `len_out` is written when it was `buffer`.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, the buffers for their capacities in writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_receive(
    agent: *const kvf_agent,
    timeout_ms: u32,
    peer_buffer: *mut c_char,
    peer_capacity: usize,
    buffer: *mut c_void,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        // SAFETY: null or writable for `peer_capacity` bytes, by contract.
        let name = unsafe { OutArray::new(peer_buffer.cast(), peer_capacity, "peer_buffer") }?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast::<u8>(), capacity, len_out, "buffer") }?;
        let is_query = buffer.is_null();
        let timeout = milliseconds(timeout_ms);
        agent.inbox.receive(&agent.agent, timeout, |notification| {
            let sender = terminated(&notification.peer);
            if !name.is_null() && sender.len() > name.capacity() {
                let (len, capacity) = (sender.len(), name.capacity());
                let text = format!("peer name: {len} bytes do not fit into a buffer of {capacity}");
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            listing.fill(&notification.bytes, "message")?;
            if !name.is_null() {
                name.write(&sender);
            }
            Ok(!is_query)
        })
    })
}

/// Limits how fast transfers move, in bytes a second; 0: not at all. Those with `peer`, or if it is NULL all of a
/// kvf_priority. For what is made from now on.
///
/// # Safety
/// `agent` and `peer` are null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_set_rate(
    agent: *const kvf_agent,
    peer: *const kvf_peer,
    priority: u32,
    bytes_per_second: u64,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let peer = enter_optional(peer, "peer")?;
        let rate = Some(bytes_per_second).filter(|&rate| rate > 0);
        match &peer {
            Some(peer) => agent.agent.set_peer_rate(agent.own(peer)?, rate),
            None => agent.agent.set_rate(parse_priority(priority)?, rate),
        }
    })
}

/// A descriptor that polls as readable when messages have arrived: then take them with kvf_agent_receive until it answers
/// KVF_TIMEOUT, because the first of these calls makes it unreadable again. It belongs to the agent, lives as long as
/// that, and must be neither read from nor closed.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `fd_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_eventfd(
    agent: *const kvf_agent,
    fd_out: *mut i32,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(fd_out, "fd_out") }?;
        out.write(agent.agent.notification_fd()?.as_raw_fd());
        Ok(())
    })
}

fn terminated(name: &str) -> Vec<u8> {
    name.bytes().chain([0]).collect()
}

impl kvf_agent {
    /// The peer, if this agent has loaded it.
    pub(crate) fn own<'a>(&self, peer: &'a kvf_peer) -> Result<&'a PeerHandle> {
        if Arc::ptr_eq(&self.life, &peer.life) {
            return Ok(&peer.peer);
        }
        let text = format!("peer {:?} was loaded by another agent", peer.peer.name());
        Err(Error::new(ErrorKind::Invalid, text))
    }
}
