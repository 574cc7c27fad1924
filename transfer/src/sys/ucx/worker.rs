//! One worker of UCX: endpoints, registered memory, what moves between them.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::generated::ucp as ffi;
use super::heard::{self, Heard, Ticket};
use super::library::Library;
use super::operations::{EndpointId, Event, Flight, Operations, Started, request};
use super::transports;
use crate::region::{RegionCore, RegionId};
use crate::sys::fork::Process;

/// How long a worker that goes waits for what is under way.
const PARTING_MAX: Duration = Duration::from_secs(1);

pub(super) struct RemoteKey {
    pub(super) raw: ffi::ucp_rkey_h,
    pub(super) address: u64,
    pub(super) bytes: u64,
}

pub(super) struct Endpoint {
    pub(super) raw: ffi::ucp_ep_h,
    /// What UCX gives back when it fails.
    ticket: NonNull<Ticket>,
    pub(super) keys: HashMap<RegionId, RemoteKey>,
    closing: bool,
}

/// Own memory that UCX knows.
pub(super) struct Memory {
    pub(super) raw: ffi::ucp_mem_h,
    /// What UCX takes it for; none: it is to find out, and finds memory of the host.
    pub(super) kind: Option<ffi::ucs_memory_type_t>,
    /// Keeps it mapped.
    pub(super) region: Arc<RegionCore>,
    /// Operations that use it.
    pub(super) users: usize,
}

/// A context with one worker. One thread at a time uses it, whichever.
pub(crate) struct Worker {
    pub(super) library: &'static Library,
    process: Process,
    pub(super) context: ffi::ucp_context_h,
    /// Kinds of memory that it knows, as bits.
    memory_types: u64,
    worker: ffi::ucp_worker_h,
    address: Vec<u8>,
    event_fd: RawFd,
    heard: NonNull<Heard>,
    pub(super) operations: Operations,
    pub(super) endpoints: HashMap<EndpointId, Endpoint>,
    next_endpoint: usize,
    pub(super) memories: HashMap<RegionId, Memory>,
    /// Told by calls themselves.
    told: Vec<Event>,
}

// SAFETY: the worker is made for use by several threads one after the other (`UCS_THREAD_MODE_SERIALIZED`), all calls
// need `&mut self` or only read what never changes, and what the pointers point to belongs to it alone.
unsafe impl Send for Worker {}

impl Worker {
    /// Opens UCX with the settings of the environment and these changes (names without `UCX_`).
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without UCX or without any transport, [`ErrorKind::Invalid`] for a setting that
    /// UCX cannot read, which is named.
    pub(crate) fn open(changes: &[(String, String)]) -> Result<Self> {
        let library = Library::get()?;
        let settings = library.settings(changes)?;
        let context = new_context(library, settings.raw)?;
        drop(settings);
        let worker = match new_worker(library, context) {
            Ok(worker) => worker,
            Err(error) => {
                // SAFETY: made just now; nothing else was made of it.
                unsafe { library.calls.ucp_cleanup(context) };
                return Err(error);
            }
        };
        let heard = NonNull::from(Box::leak(Box::<Heard>::default()));
        let mut own = Self {
            library,
            process: Process::current(),
            context,
            memory_types: 0,
            worker,
            address: Vec::new(),
            event_fd: -1,
            heard,
            operations: Operations::new(heard),
            endpoints: HashMap::new(),
            next_endpoint: 0,
            memories: HashMap::new(),
            told: Vec::new(),
        };
        own.memory_types = own.read_memory_types()?;
        own.listen()?;
        own.address = own.read_address()?;
        own.event_fd = own.read_event_fd()?;
        Ok(own)
    }

    fn listen(&mut self) -> Result<()> {
        let fields = ffi::UCP_AM_HANDLER_PARAM_FIELD_ID
            | ffi::UCP_AM_HANDLER_PARAM_FIELD_FLAGS
            | ffi::UCP_AM_HANDLER_PARAM_FIELD_CB
            | ffi::UCP_AM_HANDLER_PARAM_FIELD_ARG;
        let handler = ffi::ucp_am_handler_param_t {
            field_mask: u64::from(fields),
            id: super::post::MESSAGE_ID,
            flags: ffi::UCP_AM_FLAG_WHOLE_MSG,
            cb: Some(heard::message),
            arg: self.heard.as_ptr().cast(),
        };
        // SAFETY: the worker is open; what is heard outlives it; the callback keeps its contract by being UCX's only.
        let status = unsafe {
            self.library
                .calls
                .ucp_worker_set_am_recv_handler(self.worker, &raw const handler)
        };
        self.library.check("listen to messages", status)
    }

