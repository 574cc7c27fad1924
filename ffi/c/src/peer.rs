//! Peers: other agents, as their metadata describes them.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use kvfabric::transfer::{Agent, PathReport, PeerHandle, RegionId};

use crate::agent::kvf_agent;
use crate::boundary::{Handle, Listing, Out, boundary, enter, into_raw, slice, take};
use crate::status::kvf_status;
use kvfabric::life::Life;

/// Another agent, in this process or elsewhere.
pub struct kvf_peer {
    pub(crate) life: Arc<Life>,
    agent: Agent,
    pub(crate) peer: PeerHandle,
}

impl Handle for kvf_peer {
    const NAME: &'static str = "peer";

    fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

/// Learns of a peer from its kvf_agent_metadata, or what is new about one.
///
/// KVF_CORRUPT for damaged metadata, KVF_VERSION for another version's.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `metadata` for `len` reads, `peer_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_peer_load(
    agent: *const kvf_agent,
    metadata: *const c_void,
    len: usize,
    peer_out: *mut *mut kvf_peer,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        // SAFETY: null or readable for `len` bytes, by contract.
        let metadata = unsafe { slice(metadata.cast::<u8>(), len, "metadata") }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(peer_out, "peer_out") }?;
        let peer = agent.agent.load_peer(metadata)?;
        let (life, agent) = (agent.life.clone(), agent.agent.clone());
        out.write(into_raw(kvf_peer { life, agent, peer }));
        Ok(())
    })
}

/// Says which way bytes go to the peer, why, and what kept better ways from being used; connects if there is no connection.
///
/// The text is for people and logs. With `buffer` NULL only its length is told, which counts the terminating NUL. KVF_INVALID
/// when `capacity` is too small; `len_out` is written then too.
///
/// # Safety
/// Each pointer is null or valid: `peer` live, `buffer` for `capacity` writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_peer_path(
    peer: *const kvf_peer,
    buffer: *mut c_char,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let peer = enter(peer, "peer")?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        let report = peer.agent.path_to(&peer.peer);
        listing.fill_text(&describe(&report), "path")
    })
}

fn describe(report: &PathReport) -> String {
    let mut text = match report.backend {
        Some(backend) => format!("{backend}: {}", report.why),
        None => "none".to_owned(),
    };
    for (backend, reason) in &report.refused {
        text.push_str(&format!("; not {backend}: {reason}"));
    }
    text
}

/// Copies out the name of the peer's agent. Buffers as in kvf_peer_path.
///
/// # Safety
/// Each pointer is null or valid: `peer` live, `buffer` for `capacity` writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_peer_name(
    peer: *const kvf_peer,
    buffer: *mut c_char,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let peer = enter(peer, "peer")?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        listing.fill_text(peer.peer.name(), "name")
    })
}

/// A region that a peer exports.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_remote_region {
    /// Its number in descriptors.
    pub id: u64,
    /// Its bytes.
    pub len: u64,
}

/// Copies out the regions that the peer's metadata named, by number.
///
/// With `regions` NULL only their count is told. KVF_INVALID when `capacity` is too small; `count_out` is written then too.
///
/// # Safety
/// Each pointer is null or valid: `peer` live, `regions` for `capacity` writes, `count_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_peer_regions(
    peer: *const kvf_peer,
    regions: *mut kvf_remote_region,
    capacity: usize,
    count_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let peer = enter(peer, "peer")?;
        // SAFETY: null or writable, `regions` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(regions, capacity, count_out, "regions") }?;
        let mut regions = peer.peer.regions();
        regions.sort_unstable();
        let region = |(id, len): (RegionId, u64)| kvf_remote_region { id: id.0, len };
        let regions: Vec<_> = regions.into_iter().map(region).collect();
        listing.fill(&regions, "regions")
    })
}

/// Ends the connections to a peer and forgets it: transfers in flight fail with KVF_PEER_LOST. The handle must still be freed.
///
/// # Safety
/// `peer` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_peer_forget(peer: *const kvf_peer) -> kvf_status {
    boundary(|| {
        let peer = enter(peer, "peer")?;
        peer.agent.forget_peer(&peer.peer);
        Ok(())
    })
}

/// Gives a handle back. The agent stays connected to the peer, and knows it until kvf_peer_forget.
///
/// # Safety
/// `peer` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_peer_free(peer: *mut kvf_peer) -> kvf_status {
    boundary(|| take(peer, "peer", |_| Ok(())))
}
