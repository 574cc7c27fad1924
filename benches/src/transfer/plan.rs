//! Which blocks go where.

use clap::ValueEnum;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_sim::seed::Random;
use kvfabric_transfer::Operation;
use serde::{Deserialize, Serialize};

/// The most blocks one iteration may move.
const BLOCKS_MAX: u64 = 1 << 20;
/// The largest block: more is no block of any model.
const BLOCK_BYTES_MAX: u64 = 1 << 30;

/// What moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(crate) enum BackendKind {
    /// Between two regions of one agent.
    Memcpy,
    /// To another process, which shares its memory.
    Shm,
    /// To another process, over loopback.
    Tcp,
    /// To another process, over UCX, with the transports that it chooses; needs UCX in the system.
    Ucx,
    /// To a file.
    File,
    /// To objects in a local folder.
    Object,
}

impl BackendKind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Memcpy => "memcpy",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Ucx => "ucx",
            Self::File => "file",
            Self::Object => "object",
        }
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
    const fn name(self) -> &'static str {
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

/// Where blocks lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub(super) enum Order {
    /// Anywhere, on both sides.
    Scattered,
    /// One after the other.
    Contiguous,
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
}

impl Shape {
    /// As in reports: `shm-write-4096`.
    pub(super) fn name(&self) -> String {
        format!(
            "{}-{}-{}",
            self.backend.name(),
            self.way.name(),
            self.block_bytes
        )
    }

    /// Blocks of one iteration.
    pub(super) const fn blocks(&self) -> u32 {
        (self.total_bytes / self.block_bytes) as u32
    }
}

/// A case with the place of every block: the i-th goes between `local[i]` and `remote[i]`, counted in blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) shape: Shape,
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
            shape: self.shape,
            local: order.clone(),
            remote: order,
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