    fn read_address(&self) -> Result<Vec<u8>> {
        let mut raw = std::ptr::null_mut();
        let mut len = 0;
        // SAFETY: the worker is open, and both results are writable.
        let status = unsafe {
            self.library
                .calls
                .ucp_worker_get_address(self.worker, &raw mut raw, &raw mut len)
        };
        self.library.check("ask for the worker's address", status)?;
        // SAFETY: the address has that length and lives until it is released, below.
        let address = unsafe { std::slice::from_raw_parts(raw.cast::<u8>(), len) }.to_vec();
        // SAFETY: got above from this worker, and not used any more.
        unsafe {
            self.library
                .calls
                .ucp_worker_release_address(self.worker, raw);
        }
        Ok(address)
    }

    fn read_memory_types(&self) -> Result<u64> {
        // SAFETY: a structure of numbers, for all of which zero is a value.
        let mut found: ffi::ucp_context_attr_t = unsafe { std::mem::zeroed() };
        found.field_mask = u64::from(ffi::UCP_ATTR_FIELD_MEMORY_TYPES);
        // SAFETY: the context is open, and the result is writable.
        let status = unsafe {
            self.library
                .calls
                .ucp_context_query(self.context, &raw mut found)
        };
        self.library.check("ask for kinds of memory", status)?;
        Ok(found.memory_types)
    }

    /// Whether it knows a kind of memory.
    pub(super) fn knows(&self, kind: ffi::ucs_memory_type_t) -> bool {
        self.memory_types & (1 << kind) != 0
    }

    fn read_event_fd(&self) -> Result<RawFd> {
        let mut fd = -1;
        // SAFETY: the worker is open, and the result is writable.
        let status = unsafe {
            self.library
                .calls
                .ucp_worker_get_efd(self.worker, &raw mut fd)
        };
        self.library
            .check("ask for the worker's event descriptor", status)?;
        Ok(fd)
    }

