//! Transfers: pairs of byte ranges to read from or write to a peer.

use std::ffi::{c_char, c_void};
use std::mem::offset_of;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;
use kvfabric::transfer::{
    Agent, Descriptor, Operation, Priority, RegionId, Request, RequestOptions, Side, Status,
};
use kvfabric::{Error, ErrorKind, Result};

use crate::agent::kvf_agent;
use crate::agent_options::{listed, parse_flag};
use crate::boundary::{
    Handle, Out, boundary, enter, enter_optional, into_raw, milliseconds, optional_text, slice,
};
use crate::list::kvf_list;
use crate::options::{self, SizePrefixed};
use crate::peer::kvf_peer;
use crate::status::kvf_status;
use kvfabric::life::Life;

/// A byte range of a region.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_descriptor {
    /// The region's kvf_region_id.
    pub region: u64,
    /// Bytes from the region's start.
    pub offset: u64,
    /// How many bytes; not 0.
    pub len: u64,
}

/// Which way bytes go, seen from the one who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum kvf_operation {
    /// From the remote side into local memory.
    KVF_READ = 1,
    /// From local memory to the remote side.
    KVF_WRITE = 2,
}

/// Who goes first where transfers wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum kvf_priority {
    /// Someone waits for it.
    KVF_NORMAL = 0,
    /// Gives way to the others, such as an offload.
    KVF_BACKGROUND = 1,
}

/// What a transfer does.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_transfer_options {
    /// sizeof(struct kvf_transfer_options).
    pub size: usize,
    /// A kvf_operation.
    pub operation: u32,
    /// Counted from the post, after which the transfer fails with KVF_TIMEOUT; 0: 30 seconds.
    pub deadline_ms: u32,
    /// Delivered to the peer once all bytes are in place; NULL: nothing is.
    pub notification: *const c_void,
    /// Its bytes, at most 65,536.
    pub notification_len: usize,
    /// How many pairs of ranges each part has, together all of them; NULL: one part. Parts move in order, and each can be
    /// waited for with kvf_transfer_wait_part.
    pub parts: *const u32,
    /// How many parts, at most 4,096; 0: one.
    pub part_count: usize,
    /// A kvf_priority.
    pub priority: u32,
    /// 1: the CRC-32C of each range is compared, in the memory where it was and in that where it arrived, before the transfer
    /// counts as done; KVF_CORRUPT names the range that differs. 0: it is not.
    pub checksum: u32,
    /// The ways that may be used, by name: "shm" or "shm,tcp"; NULL: all.
    pub backends: *const c_char,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_transfer_options {
    const SIZE_MIN: usize = offset_of!(Self, parts);
    const NAME: &'static str = "kvf_transfer_options";
}

/// A transfer, which can be posted any number of times, once at a time.
pub struct kvf_transfer {
    life: Arc<Life>,
    /// A transfer keeps its agent alive.
    _agent: Agent,
    /// Written to only for another notification, while it is not in flight.
    request: RwLock<Request>,
}

impl kvf_transfer {
    fn new(agent: &kvf_agent, request: Request) -> Self {
        Self {
            life: agent.life.clone(),
            _agent: agent.agent.clone(),
            request: RwLock::new(request),
        }
    }

    pub(crate) fn request(&self) -> RwLockReadGuard<'_, Request> {
        self.request.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Posts it with another notification, from now on.
    pub(crate) fn repost(&self, notification: Option<Bytes>) -> Result<()> {
        // Who waits holds on to the request, and waits only for what is in flight or not settled.
        let busy = || Error::new(ErrorKind::Busy, "the transfer is in use");
        let mut request = self.request.try_write().map_err(|_| busy())?;
        if matches!(request.poll(), Status::InFlight) {
            return Err(busy());
        }
        request.set_notification(notification)?;
        request.post()
    }
}

impl Handle for kvf_transfer {
    const NAME: &'static str = "transfer";

    fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

/// Makes a transfer between `count` local ranges and as many remote ones, paired in order, of equal lengths. With `peer` NULL
/// the remote ranges are this agent's own too. Connects to the peer; nothing moves before kvf_transfer_post.
///
/// KVF_INVALID for a range outside its region or lists that do not pair, KVF_NOT_FOUND for an unknown region, KVF_DENIED
/// for one that the peer does not export for this, KVF_PEER_LOST when the peer cannot be reached.
///
/// # Safety
/// Each pointer is null or valid: `agent` and `peer` live, `local` and `remote` for `count` reads, `options` with its
/// notification, parts and backends for reads, `transfer_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_create(
    agent: *const kvf_agent,
    peer: *const kvf_peer,
    local: *const kvf_descriptor,
    remote: *const kvf_descriptor,
    count: usize,
    options: *const kvf_transfer_options,
    transfer_out: *mut *mut kvf_transfer,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let peer = enter_optional(peer, "peer")?;
        // SAFETY: null or readable for `count` values, by contract.
        let local = unsafe { slice(local, count, "local") }?;
        // SAFETY: null or readable for `count` values, by contract.
        let remote = unsafe { slice(remote, count, "remote") }?;
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read(options) }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(transfer_out, "transfer_out") }?;
        // SAFETY: its notification and parts are null or readable, by contract.
        let (operation, options) = unsafe { parse(&options, None) }?;
        let peer = peer.as_deref().map(|peer| agent.own(peer)).transpose()?;
        let side = peer.map_or(Side::Local, Side::Peer);
        let local = agent
            .agent
            .prepare(Side::Local, &descriptors(local))
            .map_err(|e| e.at("local"))?;
        let remote = agent
            .agent
            .prepare(side, &descriptors(remote))
            .map_err(|e| e.at("remote"))?;
        let request = agent.agent.request(operation, &local, &remote, options)?;
        out.write(into_raw(kvf_transfer::new(&agent, request)));
        Ok(())
    })
}

