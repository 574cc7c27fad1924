//! What tasks report when they are done.

use kvfabric::{Error, ErrorKind, Fetched, Result, Source};

use crate::boundary::{Listing, boundary, enter, milliseconds};
use crate::options::{OutSized, SizePrefixed};
use crate::status::kvf_status;
use crate::task::{Work, kvf_task, outcome};

/// Where a block came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum kvf_source {
    /// Nowhere in time: compute it. Its memory may have been written to.
    KVF_SOURCE_MISS = 0,
    /// The node's host memory.
    KVF_SOURCE_HOST = 1,
    /// The node's disk.
    KVF_SOURCE_DISK = 2,
    /// Another pod.
    KVF_SOURCE_PEER = 3,
    /// The shared object store.
    KVF_SOURCE_OBJECT = 4,
    /// A slot of the node's HBM tier.
    KVF_SOURCE_HBM = 5,
}

/// What became of a store.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_store_report {
    /// sizeof(struct kvf_store_report), set by the caller.
    pub size: usize,
    /// Blocks copied.
    pub stored: u32,
    /// Blocks that were there already.
    pub already_held: u32,
    /// Blocks for which there was no room in time.
    pub refused: u32,
    /// Blocks whose copy failed.
    pub failed: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_store_report {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_store_report";
}

/// What became of a fetch.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_fetch_report {
    /// sizeof(struct kvf_fetch_report), set by the caller.
    pub size: usize,
    /// Blocks that were asked for.
    pub blocks: u32,
    /// How many of those, from the first, were brought without a hole: only these are of use.
    pub depth: u32,
    /// Blocks whose memory may still be written to: see kvf_task_unsettled. Mostly 0.
    pub unsettled: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_fetch_report {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_fetch_report";
}

/// How much of a prefix a node has itself.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_held {
    /// sizeof(struct kvf_held), set by the caller.
    pub size: usize,
    /// Blocks from the first, without a hole, in host memory and on disk together.
    pub depth: u32,
    /// How many of those are in host memory.
    pub host: u32,
    /// How many of those are only on disk.
    pub disk: u32,
    /// Blocks from the first that are here or that stores under way are bringing; never less than `depth`. While it is more, a
    /// store is worth waiting for.
    pub expected: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_held {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_held";
}

/// The report of a kvf_node_store. KVF_BUSY while it is running, why it failed if it did, KVF_INVALID for another task; so
/// does every report.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `report_out` for its size in reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_store_report(
    task: *const kvf_task,
    report_out: *mut kvf_store_report,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable for its size, by contract.
        let out = unsafe { OutSized::new(report_out) }?;
        let Work::Store(operation) = &task.work else {
            return Err(task.other("store"));
        };
        let report = outcome(operation)?;
        out.write(kvf_store_report {
            size: 0,
            stored: report.stored,
            already_held: report.already_held,
            refused: report.refused,
            failed: report.failed,
        });
        Ok(())
    })
}

/// The report of a kvf_node_fetch; as kvf_task_store_report.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `report_out` for its size in reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_fetch_report(
    task: *const kvf_task,
    report_out: *mut kvf_fetch_report,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable for its size, by contract.
        let out = unsafe { OutSized::new(report_out) }?;
        let fetched = fetched(&task)?;
        out.write(kvf_fetch_report {
            size: 0,
            blocks: fetched.sources.len() as u32,
            depth: fetched.depth() as u32,
            unsettled: fetched.unsettled.len() as u32,
            reserved: 0,
        });
        Ok(())
    })
}

fn fetched(task: &kvf_task) -> Result<&Fetched> {
    match &task.work {
        Work::Fetch(operation) => outcome(operation),
        _ => Err(task.other("fetch")),
    }
}

/// Copies out where each block of a fetch came from, as kvf_source values, in the order of the blocks that were asked for.
///
/// With `sources` NULL only their number is told. KVF_INVALID when `capacity` is too small; `count_out` is written then too.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `sources` for `capacity` writes, `count_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_sources(
    task: *const kvf_task,
    sources: *mut u32,
    capacity: usize,
    count_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable, `sources` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(sources, capacity, count_out, "sources") }?;
        let sources: Vec<u32> = fetched(&task)?.sources.iter().map(source).collect();
        listing.fill(&sources, "sources")
    })
}

fn source(source: &Source) -> u32 {
    let source = match source {
        Source::Miss => kvf_source::KVF_SOURCE_MISS,
        Source::Host => kvf_source::KVF_SOURCE_HOST,
        Source::Disk => kvf_source::KVF_SOURCE_DISK,
        Source::Peer { .. } => kvf_source::KVF_SOURCE_PEER,
        Source::Object => kvf_source::KVF_SOURCE_OBJECT,
        Source::Device => kvf_source::KVF_SOURCE_HBM,
    };
    source as u32
}

/// Copies out which blocks of a fetch, by position among those asked for, have memory that a failed transfer may still write
/// to: do not use it before kvf_task_drain has answered KVF_OK. Arrays as in kvf_task_sources.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `positions` for `capacity` writes, `count_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_unsettled(
    task: *const kvf_task,
    positions: *mut u32,
    capacity: usize,
    count_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable, `positions` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(positions, capacity, count_out, "positions") }?;
        listing.fill(&fetched(&task)?.unsettled, "positions")
    })
}

/// Waits until no transfer can write to the memory of a fetch any more, at most `timeout_ms`.
///
/// KVF_TIMEOUT when some still may then; KVF_CANCELLED when that will not be known, because the node has ended: keep the
/// memory.
///
/// # Safety
/// `task` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_drain(task: *const kvf_task, timeout_ms: u32) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        match fetched(&task)?.drained.wait(milliseconds(timeout_ms)) {
            Some(Ok(true)) => Ok(()),
            Some(Ok(false)) => {
                let text = "the node ended before its transfers did";
                Err(Error::new(ErrorKind::Cancelled, text))
            }
            Some(Err(error)) => Err(error),
            None => {
                let text = format!("transfers are still in flight after {timeout_ms} ms");
                Err(Error::new(ErrorKind::Timeout, text))
            }
        }
    })
}

/// The answer of a kvf_node_held; as kvf_task_store_report.
///
/// # Safety
/// Each pointer is null or valid: `task` live, `held_out` for its size in reads and writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_task_held(
    task: *const kvf_task,
    held_out: *mut kvf_held,
) -> kvf_status {
    boundary(|| {
        let task = enter(task, "task")?;
        // SAFETY: null or writable for its size, by contract.
        let out = unsafe { OutSized::new(held_out) }?;
        let Work::Held(operation) = &task.work else {
            return Err(task.other("question what is held"));
        };
        let held = outcome(operation)?;
        out.write(kvf_held {
            size: 0,
            depth: held.depth,
            host: held.host,
            disk: held.disk,
            expected: held.expected,
        });
        Ok(())
    })
}
