//! What a device computes of the memory of its regions.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::{CudaBackend, memory_of};
use crate::agent::Agent;
use crate::backend::Operation;
use crate::convert::Grid;
use crate::descriptor::{Descriptor, Side};
use crate::region::{Region, RegionCore, RegionId, RegionOptions, RegionUse};
use crate::request::RequestOptions;
use crate::sys::cuda::{Cuda, Desk, DeviceMemory, Flight, Gpu, Groups, Place, SUMS_MAX, Unsent};
use crate::sys::memory::HostMemory;

/// The pause between two looks at a device that computes.
const PAUSE: Duration = Duration::from_micros(20);

/// Bytes over which kernels show that they sum as the processor does: more than a group of their threads takes.
const PROOF_BYTES: u64 = 300 << 10;

/// What is summed of them: whole segments, parts of some, a single byte.
const PROOF_RANGES: [(u64, u64); 6] = [
    (0, PROOF_BYTES),
    (1, 1023),
    (1024, 1024),
    (4095, 2),
    (8191, 1),
    (12_289, 262_144),
];

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
        let place = |&(offset, len): &(u64, u64)| (0, offset, len);
        let ranges: Vec<_> = ranges.iter().map(place).collect();
        self.sums(&[region.core()], &ranges, within)
    }

    /// The CRC-32C of each of these ranges of an agent's regions.
    ///
    /// # Errors
    /// As [`CudaKernels::checksums`]; [`ErrorKind::NotFound`] for a region that the agent does not have.
    pub fn checksums_of(
        &self,
        agent: &Agent,
        memory: &[Descriptor],
        within: Duration,
    ) -> Result<Vec<u32>> {
        let mut ids: Vec<RegionId> = Vec::new();
        let mut ranges = Vec::with_capacity(memory.len());
        for part in memory {
            // Neighbours are mostly of one region, and there are few.
            let known = ids.iter().rposition(|id| *id == part.region);
            let place = known.unwrap_or_else(|| {
                ids.push(part.region);
                ids.len() - 1
            });
            ranges.push((place, part.offset, part.len));
        }
        let exports = agent.core().exports();
        let regions: Result<Vec<_>> = ids.into_iter().map(|id| exports.find(id)).collect();
        self.sums(&regions?.iter().collect::<Vec<_>>(), &ranges, within)
    }

    /// Sums ranges: of which region, from where, how many bytes.
    fn sums(
        &self,
        regions: &[&Arc<RegionCore>],
        ranges: &[(usize, u64, u64)],
        within: Duration,
    ) -> Result<Vec<u32>> {
        let started = Instant::now();
        for &(place, offset, len) in ranges {
            let bytes = regions[place].bytes();
            if offset.checked_add(len).is_none_or(|end| end > bytes) {
                let text = format!("bytes {offset}+{len} of a region of {bytes}");
                return Err(Error::new(ErrorKind::Invalid, text));
            }
        }
        let mut sums = vec![0; ranges.len()];
        let filled: Vec<usize> = (0..ranges.len()).filter(|&at| ranges[at].2 > 0).collect();
        let mut job = Job::of(regions, started, within)?;
        let mut state = self.state()?;
        if !state.has_table && !filled.is_empty() {
            let table = state.desk.make_table();
            state.wait(table, &mut job)?;
            state.has_table = true;
        }
        for part in filled.chunks(SUMS_MAX) {
            let range = |&at: &usize| {
                let (place, offset, len) = ranges[at];
                ((place, offset), len)
            };
            let list: Vec<_> = part.iter().map(range).collect();
            let sum = state.desk.sum(&job.places, &list);
            state.wait(sum, &mut job)?;
            for (at, sum) in part.iter().zip(state.desk.sums(part.len())?) {
                sums[*at] = sum;
            }
        }
        Ok(sums)
    }

    /// Has the device sum bytes that the processor has summed.
    fn prove(&self, agent: &Agent, cuda: &Cuda, within: Duration) -> Result<()> {
        let memory = HostMemory::anonymous(PROOF_BYTES)?;
        let host = agent.register(memory, RegionOptions::default())?;
        let device = DeviceMemory::allocate_on(cuda, self.gpu.ordinal(), PROOF_BYTES)?;
        let device = agent.register_device(device)?;
        let mut state = 0x9e37_79b9_u32;
        let bytes = (0..PROOF_BYTES).map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        });
        host.write_at(0, &bytes.collect::<Vec<u8>>())?;
        let pair = (
            host.descriptor(0, PROOF_BYTES),
            device.descriptor(0, PROOF_BYTES),
        );
        let options = RequestOptions {
            deadline: Some(within),
            ..RequestOptions::default()
        };
        let sent = agent.transfer(Operation::Write, &[pair], Side::Local, options)?;
        sent.wait(within)?;
        let found = self.checksums(&device, &PROOF_RANGES, within)?;
        for (&(offset, len), found) in PROOF_RANGES.iter().zip(found) {
            let expected = host.checksum(offset, len)?;
            if found != expected {
                let device = self.gpu.ordinal();
                let text = format!(
                    "cuda device {device} sums bytes {offset}+{len} to {found:08x}, the processor to {expected:08x}"
                );
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        }
        Ok(())
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
        let mut job = Job::of(&[target.core(), source.core()], Instant::now(), within)?;
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
        let regions = [of.numbers.0, of.scales.0, of.values.0].map(Region::core);
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

impl Agent {
    /// The kernels of a device, after they have shown that they sum some bytes as the processor does. Takes a while: the driver compiles
    /// them for the device when it has not done so before.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for an agent without CUDA; as [`CudaKernels::load`]; [`ErrorKind::Corrupt`] for sums that differ, and
    /// [`ErrorKind::Timeout`] when they are not there within the time.
    pub fn device_kernels(&self, ordinal: u32, within: Duration) -> Result<CudaKernels> {
        let backend = CudaBackend::of(self.core())?;
        let kernels = CudaKernels::on(&backend.cuda.gpu(ordinal)?)?;
        kernels.prove(self, &backend.cuda, within)?;
        Ok(kernels)
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
    fn of(regions: &[&Arc<RegionCore>], started: Instant, within: Duration) -> Result<Self> {
        let (mut places, mut uses) = (Vec::new(), Vec::new());
        for &region in regions {
            uses.push(RegionUse::begin(region.clone())?);
            let memory = memory_of(region).ok_or_else(|| {
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
