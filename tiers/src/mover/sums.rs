//! Sums of blocks in memory of devices, by the devices' own kernels.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::{Checksum, Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, CudaKernels, Descriptor, MemoryKind};
use tokio::sync::OnceCell;

use crate::pages::BlockMemory;

/// What a device has to have summed by then, whoever still waits for it: otherwise it is not asked again.
const SUMMED_WITHIN: Duration = Duration::from_secs(10);

/// The devices that sum blocks, each asked for its kernels when one of its blocks is first to be summed there.
#[derive(Debug)]
pub(crate) struct DeviceSums {
    agent: Agent,
    is_wanted: bool,
    known: Mutex<BTreeMap<u32, Arc<Known>>>,
}

/// What is known of a device, when it has been asked.
type Known = OnceCell<Option<Arc<Summer>>>;

/// A device that sums.
#[derive(Debug)]
pub(crate) struct Summer {
    kernels: CudaKernels,
    device: u32,
    /// Why it is not to be asked any more.
    is_lost: AtomicBool,
    told: OnceLock<()>,
}

impl DeviceSums {
    pub(crate) fn new(agent: &Agent, is_wanted: bool) -> Self {
        Self {
            agent: agent.clone(),
            is_wanted,
            known: Mutex::default(),
        }
    }

    /// The device that all of these blocks are on, if it sums blocks. Who asks first waits until that is known, for half of the time
    /// until `deadline`: the rest is for doing without it.
    pub(crate) async fn of_all<'a>(
        &self,
        blocks: impl Iterator<Item = &'a BlockMemory>,
        deadline: Instant,
    ) -> Option<Arc<Summer>> {
        if !self.is_wanted {
            return None;
        }
        let device = device_of(&self.agent, blocks)?;
        let known = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.entry(device).or_default().clone()
        };
        let found = match known.get() {
            Some(found) => found.clone(),
            None => {
                let agent = self.agent.clone();
                // It goes on when nobody waits any more.
                let asking = tokio::spawn(async move {
                    let found = known.get_or_init(|| Self::load(agent, device)).await;
                    found.clone()
                });
                let left = deadline.saturating_duration_since(Instant::now());
                tokio::time::timeout(left / 2, asking).await.ok()?.ok()?
            }
        };
        found.filter(|summer| !summer.is_lost())
    }

    async fn load(agent: Agent, device: u32) -> Option<Arc<Summer>> {
        let loading = move || agent.device_kernels(device, SUMMED_WITHIN);
        let loaded = tokio::task::spawn_blocking(loading).await;
        match loaded {
            Ok(Ok(kernels)) => {
                tracing::info!(device, "blocks are summed on the device");
                Some(Arc::new(Summer {
                    kernels,
                    device,
                    is_lost: AtomicBool::new(false),
                    told: OnceLock::new(),
                }))
            }
            Ok(Err(error)) => {
                tracing::info!(%error, device, "blocks for the device are summed in host memory");
                None
            }
            Err(error) => {
                tracing::warn!(%error, device, "kernels not loaded");
                None
            }
        }
    }

    /// The sum of each of these blocks, which are on the summer's device.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] at `deadline`; what the device says otherwise. After the latter it is not asked again.
    pub(crate) async fn sum(
        &self,
        summer: &Arc<Summer>,
        blocks: &[&BlockMemory],
        deadline: Instant,
    ) -> Result<Vec<Checksum>> {
        let ranges: Vec<Descriptor> = blocks.iter().flat_map(|block| block.ranges()).collect();
        let (agent, asked) = (self.agent.clone(), summer.clone());
        // It goes on without whoever waits for it: the device reads the memory until it is done, and the kernels keep it until then.
        let summing = tokio::task::spawn_blocking(move || {
            let sums = asked.kernels.checksums_of(&agent, &ranges, SUMMED_WITHIN);
            sums.inspect_err(|error| asked.doubt(error))
        });
        let deadline = tokio::time::Instant::from_std(deadline);
        let Ok(summed) = tokio::time::timeout_at(deadline, summing).await else {
            let text = format!("device {} has not summed blocks in time", summer.device);
            return Err(Error::new(ErrorKind::Timeout, text));
        };
        let summed = summed.map_err(|error| {
            Error::new(ErrorKind::Internal, "a thread that sums").with_source(error)
        })?;
        let mut sums = summed?.into_iter();
        let joined = |block: &&BlockMemory| Checksum::crc32c(block.join(&mut sums));
        Ok(blocks.iter().map(joined).collect())
    }
}

impl Summer {
    pub(crate) fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Acquire)
    }

    /// It could not sum. Unless that is because of the memory, it is not asked again.
    fn doubt(&self, error: &Error) {
        let is_memory = matches!(
            error.kind(),
            ErrorKind::Invalid | ErrorKind::NotFound | ErrorKind::Unsupported
        );
        if is_memory {
            return;
        }
        self.is_lost.store(true, Ordering::Release);
        let device = self.device;
        self.told.get_or_init(|| {
            tracing::warn!(%error, device, "the device does not sum; from now on its blocks are summed in host memory");
        });
    }
}

/// The device that all of these blocks are on; a block's first range speaks for all, because no request takes both kinds.
fn device_of<'a>(agent: &Agent, blocks: impl Iterator<Item = &'a BlockMemory>) -> Option<u32> {
    let mut device = None;
    for block in blocks {
        let first = block.ranges().next()?;
        match agent.memory_kind(first.region) {
            Ok(MemoryKind::Device { ordinal }) if device.is_none_or(|known| known == ordinal) => {
                device = Some(ordinal);
            }
            _ => return None,
        }
    }
    device
}
