//! What a device computes of the memory of its regions.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::memory_of;
use crate::convert::Grid;
use crate::region::{Region, RegionUse};
use crate::sys::cuda::{Cuda, Desk, Flight, Gpu, Groups, Place, SUMS_MAX, Unsent};

/// The pause between two looks at a device that computes.
const PAUSE: Duration = Duration::from_micros(20);

/// Bytes of a region: where they begin.
pub type RegionAt<'a> = (&'a Region, u64);

/// Groups of numbers in regions of one device, as bfloat16s and as E4M3 numbers with a scale for each group
/// ([`crate::convert::e4m3s_of_bf16`] says what is computed).
#[derive(Clone, Copy, Debug)]
pub struct NumberGroups<'a> {
    /// 8-bit numbers, side by side.
    pub numbers: RegionAt<'a>,
    /// 32-bit scales, at a multiple of 4 bytes.
    pub scales: RegionAt<'a>,
    /// bfloat16s, at a multiple of 2 bytes.
    pub values: RegionAt<'a>,
    /// How many groups.
    pub groups: u32,
    /// Numbers of a group.
    pub length: u32,
}

/// A device's kernels: checksums, 8-bit numbers and page layouts, for memory registered with
/// [`Agent::register_device`](crate::Agent::register_device). One call computes at a time, on a stream of its own, and returns when it is
/// done; what computes the bytes before must be done, and nothing else may touch what is written.
///
/// The results are those of [`crate::convert`] and of CRC-32C, bit by bit.
pub struct CudaKernels {
    gpu: Arc<Gpu>,
    state: Mutex<State>,
}

struct State {
    desk: Desk,
    has_table: bool,
    /// Something did not end in time, and may still run.
    stuck: bool,
}

impl CudaKernels {
    /// Loads them on the device with this number.
    ///
    /// # Errors
    /// As [`cuda_probe`](crate::cuda_probe); what the driver says when it cannot read them (CUDA before 12.0) or the device cannot run
    /// them (compute capability before 7.5).
    pub fn load(ordinal: u32) -> Result<Self> {
        Self::on(&Cuda::get()?.gpu(ordinal)?)
    }

    pub(super) fn on(gpu: &Arc<Gpu>) -> Result<Self> {
        Ok(Self {
            gpu: gpu.clone(),
            state: Mutex::new(State {
                desk: Desk::new(gpu)?,
                has_table: false,
                stuck: false,
            }),
        })
    }

    /// The CRC-32C of ranges of a region: offset and length.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a range outside the region, [`ErrorKind::Unsupported`] for memory that is not of this device,
    /// [`ErrorKind::NotFound`] after deregistration, [`ErrorKind::Timeout`] when the device has not done it within the time (then the
    /// region is kept for ever, and these kernels are beyond use: [`ErrorKind::Poisoned`]); otherwise what the driver says.
    pub fn checksums(
        &self,
        region: &Region,
        ranges: &[(u64, u64)],
        within: Duration,
    ) -> Result<Vec<u32>> {
        let started = Instant::now();
        for &(offset, len) in ranges {
            if offset
                .checked_add(len)
                .is_none_or(|end| end > region.bytes())
            {
                let text = format!("bytes {offset}+{len} of a region of {}", region.bytes());
                return Err(Error::new(ErrorKind::Invalid, text));
            }
        }
        let mut sums = vec![0; ranges.len()];
        let filled: Vec<usize> = (0..ranges.len()).filter(|&at| ranges[at].1 > 0).collect();
        let mut job = Job::of(&[region], started, within)?;
        let mut state = self.state()?;
        if !state.has_table && !filled.is_empty() {
            let table = state.desk.make_table();
            state.wait(table, &mut job)?;
            state.has_table = true;
        }
        for part in filled.chunks(SUMS_MAX) {
            let list: Vec<_> = part
                .iter()
                .map(|&at| ((0, ranges[at].0), ranges[at].1))
                .collect();
            let sum = state.desk.sum(&job.places, &list);
            state.wait(sum, &mut job)?;
            for (at, sum) in part.iter().zip(state.desk.sums(part.len())?) {
                sums[*at] = sum;
            }
        }
        Ok(sums)
    }