    /// The library's version.
    pub(crate) fn version(&self) -> &'static str {
        self.library.version()
    }

    /// By which other workers connect.
    pub(crate) fn address(&self) -> &[u8] {
        &self.address
    }

    /// Readable when there is something to do after [`Worker::arm`].
    pub(crate) fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the worker's, open for as long as that is.
        unsafe { BorrowedFd::borrow_raw(self.event_fd) }
    }

    /// Makes the event descriptor tell of what comes next; false when something has come already.
    pub(crate) fn arm(&mut self) -> Result<bool> {
        // SAFETY: the worker is open and in nobody else's hands.
        let status = unsafe { self.library.calls.ucp_worker_arm(self.worker) };
        if status == ffi::UCS_ERR_BUSY {
            return Ok(false);
        }
        self.library.check("wait for events", status).map(|()| true)
    }

    /// Lets UCX work; whether it found anything to do.
    pub(crate) fn progress(&mut self) -> bool {
        // SAFETY: the worker is open and in nobody else's hands.
        let count = unsafe { self.library.calls.ucp_worker_progress(self.worker) };
        count > 0
    }

    /// What has happened since the last time.
    pub(crate) fn events(&mut self) -> Vec<Event> {
        // SAFETY: lives as long as the worker, is only ever shared, and no call of UCX runs now.
        let heard = unsafe { self.heard.as_ref() };
        let mut events = std::mem::take(&mut self.told);
        let messages = heard.messages.take();
        events.extend(messages.into_iter().map(Event::Message));
        for (slot, status) in heard.over.take() {
            let Some(flight) = self.operations.leave(slot) else {
                continue;
            };
            events.extend(self.land(flight, status));
        }
        for (number, status) in heard.failed.take() {
            let endpoint = EndpointId(number);
            let reason = self.library.error("the peer", status).to_string();
            events.push(Event::Failed { endpoint, reason });
        }
        events
    }

    fn land(&mut self, flight: Flight, status: ffi::ucs_status_t) -> Option<Event> {
        match flight {
            Flight::Move { local, job } => {
                if let Some(memory) = self.memories.get_mut(&local) {
                    memory.users -= 1;
                }
                let outcome = self.library.check("move bytes", status);
                Some(Event::Over { job, outcome })
            }
            Flight::Flush { job } => {
                let outcome = self.library.check("wait for writes", status);
                Some(Event::Over { job, outcome })
            }
            // A message that did not go is the endpoint's failure, which is told.
            Flight::Send(_) => None,
            Flight::Close(endpoint) => {
                self.bury(endpoint);
                Some(Event::Closed(endpoint))
            }
        }
    }

    /// Prepares to talk to the worker with this address; whether it is there shows later.
    ///
    /// The address must come from a UCX worker: UCX itself checks it little.
    pub(crate) fn connect(&mut self, address: &[u8]) -> Result<EndpointId> {
        let id = EndpointId(self.next_endpoint);
        let ticket = NonNull::from(Box::leak(Box::new(Ticket {
            heard: self.heard,
            slot: id.0,
        })));
        let fields = ffi::UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
            | ffi::UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
            | ffi::UCP_EP_PARAM_FIELD_ERR_HANDLER;
        // SAFETY: a structure of numbers and pointers, for all of which zero is a value; the mask says which count.
        let mut params: ffi::ucp_ep_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from(fields);
        params.address = address.as_ptr().cast();
        params.err_mode = ffi::UCP_ERR_HANDLING_MODE_PEER;
        params.err_handler = ffi::ucp_err_handler_t {
            cb: Some(heard::failed),
            arg: ticket.as_ptr().cast(),
        };
        let mut raw = std::ptr::null_mut();
        // SAFETY: the worker is open; the address is read during the call; the ticket lives until the endpoint is closed.
        let status = unsafe {
            self.library
                .calls
                .ucp_ep_create(self.worker, &raw const params, &raw mut raw)
        };
        if let Err(error) = self.library.check("connect", status) {
            // SAFETY: leaked above, and no endpoint was made that could use it.
            drop(unsafe { Box::from_raw(ticket.as_ptr()) });
            return Err(error);
        }
        self.next_endpoint += 1;
        let endpoint = Endpoint {
            raw,
            ticket,
            keys: HashMap::new(),
            closing: false,
        };
        self.endpoints.insert(id, endpoint);
        Ok(id)
    }

    pub(super) fn endpoint(&self, id: EndpointId) -> Result<&Endpoint> {
        let endpoint = self.endpoints.get(&id).filter(|endpoint| !endpoint.closing);
        endpoint.ok_or_else(|| Error::new(ErrorKind::PeerLost, "ucx: the endpoint is closed"))
    }

    /// Which transports UCX has chosen for the endpoint.
    pub(crate) fn transports(&self, id: EndpointId) -> Result<String> {
        transports::of(self.library, self.endpoint(id)?.raw)
    }

    /// Ends an endpoint: by force at once, so that what is under way on it ends with an error; else once everything has
    /// reached the peer. [`Event::Closed`] tells when that is done.
    pub(crate) fn close(&mut self, id: EndpointId, by_force: bool) {
        let Some(endpoint) = self.endpoints.get_mut(&id) else {
            return;
        };
        if std::mem::replace(&mut endpoint.closing, true) {
            return;
        }
        let raw = endpoint.raw;
        let (slot, own) = self.operations.enter(Flight::Close(id));
        let mut params = request(own);
        params.op_attr_mask |= ffi::UCP_OP_ATTR_FIELD_FLAGS;
        params.flags = if by_force {
            ffi::UCP_EP_CLOSE_FLAG_FORCE
        } else {
            0
        };
        // SAFETY: the endpoint is open, and is not used after this.
        let answer = unsafe { self.library.calls.ucp_ep_close_nbx(raw, &raw const params) };
        if !matches!(self.started("close", answer), Ok(Started::Pending)) {
            self.operations.leave(slot);
            self.bury(id);
            self.told.push(Event::Closed(id));
        }
    }

    /// The endpoint is closed.
    fn bury(&mut self, id: EndpointId) {
        let Some(endpoint) = self.endpoints.remove(&id) else {
            return;
        };
        for key in endpoint.keys.into_values() {
            // SAFETY: unpacked for this endpoint, on which nothing is under way any more; dropped only here.
            unsafe { self.library.calls.ucp_rkey_destroy(key.raw) };
        }
        // SAFETY: leaked by `connect`; UCX tells nothing of a closed endpoint.
        drop(unsafe { Box::from_raw(endpoint.ticket.as_ptr()) });
    }

    /// Whether no operation is under way, and nothing is left to tell.
    pub(crate) fn is_quiet(&self) -> bool {
        self.operations.len() == 0 && self.told.is_empty()
    }

    /// Ends all endpoints and waits for that, but not for ever; whether nothing is under way any more.
    fn quiesce(&mut self) -> bool {
        let ids: Vec<_> = self.endpoints.keys().copied().collect();
        ids.into_iter().for_each(|id| self.close(id, true));
        let until = Instant::now() + PARTING_MAX;
        while self.operations.len() > 0 && Instant::now() < until {
            if !self.progress() {
                std::thread::yield_now();
            }
            drop(self.events());
        }
        self.operations.len() == 0
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // A child must leave the parent's connections alone; what may still be used is leaked, never freed.
        if !self.process.is_current() || !self.quiesce() {
            return self.leak();
        }
        for (_, memory) in std::mem::take(&mut self.memories) {
            self.unmap(&memory);
        }
        // SAFETY: no endpoint and no operation is left.
        unsafe { self.library.calls.ucp_worker_destroy(self.worker) };
        // SAFETY: its only worker is gone, and so is all memory.
        unsafe { self.library.calls.ucp_cleanup(self.context) };
        // SAFETY: the worker is gone, and nothing was under way.
        unsafe { self.operations.release() };
        // SAFETY: leaked by `open`; whatever could use it is gone.
        drop(unsafe { Box::from_raw(self.heard.as_ptr()) });
    }
}

