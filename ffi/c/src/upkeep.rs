//! The rest of what a node can be asked: where blocks are, and to keep, drop or write them out.

use std::ffi::c_char;
use std::mem::offset_of;

use kvfabric::{PinId, Reach, Result};

use crate::begin::{with_node, with_prefix};
use crate::blocks::{kvf_block_range, kvf_holder};
use crate::boundary::{Listing, boundary, enter, fixed, milliseconds, slice, text};
use crate::node::kvf_node;
use crate::options::{self, OutSized, SizePrefixed};
use crate::prefix::kvf_prefix;
use crate::status::kvf_status;
use crate::task::{Work, kvf_task, outcome};

/// How much of a prefix can be had.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_reach {
    /// sizeof(struct kvf_reach), set by the caller.
    pub size: usize,
    /// Blocks from the first, from the node's own tiers, its peers and shared objects together.
    pub depth: u32,
    /// Blocks from the first that the node has itself.
    pub own: u32,
    /// How many of its own are in host memory.
    pub host: u32,
    /// How many of its own are only on disk.
    pub disk: u32,
    /// Other pods that hold blocks: see kvf_task_holders.
    pub holders: u32,
    /// Ranges of blocks in the shared object store: see kvf_task_shared.
    pub shared: u32,
    /// Blocks from the first that the node itself has or that stores under way are bringing; never less than `own`.
    pub expected: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_reach {
    const SIZE_MIN: usize = offset_of!(Self, expected);
    const NAME: &'static str = "kvf_reach";
}

/// What is kept.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_pin {
    /// sizeof(struct kvf_pin), set by the caller.
    pub size: usize,
    /// What kvf_node_release and kvf_node_unpin take; means something in this run of this node only.
    pub id: u64,
    /// How many blocks, from the first, are kept; with 0 there is nothing to let go of.
    pub depth: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_pin {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_pin";
}

/// What was dropped.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_removed {
    /// sizeof(struct kvf_removed), set by the caller.
    pub size: usize,
    /// Blocks that left host memory and disk.
    pub removed: u32,
    /// Blocks that stay: pinned, lent to peers, or on their way somewhere.
    pub kept: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_removed {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_removed";
}

/// Begins to find out how much of a prefix can be had, from the node's own tiers, its peers and shared objects together; see
/// kvf_task_reach. The index is asked if the node does not have all of it; no answer within `deadline_ms` counts as nobody.
///
/// # Safety
/// Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_locate(
    node: *const kvf_node,
    prefix: *const kvf_prefix,
    deadline_ms: u32,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        let deadline = milliseconds(deadline_ms);
        // SAFETY: null or valid, by contract.
        unsafe {
            with_prefix(node, prefix, task_out, |node, prefix| {
                Ok(Work::Locate(node.node.locate(prefix, deadline)))
            })
        }
    })
}

/// What is to be kept, and for how long.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_pin_options {
    /// sizeof(struct kvf_pin_options).
    pub size: usize,
    /// The position in the prefix of the first block.
    pub first: usize,
    /// The pin's number; NULL: the node draws one. Whoever is told it beforehand may let go of the blocks even before they
    /// are kept. Draw it at random, and use it once.
    pub id: *const u64,
    /// How long the blocks are kept.
    pub ttl_ms: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_pin_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_pin_options";
}

/// Begins to keep the blocks of a prefix in host memory, for a time or until kvf_node_release; see kvf_task_pin for how many are
/// kept.
///
/// KVF_INVALID for a position outside the prefix; by the task, for the number of a pin that is in force.
///
/// # Safety
/// Each pointer is null or valid: `node` and `prefix` live, `options` with its number for reads, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_pin(
    node: *const kvf_node,
    prefix: *const kvf_prefix,
    options: *const kvf_pin_options,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read(options) }?;
        options::check_reserved(options.reserved, kvf_pin_options::NAME)?;
        let ids = usize::from(!options.id.is_null());
        // SAFETY: null or readable, by contract.
        let id = unsafe { slice(options.id, ids, "kvf_pin_options.id") }?;
        let id = id.first().copied().map(PinId);
        let (first, ttl) = (options.first, milliseconds(options.ttl_ms));
        // SAFETY: null or valid, by contract.
        unsafe {
            with_prefix(node, prefix, task_out, |node, prefix| {
                Ok(Work::Pin(node.node.pin(prefix, first, ttl, id)?))
            })
        }
    })
}

/// Begins to drop the blocks of a prefix from host memory and disk; see kvf_task_removed. Shared objects stay.
///
/// # Safety
/// Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_remove(
    node: *const kvf_node,
    prefix: *const kvf_prefix,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or valid, by contract.
        unsafe {
            with_prefix(node, prefix, task_out, |node, prefix| {
                Ok(Work::Remove(node.node.remove(prefix)))
            })
        }
    })
}

