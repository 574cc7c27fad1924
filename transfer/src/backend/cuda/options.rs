//! How devices are used.

use std::time::Duration;

use kvcache_core::{Error, Result};

use super::staging::CHUNK_BYTES;

/// The most that [`CudaOptions::staging_bytes`] may be, in bytes.
const STAGING_BYTES_MAX: u64 = 1 << 30;

/// The longest [`CudaOptions::polling`].
const POLLING_MAX: Duration = Duration::from_millis(10);

/// The most [`CudaOptions::storage_threads`].
const STORAGE_THREADS_MAX: u32 = 256;

/// How an agent uses CUDA devices ([`AgentBuilder::cuda`](crate::AgentBuilder::cuda)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Whether host memory is pinned: all memory of a region, when a request first names it beside device memory, until it is
    /// deregistered. Devices then copy from and to it by themselves. Memory that is not pinned, or cannot be, goes through
    /// buffers that are, and the processor copies it once more. Default: yes.
    pub pin: bool,
    /// Bytes of those buffers for each device, allocated when they are first needed: a multiple of 1 MiB, up to 1 GiB.
    /// Default: 16 MiB.
    pub staging_bytes: u64,
    /// Bytes of the pinned memory for each device through which requests between the device and files, objects and peers go,
    /// 1 MiB at a time; allocated when it is first needed: a multiple of 1 MiB, from 2 MiB to 1 GiB. Default: 16 MiB.
    pub window_bytes: u64,
    /// How long the device's thread looks whether copies are done before it sleeps in between; up to 10 ms. Default: 20 µs.
    pub polling: Duration,
    /// Who copies small ranges. Default: the driver.
    pub fragments: Fragments,
    /// Whether peers of this machine reach memory of devices that is exported to them, and this agent theirs: each process opens the
    /// other's memory, and its device copies. Default: yes.
    pub peers: bool,
    /// How bytes go between memory of devices and files. Default: through pinned host memory.
    pub storage: Storage,
    /// Threads that wait in cuFile, where that is used: as many of its calls of up to 4 MiB are under way. 1 to 256; default: 16.
    pub storage_threads: u32,
}

/// How bytes go between memory of devices and files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// Through pinned host memory of the agent; cuFile is not looked for.
    #[default]
    Staged,
    /// By cuFile (GPUDirect Storage) where it moves them without a copy in host memory, and says so: its compatibility mode has to be
    /// switched off for that. Through pinned host memory elsewhere; [`Estimate::refused`](crate::Estimate::refused) has the reason.
    Direct,
    /// By cuFile wherever it takes a file, also where it may take the bytes through host memory of its own.
    Cufile,
}

/// Who copies ranges that are too small for the driver's copies to be fast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fragments {
    /// The driver, as all others: the device's copy engines, which take nothing from an engine's kernels.
    #[default]
    Copies,
    /// A kernel of ours, those of up to so many bytes each, where a request has several: many in one launch, on the device's
    /// processors. Registering memory of a device fails where the driver cannot load it (CUDA before 12.0, a device before compute
    /// capability 7.5).
    Kernel {
        /// The longest range that is small, in bytes.
        up_to_bytes: u32,
    },
    /// Whoever was faster when memory of the device was first registered by this agent: sizes from 512 bytes to 64 KiB are measured in
    /// each direction, which takes some milliseconds, 16 MiB of the device and 8 MiB of pinned memory, and what the kernel has copied
    /// is compared. Where the kernel cannot be loaded, or copies wrongly, the driver copies all, and the log says why.
    Measured,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            pin: true,
            staging_bytes: 16 << 20,
            window_bytes: 16 << 20,
            polling: Duration::from_micros(20),
            fragments: Fragments::Copies,
            peers: true,
            storage: Storage::Staged,
            storage_threads: 16,
        }
    }
}

impl CudaOptions {
    pub(super) fn check(&self) -> Result<()> {
        let bytes = self.staging_bytes;
        if !(CHUNK_BYTES..=STAGING_BYTES_MAX).contains(&bytes) || !bytes.is_multiple_of(CHUNK_BYTES)
        {
            let allowed = format!("a multiple of {CHUNK_BYTES} up to {STAGING_BYTES_MAX}");
            return Err(Error::invalid("cuda staging bytes", bytes, allowed));
        }
        let bytes = self.window_bytes;
        let (least, most) = (2 * CHUNK_BYTES, STAGING_BYTES_MAX);
        if !(least..=most).contains(&bytes) || !bytes.is_multiple_of(CHUNK_BYTES) {
            let allowed = format!("a multiple of {CHUNK_BYTES} from {least} to {most}");
            return Err(Error::invalid("cuda window bytes", bytes, allowed));
        }
        let threads = self.storage_threads;
        if !(1..=STORAGE_THREADS_MAX).contains(&threads) {
            let allowed = 1..=STORAGE_THREADS_MAX;
            return Err(Error::invalid("cuda storage threads", threads, allowed));
        }
        if self.polling > POLLING_MAX {
            let allowed = format!("up to {POLLING_MAX:?}");
            return Err(Error::invalid(
                "cuda polling",
                format!("{:?}", self.polling),
                allowed,
            ));
        }
        Ok(())
    }
}
