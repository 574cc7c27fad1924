//! One worker of UCX: endpoints, registered memory, what moves between them.

use std::collections::HashMap;
use std::ffi::c_void;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::generated::ucp as ffi;
use super::heard::{self, Heard, Ticket};
use super::library::Library;
use super::operations::{EndpointId, Event, Flight, Moving, Operations, Started};
use super::transports;
use crate::backend::Operation;
use crate::region::{RegionCore, RegionId};
use crate::sys::fork::Process;

/// Our messages among all active messages of a worker.
const MESSAGE_ID: u32 = 0x4b;

/// How long a worker that goes waits for what is under way.
const PARTING_MAX: Duration = Duration::from_secs(1);

/// A peer's region, as the peer handed it out.
pub(crate) struct Granted<'a> {
    pub(crate) region: RegionId,
    /// Where it begins in the peer's memory.
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    /// The packed remote key.
    pub(crate) key: &'a [u8],
}

struct RemoteKey {
    raw: ffi::ucp_rkey_h,
    address: u64,
    bytes: u64,
}

struct Endpoint {
    raw: ffi::ucp_ep_h,
    /// What UCX gives back when it fails.
    ticket: NonNull<Ticket>,
    keys: HashMap<RegionId, RemoteKey>,
    closing: bool,
}

/// Own memory that UCX knows.
struct Memory {
    raw: ffi::ucp_mem_h,
    /// Keeps it mapped.
    region: Arc<RegionCore>,
    /// Operations that use it.
    users: usize,
}

/// A context with one worker. One thread at a time uses it, whichever.
pub(crate) struct Worker {
    library: &'static Library,
    process: Process,
    context: ffi::ucp_context_h,
    worker: ffi::ucp_worker_h,
    address: Vec<u8>,
    event_fd: RawFd,
    heard: NonNull<Heard>,
    operations: Operations,
    endpoints: HashMap<EndpointId, Endpoint>,
    next_endpoint: usize,
    memories: HashMap<RegionId, Memory>,
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
    /// UCX does not know, which is named.
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
            id: MESSAGE_ID,
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

