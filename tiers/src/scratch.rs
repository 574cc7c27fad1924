//! Small registered buffers for headers, generation words and blocks on their way between two places
//! that cannot reach each other.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, Descriptor, HostMemory, Region, RegionOptions};

/// A fixed number of equal buffers.
pub(crate) struct Scratch {
    region: Region,
    buffer_bytes: u64,
    vacant: Mutex<Vec<u32>>,
}

/// Some of them, given back when dropped. Whoever lent them to a transfer keeps them until it settles.
pub(crate) struct Buffers {
    scratch: Arc<Scratch>,
    buffers: Vec<u32>,
}

impl Scratch {
    /// `count` buffers of `buffer_bytes` each.
    pub(crate) fn new(agent: &Agent, count: u32, buffer_bytes: u64) -> Result<Arc<Self>> {
        let memory = HostMemory::anonymous(u64::from(count) * buffer_bytes)?;
        let region = agent.register(memory, RegionOptions::default())?;
        let vacant = Mutex::new((0..count).rev().collect());
        Ok(Arc::new(Self {
            region,
            buffer_bytes,
            vacant,
        }))
    }

    /// Takes `count` buffers.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when fewer are vacant: transfers that failed unsettled hold the rest.
    pub(crate) fn take(self: &Arc<Self>, count: usize) -> Result<Buffers> {
        let mut vacant = self.vacant.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(from) = vacant.len().checked_sub(count) else {
            let context = format!("{count} buffers wanted, {} vacant", vacant.len());
            return Err(Error::new(ErrorKind::Busy, context));
        };
        let buffers = vacant.split_off(from);
        Ok(Buffers {
            scratch: self.clone(),
            buffers,
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