/// Begins to let go of what kvf_node_pin has kept. A pin that has ended is no failure.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_release(
    node: *const kvf_node,
    pin: u64,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or valid, by contract.
        unsafe {
            with_node(node, task_out, |node| {
                Ok(Work::End(node.node.release(PinId(pin))))
            })
        }
    })
}

/// Begins to let go of what another node, whose peer service is at `peer_address`, has kept for this one.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `peer_address` a string, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_unpin(
    node: *const kvf_node,
    peer_address: *const c_char,
    pin: u64,
    deadline_ms: u32,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or a string, by contract.
        let address = unsafe { text(peer_address, "peer_address") }?;
        let (pin, deadline) = (PinId(pin), milliseconds(deadline_ms));
        let begin = |node: &kvf_node| Ok(Work::End(node.node.unpin(address, pin, deadline)));
        // SAFETY: null or valid, by contract.
        unsafe { with_node(node, task_out, begin) }
    })
}

/// Begins to drop everything from host memory and disk; see kvf_task_removed. Shared objects stay.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_clear(
    node: *const kvf_node,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or valid, by contract.
        unsafe { with_node(node, task_out, |node| Ok(Work::Remove(node.node.clear()))) }
    })
}

/// Begins to wait until all blocks that are on their way to disk or to the shared object store are there; the task fails with
/// KVF_TIMEOUT after `deadline_ms`.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_flush(
    node: *const kvf_node,
    deadline_ms: u32,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        let deadline = milliseconds(deadline_ms);
        // SAFETY: null or valid, by contract.
        unsafe {
            with_node(node, task_out, |node| {
                Ok(Work::End(node.node.flush(deadline)))
            })
        }
    })
}

fn reach(task: &kvf_task) -> Result<&Reach> {
    match &task.work {
        Work::Locate(operation) => outcome(operation),
        _ => Err(task.other("locate")),
    }
}

/// The answer of a kvf_node_locate; as kvf_task_store_report.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `reach_out` for its size in reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_reach(
    task: *const kvf_task,
    reach_out: *mut kvf_reach,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable for its size, by contract.
        let out = unsafe { OutSized::new(reach_out) }?;
        let reach = reach(&task)?;
        out.write(kvf_reach {
            size: 0,
            depth: reach.depth,
            own: reach.own.depth,
            host: reach.own.host,
            disk: reach.own.disk,
            holders: reach.located.holders.len() as u32,
            shared: reach.located.shared.len() as u32,
            expected: reach.own.expected,
            reserved: 0,
        });
        Ok(())
    })
}

/// Copies out the pods that a kvf_node_locate has found, deepest first: what kvf_fetch_options takes. Arrays as in
/// kvf_task_sources.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `holders` for `capacity` writes, `count_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_holders(
    task: *const kvf_task,
    holders: *mut kvf_holder,
    capacity: usize,
    count_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable, `holders` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(holders, capacity, count_out, "holders") }?;
        let holders = reach(&task)?
            .located
            .holders
            .iter()
            .map(|holder| kvf_holder {
                pod: fixed(holder.pod.as_str()),
                peer_address: fixed(holder.peer_address.as_deref().unwrap_or_default()),
                depth: holder.depth,
                reserved: 0,
            });
        listing.fill(&holders.collect::<Vec<_>>(), "holders")
    })
}

/// Copies out which blocks a kvf_node_locate has found in the shared object store. Arrays as in kvf_task_sources.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `ranges` for `capacity` writes, `count_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_shared(
    task: *const kvf_task,
    ranges: *mut kvf_block_range,
    capacity: usize,
    count_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable, `ranges` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(ranges, capacity, count_out, "ranges") }?;
        let shared = reach(&task)?.located.shared.iter();
        let ranges = shared.map(|range| kvf_block_range {
            start: range.start,
            end: range.end,
        });
        listing.fill(&ranges.collect::<Vec<_>>(), "ranges")
    })
}

/// What a kvf_node_pin keeps; as kvf_task_store_report.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `pin_out` for its size in reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_pin(task: *const kvf_task, pin_out: *mut kvf_pin) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable for its size, by contract.
        let out = unsafe { OutSized::new(pin_out) }?;
        let Work::Pin(operation) = &task.work else {
            return Err(task.other("pin"));
        };
        let pinned = outcome(operation)?;
        out.write(kvf_pin {
            size: 0,
            id: pinned.id.0,
            depth: pinned.depth,
            reserved: 0,
        });
        Ok(())
    })
}

/// What a kvf_node_remove or kvf_node_clear has dropped; as kvf_task_store_report.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `removed_out` for its size in reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_removed(
    task: *const kvf_task,
    removed_out: *mut kvf_removed,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable for its size, by contract.
        let out = unsafe { OutSized::new(removed_out) }?;
        let Work::Remove(operation) = &task.work else {
            return Err(task.other("removal"));
        };
        let removed = outcome(operation)?;
        out.write(kvf_removed {
            size: 0,
            removed: removed.removed,
            kept: removed.kept,
        });
        Ok(())
    })
}