    /// Moves the runs of a grid, whose offsets count from the start of each region. The regions may be one if no run overlaps another.
    ///
    /// # Errors
    /// As [`CudaKernels::checksums`], and as [`Grid::check`].
    pub fn rearrange(
        &self,
        target: &Region,
        source: &Region,
        grid: &Grid,
        within: Duration,
    ) -> Result<()> {
        let mut job = Job::of(&[target, source], Instant::now(), within)?;
        let mut state = self.state()?;
        let (to, from) = (((0, 0), target.bytes()), ((1, 0), source.bytes()));
        let moved = state.desk.rearrange(&job.places, to, from, grid);
        state.wait(moved, &mut job)
    }

    /// Makes 8-bit numbers and their scales of bfloat16s.
    ///
    /// # Errors
    /// As [`CudaKernels::checksums`]; [`ErrorKind::Invalid`] also for addresses that are not aligned.
    pub fn to_e4m3(&self, of: &NumberGroups<'_>, within: Duration) -> Result<()> {
        self.convert(of, false, within)
    }

    /// Makes bfloat16s of 8-bit numbers and their scales.
    ///
    /// # Errors
    /// As [`CudaKernels::to_e4m3`].
    pub fn from_e4m3(&self, of: &NumberGroups<'_>, within: Duration) -> Result<()> {
        self.convert(of, true, within)
    }

    fn convert(&self, of: &NumberGroups<'_>, is_back: bool, within: Duration) -> Result<()> {
        let regions = [of.numbers.0, of.scales.0, of.values.0];
        let mut job = Job::of(&regions, Instant::now(), within)?;
        let mut state = self.state()?;
        let groups = Groups {
            numbers: (0, of.numbers.1),
            scales: (1, of.scales.1),
            values: (2, of.values.1),
            groups: of.groups,
            length: of.length,
        };
        let converted = state.desk.convert(&job.places, &groups, is_back);
        state.wait(converted, &mut job)
    }

    fn state(&self) -> Result<std::sync::MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.stuck {
            let text = format!("cuda device {}: a kernel has not ended", self.gpu.ordinal());
            return Err(Error::new(ErrorKind::Poisoned, text));
        }
        Ok(state)
    }
}

/// The regions of a call, kept from being given back.
struct Job {
    places: Arc<[Place]>,
    uses: Vec<RegionUse>,
    started: Instant,
    within: Duration,
}

impl Job {
    fn of(regions: &[&Region], started: Instant, within: Duration) -> Result<Self> {
        let (mut places, mut uses) = (Vec::new(), Vec::new());
        for region in regions {
            uses.push(RegionUse::begin(region.core().clone())?);
            let memory = memory_of(region.core()).ok_or_else(|| {
                let text = format!("region {} is no memory of a device", region.id());
                Error::new(ErrorKind::Unsupported, text)
            })?;
            memory.check_there()?;
            places.push(Place::Device(memory.clone()));
        }
        Ok(Self {
            places: places.into(),
            uses,
            started,
            within,
        })
    }
}

impl State {
    /// Waits for what was queued, or keeps its memory for ever.
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn wait(
        &mut self,
        queued: Result<(Flight, Option<Error>), Unsent>,
        job: &mut Job,
    ) -> Result<()> {
        let failed = match queued {
            Err(Unsent::Refused(error)) => return Err(error),
            Err(Unsent::Broken(error)) => error,
            Ok((mut flight, failure)) => loop {
                match self.desk.is_over(&mut flight) {
                    Ok(true) => return failure.map_or(Ok(()), Err),
                    Ok(false) if job.started.elapsed() < job.within => std::thread::sleep(PAUSE),
                    Ok(false) => {
                        let text = format!("a kernel has not ended after {:?}", job.within);
                        break Error::new(ErrorKind::Timeout, text);
                    }
                    Err(error) => break error,
                }
            },
        };
        self.stuck = true;
        std::mem::forget(std::mem::take(&mut job.uses));
        Err(failed)
    }
}

impl fmt::Debug for CudaKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaKernels")
            .field("device", &self.gpu.ordinal())
            .finish_non_exhaustive()
    }
}
