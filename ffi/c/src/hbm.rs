//! A node's HBM tier: slots in memory of a GPU, before its other tiers.

use kvfabric::transfer::DeviceMemory;
use kvfabric::{Pages, Prefix};

use crate::begin::{Run, with_prefix, with_run};
use crate::blocks::{FETCH_DEADLINE_MS, STORE_DEADLINE_MS, or_default};
use crate::boundary::{boundary, enter, milliseconds};
use crate::node::{SHUTDOWN_GRACE, kvf_node};
use crate::options::{OutSized, SizePrefixed};
use crate::pages::kvf_pages;
use crate::prefix::kvf_prefix;
use crate::status::kvf_status;
use crate::task::{Work, kvf_task, outcome};

/// What became of a promotion.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_promote_report {
    /// sizeof(struct kvf_promote_report), set by the caller.
    pub size: usize,
    /// Blocks that came up.
    pub promoted: u32,
    /// Blocks that were up already.
    pub already_held: u32,
    /// Blocks that could not be had in time, or that came after one that could not.
    pub missed: u32,
    /// Blocks for which there was no slot.
    pub refused: u32,
    /// Blocks whose copy failed.
    pub failed: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_promote_report {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_promote_report";
}

/// Opens a node's HBM tier in `len` bytes of memory of the GPU with number `device`: at `address`, where the caller has allocated it, or
/// allocated for this with `address` 0. Its content is lost, and it is the node's until kvf_node_hbm_close has answered KVF_OK, or for
/// ever. From then on kvf_node_fetch looks there first, and the index is told of what is there. The setting hbm.bytes of the node's
/// configuration does the same when the node is opened.
///
/// KVF_BUSY when the node has one; KVF_UNSUPPORTED without the setting fabric.cuda and without CUDA; KVF_INVALID for less than a block,
/// and as kvf_region_register_device; KVF_BUSY also when the device has no memory left.
///
/// # Safety
/// `node` is null or live. The device's memory is kept as said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_hbm_open(
    node: *const kvf_node,
    device: u32,
    address: u64,
    len: u64,
) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        let memory = match address {
            0 => DeviceMemory::allocate(device, len)?,
            // SAFETY: stays as it is until the tier is closed, by contract.
            address => unsafe { DeviceMemory::from_raw(device, address, len) }?,
        };
        node.node.open_hbm(memory)
    })
}

/// Begins to bring `count` blocks of a prefix, from position `first` on, up into the HBM tier, from wherever they are. Those that
/// nobody has wanted for the longest time make room, and go down into the other tiers if those do not have them. What has not come
/// after `deadline_ms` (0: 5 seconds) is missed.
///
/// KVF_INVALID for blocks outside the prefix. KVF_UNSUPPORTED, by the task, without an HBM tier; KVF_BUSY, too, when too much is in
/// progress. See kvf_task_promote_report.
///
/// # Safety
/// Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_hbm_promote(
    node: *const kvf_node,
    prefix: *const kvf_prefix,
    first: usize,
    count: usize,
    deadline_ms: u32,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        let deadline = milliseconds(or_default(deadline_ms, FETCH_DEADLINE_MS));
        let begin = |node: &kvf_node, prefix: &Prefix| {
            let operation = node.node.promote(prefix, first, count, deadline)?;
            Ok(Work::Promote(operation))
        };
        // SAFETY: null or valid, by contract.
        unsafe { with_prefix(node, prefix, task_out, begin) }
    })
}

/// Begins to copy `count` blocks of a prefix into the HBM tier within the GPU; otherwise as kvf_node_store. The other tiers get a block
/// when it leaves its slot. Where the GPU does not compute checksums, and for other memory, blocks are stored in the other tiers and
/// promoted. KVF_UNSUPPORTED, by the task, without an HBM tier. Its report is kvf_task_store_report.
///
/// # Safety
/// As kvf_node_store.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_hbm_store(
    node: *const kvf_node,
    prefix: *const kvf_prefix,
    first: usize,
    pages: *const kvf_pages,
    blocks: *const u32,
    count: usize,
    deadline_ms: u32,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        let deadline = milliseconds(or_default(deadline_ms, STORE_DEADLINE_MS));
        let run = Run {
            prefix,
            pages,
            blocks,
            count,
        };
        let begin = |node: &kvf_node, prefix: &Prefix, pages: &Pages, blocks: &[u32]| {
            let operation = node
                .node
                .store_hbm(prefix, first, pages, blocks, deadline)?;
            Ok(Work::Store(operation))
        };
        // SAFETY: null or valid, by contract.
        unsafe { with_run(node, run, task_out, begin) }
    })
}

/// Begins to take `count` blocks of a prefix, from position `first` on, out of the HBM tier, down into the other tiers; those that are not
/// up are passed over, and those that find no room after `deadline_ms` (0: 30 seconds) stay up. KVF_INVALID for blocks outside the prefix;
/// KVF_UNSUPPORTED, by the task, without an HBM tier. Its report is kvf_task_store_report.
///
/// # Safety
/// Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_hbm_offload(
    node: *const kvf_node,
    prefix: *const kvf_prefix,
    first: usize,
    count: usize,
    deadline_ms: u32,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        let deadline = milliseconds(or_default(deadline_ms, STORE_DEADLINE_MS));
        let begin = |node: &kvf_node, prefix: &Prefix| {
            let operation = node.node.offload(prefix, first, count, deadline)?;
            Ok(Work::Store(operation))
        };
        // SAFETY: null or valid, by contract.
        unsafe { with_prefix(node, prefix, task_out, begin) }
    })
}

/// Ends a node's HBM tier: what is only there is lost, and the index is told. After KVF_OK memory that was lent may be freed.
///
/// KVF_UNSUPPORTED without an HBM tier; KVF_TIMEOUT when something still uses the memory after `timeout_ms`: keep it, and call again.
///
/// # Safety
/// `node` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_hbm_close(node: *const kvf_node, timeout_ms: u32) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        let timeout = milliseconds(timeout_ms);
        match node.node.close_hbm(timeout).wait(timeout + SHUTDOWN_GRACE) {
            Some(ended) => ended.copied(),
            None => Err(kvfabric::Error::new(
                kvfabric::ErrorKind::Timeout,
                "the node does not answer",
            )),
        }
    })
}

/// The report of a kvf_node_hbm_promote; as kvf_task_store_report.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `report_out` for its size in reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_promote_report(
    task: *const kvf_task,
    report_out: *mut kvf_promote_report,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable for its size, by contract.
        let out = unsafe { OutSized::new(report_out) }?;
        let Work::Promote(operation) = &task.work else {
            return Err(task.other("promotion"));
        };
        let report = outcome(operation)?;
        out.write(kvf_promote_report {
            size: 0,
            promoted: report.promoted,
            already_held: report.already_held,
            missed: report.missed,
            refused: report.refused,
            failed: report.failed,
            reserved: 0,
        });
        Ok(())
    })
}
