//! Transfers and an engine's streams: one begins after the other, and no processor waits.

use kvfabric::Error;
use kvfabric::transfer::{CudaPoint, CudaStream};

use crate::boundary::{boundary, enter, milliseconds};
use crate::status::kvf_status;
use crate::transfer::kvf_transfer;

/// All parts of a transfer.
pub const KVF_ALL_PARTS: u32 = 0xFFFF_FFFF;

/// As kvf_transfer_post, of a transfer with memory of a GPU: nothing of it is read or written before the GPU has done all that
/// `stream` of device number `device` has been given so far. `stream` is a CUstream or cudaStream_t as a number: 0 and 1 are the
/// device's default stream, 2 the calling thread's. Nothing waits for it but the GPU. The deadline counts from the post.
///
/// As kvf_transfer_post; KVF_UNSUPPORTED for a transfer that no GPU's copies move, without CUDA, for a stream that is captured into a
/// graph, and for one of another context than the device's primary one; KVF_INVALID for a device that there is not, and a stream of
/// another device.
///
/// # Safety
/// `transfer` is null or live; `stream` is a stream that lives, and on which no capture begins, during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_post_after(
    transfer: *const kvf_transfer,
    device: u32,
    stream: u64,
) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        // SAFETY: a stream that lives during the call, which what is made of it does not outlive, by contract.
        let stream = unsafe { CudaStream::from_raw(device, stream) }?;
        let point = stream.point()?;
        transfer.request().post_after(&point)
    })
}

/// As kvf_transfer_post_after, after what `event` of device number `device`, a CUevent or cudaEvent_t as a number, was last recorded
/// behind. It may be recorded again afterwards.
///
/// As kvf_transfer_post_after; KVF_INVALID also for 0, KVF_UNSUPPORTED also for an event that was recorded into a graph.
///
/// # Safety
/// `transfer` is null or live; `event` is an event that lives, and that no thread records, during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_post_after_event(
    transfer: *const kvf_transfer,
    device: u32,
    event: u64,
) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        if event == 0 {
            return Err(Error::invalid("event", event, "a CUevent"));
        }
        // SAFETY: an event that lives and is not recorded during the call, by contract.
        let point = unsafe { CudaPoint::of_event(device, event) }?;
        transfer.request().post_after(&point)
    })
}

/// Has `stream` of device number `device` wait for a part, counted from 0, or for KVF_ALL_PARTS: what it is given after this call is
/// done after all copies of the part. Waits itself until they are queued, at most `timeout_ms`, not until they are made.
///
/// After KVF_OK the stream goes on whatever becomes of the transfer, and finds the part's bytes in memory of the GPU: queued copies are
/// taken back by nothing, and one that fails breaks the GPU's context, which the stream's own calls report. After any failure the
/// stream waits for nothing: do not use the part. Memory of the host is in place when kvf_transfer_wait_part says so.
///
/// Why the transfer failed before the copies were queued; KVF_TIMEOUT also when `timeout_ms` ran out; KVF_INVALID for a part that
/// there is not, and when it was never posted; KVF_UNSUPPORTED also with checksums; otherwise as kvf_transfer_post_after.
///
/// # Safety
/// As kvf_transfer_post_after.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_transfer_order_stream(
    transfer: *const kvf_transfer,
    device: u32,
    stream: u64,
    part: usize,
    timeout_ms: u32,
) -> kvf_status {
    boundary(|| {
        let transfer = enter(transfer, "transfer")?;
        // SAFETY: a stream that lives during the call, which what is made of it does not outlive, by contract.
        let stream = unsafe { CudaStream::from_raw(device, stream) }?;
        let part = (part != KVF_ALL_PARTS as usize).then_some(part);
        let request = transfer.request();
        request.order_stream(&stream, part, milliseconds(timeout_ms))?;
        Ok(())
    })
}
