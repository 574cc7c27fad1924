//! Which blocks go where.

use std::ops::Range;

use clap::ValueEnum;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_sim::seed::Random;
use kvfabric_transfer::Operation;
use serde::{Deserialize, Serialize};

/// The most blocks one iteration may move.
const BLOCKS_MAX: u64 = 1 << 20;
/// The largest block: more is no block of any model.
const BLOCK_BYTES_MAX: u64 = 1 << 30;
/// The most threads that post, and the most requests that each keeps in flight.
pub(super) const PARALLEL_MAX: u32 = 1024;

/// What moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum BackendKind {
    /// Between two regions of one agent.
    Memcpy,
    /// To another process, which shares its memory.
    Shm,
    /// To another process, whose own memory the system copies from and to.
    Cma,
    /// To another process, over loopback.
    Tcp,
    /// To another process, over UCX, with the transports that it chooses; needs UCX in the system.
    Ucx,
    /// To another process, over RDMA by libibverbs; needs a device.
    Verbs,
    /// From memory of a GPU to that of another process's GPU, over UCX.
    #[value(skip)]
    UcxCuda,
    /// The same over RDMA by libibverbs.
    #[value(skip)]
    VerbsCuda,
    /// To a file.
    File,
    /// To objects in a local folder.
    Object,
    /// Between host memory and memory of a GPU; needs the CUDA driver.
    Cuda,
    /// Within a GPU, whichever way is named; needs the CUDA driver.
    CudaWithin,
    /// From memory of a GPU to that of another process on the same machine, which it opens; needs the CUDA driver.
    CudaIpc,
}

impl BackendKind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Memcpy => "memcpy",
            Self::Shm => "shm",
            Self::Cma => "cma",
            Self::Tcp => "tcp",
            Self::Ucx => "ucx",
            Self::Verbs => "verbs",
            Self::UcxCuda => "ucx-cuda",
            Self::VerbsCuda => "verbs-cuda",
            Self::File => "file",
            Self::Object => "object",
            Self::Cuda => "cuda",
            Self::CudaWithin => "cuda-within",
            Self::CudaIpc => "cuda-ipc",
        }
    }

    /// Whether one side at least is memory of a GPU, and GPUs copy.
    pub(super) const fn is_on_device(self) -> bool {
        matches!(self, Self::Cuda | Self::CudaWithin | Self::CudaIpc)
    }

    /// Whether both sides are memory of GPUs, each of its own process.
    pub(super) const fn is_between_gpus(self) -> bool {
        matches!(self, Self::UcxCuda | Self::VerbsCuda | Self::CudaIpc)
    }

    /// The same between memory of GPUs; none where that is not moved so.
    pub(super) const fn between_gpus(self) -> Option<Self> {
        match self {
            Self::Ucx | Self::UcxCuda => Some(Self::UcxCuda),
            Self::Verbs | Self::VerbsCuda => Some(Self::VerbsCuda),
            _ => None,
        }
    }

    /// The way as path reports name it.
    pub(super) const fn way_name(self) -> &'static str {
        match self {
            Self::UcxCuda => Self::Ucx.name(),
            Self::VerbsCuda => Self::Verbs.name(),
            Self::CudaIpc => Self::Cuda.name(),
            other => other.name(),
        }
    }

    /// Those of the ways named that differ over it.
    pub(super) fn ways(self, named: &[Way]) -> &[Way] {
        match self {
            Self::CudaWithin => &[Way::Write],
            _ => named,
        }
    }

    /// Whether the other side is memory of another process.
    pub(super) const fn is_to_a_process(self) -> bool {
        matches!(
            self,
            Self::Shm
                | Self::Cma
                | Self::Tcp
                | Self::Ucx
                | Self::Verbs
                | Self::UcxCuda
                | Self::VerbsCuda
                | Self::CudaIpc
        )
    }
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(super) enum Way {
    /// From the other side to this one.
    Read,
    /// From this side to the other.
    Write,
}

impl Way {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    pub(super) const fn operation(self) -> Operation {
        match self {
            Self::Read => Operation::Read,
            Self::Write => Operation::Write,
        }
    }
}

/// Where the other side's memory is, or both sides'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Memory {
    /// Memory of hosts, files and objects.
    Host,
    /// Memory of a GPU.
    Cuda,
}

/// Where blocks lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(super) enum Order {
    /// Anywhere, on both sides.
    Scattered,
    /// One after the other.
    Contiguous,
}

impl Order {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Scattered => "scattered",
            Self::Contiguous => "contiguous",
        }
    }
}

/// When lists are checked and requests made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(super) enum Calls {
    /// Once, before anything is timed; then they are posted again and again.
    Prepared,
    /// Each time anew, which is timed too.
    OneShot,
}

