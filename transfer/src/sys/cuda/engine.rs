//! Streams and events of an engine, which stay the engine's.

use std::fmt;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::{Code, Handle};
use super::driver::Cuda;
use super::event::{CudaPoint, Event};
use super::gpu::Gpu;

/// Handles up to this one are no streams of their own: the default stream (0 and 1), and the calling thread's (2).
const DEFAULT_STREAM_MAX: u64 = 2;

/// What a stream answers that is not being captured.
const NOT_CAPTURED: u32 = 0;

/// A stream of an engine in this process (a `CUstream` or `cudaStream_t`): what it computes before requests, and after them.
pub struct CudaStream {
    gpu: Arc<Gpu>,
    raw: Handle,
}

impl CudaStream {
    /// A stream of the device with this number. 0 and 1 are the device's default stream, 2 that of the thread that makes each call.
    ///
    /// # Safety
    /// It is a stream, and lives until what is returned is dropped; no capture into a graph begins on it while a call with it runs.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without CUDA, with the reason, and for a stream of another context than the device's primary one,
    /// which CUDA's runtime uses; [`ErrorKind::Invalid`] for a device that there is not, and a stream of another device.
    pub unsafe fn from_raw(ordinal: u32, stream: u64) -> Result<Self> {
        // SAFETY: passed on to the caller, word for word.
        unsafe { Self::on(&Cuda::get()?.gpu(ordinal)?, stream) }
    }

    /// # Safety
    /// As [`CudaStream::from_raw`].
    pub(super) unsafe fn on(gpu: &Arc<Gpu>, stream: u64) -> Result<Self> {
        let own = Self {
            gpu: gpu.clone(),
            raw: Handle::of(stream),
        };
        if stream > DEFAULT_STREAM_MAX {
            own.check_context()?;
        }
        Ok(own)
    }

    fn check_context(&self) -> Result<()> {
        let (gpu, calls) = (&self.gpu, &*self.gpu.calls);
        let failed = |code| gpu.fault(&format!("ask for the context of {self:?}"), code);
        let _entered = gpu.enter().map_err(failed)?;
        // SAFETY: a live stream, by the promise of whoever made this.
        let context = unsafe { calls.stream_context(self.raw) }.map_err(failed)?;
        if context == gpu.context() {
            return Ok(());
        }
        // SAFETY: the context of a live stream lives, and is popped below.
        unsafe { calls.push(context) }.map_err(failed)?;
        let found = calls.current_device();
        // SAFETY: pushed above.
        unsafe { calls.pop() }.map_err(failed)?;
        let (found, own) = (found.map_err(failed)?.0, gpu.ordinal());
        if u32::try_from(found) != Ok(own) {
            let text = format!("{self:?}: it belongs to device {found}, not to {own}");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        let text = format!(
            "{self:?}: it was made in another context of device {own} than the primary one"
        );
        Err(Error::new(ErrorKind::Unsupported, text))
    }

    /// The device's number in this process.
    #[must_use]
    pub fn ordinal(&self) -> u32 {
        self.gpu.ordinal()
    }

    /// Where it is now: behind all that it has been given.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] while it is captured into a graph; otherwise what the driver says.
    pub fn point(&self) -> Result<CudaPoint> {
        let gpu = &self.gpu;
        let failed = |code| gpu.fault(&format!("record an event on {self:?}"), code);
        let _entered = gpu.enter().map_err(failed)?;
        self.check_free()?;
        let event = Event::new(gpu).map_err(failed)?;
        // SAFETY: both live, and of the context that is current.
        unsafe { gpu.calls.record(event.raw, self.raw) }.map_err(failed)?;
        Ok(CudaPoint(Arc::new(event)))
    }

    /// What it is given from now on is done after these points.
    ///
    /// # Errors
    /// As [`CudaStream::point`]; it then waits for some of the points, or for none.
    pub(crate) fn follow(&self, points: &[CudaPoint]) -> Result<()> {
        let gpu = &self.gpu;
        let failed = |code| gpu.fault(&format!("have {self:?} wait"), code);
        let _entered = gpu.enter().map_err(failed)?;
        self.check_free()?;
        for point in points {
            // SAFETY: both live; the event was recorded on a stream that no graph captures.
            unsafe { gpu.calls.stream_wait(self.raw, point.0.raw) }.map_err(failed)?;
        }
        Ok(())
    }

    /// Whether it works, and is not captured. The context is current.
    fn check_free(&self) -> Result<()> {
        let captured = |who: &str| {
            let text = format!("{who}, and a transfer is no part of a graph");
            Err(Error::new(ErrorKind::Unsupported, text))
        };
        // SAFETY: a live stream, by the promise of whoever made this.
        match unsafe { self.gpu.calls.is_captured(self.raw) } {
            Ok(NOT_CAPTURED) => Ok(()),
            Ok(_) => captured(&format!("{self:?} is being captured")),
            Err(Code::CAPTURE_IMPLICIT) => captured(&format!(
                "{self:?} waits for a stream that is being captured"
            )),
            Err(code) => Err(self.gpu.fault(&format!("ask about {self:?}"), code)),
        }
    }
}

impl fmt::Debug for CudaStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let raw = self.raw.0.addr();
        write!(f, "stream {raw:#x} of cuda device {}", self.ordinal())
    }
}

impl CudaPoint {
    /// Where an event of an engine (a `CUevent` or `cudaEvent_t`) was last recorded. The engine may record it again afterwards.
    ///
    /// # Safety
    /// It is an event that lives during the call, which no thread records meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without CUDA, with the reason, and for an event that was recorded into a graph;
    /// [`ErrorKind::Invalid`] for a device that there is not; otherwise what the driver says.
    pub unsafe fn of_event(ordinal: u32, event: u64) -> Result<Self> {
        // SAFETY: passed on to the caller, word for word.
        unsafe { Self::of(&Cuda::get()?.gpu(ordinal)?, event) }
    }

    /// # Safety
    /// As [`CudaPoint::of_event`].
    pub(super) unsafe fn of(gpu: &Arc<Gpu>, event: u64) -> Result<Self> {
        let raw = Handle::of(event);
        if event == 0 {
            return Err(Error::invalid("event", event, "the handle of a CUDA event"));
        }
        let failed = |code| gpu.fault(&format!("wait for event {event:#x}"), code);
        let entered = gpu.enter().map_err(failed)?;
        let calls = &*gpu.calls;
        // SAFETY: a live event, by the caller's promise.
        match unsafe { calls.is_over(raw) } {
            Ok(_) => {}
            Err(Code::CAPTURED_EVENT) => {
                let text = format!(
                    "event {event:#x} was recorded into a graph, and a transfer is no part of one"
                );
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            Err(code) => return Err(failed(code)),
        }
        // A stream that does nothing else carries it over into an event of our own, which nobody records again.
        let own = Event::new(gpu).map_err(failed)?;
        // SAFETY: the context is current; destroyed below.
        let between = unsafe { calls.create_stream() }.map_err(failed)?;
        // SAFETY: both live; the event is in no graph.
        let carried = unsafe { calls.stream_wait(between, raw) }
            // SAFETY: both live and of the current context.
            .and_then(|()| unsafe { calls.record(own.raw, between) });
        // SAFETY: created above; what it was given is still done.
        let destroyed = unsafe { calls.destroy_stream(between) };
        drop(entered);
        carried.and(destroyed).map_err(failed)?;
        Ok(Self(Arc::new(own)))
    }
}
