//! Requests and streams of an engine on the same devices: one begins after the other, and nobody's processor waits.

use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::state::State;
use super::{Request, Route};
use crate::backend::Point;
use crate::outcome::{MemoryFate, TransferError};
use crate::sys::cuda::CudaStream;

impl Request {
    /// As [`Request::post`], of a request with memory of a GPU: nothing of it is read or written before the device has come to `point`,
    /// such as where the stream is that computes the bytes ([`CudaStream::point`]). Nothing waits for that but the device, or the
    /// device's thread where bytes go through buffers. The deadline counts from the post.
    ///
    /// Such requests have a stream of their own for each direction of a device, on which they begin in the order of their posts: one
    /// whose point is never reached holds back those behind it. When it fails meanwhile, its memory is in flight until its point is
    /// reached, if its copies were queued.
    ///
    /// # Errors
    /// As [`Request::post`]; [`ErrorKind::Unsupported`] for a request that no GPU's copies move.
    pub fn post_after(&self, point: &Point) -> Result<()> {
        self.agent.check()?;
        match &self.route {
            Route::Own(backend) if backend.has_streams() => {
                self.post_to(backend, 0, Some(point.clone()))
            }
            _ => Err(self.without_streams()),
        }
    }

    /// Has an engine's stream wait for a part, counted from 0, or for all: what the stream is given after this call is done when the
    /// device has copied all bytes of the part. Waits itself until the copies are queued, at most `timeout`, and not until they are
    /// made.
    ///
    /// After a success the stream goes on whatever becomes of the request, and finds the bytes in place: all copies of the part were
    /// queued, a deadline or a cancel takes none of them back, and a copy that fails breaks the device's context, which the engine's
    /// own calls report. After an error the stream waits for nothing: do not use the part. What is in place in memory of the host is
    /// told by the request alone ([`Request::wait_part`]).
    ///
    /// # Errors
    /// Why the request has failed before all copies of the part were queued; [`ErrorKind::Timeout`] with memory in flight when
    /// `timeout` ran out first; [`ErrorKind::Invalid`] for a part that there is not, and when it was never posted;
    /// [`ErrorKind::Unsupported`] for a request that no GPU's copies move or whose checksums are compared, and while the stream is
    /// captured into a graph.
    pub fn order_stream(
        &self,
        stream: &CudaStream,
        part: Option<usize>,
        timeout: Duration,
    ) -> Result<(), TransferError> {
        let refused = |error| TransferError::new(error, MemoryFate::Settled);
        if !matches!(&self.route, Route::Own(backend) if backend.has_streams()) {
            return Err(refused(self.without_streams()));
        }
        if self.core.plan.is_checked() {
            let text = "a stream cannot wait for checksums to be compared: wait for the request";
            return Err(refused(Error::new(ErrorKind::Unsupported, text)));
        }
        let known = |state: &State| self.core.points(state, part);
        self.wait_for(Instant::now() + timeout, None, |state| {
            known(state).is_some()
        });
        let points = known(&self.core.lock()).unwrap_or_else(|| {
            let text = format!("copies not queued after {timeout:?}");
            let error = Error::new(ErrorKind::Timeout, text);
            Err(TransferError::new(error, MemoryFate::InFlight))
        })?;
        // The memory is the request's to tell of, and not changed by this.
        stream.follow(&points).map_err(refused)
    }

    fn without_streams(&self) -> Error {
        let name = match &self.route {
            Route::Own(backend) => backend.name(),
            Route::Peer(_) => "a connection to a peer",
        };
        let text =
            format!("streams of an engine are for requests with memory of a GPU, not for {name}");
        Error::new(ErrorKind::Unsupported, text)
    }
}
