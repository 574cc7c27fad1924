//! Transfers: pairs of byte ranges to read from or write to a peer.

use std::ffi::c_void;
use std::sync::Arc;

use bytes::Bytes;
use kvfabric::transfer::{
    Agent, Descriptor, Operation, PeerHandle, RegionId, Request, RequestOptions, Side, Status,
};
use kvfabric::{Error, Result};

use crate::agent::kvf_agent;
use crate::boundary::{
    Handle, Out, boundary, enter, enter_optional, into_raw, milliseconds, slice, take,
};
use crate::life::Life;
use crate::options::{self, SizePrefixed};
use crate::peer::kvf_peer;
use crate::status::kvf_status;

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

/// Where a transfer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum kvf_state {
    /// Not posted.
    KVF_IDLE = 0,
    /// Posted, not finished.
    KVF_IN_FLIGHT = 1,
    /// Finished; it may be posted again.
    KVF_DONE = 2,
    /// Failed; kvf_transfer_wait says why. It may be posted again once its memory is settled.
    KVF_FAILED = 3,
}

/// What may be done with the memory of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum kvf_fate {
    /// No byte of it is in use: the memory may be reused. After a failed write the target's bytes are unspecified.
    KVF_SETTLED = 0,
    /// Work may still land: keep the memory as it is.
    KVF_MEMORY_IN_FLIGHT = 1,
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
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_transfer_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_transfer_options";
}

/// A transfer, which can be posted any number of times, once at a time.
pub struct kvf_transfer {
    life: Arc<Life>,
    /// A transfer keeps its agent alive.
    _agent: Agent,
    request: Request,
}

impl Handle for kvf_transfer {
    fn life(&self) -> &Life {
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
/// notification for reads, `transfer_out` for a write.
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
        // SAFETY: null or live during this call, by contract.
        let agent = unsafe { enter(agent, "agent") }?;
        // SAFETY: null or live during this call, by contract.
        let peer = unsafe { enter_optional(peer, "peer") }?;
        // SAFETY: null or readable for `count` values, by contract.
        let local = unsafe { slice(local, count, "local") }?;
        // SAFETY: null or readable for `count` values, by contract.
        let remote = unsafe { slice(remote, count, "remote") }?;
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read(options) }?;
        let place = "kvf_transfer_options.notification";
        let message = options.notification.cast::<u8>();
        // SAFETY: null or readable for its length, by contract.
        let message = unsafe { slice(message, options.notification_len, place) }?;
        let notification =
            (!options.notification.is_null()).then(|| Bytes::copy_from_slice(message));
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(transfer_out, "transfer_out") }?;
        let operation = parse_operation(options.operation)?;
        let deadline = Some(milliseconds(options.deadline_ms)).filter(|d| !d.is_zero());
        let options = RequestOptions {
            positions: None,
            notification,
            deadline,
        };
        let peer = peer.as_deref().map(|peer| agent.own(peer)).transpose()?;
        let request = prepare(&agent.agent, operation, local, remote, peer, options)?;
        let (life, agent) = (agent.life.clone(), agent.agent.clone());
        out.write(into_raw(kvf_transfer {
            life,
            _agent: agent,
            request,
        }));
        Ok(())
    })
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

fn prepare(
    agent: &Agent,
    operation: Operation,
    local: &[kvf_descriptor],
    remote: &[kvf_descriptor],
    peer: Option<&PeerHandle>,
    options: RequestOptions,
) -> Result<Request> {
    let side = peer.map_or(Side::Local, Side::Peer);
    let local = agent
        .prepare(Side::Local, &descriptors(local))
        .map_err(|e| e.at("local"))?;
    let remote = agent
        .prepare(side, &descriptors(remote))
        .map_err(|e| e.at("remote"))?;
    agent.request(operation, &local, &remote, options)
}

fn descriptors(raw: &[kvf_descriptor]) -> Vec<Descriptor> {
    let parse = |raw: &kvf_descriptor| Descriptor {
        region: RegionId(raw.region),
        offset: raw.offset,
        len: raw.len,
    };
    raw.iter().map(parse).collect()
}

/// Starts a transfer, which may be finished when this returns.
///
/// Nothing is started on failure: KVF_BUSY when it is in flight or a queue is full, KVF_PEER_LOST when the peer cannot be
/// reached, KVF_NOT_FOUND when a region was deregistered.
///
/// # Safety
/// `transfer` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_post(transfer: *const kvf_transfer) -> kvf_status {
    boundary(|| {
        // SAFETY: null or live during this call, by contract.
        let transfer = unsafe { enter(transfer, "transfer") }?;
        transfer.request.post()
    })
}

/// Says where a transfer stands, without waiting. Failure of the transfer is no failure of this call.
///
/// # Safety
/// Each pointer is null or valid: `transfer` live, `state_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_poll(
    transfer: *const kvf_transfer,
    state_out: *mut kvf_state,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or live during this call, by contract.
        let transfer = unsafe { enter(transfer, "transfer") }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(state_out, "state_out") }?;
        out.write(match transfer.request.poll() {
            Status::Idle => kvf_state::KVF_IDLE,
            Status::InFlight => kvf_state::KVF_IN_FLIGHT,
            Status::Done(_) => kvf_state::KVF_DONE,
            Status::Failed(_) => kvf_state::KVF_FAILED,
        });
        Ok(())
    })
}

/// Waits until a transfer is finished, at most `timeout_ms`: KVF_OK when it has succeeded, else why it failed.
///
/// KVF_TIMEOUT also when `timeout_ms` ran out, which fails this call and not the transfer: kvf_transfer_poll tells the two
/// apart. KVF_INVALID when it was never posted.
///
/// # Safety
/// `transfer` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_wait(
    transfer: *const kvf_transfer,
    timeout_ms: u32,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or live during this call, by contract.
        let transfer = unsafe { enter(transfer, "transfer") }?;
        transfer.request.wait(milliseconds(timeout_ms))?;
        Ok(())
    })
}

/// Asks a transfer to end. If it is in flight it fails with KVF_CANCELLED now; its memory may be used once
/// kvf_transfer_fate says KVF_SETTLED.
///
/// # Safety
/// `transfer` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_cancel(transfer: *const kvf_transfer) -> kvf_status {
    boundary(|| {
        // SAFETY: null or live during this call, by contract.
        let transfer = unsafe { enter(transfer, "transfer") }?;
        transfer.request.cancel();
        Ok(())
    })
}

/// Says what may be done with the memory of a transfer, waiting at most `timeout_ms` for it to be settled.
///
/// # Safety
/// Each pointer is null or valid: `transfer` live, `fate_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_fate(
    transfer: *const kvf_transfer,
    timeout_ms: u32,
    fate_out: *mut kvf_fate,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or live during this call, by contract.
        let transfer = unsafe { enter(transfer, "transfer") }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(fate_out, "fate_out") }?;
        let settled = transfer.request.wait_drained(milliseconds(timeout_ms));
        out.write(if settled {
            kvf_fate::KVF_SETTLED
        } else {
            kvf_fate::KVF_MEMORY_IN_FLIGHT
        });
        Ok(())
    })
}

/// Gives a transfer back. One that is in flight goes on: its regions answer KVF_BUSY until it has ended.
///
/// # Safety
/// `transfer` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_free(transfer: *mut kvf_transfer) -> kvf_status {
    boundary(|| {
        // SAFETY: null or live, and given up by the caller, by contract.
        unsafe { take(transfer, "transfer", |_| Ok(())) }.map(drop)
    })
}
