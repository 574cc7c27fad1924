//! What happens to connections.

use std::ffi::{CStr, c_int};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::events::never_block;
use super::ffi;
use super::id::Id;
use super::library::Library;
use crate::sys::fork::Process;

/// A rejection whose reason stands in what came with it: the other side itself said no.
const REJECTED_BY_PEER: c_int = 28;

/// What has happened, as far as it is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Happened {
    AddressResolved,
    RouteResolved,
    /// Somebody wants to be connected.
    Requested,
    /// The other side has accepted.
    Answered,
    /// Both sides know that it is connected.
    Established,
    /// It came to nothing, or to an end.
    Failed,
    /// Nothing that anybody has to do something about.
    Other,
}

/// One thing that has happened.
pub(crate) struct Event {
    /// Whom it happened to, by the number that it was made with; of a request the listener.
    pub(crate) number: u64,
    pub(crate) happened: Happened,
    /// Bytes of the other side's.
    pub(crate) private: Vec<u8>,
    /// Of a request: who is to accept or to refuse it.
    pub(crate) request: Option<Id>,
    kind: ffi::rdma_cm_event_type,
    status: c_int,
    /// The kind, as the library calls it.
    name: String,
}

fn happened(kind: ffi::rdma_cm_event_type) -> Happened {
    match kind {
        ffi::RDMA_CM_EVENT_ADDR_RESOLVED => Happened::AddressResolved,
        ffi::RDMA_CM_EVENT_ROUTE_RESOLVED => Happened::RouteResolved,
        ffi::RDMA_CM_EVENT_CONNECT_REQUEST => Happened::Requested,
        ffi::RDMA_CM_EVENT_CONNECT_RESPONSE => Happened::Answered,
        ffi::RDMA_CM_EVENT_ESTABLISHED => Happened::Established,
        ffi::RDMA_CM_EVENT_ADDR_ERROR
        | ffi::RDMA_CM_EVENT_ROUTE_ERROR
        | ffi::RDMA_CM_EVENT_CONNECT_ERROR
        | ffi::RDMA_CM_EVENT_UNREACHABLE
        | ffi::RDMA_CM_EVENT_REJECTED
        | ffi::RDMA_CM_EVENT_DISCONNECTED
        | ffi::RDMA_CM_EVENT_DEVICE_REMOVAL => Happened::Failed,
        _ => Happened::Other,
    }
}

/// What a failure means, and what a caller can do about it.
fn meaning(kind: ffi::rdma_cm_event_type, status: c_int) -> (ErrorKind, String) {
    use ErrorKind::{Denied, Io, PeerLost};
    let system = || std::io::Error::from_raw_os_error(status.saturating_neg()).to_string();
    match kind {
        ffi::RDMA_CM_EVENT_ADDR_ERROR => (PeerLost, format!("no way to the address: {}", system())),
        ffi::RDMA_CM_EVENT_ROUTE_ERROR => (PeerLost, format!("no route: {}", system())),
        ffi::RDMA_CM_EVENT_UNREACHABLE => (PeerLost, "nobody answers there".to_owned()),
        ffi::RDMA_CM_EVENT_REJECTED => match status {
            REJECTED_BY_PEER => (Denied, "the peer refuses it".to_owned()),
            8 => (PeerLost, "nobody listens there".to_owned()),
            10 => (
                PeerLost,
                "the peer knows the queue pair from before".to_owned(),
            ),
            _ => (PeerLost, "it is rejected".to_owned()),
        },
        ffi::RDMA_CM_EVENT_DISCONNECTED => (PeerLost, "the peer has disconnected".to_owned()),
        ffi::RDMA_CM_EVENT_DEVICE_REMOVAL => (Io, "the device is being removed".to_owned()),
        ffi::RDMA_CM_EVENT_CONNECT_ERROR => (Io, system()),
        _ => (Io, "something else has happened".to_owned()),
    }
}

impl Event {
    /// What is wrong, with the event's own name and its status.
    pub(crate) fn error(&self) -> Error {
        let (kind, text) = meaning(self.kind, self.status);
        let said = match (self.kind, self.status) {
            (ffi::RDMA_CM_EVENT_REJECTED, REJECTED_BY_PEER) => refusal(&self.private),
            _ => None,
        };
        let said = said.map_or_else(String::new, |said| format!(": {said}"));
        let (name, status) = (&self.name, self.status);
        Error::new(
            kind,
            format!("rdma_cm: {text}{said} ({name}, status {status})"),
        )
    }

