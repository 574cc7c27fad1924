//! Prepared lists: byte ranges that were checked once, for any number of transfers.

use std::sync::Arc;

use kvfabric::life::Life;
use kvfabric::transfer::{Agent, PreparedList, RegionId, Side, Strided};
use kvfabric::{Error, ErrorKind, Result};

use crate::agent::kvf_agent;
use crate::boundary::{Handle, Out, boundary, enter, enter_optional, into_raw, slice, take};
use crate::options;
use crate::peer::kvf_peer;
use crate::status::kvf_status;
use crate::transfer::{descriptors, kvf_descriptor};

/// Byte ranges of one length at equal steps in a region. Range n begins at `offset` + n * `stride`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_strided {
    /// The region's kvf_region_id.
    pub region: u64,
    /// Bytes from the region's start to the first range.
    pub offset: u64,
    /// Bytes of each range; not 0.
    pub len: u64,
    /// Bytes from the start of one range to the start of the next.
    pub stride: u64,
    /// How many ranges; not 0.
    pub count: u32,
    /// Zero.
    pub reserved: u32,
}

/// Byte ranges, by position from 0, of this agent's regions or of one peer's.
pub struct kvf_list {
    life: Arc<Life>,
    /// A list keeps its agent alive.
    _agent: Agent,
    list: PreparedList,
}

impl Handle for kvf_list {
    const NAME: &'static str = "list";

    fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

impl kvf_list {
    /// The list, if this agent has made it.
    pub(crate) fn of(&self, agent: &kvf_agent, name: &str) -> Result<&PreparedList> {
        if Arc::ptr_eq(&self.life, &agent.life) {
            return Ok(&self.list);
        }
        let text = format!("the {name} list was made by another agent");
        Err(Error::new(ErrorKind::Invalid, text))
    }
}

/// Checks `count` byte ranges of the peer's regions, or with `peer` NULL of this agent's own, and keeps them.
///
/// KVF_INVALID for a range outside its region, KVF_NOT_FOUND for an unknown region; the text names the position.
///
/// # Safety
/// Each pointer is null or valid: `agent` and `peer` live, `descriptors` for `count` reads, `list_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_list_create(
    agent: *const kvf_agent,
    peer: *const kvf_peer,
    descriptors: *const kvf_descriptor,
    count: usize,
    list_out: *mut *mut kvf_list,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for `count` values, by contract.
        let ranges = unsafe { slice(descriptors, count, "descriptors") }?;
        let prepare =
            |agent: &Agent, side: Side<'_>| agent.prepare(side, &self::descriptors(ranges));
        // SAFETY: null or valid, by contract.
        unsafe { create(agent, peer, list_out, prepare) }
    })
}

/// As kvf_list_create, with the ranges that `count` entries stand for, one entry after the other: the list has as many
/// positions as all entries together have ranges.
///
/// # Safety
/// Each pointer is null or valid: `agent` and `peer` live, `entries` for `count` reads, `list_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_list_create_strided(
    agent: *const kvf_agent,
    peer: *const kvf_peer,
    entries: *const kvf_strided,
    count: usize,
    list_out: *mut *mut kvf_list,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for `count` values, by contract.
        let entries = unsafe { slice(entries, count, "entries") }?;
        let parse = |entry: &kvf_strided| {
            options::check_reserved(entry.reserved, "kvf_strided")?;
            Ok(Strided {
                region: RegionId(entry.region),
                offset: entry.offset,
                len: entry.len,
                stride: entry.stride,
                count: entry.count,
            })
        };
        let strided: Vec<Strided> = entries.iter().map(parse).collect::<Result<_>>()?;
        let prepare = |agent: &Agent, side: Side<'_>| agent.prepare_strided(side, &strided);
        // SAFETY: null or valid, by contract.
        unsafe { create(agent, peer, list_out, prepare) }
    })
}

/// # Safety
/// Each pointer is null or valid: `agent` and `peer` live, `list_out` for a write.
unsafe fn create(
    agent: *const kvf_agent,
    peer: *const kvf_peer,
    list_out: *mut *mut kvf_list,
    prepare: impl FnOnce(&Agent, Side<'_>) -> Result<PreparedList>,
) -> Result<()> {
    let agent = enter(agent, "agent")?;
    let peer = enter_optional(peer, "peer")?;
    // SAFETY: null or writable, by this function's contract.
    let out = unsafe { Out::new(list_out, "list_out") }?;
    let peer = peer.as_deref().map(|peer| agent.own(peer)).transpose()?;
    let list = prepare(&agent.agent, peer.map_or(Side::Local, Side::Peer))?;
    out.write(into_raw(kvf_list {
        life: agent.life.clone(),
        _agent: agent.agent.clone(),
        list,
    }));
    Ok(())
}

/// How many ranges a list has.
///
/// # Safety
/// Each pointer is null or valid: `list` live, `count_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_list_len(list: *const kvf_list, count_out: *mut usize) -> kvf_status {
    boundary(|| {
        let list = enter(list, "list")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(count_out, "count_out") }?;
        out.write(list.list.len());
        Ok(())
    })
}

/// Gives a list back. Transfers that were made from it keep what they need.
///
/// # Safety
/// `list` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_list_free(list: *mut kvf_list) -> kvf_status {
    boundary(|| take(list, "list", |_| Ok(())))
}
