//! Pages: how the engine's memory holds numbered blocks.

use std::sync::Arc;

use kvfabric::life::Life;
use kvfabric::transfer::RegionId;
use kvfabric::{AttachedNode, Pages, Segment};

use crate::boundary::{Handle, Out, boundary, enter, into_raw, slice, take};
use crate::node::kvf_node;
use crate::status::kvf_status;

/// One part of every block, such as one layer's: of block b the `len` bytes at `offset` + b * `stride`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_segment {
    /// The kvf_region_id of a region of the node's agent.
    pub region: u64,
    /// Where block 0 has this part, in bytes from the region's start.
    pub offset: u64,
    /// Bytes from one block's part to the next one's; at least `len`.
    pub stride: u64,
    /// Bytes of the part.
    pub len: u64,
}

/// An engine's paged memory. Its regions must stay registered as long as blocks in it are stored or fetched.
pub struct kvf_pages {
    node: Arc<AttachedNode>,
    pub(crate) pages: Pages,
}

impl Handle for kvf_pages {
    const NAME: &'static str = "pages";

    fn life(&self) -> &Arc<Life> {
        self.node.life()
    }
}

impl kvf_pages {
    /// Whether this node has made them.
    pub(crate) fn is_of(&self, node: &kvf_node) -> bool {
        Arc::ptr_eq(&self.node, &node.node)
    }
}

/// Describes memory that holds `blocks` blocks, numbered from 0, each made of these `count` segments in order.
///
/// KVF_INVALID when the segments do not add up to the configured block, or do not lie in their regions; KVF_NOT_FOUND for
/// an unknown region.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `segments` for `count` reads, `pages_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_pages_create(
    node: *const kvf_node,
    segments: *const kvf_segment,
    count: usize,
    blocks: u32,
    pages_out: *mut *mut kvf_pages,
) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        // SAFETY: null or readable for `count` values, by contract.
        let segments = unsafe { slice(segments, count, "segments") }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(pages_out, "pages_out") }?;
        let parse = |segment: &kvf_segment| Segment {
            region: RegionId(segment.region),
            offset: segment.offset,
            stride: segment.stride,
            len: segment.len,
        };
        let segments = segments.iter().map(parse).collect();
        let pages = node.node.node().pages(segments, blocks)?;
        let node = node.node.clone();
        out.write(into_raw(kvf_pages { node, pages }));
        Ok(())
    })
}

/// Gives pages back. Stores and fetches in progress go on.
///
/// # Safety
/// `pages` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_pages_free(pages: *mut kvf_pages) -> kvf_status {
    boundary(|| take(pages, "pages", |_| Ok(())))
}