/// Makes a transfer between the ranges of two lists, or, with `local_positions` and `remote_positions`, between `count` of
/// each, by position, paired in order. Both NULL with a `count` of 0: all of both lists. The lists may be used for other
/// transfers, and be freed, at any time. Connects to the peer; nothing moves before kvf_transfer_post.
///
/// As kvf_transfer_create; KVF_INVALID also for a list of another agent, for a `local` list of a peer's regions, and for a
/// position outside its list.
///
/// # Safety
/// Each pointer is null or valid: `agent`, `local` and `remote` live, the positions for `count` reads, `options` with its
/// notification, parts and backends for reads, `transfer_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_create_prepared(
    agent: *const kvf_agent,
    local: *const kvf_list,
    remote: *const kvf_list,
    local_positions: *const u32,
    remote_positions: *const u32,
    count: usize,
    options: *const kvf_transfer_options,
    transfer_out: *mut *mut kvf_transfer,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let local = enter(local, "local")?;
        let remote = enter(remote, "remote")?;
        // SAFETY: null or readable for `count` values, by contract.
        let locals = unsafe { slice(local_positions, count, "local_positions") }?;
        // SAFETY: null or readable for `count` values, by contract.
        let remotes = unsafe { slice(remote_positions, count, "remote_positions") }?;
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read(options) }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(transfer_out, "transfer_out") }?;
        let is_all = local_positions.is_null() && remote_positions.is_null();
        let positions = (!is_all).then(|| (locals.to_vec(), remotes.to_vec()));
        // SAFETY: its notification and parts are null or readable, by contract.
        let (operation, options) = unsafe { parse(&options, positions) }?;
        let (local, remote) = (local.of(&agent, "local")?, remote.of(&agent, "remote")?);
        let request = agent.agent.request(operation, local, remote, options)?;
        out.write(into_raw(kvf_transfer::new(&agent, request)));
        Ok(())
    })
}

/// # Safety
/// The notification of `options` is null or readable for its length, its parts for their count, and its backends are null or
/// a string.
unsafe fn parse(
    options: &kvf_transfer_options,
    positions: Option<(Vec<u32>, Vec<u32>)>,
) -> Result<(Operation, RequestOptions)> {
    let place = "kvf_transfer_options.notification";
    // SAFETY: null or readable for its length, by this function's contract.
    let notification =
        unsafe { optional_bytes(options.notification, options.notification_len, place) }?;
    let operation = parse_operation(options.operation)?;
    let deadline = Some(milliseconds(options.deadline_ms)).filter(|d| !d.is_zero());
    // SAFETY: null or readable for its count, by this function's contract.
    let parts = unsafe {
        slice(
            options.parts,
            options.part_count,
            "kvf_transfer_options.parts",
        )
    }?;
    let place = "kvf_transfer_options.backends";
    // SAFETY: null or a string, by this function's contract.
    let backends = unsafe { optional_text(options.backends, place) }?;
    let options = RequestOptions {
        positions,
        notification,
        deadline,
        parts: parts.to_vec(),
        priority: parse_priority(options.priority)?,
        checksum: parse_flag(options.checksum, "kvf_transfer_options.checksum")?,
        backends: listed(backends),
    };
    Ok((operation, options))
}

/// # Safety
/// `bytes` is null or readable for `len` bytes.
pub(crate) unsafe fn optional_bytes(
    bytes: *const c_void,
    len: usize,
    name: &str,
) -> Result<Option<Bytes>> {
    // SAFETY: null or readable for its length, by this function's contract.
    let message = unsafe { slice(bytes.cast::<u8>(), len, name) }?;
    Ok((!bytes.is_null()).then(|| Bytes::copy_from_slice(message)))
}

pub(crate) fn parse_priority(priority: u32) -> Result<Priority> {
    const NORMAL: u32 = kvf_priority::KVF_NORMAL as u32;
    const BACKGROUND: u32 = kvf_priority::KVF_BACKGROUND as u32;
    match priority {
        NORMAL => Ok(Priority::Normal),
        BACKGROUND => Ok(Priority::Background),
        other => {
            let accepted = "KVF_NORMAL or KVF_BACKGROUND";
            Err(Error::invalid("priority", other, accepted))
        }
    }
}

fn parse_operation(code: u32) -> Result<Operation> {
    const READ: u32 = kvf_operation::KVF_READ as u32;
    const WRITE: u32 = kvf_operation::KVF_WRITE as u32;
    match code {
        READ => Ok(Operation::Read),
        WRITE => Ok(Operation::Write),
        _ => Err(Error::invalid(
            "kvf_transfer_options.operation",
            code,
            READ..=WRITE,
        )),
    }
}

pub(crate) fn descriptors(raw: &[kvf_descriptor]) -> Vec<Descriptor> {
    let parse = |raw: &kvf_descriptor| Descriptor {
        region: RegionId(raw.region),
        offset: raw.offset,
        len: raw.len,
    };
    raw.iter().map(parse).collect()
}