    fn endpoint(&self, id: EndpointId) -> Result<&Endpoint> {
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

    /// What UCX answered to the start of an operation.
    fn started(&self, doing: &str, answer: *mut c_void) -> Result<Started> {
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

    /// Makes a region known to UCX, which pins it where the hardware needs that.
    pub(crate) fn register(&mut self, region: &Arc<RegionCore>) -> Result<()> {
        if self.memories.contains_key(&region.id()) {
            return Ok(());
        }
        let mapping = region.mapping()?;
        let fields = ffi::UCP_MEM_MAP_PARAM_FIELD_ADDRESS | ffi::UCP_MEM_MAP_PARAM_FIELD_LENGTH;
        // SAFETY: as in `connect`.
        let mut params: ffi::ucp_mem_map_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from(fields);
        params.address = std::ptr::with_exposed_provenance_mut(mapping.address() as usize);
        params.length = mapping.len() as usize;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is open, and the range is mapped for as long as the region is kept, beside the handle.
        let status = unsafe {
            self.library
                .calls
                .ucp_mem_map(self.context, &raw const params, &raw mut raw)
        };
        let doing = format!("register {} bytes", mapping.len());
        self.library.check(&doing, status)?;
        let memory = Memory {
            raw,
            region: region.clone(),
            users: 0,
        };
        self.memories.insert(region.id(), memory);
        Ok(())
    }

    /// What lets a peer use a registered region.
    pub(crate) fn pack_key(&self, region: RegionId) -> Result<Vec<u8>> {
        let memory = self.memory(region)?;
        let mut raw = std::ptr::null_mut();
        let mut len = 0;
        // SAFETY: the context is open, the memory is registered with it, both results are writable.
        let status = unsafe {
            self.library
                .calls
                .ucp_rkey_pack(self.context, memory.raw, &raw mut raw, &raw mut len)
        };
        self.library.check("pack a remote key", status)?;
        // SAFETY: the key has that length and lives until it is released, below.
        let key = unsafe { std::slice::from_raw_parts(raw.cast::<u8>(), len) }.to_vec();
        // SAFETY: got above, and not used any more.
        unsafe { self.library.calls.ucp_rkey_buffer_release(raw) };
        Ok(key)
    }

    fn memory(&self, region: RegionId) -> Result<&Memory> {
        self.memories.get(&region).ok_or_else(|| {
            let text = format!("ucx: region {region} is not registered");
            Error::new(ErrorKind::Internal, text)
        })
    }

    /// Makes UCX forget a region; false while operations use it. No byte of a peer's can land there any more, provided
    /// that every peer has let go of its key.
    pub(crate) fn deregister(&mut self, region: RegionId) -> bool {
        match self.memories.get(&region) {
            None => return true,
            Some(memory) if memory.users > 0 => return false,
            Some(_) => {}
        }
        if let Some(memory) = self.memories.remove(&region) {
            self.unmap(&memory);
        }
        true
    }

    fn unmap(&self, memory: &Memory) {
        // SAFETY: mapped by `register` with this context, with no operation under way; given back once.
        let status = unsafe { self.library.calls.ucp_mem_unmap(self.context, memory.raw) };
        if let Err(error) = self.library.check("deregister memory", status) {
            tracing::warn!(%error, region = %memory.region.id(), "ucx");
        }
    }

    /// Learns how a peer's region is reached.
    ///
    /// The key must come from a UCX context: UCX itself checks it little.
    pub(crate) fn learn(&mut self, id: EndpointId, granted: &Granted<'_>) -> Result<()> {
        let endpoint = self.endpoint(id)?.raw;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the endpoint is open, the key is read during the call, the result is writable.
        let status = unsafe {
            self.library.calls.ucp_ep_rkey_unpack(
                endpoint,
                granted.key.as_ptr().cast(),
                &raw mut raw,
            )
        };
        self.library.check("unpack a remote key", status)?;
        let key = RemoteKey {
            raw,
            address: granted.address,
            bytes: granted.bytes,
        };
        let endpoint = self.endpoints.get_mut(&id);
        let before = endpoint.and_then(|endpoint| endpoint.keys.insert(granted.region, key));
        if let Some(before) = before {
            // SAFETY: replaced just now; the caller asks once for each region and forgets it before it asks again.
            unsafe { self.library.calls.ucp_rkey_destroy(before.raw) };
        }
        Ok(())
    }

    /// Lets go of a peer's region. No operation must be under way on it.
    pub(crate) fn forget(&mut self, id: EndpointId, region: RegionId) {
        let endpoint = self.endpoints.get_mut(&id);
        if let Some(key) = endpoint.and_then(|endpoint| endpoint.keys.remove(&region)) {
            // SAFETY: unpacked by `learn`, dropped only once, and nothing uses it by the caller's word.
            unsafe { self.library.calls.ucp_rkey_destroy(key.raw) };
        }
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
        let mapping = memory.region.mapping()?;
        let range = match operation {
            Operation::Read => mapping.sink(moving.local_offset, moving.len)?.raw(),
            Operation::Write => mapping.span(moving.local_offset, moving.len)?.raw(),
        };
        let handle = memory.raw;
        let local = moving.local;
        let (slot, own) = self.operations.enter(Flight::Move { local, job });
        let mut params = request(own);
        params.op_attr_mask |= ffi::UCP_OP_ATTR_FIELD_MEMH;
        params.memh = handle;
        let calls = &self.library.calls;
        let (base, len) = (range.iov_base, range.iov_len);
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

/// The parameters of an operation with this ticket.
fn request(own: *mut c_void) -> ffi::ucp_request_param_t {
    // SAFETY: a structure of numbers and pointers, for all of which zero is a value; the mask says which count.
    let mut params: ffi::ucp_request_param_t = unsafe { std::mem::zeroed() };
    params.op_attr_mask = ffi::UCP_OP_ATTR_FIELD_CALLBACK | ffi::UCP_OP_ATTR_FIELD_USER_DATA;
    params.cb.send = Some(heard::over);
    params.user_data = own;
    params
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
