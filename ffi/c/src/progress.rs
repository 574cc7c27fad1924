//! Transfers in progress: posted, polled, waited for, measured, given back.

use std::ffi::{c_char, c_void};
use std::os::fd::AsRawFd;
use std::time::Duration;

use kvfabric::transfer::Status;
use kvfabric::{Error, ErrorKind};

use crate::boundary::{Out, boundary, enter, fixed, milliseconds, take};
use crate::options::{OutSized, SizePrefixed};
use crate::status::kvf_status;
use crate::transfer::{kvf_transfer, optional_bytes};

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

/// Bytes that the name of a path has room for, with its terminating NUL.
pub const KVF_PATH_CAPACITY: usize = 32;

/// What a post took.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_telemetry {
    /// sizeof(struct kvf_telemetry), set by the caller.
    pub size: usize,
    /// When it was posted, in nanoseconds since the agent was made.
    pub posted_ns: u64,
    /// How long the call that posted it took. A small copy is done within it.
    pub post_ns: u64,
    /// From the post to its end.
    pub transfer_ns: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Pairs of ranges that were moved, before neighbours were merged.
    pub descriptors: u32,
    /// How often it, or a piece of it, was tried again after a failure.
    pub failovers: u32,
    /// What moved them, such as "shm".
    pub path: [c_char; KVF_PATH_CAPACITY],
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_telemetry {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_telemetry";
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
        let transfer = enter(transfer, "transfer")?;
        transfer.request().post()
    })
}

/// As kvf_transfer_post, with `len` bytes at `notification` from now on in place of those given before; NULL: with none.
///
/// KVF_BUSY also while another thread waits for it.
///
/// # Safety
/// Each pointer is null or valid: `transfer` live, `notification` for `len` reads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_repost(
    transfer: *const kvf_transfer,
    notification: *const c_void,
    len: usize,
) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        // SAFETY: null or readable for `len` bytes, by contract.
        let notification = unsafe { optional_bytes(notification, len, "notification") }?;
        transfer.repost(notification)
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
        let transfer = enter(transfer, "transfer")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(state_out, "state_out") }?;
        out.write(match transfer.request().poll() {
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
        let transfer = enter(transfer, "transfer")?;
        transfer.request().wait(milliseconds(timeout_ms))?;
        Ok(())
    })
}

/// Waits until all bytes of a part, counted from 0, are in place, at most `timeout_ms`. A part that is in place stays so when
/// the transfer fails later.
///
/// Why the transfer failed before the part was in place; KVF_TIMEOUT also when `timeout_ms` ran out; KVF_INVALID for a part
/// that there is not, and when it was never posted.
///
/// # Safety
/// `transfer` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_wait_part(
    transfer: *const kvf_transfer,
    part: usize,
    timeout_ms: u32,
) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        let request = transfer.request();
        request.wait_part(part, milliseconds(timeout_ms))?;
        Ok(())
    })
}

/// A descriptor that polls as readable while the last post is decided: done or failed. The next post makes it unreadable
/// again. It belongs to the transfer, lives as long as that, and must be neither read from nor closed.
///
/// # Safety
/// Each pointer is null or valid: `transfer` live, `fd_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_eventfd(
    transfer: *const kvf_transfer,
    fd_out: *mut i32,
) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(fd_out, "fd_out") }?;
        let request = transfer.request();
        out.write(request.event_fd()?.as_raw_fd());
        Ok(())
    })
}

/// What the last post that succeeded took. KVF_NOT_FOUND before one has.
///
/// # Safety
/// Each pointer is null or valid: `transfer` live, `telemetry_out` for its size in reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_telemetry(
    transfer: *const kvf_transfer,
    telemetry_out: *mut kvf_telemetry,
) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        // SAFETY: null or writable for its size, by contract.
        let out = unsafe { OutSized::new(telemetry_out) }?;
        let telemetry = transfer.request().telemetry().ok_or_else(|| {
            let text = "no post of the transfer has succeeded yet";
            Error::new(ErrorKind::NotFound, text)
        })?;
        out.write(kvf_telemetry {
            size: 0,
            posted_ns: nanoseconds(telemetry.posted),
            post_ns: nanoseconds(telemetry.post),
            transfer_ns: nanoseconds(telemetry.transfer),
            bytes: telemetry.bytes,
            descriptors: telemetry.descriptors,
            failovers: telemetry.failovers,
            path: fixed(telemetry.path),
        });
        Ok(())
    })
}

pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Asks a transfer to end. If it is in flight it fails with KVF_CANCELLED now; its memory may be used once
/// kvf_transfer_fate says KVF_SETTLED.
///
/// # Safety
/// `transfer` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_cancel(transfer: *const kvf_transfer) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        transfer.request().cancel();
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
        let transfer = enter(transfer, "transfer")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(fate_out, "fate_out") }?;
        let settled = transfer.request().wait_drained(milliseconds(timeout_ms));
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
    boundary(|| take(transfer, "transfer", |_| Ok(())))
}
