//! What a worker is told to do: messages, reads and writes, waiting for writes.

use std::ffi::c_void;

use kvcache_core::{Error, ErrorKind, Result};

use super::generated::ucp as ffi;
use super::heard;
use super::operations::{EndpointId, Flight, Moving, Started, request};
use super::worker::Worker;
use crate::backend::Operation;

/// Our messages among all active messages of a worker.
pub(super) const MESSAGE_ID: u32 = 0x4b;

impl Worker {
    /// What UCX answered to the start of an operation.
    pub(super) fn started(&self, doing: &str, answer: *mut c_void) -> Result<Started> {
        let code = answer.addr() as isize;
        if code == 0 {
            return Ok(Started::Over);
        }
        // The last hundred addresses stand for errors.
        if (isize::from(ffi::UCS_ERR_LAST)..0).contains(&code) {
            return Err(self.library.error(doing, code as ffi::ucs_status_t));
        }
        Ok(Started::Pending)
    }

    /// Takes the number back of an operation that has not begun or is over already.
    fn settle(&mut self, slot: usize, started: Result<Started>) -> Result<Started> {
        if !matches!(started, Ok(Started::Pending)) {
            self.operations.leave(slot);
        }
        started
    }

    /// Sends a message. It arrives whole, after those sent before, or the endpoint fails.
    pub(crate) fn send(&mut self, id: EndpointId, bytes: Vec<u8>) -> Result<()> {
        let raw = self.endpoint(id)?.raw;
        if bytes.len() > heard::MESSAGE_BYTES_MAX {
            return Err(Error::invalid(
                "bytes of a message",
                bytes.len(),
                0..=heard::MESSAGE_BYTES_MAX,
            ));
        }
        let bytes = bytes.into_boxed_slice();
        let (start, len) = (bytes.as_ptr(), bytes.len());
        let (slot, own) = self.operations.enter(Flight::Send(bytes));
        let mut params = request(own);
        params.op_attr_mask |= ffi::UCP_OP_ATTR_FIELD_FLAGS;
        params.flags = ffi::UCP_AM_SEND_FLAG_EAGER;
        // SAFETY: the endpoint is open, and the bytes live in the operation's place until it is over.
        let answer = unsafe {
            self.library.calls.ucp_am_send_nbx(
                raw,
                MESSAGE_ID,
                std::ptr::null(),
                0,
                start.cast(),
                len,
                &raw const params,
            )
        };
        let started = self.started("send a message", answer);
        self.settle(slot, started).map(|_| ())
    }

    /// Starts to read or write bytes of a peer's region.
    pub(crate) fn transfer(
        &mut self,
        operation: Operation,
        id: EndpointId,
        moving: Moving,
        job: usize,
    ) -> Result<Started> {
        let endpoint = self.endpoint(id)?;
        let key = endpoint.keys.get(&moving.remote).ok_or_else(|| {
            let text = format!("ucx: no key of the peer's region {}", moving.remote);
            Error::new(ErrorKind::NotFound, text)
        })?;
        let (raw, rkey) = (endpoint.raw, key.raw);
        let end = moving.remote_offset.checked_add(moving.len);
        let remote = key.address.checked_add(moving.remote_offset);
        let (Some(remote), true) = (remote, end.is_some_and(|end| end <= key.bytes)) else {
            let text = format!(
                "bytes {}+{} lie outside the {} bytes of the peer's region",
                moving.remote_offset, moving.len, key.bytes
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        };
        let memory = self.memory(moving.local)?;
        let (base, len) = memory.range(operation, moving.local_offset, moving.len)?;
        let (handle, kind) = (memory.raw, memory.kind);
        let local = moving.local;
        let (slot, own) = self.operations.enter(Flight::Move { local, job });
        let mut params = request(own);
        params.op_attr_mask |= ffi::UCP_OP_ATTR_FIELD_MEMH;
        params.memh = handle;
        if let Some(kind) = kind {
            params.op_attr_mask |= ffi::UCP_OP_ATTR_FIELD_MEMORY_TYPE;
            params.memory_type = kind;
        }
        let calls = &self.library.calls;
        let answer = match operation {
            // SAFETY: the range was checked to lie in registered memory that is kept until the operation is over, and
            // may be written; the endpoint and its key are open; what lies at the other end is checked there by UCX.
            Operation::Read => unsafe {
                calls.ucp_get_nbx(raw, base, len, remote, rkey, &raw const params)
            },
            // SAFETY: as above; the range is only read.
            Operation::Write => unsafe {
                calls.ucp_put_nbx(raw, base, len, remote, rkey, &raw const params)
            },
        };
        let started = self.started("move bytes", answer);
        let started = self.settle(slot, started)?;
        if started == Started::Pending
            && let Some(memory) = self.memories.get_mut(&local)
        {
            memory.users += 1;
        }
        Ok(started)
    }

    /// Starts to wait until all that was written before has reached the peer's memory.
    pub(crate) fn flush(&mut self, id: EndpointId, job: usize) -> Result<Started> {
        let raw = self.endpoint(id)?.raw;
        let (slot, own) = self.operations.enter(Flight::Flush { job });
        let params = request(own);
        // SAFETY: the endpoint is open.
        let answer = unsafe { self.library.calls.ucp_ep_flush_nbx(raw, &raw const params) };
        let started = self.started("wait for writes", answer);
        self.settle(slot, started)
    }
}
