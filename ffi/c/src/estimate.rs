//! What transfers are expected to take, and which way they would go.

use std::ffi::c_char;
use std::time::Duration;

use kvfabric::transfer::{Estimate, PathCost};

use crate::agent::kvf_agent;
use crate::boundary::{Listing, boundary, enter, fixed, text};
use crate::options::{OutSized, SizePrefixed};
use crate::progress::{KVF_PATH_CAPACITY, nanoseconds};
use crate::status::kvf_status;
use crate::transfer::kvf_transfer;

/// What a post would take now.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_estimate {
    /// sizeof(struct kvf_estimate), set by the caller.
    pub size: usize,
    /// From the post to its end, in nanoseconds, if nothing else is in its way.
    pub expected_ns: u64,
    /// 1: transfers of about this size have shown it; 0: it is what the way is taken to cost.
    pub measured: u32,
    /// Zero.
    pub reserved: u32,
    /// The way that it would go, such as "shm".
    pub path: [c_char; KVF_PATH_CAPACITY],
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_estimate {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_estimate";
}

/// What a way is taken to cost in estimates, until transfers have shown it: `latency_ns` for one that moves next to nothing, and
/// the bandwidth of long ones.
///
/// KVF_INVALID for a bandwidth of 0, and for a name that is no way or kind of storage.
///
/// # Safety
/// `agent` is null or live, `backend` null or a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_assume_cost(
    agent: *const kvf_agent,
    backend: *const c_char,
    latency_ns: u64,
    bytes_per_second: u64,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        // SAFETY: null or a string, by contract.
        let backend = unsafe { text(backend, "backend") }?;
        let cost = PathCost {
            latency: Duration::from_nanos(latency_ns),
            bytes_per_s: bytes_per_second,
        };
        agent.agent.assume_cost(backend, cost)
    })
}

/// What posting a transfer would take now, by what others took; connects to the peer if there is no connection.
///
/// KVF_PEER_LOST when the peer cannot be reached.
///
/// # Safety
/// Each pointer is null or valid: `transfer` live, `estimate_out` for its size in reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_estimate(
    transfer: *const kvf_transfer,
    estimate_out: *mut kvf_estimate,
) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        // SAFETY: null or writable for its size, by contract.
        let out = unsafe { OutSized::new(estimate_out) }?;
        let estimate = transfer.request().estimate()?;
        out.write(kvf_estimate {
            size: 0,
            expected_ns: nanoseconds(estimate.expected),
            measured: estimate.measured.into(),
            reserved: 0,
            path: fixed(estimate.backend),
        });
        Ok(())
    })
}

/// Says which way a transfer would go now, and what kept those that go before it from being chosen. Buffers as in
/// kvf_peer_path.
///
/// # Safety
/// Each pointer is null or valid: `transfer` live, `buffer` for `capacity` writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_path(
    transfer: *const kvf_transfer,
    buffer: *mut c_char,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        let estimate = transfer.request().estimate()?;
        listing.fill_text(&describe(&estimate), "path")
    })
}

fn describe(estimate: &Estimate) -> String {
    let mut text = estimate.backend.to_owned();
    for (backend, reason) in &estimate.refused {
        text.push_str(&format!("; not {backend}: {reason}"));
    }
    text
}