impl Worker {
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn leak(&mut self) {
        for memory in std::mem::take(&mut self.memories).into_values() {
            std::mem::forget(memory.region);
        }
        std::mem::forget(std::mem::replace(
            &mut self.operations,
            Operations::new(self.heard),
        ));
    }
}

fn new_context(
    library: &'static Library,
    settings: *mut ffi::ucp_config_t,
) -> Result<ffi::ucp_context_h> {
    // SAFETY: as in `request`.
    let mut params: ffi::ucp_params_t = unsafe { std::mem::zeroed() };
    params.field_mask = u64::from(ffi::UCP_PARAM_FIELD_FEATURES | ffi::UCP_PARAM_FIELD_NAME);
    params.features =
        u64::from(ffi::UCP_FEATURE_RMA | ffi::UCP_FEATURE_AM | ffi::UCP_FEATURE_WAKEUP);
    params.name = c"kvfabric".as_ptr();
    let mut context = std::ptr::null_mut();
    // SAFETY: parameters and settings are read during the call, the result is writable.
    let status = unsafe {
        library.calls.ucp_init_version(
            ffi::UCP_API_MAJOR,
            ffi::UCP_API_MINOR,
            &raw const params,
            settings,
            &raw mut context,
        )
    };
    library.check("open", status)?;
    Ok(context)
}

fn new_worker(library: &'static Library, context: ffi::ucp_context_h) -> Result<ffi::ucp_worker_h> {
    // SAFETY: as in `request`.
    let mut params: ffi::ucp_worker_params_t = unsafe { std::mem::zeroed() };
    params.field_mask = u64::from(ffi::UCP_WORKER_PARAM_FIELD_THREAD_MODE);
    params.thread_mode = ffi::UCS_THREAD_MODE_SERIALIZED;
    let mut worker = std::ptr::null_mut();
    // SAFETY: the context is open, parameters are read during the call, the result is writable.
    let status = unsafe {
        library
            .calls
            .ucp_worker_create(context, &raw const params, &raw mut worker)
    };
    library.check("make a worker", status)?;
    Ok(worker)
}