    /// Whether the listener or the connection must be let go of, as its device goes.
    pub(crate) fn is_removal(&self) -> bool {
        self.kind == ffi::RDMA_CM_EVENT_DEVICE_REMOVAL
    }
}

/// What stands before the reason of a refusal.
pub(super) const REFUSAL: [u8; 4] = *b"KVFN";

/// The reason of a refusal; none if it is not one of this program's.
fn refusal(private: &[u8]) -> Option<&str> {
    let rest = private.strip_prefix(&REFUSAL)?;
    let (&length, text) = rest.split_first()?;
    std::str::from_utf8(text.get(..length.into())?).ok()
}

/// Tells what happens to ids.
pub(crate) struct Events {
    pub(super) library: &'static Library,
    pub(super) raw: NonNull<ffi::rdma_event_channel>,
    pub(super) process: Process,
}

// SAFETY: the calls of librdmacm may be made from any thread, several at a time; what the pointer points to lives until it is
// destroyed by `drop`.
unsafe impl Send for Events {}
// SAFETY: as above.
unsafe impl Sync for Events {}

impl Events {
    /// # Errors
    /// [`ErrorKind::Unsupported`] without librdmacm, or without `/dev/infiniband/rdma_cm`.
    pub(crate) fn new() -> Result<Self> {
        let library = Library::get()?;
        // SAFETY: no preconditions.
        let raw = unsafe { (library.calls.rdma_create_event_channel)() };
        let Some(raw) = NonNull::new(raw) else {
            let cause = std::io::Error::last_os_error();
            let text = format!("rdma_cm is not there (is rdma_ucm loaded?): {cause}");
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let own = Self {
            library,
            raw,
            process: Process::current(),
        };
        never_block(own.as_fd())?;
        Ok(own)
    }

    /// What has happened next, if anything.
    pub(crate) fn next(self: &Arc<Self>) -> Option<Event> {
        let calls = &self.library.calls;
        let mut event = std::ptr::null_mut();
        // SAFETY: the channel is open and does not block, and the result is writable.
        let code = unsafe { (calls.rdma_get_cm_event)(self.raw.as_ptr(), &raw mut event) };
        let event = NonNull::new(event).filter(|_| code == 0)?;
        // SAFETY: an event that was got just now, and not acknowledged: until then it stays, and so does its id.
        let told = unsafe { event.as_ref() };
        let (kind, status) = (told.event, told.status);
        // SAFETY: as above.
        let id = unsafe { &*told.id };
        let number = id.context.expose_provenance() as u64;
        // SAFETY: the library names every number.
        let name = unsafe { (calls.rdma_event_str)(kind) };
        // SAFETY: a terminated text that is never freed.
        let name = unsafe { CStr::from_ptr(name) };
        let name = name.to_string_lossy();
        let mut all = Event {
            number,
            happened: happened(kind),
            private: private(told),
            request: None,
            kind,
            status,
            name: name.trim_start_matches("RDMA_CM_EVENT_").to_owned(),
        };
        let asked = NonNull::new(told.id).filter(|_| all.happened == Happened::Requested);
        // SAFETY: got above, acknowledged once.
        unsafe { (calls.rdma_ack_cm_event)(event.as_ptr()) };
        // SAFETY: a request brings an id, which is nobody else's.
        all.request = asked.map(|asked| unsafe { Id::asked(self, asked) });
        Some(all)
    }

    /// What happens next, until then.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`].
    pub(super) fn wait(self: &Arc<Self>, until: Instant, doing: &str) -> Result<Event> {
        loop {
            if let Some(event) = self.next() {
                return Ok(event);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = format!("rdma_cm: {doing}: nothing has come in time");
                return Err(Error::new(ErrorKind::Timeout, text));
            }
            let limit = Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(self.as_ref(), PollFlags::IN)];
            // A signal only makes it look once more than it had to.
            let _ = poll(&mut fds, Some(&limit));
        }
    }
}