/// The pages of a model's layers: each layer is one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layers {
    /// Layers that look at all tokens, and blocks of each.
    pub(super) full: u32,
    pub(super) full_blocks: u32,
    /// Layers that look at the last tokens only, and blocks of each.
    pub(super) windowed: u32,
    pub(super) windowed_blocks: u32,
}

impl Layers {
    /// Blocks of each layer in turn; both kinds alternate while both are left.
    fn counts(self) -> impl Iterator<Item = u32> {
        let pairs = self.full.min(self.windowed);
        let alternating = (0..pairs).flat_map(move |_| [self.windowed_blocks, self.full_blocks]);
        let full = (pairs..self.full).map(move |_| self.full_blocks);
        let windowed = (pairs..self.windowed).map(move |_| self.windowed_blocks);
        alternating
            .chain(full)
            .chain(windowed)
            .filter(|count| *count > 0)
    }

    /// Blocks of all layers.
    pub(super) fn blocks(self) -> u64 {
        u64::from(self.full) * u64::from(self.full_blocks)
            + u64::from(self.windowed) * u64::from(self.windowed_blocks)
    }
}

/// One case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) backend: BackendKind,
    pub(super) way: Way,
    pub(super) block_bytes: u64,
    pub(super) total_bytes: u64,
    pub(super) request_blocks: u32,
    pub(super) order: Order,
    pub(super) seed: u64,
    /// Threads that post requests, all at once.
    pub(super) threads: u32,
    /// Requests that each thread keeps in flight.
    pub(super) in_flight: u32,
    pub(super) calls: Calls,
    /// Requests are layers, not batches of [`Shape::request_blocks`].
    pub(super) layers: Option<Layers>,
}

impl Shape {
    /// As in reports: `shm-write-4096`.
    pub(super) fn name(&self) -> String {
        format!("{}-{}", self.path(), self.block_bytes)
    }

    /// Which way over which backend, as in reports: `shm-write`; with a GPU `cuda-h2d`, `cuda-d2h` or `cuda-d2d`.
    pub(super) fn path(&self) -> String {
        match (self.backend, self.way) {
            (BackendKind::Cuda, Way::Write) => "cuda-h2d".to_owned(),
            (BackendKind::Cuda, Way::Read) => "cuda-d2h".to_owned(),
            (BackendKind::CudaWithin, _) => "cuda-d2d".to_owned(),
            (backend, way) => format!("{}-{}", backend.name(), way.name()),
        }
    }

    /// Blocks of one iteration.
    pub(super) const fn blocks(&self) -> u32 {
        (self.total_bytes / self.block_bytes) as u32
    }

    /// Positions of the blocks of each request.
    fn requests(&self) -> Vec<Range<u32>> {
        let blocks = self.blocks();
        let Some(layers) = self.layers else {
            let starts = (0..blocks).step_by(self.request_blocks as usize);
            return starts
                .map(|first| first..blocks.min(first.saturating_add(self.request_blocks)))
                .collect();
        };
        let mut next = 0;
        let layer = |count| {
            let first = next;
            next += count;
            first..next
        };
        layers.counts().map(layer).collect()
    }

