//! Work that a device does in order, and what tells that it is done.

use std::any::Any;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::{Answer, Code, CopyList, Handle};
use super::event::{CudaPoint, Event};
use super::gather::{Gather, Pieces, UsedList};
use super::gpu::Gpu;
use super::kernels::Kernels;
use super::memory::DeviceMemory;
use super::pinned::Pinned;

/// What is dropped when nothing uses a place any more, after its memory.
pub(crate) type Keep = Arc<dyn Any + Send + Sync>;

/// Memory that a device copies from and to.
#[derive(Clone)]
pub(crate) enum Place {
    Device(Arc<DeviceMemory>),
    /// Of somebody who waits until it is let go of.
    Held(
        Arc<DeviceMemory>,
        #[expect(dead_code, reason = "kept")] Keep,
    ),
    Host(Arc<Pinned>),
}

impl Place {
    pub(super) fn at(&self, offset: u64, len: u64) -> Result<u64> {
        match self {
            Self::Device(memory) | Self::Held(memory, _) => memory.at(offset, len),
            Self::Host(memory) => memory.at(offset, len),
        }
    }

    /// The device that it is memory of.
    fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Device(memory) | Self::Held(memory, _) => Some(memory.gpu()),
            Self::Host(_) => None,
        }
    }

    /// Whether it is memory of this device.
    pub(super) fn is_on(&self, gpu: &Gpu) -> bool {
        self.gpu().is_some_and(|own| own.ordinal() == gpu.ordinal())
    }

    /// Whether kernels reach it, and not copies alone.
    pub(crate) fn is_reached(&self) -> bool {
        match self {
            Self::Device(_) | Self::Held(..) => true,
            Self::Host(memory) => memory.is_mapped(),
        }
    }
}

/// Bytes of a place: the position of the place in a batch's list, and the first byte.
pub(crate) type At = (usize, u64);

/// Copies that are queued together. They are made in no order.
pub(crate) struct Batch {
    places: Arc<[Place]>,
    copies: CopyList,
    /// Of each copy, on which device a kernel may make it.
    reached: Vec<Option<u32>>,
    /// Copies from device to device.
    across: Vec<Across>,
    bytes: u64,
}

/// A copy between memory of two devices, each by its context and the address.
struct Across {
    to: (Handle, u64),
    from: (Handle, u64),
    bytes: usize,
}

impl Batch {
    pub(crate) fn new(places: &Arc<[Place]>) -> Self {
        Self {
            places: places.clone(),
            copies: CopyList::default(),
            reached: Vec::new(),
            across: Vec::new(),
            bytes: 0,
        }
    }

    /// Adds a copy, after checking that both ranges lie in their places.
    pub(crate) fn copy(&mut self, to: At, from: At, len: u64) -> Result<()> {
        let (to_place, from_place) = (self.place(to.0)?, self.place(from.0)?);
        let target = to_place.at(to.1, len)?;
        let source = from_place.at(from.1, len)?;
        let is_reached = to_place.is_reached() && from_place.is_reached();
        let of = match (to_place.gpu(), from_place.gpu()) {
            (Some(to), Some(from)) if to.ordinal() != from.ordinal() => {
                let (to, from) = ((to.context(), target), (from.context(), source));
                let bytes = len as usize;
                self.across.push(Across { to, from, bytes });
                self.bytes += len;
                return Ok(());
            }
            (gpu, other) => gpu.or(other).map(Gpu::ordinal),
        };
        self.copies.push(target, source, len as usize);
        self.reached.push(of.filter(|_| is_reached));
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
        self.copies.len() + self.across.len()
    }
}

/// What was queued, and is not known to be done: it keeps its memory, for ever if need be.
pub(crate) struct Flight {
    event: Arc<Event>,
    /// Gone once it is over.
    places: Option<Arc<[Place]>>,
    /// The list that its kernel reads.
    list: Option<UsedList>,
}

impl Drop for Flight {
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn drop(&mut self) {
        if let Some(places) = self.places.take() {
            std::mem::forget(places);
            std::mem::forget(self.list.take());
            std::mem::forget(self.event.clone());
        }
    }
}

