//! A ring that does all that the engine asks of it.

use std::io;

use io_uring::{IoUring, Probe, opcode};

/// Submission entries: calls, their cancellations and the wake-up, with room.
const RING_ENTRIES: u32 = 256;

/// Makes one.
///
/// # Errors
/// What the kernel says, and what its rings lack.
pub(super) fn ring() -> io::Result<IoUring> {
    let ring = IoUring::builder()
        .dontfork()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(RING_ENTRIES)
        .or_else(|_| IoUring::builder().dontfork().build(RING_ENTRIES))?;
    if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
        return Err(io::Error::other("this kernel's rings may drop answers"));
    }
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    for (name, code) in [
        ("readv", opcode::Readv::CODE),
        ("writev", opcode::Writev::CODE),
        ("fsync", opcode::Fsync::CODE),
        ("poll", opcode::PollAdd::CODE),
        ("cancel", opcode::AsyncCancel::CODE),
    ] {
        if !probe.is_supported(code) {
            return Err(io::Error::other(format!("this kernel's rings lack {name}")));
        }
    }
    Ok(ring)
}
