//! Where a block's bytes lie in a registered region.

use std::ops::Range;

use super::LAYERS_MAX;
use crate::error::{Error, ErrorKind};
use crate::id::SlotIndex;

/// A range of bytes in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The first byte, from the region's start.
    pub offset: u64,
    /// How many.
    pub len: u64,
}

/// How an engine lays out one cache group: a page for each block and layer.
///
/// The page of block `b` in layer `l` begins at `base + l * layer_stride + b * block_stride`. Layers first and blocks
/// first are both just strides, so this describes every layout in which a page is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    base: u64,
    layers: u32,
    blocks: u32,
    page_bytes: u64,
    layer_stride: u64,
    block_stride: u64,
}

impl Layout {
    /// Describes strided pages; see the type.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when there are no layers, blocks or bytes, when pages would overlap, or when the end of
    /// the last page does not fit 64 bits. The value and the range are named.
    pub fn new(
        base: u64,
        layers: u32,
        blocks: u32,
        page_bytes: u64,
        layer_stride: u64,
        block_stride: u64,
    ) -> Result<Self, Error> {
        if !(1..=LAYERS_MAX).contains(&layers) {
            return Err(Error::invalid("layers", layers, 1..=LAYERS_MAX));
        }
        if blocks == 0 {
            return Err(Error::invalid("blocks", blocks, 1..=u32::MAX));
        }
        if page_bytes == 0 {
            return Err(Error::invalid("page_bytes", page_bytes, 1..=u64::MAX));
        }
        let layout = Self {
            base,
            layers,
            blocks,
            page_bytes,
            layer_stride,
            block_stride,
        };
        let (inner, outer) = layout.steps();
        // Pages are apart when the inner step passes a page and the outer step passes the whole inner run.
        let inner_run = inner.reach(page_bytes).ok_or_else(|| layout.too_large())?;
        if inner.count > 1 && inner.stride < page_bytes {
            return Err(Error::invalid(
                inner.name,
                inner.stride,
                page_bytes..=u64::MAX,
            ));
        }
        if outer.count > 1 && outer.stride < inner_run {
            return Err(Error::invalid(
                outer.name,
                outer.stride,
                inner_run..=u64::MAX,
            ));
        }
        let end = outer.reach(inner_run).and_then(|run| run.checked_add(base));
        end.map(|_| layout).ok_or_else(|| layout.too_large())
    }

    /// All layers of a block side by side, block after block: our own tiers' layout.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn block_major(layers: u32, blocks: u32, page_bytes: u64) -> Result<Self, Error> {
        let block = page_bytes.checked_mul(u64::from(layers)).ok_or_else(|| {
            Error::invalid(
                "page_bytes",
                page_bytes,
                1..=u64::MAX / u64::from(layers.max(1)),
            )
        })?;
        Self::new(0, layers, blocks, page_bytes, page_bytes, block)
    }

    /// All blocks of a layer side by side, layer after layer: vLLM's usual layout.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn layer_major(layers: u32, blocks: u32, page_bytes: u64) -> Result<Self, Error> {
        let layer = page_bytes.checked_mul(u64::from(blocks)).ok_or_else(|| {
            Error::invalid(
                "page_bytes",
                page_bytes,
                1..=u64::MAX / u64::from(blocks.max(1)),
            )
        })?;
        Self::new(0, layers, blocks, page_bytes, layer, page_bytes)
    }

    /// Layers in the group.
    #[must_use]
    pub const fn layers(&self) -> u32 {
        self.layers
    }

    /// Blocks in the group.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Bytes of one block in one layer.
    #[must_use]
    pub const fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Bytes of one block in all layers.
    #[must_use]
    pub const fn block_bytes(&self) -> u64 {
        self.page_bytes * self.layers as u64
    }

    /// Where the last page ends: a region must have at least so many bytes.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.base
            + (self.layers as u64 - 1) * self.layer_stride
            + (self.blocks as u64 - 1) * self.block_stride
            + self.page_bytes
    }

    /// The byte ranges a block occupies, in layer order.
    ///
    /// Neighbours are merged, so the list is as short as the layout allows; empty only for no layers.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a slot or a layer that the layout does not have.
    pub fn extents(&self, slot: SlotIndex, layers: Range<u32>) -> Result<Vec<Extent>, Error> {
        if slot.0 >= self.blocks {
            return Err(Error::invalid("slot", slot, 0..self.blocks));
        }
        if layers.end > self.layers || layers.start > layers.end {
            return Err(Error::invalid(
                "layers",
                format_args!("{layers:?}"),
                0..=self.layers,
            ));
        }
        let first = self.base + u64::from(slot.0) * self.block_stride;
        let mut extents: Vec<Extent> = Vec::new();
        for layer in layers {
            let offset = first + u64::from(layer) * self.layer_stride;
            match extents.last_mut() {
                Some(last) if last.offset + last.len == offset => last.len += self.page_bytes,
                _ => extents.push(Extent {
                    offset,
                    len: self.page_bytes,
                }),
            }
        }
        Ok(extents)
    }

    /// The two directions, the one with the smaller stride first.
    fn steps(&self) -> (Step, Step) {
        let layer = Step {
            name: "layer_stride",
            count: self.layers,
            stride: self.layer_stride,
        };
        let block = Step {
            name: "block_stride",
            count: self.blocks,
            stride: self.block_stride,
        };
        // A direction with one step never strides: it is inner whatever its number says.
        let layer_is_inner = match (layer.count, block.count) {
            (1, _) => true,
            (_, 1) => false,
            _ => layer.stride <= block.stride,
        };
        if layer_is_inner {
            (layer, block)
        } else {
            (block, layer)
        }
    }

    fn too_large(&self) -> Error {
        Error::new(
            ErrorKind::Invalid,
            format!("the last page of {self:?} ends beyond 64 bits"),
        )
    }
}

/// One direction in which pages follow each other.
struct Step {
    name: &'static str,
    count: u32,
    stride: u64,
}

impl Step {
    /// From the first byte to the last of runs of `len` bytes that follow each other in this direction.
    fn reach(&self, len: u64) -> Option<u64> {
        u64::from(self.count - 1)
            .checked_mul(self.stride)?
            .checked_add(len)
    }
}
