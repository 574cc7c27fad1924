//! Operations under way, by number.

use std::ffi::c_void;
use std::ptr::NonNull;

use kvcache_core::Result;

use super::generated::ucp as ffi;
use super::heard::{self, Heard, Ticket};
use crate::region::RegionId;

/// Names an endpoint of a worker; never used again for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct EndpointId(pub(super) usize);

/// How an operation began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Started {
    /// It is over already.
    Over,
    /// An [`Event`] will tell.
    Pending,
}

/// What a worker tells.
#[derive(Debug)]
pub(crate) enum Event {
    /// A message has come, from nobody knows whom.
    Message(Vec<u8>),
    /// An operation of this job (the number that it was started with) is over.
    Over { job: usize, outcome: Result<()> },
    /// Nothing goes to this peer any more; the endpoint is to be closed.
    Failed {
        endpoint: EndpointId,
        reason: String,
    },
    /// The endpoint is closed: what was under way on it is over, and no byte that came by it can land any more.
    Closed(EndpointId),
}

/// A range of own memory, and one of a peer's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moving {
    /// The own region; registered with the worker.
    pub(crate) local: RegionId,
    pub(crate) local_offset: u64,
    /// The peer's region, whose key was unpacked.
    pub(crate) remote: RegionId,
    pub(crate) remote_offset: u64,
    pub(crate) len: u64,
}

/// What an operation uses for as long as it is under way.
pub(super) enum Flight {
    /// Bytes between an own region and one of the endpoint's, for a job.
    Move { local: RegionId, job: usize },
    /// Waits for what was written before, for a job.
    Flush { job: usize },
    /// A message.
    Send(#[expect(dead_code, reason = "UCX reads it until it is sent")] Box<[u8]>),
    /// The endpoint is being closed.
    Close(EndpointId),
}

/// All that is under way. A ticket is made once for each place and used again, and stays where it is.
pub(super) struct Operations {
    heard: NonNull<Heard>,
    tickets: Vec<NonNull<Ticket>>,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
}

impl Operations {
    /// `heard` must live at least as long as anything that uses the tickets.
    pub(super) fn new(heard: NonNull<Heard>) -> Self {
        Self {
            heard,
            tickets: Vec::new(),
            flights: Vec::new(),
            free: Vec::new(),
        }
    }

    /// How many are under way.
    pub(super) fn len(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// A number and what UCX is to give back with it.
    pub(super) fn enter(&mut self, flight: Flight) -> (usize, *mut c_void) {
        let slot = self.free.pop().unwrap_or_else(|| {
            let slot = self.flights.len();
            let heard = self.heard;
            let ticket = Box::leak(Box::new(Ticket { heard, slot }));
            self.tickets.push(NonNull::from(ticket));
            self.flights.push(None);
            slot
        });
        self.flights[slot] = Some(flight);
        (slot, self.tickets[slot].as_ptr().cast())
    }

    pub(super) fn leave(&mut self, slot: usize) -> Option<Flight> {
        let flight = self.flights.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(flight)
    }

    /// Gives the tickets back, once no call of UCX can come any more.
    ///
    /// # Safety
    /// Nothing is under way, and the worker is gone.
    pub(super) unsafe fn release(&mut self) {
        for ticket in self.tickets.drain(..) {
            // SAFETY: leaked by `enter`, and given back only here; the caller says that nobody else uses it.
            drop(unsafe { Box::from_raw(ticket.as_ptr()) });
        }
    }
}

/// The parameters of an operation with this ticket.
pub(super) fn request(own: *mut c_void) -> ffi::ucp_request_param_t {
    // SAFETY: a structure of numbers and pointers, for all of which zero is a value; the mask says which count.
    let mut params: ffi::ucp_request_param_t = unsafe { std::mem::zeroed() };
    params.op_attr_mask = ffi::UCP_OP_ATTR_FIELD_CALLBACK | ffi::UCP_OP_ATTR_FIELD_USER_DATA;
    params.cb.send = Some(heard::over);
    params.user_data = own;
    params
}