impl Flight {
    /// The place in its stream behind all of it.
    pub(crate) fn point(&self) -> CudaPoint {
        CudaPoint(self.event.clone())
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
    /// Events that are over, and may be recorded again when nobody else holds them.
    spare: Vec<Arc<Event>>,
    has_batch: bool,
    gather: Option<Gather>,
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
            gather: None,
            gpu: gpu.clone(),
        })
    }

    /// Whether lists of copies go in one call.
    pub(crate) fn has_batch(&self) -> bool {
        self.has_batch
    }

    /// Has a kernel copy small pieces, once [`Stream::gather_up_to`] says what is small: of up to so many batches at once, of up to so
    /// many copies each.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn gather_by(
        &mut self,
        kernels: &Arc<Kernels>,
        batches: u64,
        copies_max: u64,
    ) -> Result<()> {
        self.gather = Some(Gather::new(kernels, batches, copies_max)?);
        Ok(())
    }

    /// Pieces of up to so many bytes go by the kernel from now on; 0: none.
    pub(crate) fn gather_up_to(&mut self, bytes: u64) {
        if let Some(gather) = &mut self.gather {
            gather.up_to = bytes;
        }
    }

    /// Queues a batch. The second value is why not all of it was queued; the flight covers what was.
    pub(crate) fn submit(&mut self, batch: Batch) -> Result<(Flight, Option<Error>), Unsent> {
        let Batch {
            places,
            mut copies,
            reached,
            across,
            ..
        } = batch;
        let what = format!("queue {} copies", copies.len() + across.len());
        // Kernels of this device do not touch another one's memory.
        let here = Some(self.gpu.ordinal());
        let reached: Vec<bool> = reached.into_iter().map(|of| of == here).collect();
        let pieces = match &mut self.gather {
            Some(gather) => gather.take(&mut copies, &reached),
            None => Ok(None),
        };
        let (list, pieces) = pieces.map_err(Unsent::Refused)?.unzip();
        self.fly(places, list, &what, |stream, list| {
            stream.queue(&mut copies, pieces.as_ref(), list)?;
            stream.queue_across(&across)
        })
    }

    /// As [`Stream::submit`], of what a caller queues: it is given the stream.
    ///
    /// # Safety
    /// What is queued touches the memory of `places` and `list` alone.
    pub(super) unsafe fn submit_work(
        &mut self,
        places: Arc<[Place]>,
        list: UsedList,
        what: &str,
        queue: impl FnOnce(&UsedList, Handle) -> Answer<()>,
    ) -> Result<(Flight, Option<Error>), Unsent> {
        self.fly(places, Some(list), what, |stream, list| {
            list.map_or(Ok(()), |list| queue(list, stream.raw))
        })
    }

    /// Has what is queued and an event behind it keep its memory.
    fn fly(
        &mut self,
        places: Arc<[Place]>,
        list: Option<UsedList>,
        what: &str,
        queue: impl FnOnce(&mut Self, Option<&UsedList>) -> Answer<()>,
    ) -> Result<(Flight, Option<Error>), Unsent> {
        let gpu = self.gpu.clone();
        let ready = gpu.enter().map_err(|code| ("enter its context", code));
        let ready = ready.and_then(|entered| match self.event() {
            Ok(event) => Ok((entered, event)),
            Err(code) => Err(("create an event", code)),
        });
        let (_entered, event) = match ready {
            Ok(ready) => ready,
            Err((doing, code)) => {
                self.give_back(list);
                return Err(Unsent::Refused(gpu.fault(doing, code)));
            }
        };
        // From here on something may be queued: the flight keeps the memory.
        let flight = Flight {
            event,
            places: Some(places),
            list,
        };
        let queued = queue(self, flight.list.as_ref());
        // SAFETY: both live and of the current context.
        if let Err(code) = unsafe { gpu.calls.record(flight.event.raw, self.raw) } {
            return Err(Unsent::Broken(gpu.fault("record an event", code)));
        }
        Ok((flight, queued.err().map(|code| gpu.fault(what, code))))
    }

    /// What is queued from now on is done after a point of another stream.
    ///
    /// # Errors
    /// What the driver says; then it waits for nothing.
    pub(crate) fn follow(&self, point: &CudaPoint) -> Result<()> {
        let waits = self.gpu.enter().and_then(|_entered| {
            // SAFETY: both live; points are in no graph.
            unsafe { self.gpu.calls.stream_wait(self.raw, point.0.raw) }
        });
        waits.map_err(|code| self.gpu.fault("wait for another stream", code))
    }

    fn give_back(&mut self, list: Option<UsedList>) {
        if let (Some(gather), Some(list)) = (&mut self.gather, list) {
            gather.give_back(list);
        }
    }

    /// An event that nothing waits for. A context is current.
    fn event(&mut self) -> Answer<Arc<Event>> {
        let unused = |event: &Arc<Event>| Arc::strong_count(event) == 1;
        match self.spare.iter().position(unused) {
            Some(at) => Ok(self.spare.swap_remove(at)),
            None => Event::new(&self.gpu).map(Arc::new),
        }
    }

    fn queue(
        &mut self,
        copies: &mut CopyList,
        pieces: Option<&Pieces>,
        list: Option<&UsedList>,
    ) -> Answer<()> {
        let calls = &*self.gpu.calls;
        if let (Some(pieces), Some(list)) = (pieces, list) {
            // SAFETY: the flight that the caller made keeps the list and the places, in which all pieces lie and which kernels reach;
            // the stream is ours and live, its context current.
            unsafe { pieces.queue(list, self.raw) }?;
        }
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

    fn queue_across(&self, copies: &[Across]) -> Answer<()> {
        for copy in copies {
            // SAFETY: the flight that the caller made keeps the places, in which both ranges lie, and with them their contexts, until
            // the stream has made the copy; the stream is ours and live, its context current.
            unsafe {
                self.gpu
                    .calls
                    .copy_across(copy.to, copy.from, copy.bytes, self.raw)
            }?;
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
            // SAFETY: the flight holds it.
            unsafe { self.gpu.calls.is_over(flight.event.raw) }
        });
        let over = over.map_err(|code| self.gpu.fault("wait for copies", code))?;
        if over {
            flight.places = None;
            self.spare.push(flight.event.clone());
            self.give_back(flight.list.take());
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
            // SAFETY: created by `new`, destroyed only here; what is queued still runs, over memory that its flight keeps.
            unsafe { self.gpu.calls.destroy_stream(self.raw) }
        });
        if let Err(code) = destroyed {
            tracing::warn!(code = code.0, "destroy a CUDA stream");
        }
    }
}
