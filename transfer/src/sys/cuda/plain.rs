//! Plain copies of the driver's, one at a time: what measurements stand beside.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::driver::Cuda;
use super::memory::DeviceMemory;
use super::pinned::Pinned;
use super::stream::{Batch, Flight, Place, Stream, Unsent};
use crate::sys::memory::HostMemory;

/// How long one copy may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// One side of a [`CudaCopies`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CudaSide {
    /// Pinned memory of the host.
    Host,
    /// Memory of the device.
    Device,
    /// Other memory of the device.
    Other,
}

/// Contiguous copies by `cuMemcpyAsync` on a stream of their own, between pinned host memory and two pieces of a device's: no
/// agent, no thread, no list. Each is waited for, by asking for its event without a pause. For measurements: what a device and its bus
/// give to the plainest program.
pub struct CudaCopies {
    /// In the order of [`CudaSide`].
    places: Arc<[Place]>,
    host: Arc<Pinned>,
    stream: Stream,
}

impl CudaCopies {
    /// Memory of so many bytes on each side, of unspecified content.
    ///
    /// # Errors
    /// As [`DeviceMemory::allocate`].
    pub fn new(ordinal: u32, bytes: u64) -> Result<Self> {
        Self::on(&Cuda::get()?, ordinal, bytes)
    }

    pub(super) fn on(cuda: &Cuda, ordinal: u32, bytes: u64) -> Result<Self> {
        let gpu = cuda.gpu(ordinal)?;
        let memory = HostMemory::anonymous(bytes)?;
        memory.mapping().populate(0, bytes)?;
        let host = Arc::new(Pinned::own(&gpu, memory)?);
        let device = || DeviceMemory::allocate_on(cuda, ordinal, bytes).map(Arc::new);
        Ok(Self {
            places: [
                Place::Host(host.clone()),
                Place::Device(device()?),
                Place::Device(device()?),
            ]
            .into(),
            host,
            stream: Stream::new(&gpu)?,
        })
    }

    /// Copies `len` bytes at `offset` to the same place on another side, and waits until they are there.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a side with itself and a range that lies outside, [`ErrorKind::Timeout`] after a minute;
    /// otherwise what the driver says. A side that may still be written to is never freed.
    pub fn copy(&mut self, to: CudaSide, from: CudaSide, offset: u64, len: u64) -> Result<()> {
        if to == from {
            return Err(Error::new(ErrorKind::Invalid, "a copy onto itself"));
        }
        let mut batch = Batch::new(&self.places);
        batch.copy((to as usize, offset), (from as usize, offset), len)?;
        let (flight, failure) = self.stream.submit(batch).map_err(|unsent| match unsent {
            Unsent::Refused(error) | Unsent::Broken(error) => error,
        })?;
        self.wait(flight)?;
        failure.map_or(Ok(()), Err)
    }

    fn wait(&mut self, mut flight: Flight) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !self.stream.is_over(&mut flight)? {
            if Instant::now() > until {
                let text = format!("a copy takes more than {} s", PATIENCE.as_secs());
                return Err(Error::new(ErrorKind::Timeout, text));
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Writes to the host's side.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a range that lies outside.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.host.mapping()?.write(offset, bytes)
    }

    /// Reads the host's side.
    ///
    /// # Errors
    /// As [`CudaCopies::write`].
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.host.mapping()?.read(offset, bytes)
    }
}

impl fmt::Debug for CudaCopies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CudaCopies")
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{Fake, OUT_OF_MEMORY};
    use super::*;

    /// Up, across and down again, over the stand-in of the driver: the bytes are those that went up, and nothing is left.
    #[test]
    fn bytes_go_up_across_and_down() {
        let fake = Fake::new(1);
        let mut copies = CudaCopies::on(&fake.start(), 0, 8192).unwrap();
        let bytes: Vec<u8> = (0..4096_u32).map(|at| (at % 251) as u8).collect();
        copies.write(4096, &bytes).unwrap();
        for (to, from) in [
            (CudaSide::Device, CudaSide::Host),
            (CudaSide::Other, CudaSide::Device),
        ] {
            copies.copy(to, from, 4096, 4096).unwrap();
        }
        copies.write(4096, &[0; 4096]).unwrap();
        copies
            .copy(CudaSide::Host, CudaSide::Other, 4096, 4096)
            .unwrap();
        let mut found = vec![0; 4096];
        copies.read(4096, &mut found).unwrap();
        assert!(found == bytes);
        assert_eq!(fake.count("cuMemcpyAsync"), 3);
        assert_eq!(fake.count("cuMemcpyBatchAsync"), 0, "the plain call");
        drop(copies);
        fake.check_empty();
    }

    /// What lies outside, a side with itself, and what the driver refuses.
    #[test]
    fn what_cannot_be_copied_is_refused() {
        let fake = Fake::new(1);
        let mut copies = CudaCopies::on(&fake.start(), 0, 4096).unwrap();
        let mut kind = |to, offset, len| {
            let copied = copies.copy(to, CudaSide::Host, offset, len);
            copied.unwrap_err().kind()
        };
        assert_eq!(kind(CudaSide::Device, 4096, 1), ErrorKind::Invalid);
        assert_eq!(kind(CudaSide::Host, 0, 8), ErrorKind::Invalid);
        fake.fail("cuMemcpyAsync", 0, OUT_OF_MEMORY);
        assert_eq!(kind(CudaSide::Device, 0, 8), ErrorKind::Busy);
        assert!(CudaCopies::on(&fake.start(), 1, 4096).is_err());
        drop(copies);
        fake.check_empty();
    }
}