/// The bytes that came with an event, if its kind has such.
fn private(event: &ffi::rdma_cm_event) -> Vec<u8> {
    let has_some = matches!(
        event.event,
        ffi::RDMA_CM_EVENT_CONNECT_REQUEST
            | ffi::RDMA_CM_EVENT_CONNECT_RESPONSE
            | ffi::RDMA_CM_EVENT_ESTABLISHED
            | ffi::RDMA_CM_EVENT_REJECTED
    );
    if !has_some {
        return Vec::new();
    }
    // SAFETY: connections of reliable queue pairs have this form; all of it are numbers and a pointer.
    let param = unsafe { event.param.conn };
    let bytes = param.private_data.cast::<u8>();
    let count = usize::from(param.private_data_len);
    if bytes.is_null() || count == 0 {
        return Vec::new();
    }
    // SAFETY: the library keeps as many bytes there until the event is acknowledged.
    unsafe { std::slice::from_raw_parts(bytes, count) }.to_vec()
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is open.
        let fd = unsafe { self.raw.as_ref() }.fd;
        // SAFETY: the descriptor is the channel's, open for as long as that is.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if !self.process.is_current() {
            return;
        }
        // SAFETY: made by `new`, destroyed only here; ids hold the channel, so there are none any more.
        unsafe { (self.library.calls.rdma_destroy_event_channel)(self.raw.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: ffi::rdma_cm_event_type, status: c_int, private: &[u8]) -> Event {
        Event {
            number: 0,
            happened: happened(kind),
            private: private.to_vec(),
            request: None,
            kind,
            status,
            name: "NAME".to_owned(),
        }
    }

    /// Each kind of failure, with what a caller can do about it, and its status.
    #[test]
    fn every_failure_has_a_kind_and_keeps_its_status() {
        use ErrorKind::{Denied, Io, PeerLost};
        let failures = [
            (
                ffi::RDMA_CM_EVENT_ADDR_ERROR,
                -113,
                PeerLost,
                "No route to host",
            ),
            (
                ffi::RDMA_CM_EVENT_ROUTE_ERROR,
                -110,
                PeerLost,
                "no route: Connection timed out",
            ),
            (
                ffi::RDMA_CM_EVENT_UNREACHABLE,
                -110,
                PeerLost,
                "nobody answers",
            ),
            (ffi::RDMA_CM_EVENT_REJECTED, 8, PeerLost, "nobody listens"),
            (ffi::RDMA_CM_EVENT_REJECTED, 10, PeerLost, "from before"),
            (
                ffi::RDMA_CM_EVENT_REJECTED,
                28,
                Denied,
                "the peer refuses it",
            ),
            (ffi::RDMA_CM_EVENT_REJECTED, 5, PeerLost, "rejected"),
            (
                ffi::RDMA_CM_EVENT_CONNECT_ERROR,
                -22,
                Io,
                "Invalid argument",
            ),
            (ffi::RDMA_CM_EVENT_DISCONNECTED, 0, PeerLost, "disconnected"),
            (ffi::RDMA_CM_EVENT_DEVICE_REMOVAL, 0, Io, "removed"),
        ];
        for (kind, status, expected, words) in failures {
            let event = event(kind, status, b"");
            assert_eq!(event.happened, Happened::Failed);
            let error = event.error();
            assert_eq!(error.kind(), expected, "{error}");
            let text = error.to_string();
            assert!(text.contains(words), "{text}");
            assert!(text.contains(&format!("(NAME, status {status})")), "{text}");
        }
        let others = (0..=ffi::RDMA_CM_EVENT_TIMEWAIT_EXIT + 1)
            .filter(|kind| failures.iter().all(|(failed, ..)| failed != kind));
        assert!(others.map(happened).all(|other| other != Happened::Failed));
        assert_eq!(happened(99), Happened::Other);
    }

    /// The peer's own words are told; what others send with a refusal is not believed.
    #[test]
    fn the_reason_of_a_refusal_is_told() {
        let refused = |private: &[u8]| {
            let event = event(ffi::RDMA_CM_EVENT_REJECTED, 28, private);
            event.error().to_string()
        };
        assert!(refused(b"KVFN\x05hello\0\0\0").contains("refuses it: hello ("));
        for wrong in [
            &b"KVFN\x09hello"[..],
            b"KVFX\x05hello",
            b"KVFN\x02\xff\xff",
            b"KVFN",
            b"",
        ] {
            assert!(refused(wrong).contains("refuses it ("), "{wrong:?}");
        }
    }
}
