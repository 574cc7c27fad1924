//! One end of a connection that is made by IP address, or one who listens for such.

use std::ffi::CStr;
use std::net::{IpAddr, SocketAddr};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::super::generated::ibverbs as verbs;
use super::super::library::Library as Verbs;
use super::address::to_raw;
use super::events::{Event, Events, Happened, REFUSAL};
use super::ffi;
use super::library::check;

/// Requests that the kernel keeps until they are looked at; it rejects those beyond.
const BACKLOG: i32 = 128;

/// The longest reason of a refusal: what fits with what stands before it.
const REASON_MAX: usize = 140;

/// Tried again for ever when the peer is not ready, as elsewhere.
const NOT_READY_RETRIES: u8 = 7;

/// What the other side is told of a queue pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Param<'a> {
    pub(crate) pair: u32,
    /// Reads under way to the peer.
    pub(crate) reads: u8,
    /// Reads of the peer's that are answered at once.
    pub(crate) reads_served: u8,
    pub(crate) retries: u8,
    /// At most 56 bytes of a request, 196 of an answer.
    pub(crate) private: &'a [u8],
}

impl Param<'_> {
    fn raw(&self) -> Result<ffi::rdma_conn_param> {
        let count = u8::try_from(self.private.len())
            .map_err(|_| Error::invalid("private bytes", self.private.len(), 0..=u8::MAX))?;
        Ok(ffi::rdma_conn_param {
            private_data: self.private.as_ptr().cast(),
            private_data_len: count,
            responder_resources: self.reads_served,
            initiator_depth: self.reads,
            flow_control: 1,
            retry_count: self.retries.min(7),
            rnr_retry_count: NOT_READY_RETRIES,
            srq: 0,
            qp_num: self.pair,
        })
    }
}

/// An end, a request or a listener. When it is dropped the other side learns that it is gone.
pub(crate) struct Id {
    events: Arc<Events>,
    raw: NonNull<ffi::rdma_cm_id>,
}

// SAFETY: the calls of librdmacm may be made from any thread; it is used by one at a time.
unsafe impl Send for Id {}

/// Milliseconds until then, as the library counts them; at least one.
fn left(until: Instant) -> i32 {
    let left = until.saturating_duration_since(Instant::now());
    i32::try_from(left.max(Duration::from_millis(1)).as_millis()).unwrap_or(i32::MAX)
}

