//! What UCX says by callback, until it is asked for.

use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr::NonNull;

use super::generated::ucp::{self as ffi, ucp_am_recv_param_t, ucp_ep_h, ucs_status_t};
use super::library::Library;

/// The longest message that is taken; longer ones are none of ours.
pub(super) const MESSAGE_BYTES_MAX: usize = 128 << 10;

/// Filled by the callbacks below, which run inside of a worker's calls, and emptied between those. No borrow of a list
/// lasts longer than one of its operations, so they never meet.
#[derive(Default)]
pub(super) struct Heard {
    /// Messages, whole.
    pub(super) messages: RefCell<Vec<Vec<u8>>>,
    /// Endpoints that failed, and how.
    pub(super) failed: RefCell<Vec<(usize, ucs_status_t)>>,
    /// Operations that are over, and how.
    pub(super) over: RefCell<Vec<(usize, ucs_status_t)>>,
}

/// What an operation carries along.
pub(super) struct Ticket {
    pub(super) heard: NonNull<Heard>,
    /// Its number.
    pub(super) slot: usize,
}

/// An operation is over.
///
/// # Safety
/// To be called by UCX only, inside of a call of a worker, with the [`Ticket`] of an operation of that worker.
pub(super) unsafe extern "C" fn over(request: *mut c_void, status: ucs_status_t, own: *mut c_void) {
    // SAFETY: tickets live as long as their worker, which is in a call now, and are never changed.
    let ticket = unsafe { &*own.cast::<Ticket>() };
    // SAFETY: what is heard lives as long as the worker, too, and is only ever shared.
    let heard = unsafe { ticket.heard.as_ref() };
    heard.over.borrow_mut().push((ticket.slot, status));
    if let Ok(library) = Library::get() {
        // SAFETY: UCX hands the request to this callback, and nobody else has kept it.
        unsafe { library.calls.ucp_request_free(request) };
    }
}

/// An endpoint failed: nothing of it works any more.
///
/// # Safety
/// As [`over`], with the [`Ticket`] of an endpoint.
pub(super) unsafe extern "C" fn failed(
    own: *mut c_void,
    _endpoint: ucp_ep_h,
    status: ucs_status_t,
) {
    // SAFETY: as in `over`.
    let ticket = unsafe { &*own.cast::<Ticket>() };
    // SAFETY: as in `over`.
    let heard = unsafe { ticket.heard.as_ref() };
    heard.failed.borrow_mut().push((ticket.slot, status));
}

/// A message has come. Always takes all of it.
///
/// # Safety
/// As [`over`], with the worker's [`Heard`]; `bytes` is readable for `len` bytes unless the message is a rendezvous.
pub(super) unsafe extern "C" fn message(
    own: *mut c_void,
    _header: *const c_void,
    _header_len: usize,
    bytes: *mut c_void,
    len: usize,
    told: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: what is heard lives as long as the worker and is only ever shared.
    let heard = unsafe { &*own.cast::<Heard>() };
    // SAFETY: UCX describes each message by a valid structure.
    let told = unsafe { &*told };
    let is_elsewhere = told.recv_attr & u64::from(ffi::UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
    // Ours are never longer and never sent by rendezvous: what is, is a stranger's, and dropped.
    if !is_elsewhere && len <= MESSAGE_BYTES_MAX {
        let mut message = vec![0; len];
        // SAFETY: the message is readable for its length, and the copy is as long and new.
        unsafe { std::ptr::copy_nonoverlapping(bytes.cast::<u8>(), message.as_mut_ptr(), len) };
        heard.messages.borrow_mut().push(message);
    }
    ffi::UCS_OK
}
