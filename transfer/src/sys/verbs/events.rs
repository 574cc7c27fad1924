//! How a device tells of completions, and of what goes wrong beside them.

use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use kvcache_core::{Error, Result};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::context::Context;
use super::generated::ibverbs as ffi;
use super::library::last;

/// Tells which completion queues have something, once each time they were armed.
pub(crate) struct Channel {
    pub(super) context: Arc<Context>,
    pub(super) raw: NonNull<ffi::ibv_comp_channel>,
}

// SAFETY: as for the context; events are taken by one thread at a time or by several, which the library allows.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

/// Asking for events must not wait for them.
pub(super) fn never_block(fd: BorrowedFd<'_>) -> Result<()> {
    let set = fcntl_getfl(fd).and_then(|flags| fcntl_setfl(fd, flags | OFlags::NONBLOCK));
    set.map_err(|e| Error::io("verbs: make events non-blocking", e.into()))
}

impl Channel {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        // SAFETY: the device is open, and the channel keeps it so.
        let raw = unsafe {
            context
                .library
                .calls
                .ibv_create_comp_channel(context.raw.as_ptr())
        };
        let raw = NonNull::new(raw).ok_or_else(|| last("make an event channel"))?;
        let own = Self {
            context: context.clone(),
            raw,
        };
        never_block(own.as_fd())?;
        never_block(context.notice_fd())?;
        Ok(own)
    }

    /// The number of the next queue that has something, if any.
    pub(crate) fn next(&self) -> Option<u64> {
        let (mut queue, mut number) = (std::ptr::null_mut(), std::ptr::null_mut());
        let calls = &self.context.library.calls;
        // SAFETY: the channel is open, and both results are writable.
        let code =
            unsafe { calls.ibv_get_cq_event(self.raw.as_ptr(), &raw mut queue, &raw mut number) };
        if code != 0 {
            return None;
        }
        // SAFETY: the queue of an event that was got just now, and not acknowledged: so it is not destroyed.
        unsafe { calls.ibv_ack_cq_events(queue, 1) };
        Some(number.expose_provenance() as u64)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is open.
        let fd = unsafe { self.raw.as_ref() }.fd;
        // SAFETY: the descriptor is the channel's, open for as long as that is.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if !self.context.process.is_current() {
            return;
        }
        let calls = &self.context.library.calls;
        // SAFETY: made by `new`; queues hold the channel, so there are none any more.
        let code = unsafe { calls.ibv_destroy_comp_channel(self.raw.as_ptr()) };
        if code != 0 {
            tracing::warn!(code, "close an event channel of verbs");
        }
    }
}

/// What a device tells beside completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The queue pair of this number failed.
    PairFailed(u32),
    /// The device failed, and with it all that it has.
    DeviceFailed,
    /// The port went up (true) or down.
    Port { number: u8, is_up: bool },
    /// Anything else, as verbs number it.
    Other(u32),
}

impl Context {
    /// What the device has to tell next, if anything.
    pub(crate) fn notice(&self) -> Option<Notice> {
        let mut event = std::mem::MaybeUninit::<ffi::ibv_async_event>::zeroed();
        // SAFETY: the device is open, and the result is writable.
        let code = unsafe {
            self.library
                .calls
                .ibv_get_async_event(self.raw.as_ptr(), event.as_mut_ptr())
        };
        if code != 0 {
            return None;
        }
        // SAFETY: numbers and pointers, for all of which zero is a value; filled above.
        let mut event = unsafe { event.assume_init() };
        let notice = match event.event_type {
            ffi::IBV_EVENT_QP_FATAL | ffi::IBV_EVENT_QP_REQ_ERR | ffi::IBV_EVENT_QP_ACCESS_ERR => {
                // SAFETY: events of these kinds name a queue pair.
                let pair = unsafe { event.element.qp };
                // SAFETY: a queue pair is not destroyed before its events are acknowledged, below.
                Notice::PairFailed(unsafe { (*pair).qp_num })
            }
            ffi::IBV_EVENT_DEVICE_FATAL => Notice::DeviceFailed,
            ffi::IBV_EVENT_PORT_ACTIVE | ffi::IBV_EVENT_PORT_ERR => {
                // SAFETY: events of these kinds name a port.
                let number = unsafe { event.element.port_num };
                Notice::Port {
                    number: u8::try_from(number).unwrap_or(0),
                    is_up: event.event_type == ffi::IBV_EVENT_PORT_ACTIVE,
                }
            }
            other => Notice::Other(other),
        };
        // SAFETY: got above, acknowledged once.
        unsafe { self.library.calls.ibv_ack_async_event(&raw mut event) };
        Some(notice)
    }
}
