//! Work that a device does in order, and what tells that it is done.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::{Answer, Code, CopyList, Handle};
use super::gpu::Gpu;
use super::memory::DeviceMemory;
use super::pinned::Pinned;

/// Memory that a device copies from and to.
#[derive(Clone)]
pub(crate) enum Place {
    Device(Arc<DeviceMemory>),
    Host(Arc<Pinned>),
}

impl Place {
    fn at(&self, offset: u64, len: u64) -> Result<u64> {
        match self {
            Self::Device(memory) => memory.at(offset, len),
            Self::Host(memory) => memory.at(offset, len),
        }
    }
}

/// Bytes of a place: the position of the place in a batch's list, and the first byte.
pub(crate) type At = (usize, u64);

/// Copies that are queued together. They are made in no order.
pub(crate) struct Batch {
    places: Arc<[Place]>,
    copies: CopyList,
    bytes: u64,
}

impl Batch {
    pub(crate) fn new(places: &Arc<[Place]>) -> Self {
        Self {
            places: places.clone(),
            copies: CopyList::default(),
            bytes: 0,
        }
    }

    /// Adds a copy, after checking that both ranges lie in their places.
    pub(crate) fn copy(&mut self, to: At, from: At, len: u64) -> Result<()> {
        let target = self.place(to.0)?.at(to.1, len)?;
        let source = self.place(from.0)?.at(from.1, len)?;
        self.copies.targets.push(target);
        self.copies.sources.push(source);
        self.copies.bytes.push(len as usize);
        self.bytes += len;
        Ok(())
    }

    fn place(&self, position: usize) -> Result<&Place> {
        self.places.get(position).ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!("a batch has no place {position}"),
            )
        })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.copies.len()
    }
}

/// What was queued, and is not known to be done: it keeps its memory, for ever if need be.
pub(crate) struct Flight {
    event: Handle,
    /// Gone once it is over.
    places: Option<Arc<[Place]>>,
}

impl Drop for Flight {
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn drop(&mut self) {
        if let Some(places) = self.places.take() {
            std::mem::forget(places);
        }
    }
}

/// Why a batch is not in flight.
pub(crate) enum Unsent {
    /// Nothing of it was queued.
    Refused(Error),
    /// It may be queued, and nothing can tell when it is over: the device's context is beyond use.
    Broken(Error),
}

/// A queue of a device that waits for no other.
pub(crate) struct Stream {
    gpu: Arc<Gpu>,
    raw: Handle,
    /// Events that are over and may be recorded again.
    spare: Vec<Handle>,
    has_batch: bool,
}

impl Stream {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let created = gpu.enter().and_then(|_entered| {
            // SAFETY: the context is current; destroyed by `drop`.
            unsafe { gpu.calls.create_stream() }
        });
        let raw = created.map_err(|code| gpu.fault("create a stream", code))?;
        Ok(Self {
            raw,
            spare: Vec::new(),
            has_batch: gpu.calls.has_batch(),
            gpu: gpu.clone(),
        })
    }

    /// Whether lists of copies go in one call.
    pub(crate) fn has_batch(&self) -> bool {
        self.has_batch
    }

    /// Queues a batch. The second value is why not all of it was queued; the flight covers what was.
    pub(crate) fn submit(&mut self, batch: Batch) -> Result<(Flight, Option<Error>), Unsent> {
        let gpu = self.gpu.clone();
        let refused = |doing, code| Unsent::Refused(gpu.fault(doing, code));
        let _entered = gpu
            .enter()
            .map_err(|code| refused("enter its context", code))?;
        let event = match self.spare.pop() {
            Some(event) => event,
            // SAFETY: the context is current; destroyed by `drop` of the stream, or never.
            None => unsafe { gpu.calls.create_event() }
                .map_err(|code| refused("create an event", code))?,
        };
        let Batch {
            places, mut copies, ..
        } = batch;
        // From here on something may be queued: the flight keeps the memory.
        let flight = Flight {
            event,
            places: Some(places),
        };
        let queued = self.queue(&mut copies);
        // SAFETY: both live and of the current context.
        if let Err(code) = unsafe { gpu.calls.record(event, self.raw) } {
            return Err(Unsent::Broken(gpu.fault("record an event", code)));
        }
        let what = format!("queue {} copies", copies.len());
        Ok((flight, queued.err().map(|code| gpu.fault(&what, code))))
    }

    fn queue(&mut self, copies: &mut CopyList) -> Answer<()> {
        let calls = &*self.gpu.calls;
        if self.has_batch && copies.len() > 1 {
            // SAFETY: the flight that the caller made keeps the places, in which all ranges lie, until the stream has made the
            // copies; the driver has the call.
            match unsafe { calls.copy_batch(copies, self.raw) } {
                // A driver that knows it for other devices: one by one from now on. Making a copy twice changes nothing.
                Err(Code::NOT_SUPPORTED) => self.has_batch = false,
                answer => return answer,
            }
        }
        for at in 0..copies.len() {
            let (target, source) = (copies.targets[at], copies.sources[at]);
            // SAFETY: as above.
            unsafe { calls.copy(target, source, copies.bytes[at], self.raw) }?;
        }
        Ok(())
    }

    /// Whether a flight of this stream is over: nothing of it is touched any more.
    ///
    /// # Errors
    /// What the driver says; then nothing can tell any more whether it is over.
    pub(crate) fn is_over(&mut self, flight: &mut Flight) -> Result<bool> {
        if flight.places.is_none() {
            return Ok(true);
        }
        let over = self.gpu.enter().and_then(|_entered| {
            // SAFETY: recorded by `submit`, and destroyed only with the stream, of events that are over.
            unsafe { self.gpu.calls.is_over(flight.event) }
        });
        let over = over.map_err(|code| self.gpu.fault("wait for copies", code))?;
        if over {
            flight.places = None;
            self.spare.push(flight.event);
        }
        Ok(over)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.gpu.process.is_current() {
            return;
        }
        let destroyed = self.gpu.enter().and_then(|_entered| {
            for event in self.spare.drain(..) {
                // SAFETY: created by `submit`; it is over, and no flight has it any more.
                unsafe { self.gpu.calls.destroy_event(event) }?;
            }
            // SAFETY: created by `new`, destroyed only here; what is queued still runs, over memory that its flight keeps.
            unsafe { self.gpu.calls.destroy_stream(self.raw) }
        });
        if let Err(code) = destroyed {
            tracing::warn!(code = code.0, "destroy a CUDA stream");
        }
    }
}