impl Id {
    /// One of this number.
    fn new(events: &Arc<Events>, number: u64) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the channel is open and kept so; the result is writable; the id's word is a number, never used as an address.
        let code = unsafe {
            (events.library.calls.rdma_create_id)(
                events.raw.as_ptr(),
                &raw mut raw,
                std::ptr::without_provenance_mut(number as usize),
                ffi::RDMA_PS_TCP,
            )
        };
        check("make an id", code)?;
        let raw = NonNull::new(raw);
        let raw = raw.ok_or_else(|| Error::new(ErrorKind::Io, "rdma_cm: no id was made"))?;
        Ok(Self {
            events: events.clone(),
            raw,
        })
    }

    /// Who has sent a request.
    ///
    /// # Safety
    /// The id came with an event of this channel, and nobody else has it.
    pub(super) unsafe fn asked(events: &Arc<Events>, raw: NonNull<ffi::rdma_cm_id>) -> Self {
        Self {
            events: events.clone(),
            raw,
        }
    }

    /// Takes requests in at any free port of this address.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when it is none of this machine's, or not one of an RDMA port.
    pub(crate) fn listen(
        events: &Arc<Events>,
        number: u64,
        ip: IpAddr,
    ) -> Result<(Self, SocketAddr)> {
        let own = Self::new(events, number)?;
        let calls = &events.library.calls;
        let mut address = to_raw(SocketAddr::new(ip, 0));
        // SAFETY: the id lives; the address is read during the call.
        let code = unsafe { (calls.rdma_bind_addr)(own.raw.as_ptr(), (&raw mut address).cast()) };
        check(&format!("bind to {ip}"), code)?;
        // SAFETY: the id lives.
        let code = unsafe { (calls.rdma_listen)(own.raw.as_ptr(), BACKLOG) };
        check(&format!("listen at {ip}"), code)?;
        // SAFETY: as above.
        let port = unsafe { (calls.rdma_get_src_port)(own.raw.as_ptr()) };
        Ok((own, SocketAddr::new(ip, u16::from_be(port))))
    }

    /// The name of its device, and the number of its port; none before it has an address.
    pub(crate) fn port(&self) -> Option<(String, u8)> {
        // SAFETY: the id lives as long as this; the library fills it while a call of ours, or the taking of an event, lasts.
        let own = unsafe { self.raw.as_ref() };
        let context = NonNull::new(own.verbs)?;
        // SAFETY: the library keeps its devices open.
        let device = unsafe { context.as_ref() }.device;
        // SAFETY: the device of an open context.
        let name = unsafe { Verbs::get().ok()?.calls.ibv_get_device_name(device) };
        // SAFETY: a terminated text of the device.
        let name = unsafe { CStr::from_ptr(name) };
        Some((name.to_string_lossy().into_owned(), own.port_num))
    }

    /// What happens to it is told by this number from now on.
    pub(crate) fn number(&mut self, number: u64) {
        // SAFETY: the id lives, and its word is the user's to set.
        unsafe { self.raw.as_mut() }.context = std::ptr::without_provenance_mut(number as usize);
    }

    /// Asks for a connection from one of this machine's addresses to a peer's, until its answer is there. The queue pair is to
    /// be made ready by [`Id::attributes`] then; then the peer is told by [`Id::establish`].
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`] when there is no way to it, or nobody answers there; [`ErrorKind::Denied`] when it refuses;
    /// [`ErrorKind::Timeout`] at the end of the time. All with both addresses.
    pub(crate) fn connect(
        number: u64,
        (from, to): (IpAddr, SocketAddr),
        traffic_class: u8,
        param: &Param<'_>,
        until: Instant,
    ) -> Result<Self> {
        let named = |error: Error| error.at(format!("from {from} to {to}"));
        let own = Self::new(&Arc::new(Events::new()?), number)?;
        let asked = own.ask((from, to), traffic_class, param, until);
        asked.map_err(named).map(|()| own)
    }

    fn ask(
        &self,
        (from, to): (IpAddr, SocketAddr),
        mut traffic_class: u8,
        param: &Param<'_>,
        until: Instant,
    ) -> Result<()> {
        let calls = &self.events.library.calls;
        let id = self.raw.as_ptr();
        if traffic_class > 0 {
            let value = (&raw mut traffic_class).cast();
            let (level, name) = (ffi::RDMA_OPTION_ID, ffi::RDMA_OPTION_ID_TOS);
            // SAFETY: the id lives; the value is one byte, read during the call.
            let code = unsafe { (calls.rdma_set_option)(id, level, name, value, 1) };
            check("set the traffic class", code)?;
        }
        let (mut from, mut to) = (to_raw(SocketAddr::new(from, 0)), to_raw(to));
        let (from, to) = ((&raw mut from).cast(), (&raw mut to).cast());
        // SAFETY: the id lives; the addresses are read during the call.
        let code = unsafe { (calls.rdma_resolve_addr)(id, from, to, left(until)) };
        check("look for the address", code)?;
        self.expect(Happened::AddressResolved, until, "look for the address")?;
        // SAFETY: the id lives.
        let code = unsafe { (calls.rdma_resolve_route)(id, left(until)) };
        check("look for a route", code)?;
        self.expect(Happened::RouteResolved, until, "look for a route")?;
        let mut raw = param.raw()?;
        // SAFETY: the id lives; what is told is read during the call.
        let code = unsafe { (calls.rdma_connect)(id, &raw mut raw) };
        check("ask for a connection", code)?;
        self.expect(Happened::Answered, until, "ask for a connection")?;
        Ok(())
    }

    fn expect(&self, wanted: Happened, until: Instant, doing: &str) -> Result<Event> {
        loop {
            let event = self.events.wait(until, doing)?;
            match event.happened {
                happened if happened == wanted => return Ok(event),
                // An address of a bond has moved, which is found out by what comes next.
                Happened::Other => {}
                _ => return Err(event.error()),
            }
        }
    }

    /// How its queue pair is brought into a state of verbs, and which attributes that are.
    pub(in super::super) fn attributes(
        &self,
        state: verbs::ibv_qp_state,
    ) -> Result<(verbs::ibv_qp_attr, u32)> {
        // SAFETY: a structure of numbers, for all of which zero is a value.
        let mut attributes: verbs::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = state;
        let mut mask = 0;
        let calls = &self.events.library.calls;
        // SAFETY: the id lives; both results are writable.
        let code = unsafe {
            (calls.rdma_init_qp_attr)(self.raw.as_ptr(), &raw mut attributes, &raw mut mask)
        };
        check("ask how to connect the queue pair", code)?;
        Ok((attributes, mask.cast_unsigned()))
    }

    /// Tells the peer that its answer has come and the queue pair is ready; events go to these from now on.
    pub(crate) fn establish(&mut self, events: &Arc<Events>) -> Result<()> {
        let calls = &self.events.library.calls;
        // SAFETY: the id lives.
        let code = unsafe { (calls.rdma_establish)(self.raw.as_ptr()) };
        check("tell the peer that it is connected", code)?;
        // SAFETY: as above; the channel is open, and all events of the id were acknowledged.
        let code = unsafe { (calls.rdma_migrate_id)(self.raw.as_ptr(), events.raw.as_ptr()) };
        check("hand a connection over", code)?;
        self.events = events.clone();
        Ok(())
    }

    /// Answers a request, whose queue pair is ready.
    pub(crate) fn accept(&self, param: &Param<'_>) -> Result<()> {
        let mut raw = param.raw()?;
        let calls = &self.events.library.calls;
        // SAFETY: the id lives; what is told is read during the call.
        let code = unsafe { (calls.rdma_accept)(self.raw.as_ptr(), &raw mut raw) };
        check("accept a connection", code)
    }

    /// Refuses a request; the reason is told, as far as there is room for it.
    pub(crate) fn refuse(self, reason: &str) -> Result<()> {
        let mut end = reason.len().min(REASON_MAX);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let mut private = REFUSAL.to_vec();
        private.push(end as u8);
        private.extend_from_slice(&reason.as_bytes()[..end]);
        let count = private.len() as u8;
        let calls = &self.events.library.calls;
        // SAFETY: the id lives; the bytes are read during the call.
        let code =
            unsafe { (calls.rdma_reject)(self.raw.as_ptr(), private.as_ptr().cast(), count) };
        check("refuse a connection", code)
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        if !self.events.process.is_current() {
            return;
        }
        // SAFETY: made by `new` or handed over by an event, destroyed only here; all of its events were acknowledged when they
        // were got.
        let code = unsafe { (self.events.library.calls.rdma_destroy_id)(self.raw.as_ptr()) };
        if code != 0 {
            tracing::warn!(code, "end an id of rdma_cm");
        }
    }
}