    /// Refuses what another process must not ask for.
    fn check_parts(&self) -> Result<()> {
        for (name, value, most) in [
            ("--blocks", self.request_blocks, BLOCKS_MAX as u32),
            ("--threads", self.threads, PARALLEL_MAX),
            ("--in-flight", self.in_flight, PARALLEL_MAX),
        ] {
            if !(1..=most).contains(&value) {
                return Err(Error::invalid(name, value, format_args!("1..={most}")));
            }
        }
        let blocks = u64::from(self.blocks());
        if let Some(layers) = self.layers.filter(|layers| layers.blocks() != blocks) {
            let context = format!(
                "{blocks} blocks are not the {} of {layers:?}",
                layers.blocks()
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(())
    }
}

/// A case with the place of every block: the i-th goes between `local[i]` and `remote[i]`, counted in blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) shape: Shape,
    /// As in reports.
    pub(super) case: String,
    /// Positions of the blocks of each request.
    pub(super) requests: Vec<Range<u32>>,
    pub(super) local: Vec<u32>,
    pub(super) remote: Vec<u32>,
}

impl Plan {
    /// Chooses the places; the same shape gives the same ones in every process.
    ///
    /// # Errors
    /// `Invalid` naming the option.
    pub(super) fn new(shape: Shape) -> Result<Self> {
        let Shape {
            block_bytes,
            total_bytes,
            ..
        } = shape;
        if !(8..=BLOCK_BYTES_MAX).contains(&block_bytes) || block_bytes % 8 != 0 {
            return Err(Error::invalid(
                "--block-bytes",
                block_bytes,
                format_args!("a multiple of 8 in 8..={BLOCK_BYTES_MAX}"),
            ));
        }
        if total_bytes % block_bytes != 0 {
            let context = format!(
                "--total-bytes {total_bytes} is no multiple of --block-bytes {block_bytes}"
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let blocks = total_bytes / block_bytes;
        if !(1..=BLOCKS_MAX).contains(&blocks) {
            let context = format!(
                "--total-bytes {total_bytes} are {blocks} blocks of {block_bytes}, at most {BLOCKS_MAX}"
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        shape.check_parts()?;
        let places = |stream| {
            let mut places: Vec<u32> = (0..blocks as u32).collect();
            if shape.order == Order::Scattered {
                Random::stream(shape.seed, stream).shuffle(&mut places);
            }
            places
        };
        let remote = match shape.backend {
            // A write of an object covers it from its start on without a gap.
            BackendKind::Object => (0..blocks as u32).collect(),
            _ => places(2),
        };
        Ok(Self {
            shape,
            case: shape.name(),
            requests: shape.requests(),
            local: places(1),
            remote,
        })
    }

    /// Where the bytes come from, block by block.
    pub(super) fn sources(&self) -> &[u32] {
        match self.shape.way {
            Way::Read => &self.remote,
            Way::Write => &self.local,
        }
    }

    /// Where they go.
    pub(super) fn targets(&self) -> &[u32] {
        match self.shape.way {
            Way::Read => &self.local,
            Way::Write => &self.remote,
        }
    }

    /// The byte at which the block at this place begins.
    pub(super) const fn offset(&self, place: u32) -> u64 {
        place as u64 * self.shape.block_bytes
    }

    /// The same case with all blocks in order, as a reference moves them that only streams.
    pub(super) fn in_order(&self) -> Self {
        let order: Vec<u32> = (0..self.shape.blocks()).collect();
        Self {
            local: order.clone(),
            remote: order,
            ..self.clone()
        }
    }
}

#[cfg(test)]
pub(super) fn shape(backend: BackendKind, way: Way) -> Shape {
    Shape {
        backend,
        way,
        block_bytes: 4096,
        total_bytes: 64 << 10,
        request_blocks: 3,
        order: Order::Scattered,
        seed: 5,
        threads: 1,
        in_flight: 2,
        calls: Calls::Prepared,
        layers: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sorts the places of a scattered plan: each occurs once, and not in order.
    #[test]
    fn every_block_has_one_place_on_each_side() {
        let plan = Plan::new(shape(BackendKind::Tcp, Way::Read)).unwrap();
        let order: Vec<u32> = (0..16).collect();
        for places in [&plan.local, &plan.remote] {
            assert_ne!(*places, order);
            let mut sorted = places.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, order);
        }
        assert_ne!(plan.local, plan.remote);
        assert_eq!(Plan::new(plan.shape).unwrap(), plan);
    }

    /// Cuts 16 blocks by threes, and into the layers of a model that has both kinds.
    #[test]
    fn every_block_is_in_one_request() {
        let mut one = shape(BackendKind::Shm, Way::Read);
        let batches = Plan::new(one).unwrap().requests;
        assert_eq!((batches.len(), batches[5].clone()), (6, 15..16));
        one.layers = Some(Layers {
            full: 3,
            full_blocks: 4,
            windowed: 2,
            windowed_blocks: 2,
        });
        let layers = Plan::new(one).unwrap().requests;
        assert_eq!(layers, [0..2, 2..6, 6..8, 8..12, 12..16]);
        one.total_bytes += 4096;
        assert_eq!(Plan::new(one).unwrap_err().kind(), ErrorKind::Invalid);
    }

    /// What another process could send: no blocks in a request, or no thread.
    #[test]
    fn shapes_that_cannot_be_run_are_refused() {
        let good = shape(BackendKind::Shm, Way::Write);
        let named = |shape| Plan::new(shape).unwrap_err().to_string();
        assert!(
            named(Shape {
                request_blocks: 0,
                ..good
            })
            .contains("--blocks")
        );
        assert!(named(Shape { threads: 0, ..good }).contains("--threads"));
        assert!(
            named(Shape {
                in_flight: 9999,
                ..good
            })
            .contains("--in-flight")
        );
    }

    /// What cannot be cut into blocks names the option and both sizes.
    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let good = shape(BackendKind::Shm, Way::Write);
        for (block_bytes, total_bytes, name) in [
            (12, 24, "--block-bytes"),
            (4096, 5000, "--total-bytes"),
            (8, 16 << 20, "--total-bytes"),
        ] {
            let error = Plan::new(Shape {
                block_bytes,
                total_bytes,
                ..good
            })
            .unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
