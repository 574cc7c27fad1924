//! Small registered buffers for headers, generation words and blocks on their way between two places
//! that cannot reach each other.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, Descriptor, HostMemory, Region, RegionOptions};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A fixed number of equal buffers.
pub(crate) struct Scratch {
    region: Region,
    buffer_bytes: u64,
    count: u32,
    vacant: Mutex<Vec<u32>>,
    /// As many as are vacant; a permit goes back after its buffer did.
    permits: Arc<Semaphore>,
}

/// Some of them, given back when dropped. Whoever lent them to a transfer keeps them until it settles.
pub(crate) struct Buffers {
    scratch: Arc<Scratch>,
    buffers: Vec<u32>,
    _permits: OwnedSemaphorePermit,
}

impl Scratch {
    /// `count` buffers of `buffer_bytes` each.
    pub(crate) fn new(agent: &Agent, count: u32, buffer_bytes: u64) -> Result<Arc<Self>> {
        let memory = HostMemory::anonymous(u64::from(count) * buffer_bytes)?;
        let region = agent.register(memory, RegionOptions::default())?;
        let vacant = Mutex::new((0..count).rev().collect());
        let permits = Arc::new(Semaphore::new(count as usize));
        Ok(Arc::new(Self {
            region,
            buffer_bytes,
            count,
            vacant,
            permits,
        }))
    }

    /// Takes `count` buffers, waiting until `deadline` for others to give theirs back.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] when fewer were vacant all the time: transfers that failed unsettled hold
    /// the rest. [`ErrorKind::Invalid`] for more than there are.
    pub(crate) async fn take(self: &Arc<Self>, count: usize, deadline: Instant) -> Result<Buffers> {
        let wanted = u32::try_from(count)
            .ok()
            .filter(|wanted| *wanted <= self.count);
        let Some(wanted) = wanted else {
            return Err(Error::invalid("buffers wanted", count, ..=self.count));
        };
        let deadline = tokio::time::Instant::from_std(deadline);
        let permits = self.permits.clone().acquire_many_owned(wanted);
        let Ok(Ok(permits)) = tokio::time::timeout_at(deadline, permits).await else {
            let context = format!("{count} buffers wanted, others hold them");
            return Err(Error::new(ErrorKind::Timeout, context));
        };
        let mut vacant = self.vacant.lock().unwrap_or_else(PoisonError::into_inner);
        let from = vacant.len().checked_sub(count);
        assert!(from.is_some(), "there is a vacant buffer for every permit");
        let buffers = vacant.split_off(from.unwrap_or(0));
        drop(vacant);
        Ok(Buffers {
            scratch: self.clone(),
            buffers,
            _permits: permits,
        })
    }
}

impl Buffers {
    /// `len` bytes at the start of the buffer at `position`.
    pub(crate) fn descriptor(&self, position: usize, len: u64) -> Descriptor {
        assert!(len <= self.scratch.buffer_bytes, "{len} bytes of a buffer");
        self.scratch.region.descriptor(self.offset(position), len)
    }

    /// Fills the buffer at `position` with `bytes`, and zeros after them.
    pub(crate) fn write(&self, position: usize, bytes: &[u8]) -> Result<()> {
        let (offset, len) = (self.offset(position), bytes.len() as u64);
        assert!(len <= self.scratch.buffer_bytes, "{len} bytes for a buffer");
        self.scratch.region.write_at(offset, bytes)?;
        match self.scratch.buffer_bytes - len {
            0 => Ok(()),
            rest => self.scratch.region.fill_at(offset + len, rest, 0),
        }
    }

    /// Copies from byte `from` on of the buffer at `position`.
    pub(crate) fn read(&self, position: usize, from: u64, bytes: &mut [u8]) -> Result<()> {
        assert!(
            from + bytes.len() as u64 <= self.scratch.buffer_bytes,
            "read past a buffer"
        );
        self.scratch
            .region
            .read_at(self.offset(position) + from, bytes)
    }

    /// The CRC-32C of the first `len` bytes of the buffer at `position`.
    pub(crate) fn checksum(&self, position: usize, len: u64) -> Result<u32> {
        assert!(len <= self.scratch.buffer_bytes, "{len} bytes of a buffer");
        self.scratch.region.checksum(self.offset(position), len)
    }

    fn offset(&self, position: usize) -> u64 {
        u64::from(self.buffers[position]) * self.scratch.buffer_bytes
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        let mut vacant = self
            .scratch
            .vacant
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        vacant.append(&mut self.buffers);
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Buffers").field(&self.buffers).finish()
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch")
            .field("buffer_bytes", &self.buffer_bytes)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Everything taken, one more wanted, then one given back; and more than there are.
    #[tokio::test]
    async fn buffers_are_waited_for_until_the_deadline() {
        let agent = Agent::builder("scratch").build().unwrap();
        let scratch = Scratch::new(&agent, 3, 64).unwrap();
        let later = || Instant::now() + Duration::from_secs(20);
        let two = scratch.take(2, later()).await.unwrap();
        let one = scratch.take(1, later()).await.unwrap();
        let refused = scratch.take(1, Instant::now()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Timeout);
        let (taken, ()) = tokio::join!(scratch.take(2, later()), async { drop(two) });
        assert_eq!(taken.unwrap().buffers.len(), 2);
        drop(one);
        let refused = scratch.take(4, later()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
    }

    /// A short write over a full one.
    #[tokio::test]
    async fn a_buffer_ends_in_zeros_after_what_was_written() {
        let agent = Agent::builder("scratch").build().unwrap();
        let scratch = Scratch::new(&agent, 2, 8).unwrap();
        let buffers = scratch
            .take(2, Instant::now() + Duration::from_secs(20))
            .await
            .unwrap();
        buffers.write(1, &[0xff; 8]).unwrap();
        buffers.write(1, &[1, 2]).unwrap();
        let mut bytes = [9; 8];
        buffers.read(1, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 0, 0, 0, 0, 0, 0]);
    }
}
