//! Blocks of a prefix: stored, fetched, looked for.

use std::ffi::c_char;

use kvfabric::{Error, ErrorKind, Holder, Located, Pages, PodName, Prefix, Result};

use crate::begin::{Run, with_prefix, with_run};
use crate::boundary::{boundary, milliseconds, slice, text};
use crate::index::KVF_NAME_CAPACITY;
use crate::node::kvf_node;
use crate::options::{self, SizePrefixed};
use crate::pages::kvf_pages;
use crate::prefix::kvf_prefix;
use crate::status::kvf_status;
use crate::task::{Work, kvf_task};

/// The longest fetch that names no deadline, in milliseconds.
pub(crate) const FETCH_DEADLINE_MS: u32 = 5_000;
/// The longest store that names no deadline, in milliseconds.
pub(crate) const STORE_DEADLINE_MS: u32 = 30_000;

/// A pod that holds the first blocks of a prefix.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_holder {
    /// Its name, with a terminating NUL.
    pub pod: [c_char; KVF_NAME_CAPACITY],
    /// Where its peer service listens, "host:port"; empty if that is not known.
    pub peer_address: [c_char; KVF_NAME_CAPACITY],
    /// How many blocks, from the prefix's first, without a hole.
    pub depth: u32,
    /// Zero.
    pub reserved: u32,
}

/// Blocks of a prefix, by position.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_block_range {
    /// The first.
    pub start: u32,
    /// Behind the last.
    pub end: u32,
}

/// How a fetch is made. Without holders and shared ranges the index is asked, if there is one.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_fetch_options {
    /// sizeof(struct kvf_fetch_options).
    pub size: usize,
    /// Pods that are known to hold blocks; NULL for none.
    pub holders: *const kvf_holder,
    /// How many.
    pub holder_count: usize,
    /// Blocks that are known to be in the shared object store: ascending, apart from each other; NULL for none.
    pub shared: *const kvf_block_range,
    /// How many ranges.
    pub shared_count: usize,
    /// When what has not come is a miss; 0: after 5 seconds.
    pub deadline_ms: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_fetch_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_fetch_options";
}

/// Begins to store `count` blocks of a prefix, from position `first` on, which the engine has in `pages` under the numbers
/// `blocks`. That memory must stay as it is until the task is finished. What has found no room after `deadline_ms` (0: 30
/// seconds) is refused.
///
/// KVF_INVALID for blocks outside the prefix or the pages. KVF_BUSY, by the task, when too much is in progress.
///
/// # Safety
/// Each pointer is null or valid: `node`, `prefix` and `pages` live, `blocks` for `count` reads, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_store(
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
            let operation = node.node.store(prefix, first, pages, blocks, deadline)?;
            Ok(Work::Store(operation))
        };
        // SAFETY: null or valid, by contract.
        unsafe { with_run(node, run, task_out, begin) }
    })
}

/// Begins to fetch `count` blocks of a prefix, from position `first` on, into `pages` under the numbers `blocks`: from the HBM tier, if
/// there is one, and from wherever else they are. That memory is the node's until the task is finished, and that of kvf_task_unsettled blocks longer. `options` may be NULL.
///
/// As kvf_node_store. A block that cannot be had is a miss, not a failure.
///
/// # Safety
/// Each pointer is null or valid: `node`, `prefix` and `pages` live, `blocks` for `count` reads, `options` with its arrays
/// for reads, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_fetch(
    node: *const kvf_node,
    prefix: *const kvf_prefix,
    first: usize,
    pages: *const kvf_pages,
    blocks: *const u32,
    count: usize,
    options: *const kvf_fetch_options,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read_optional(options) }?;
        let (hints, deadline_ms) = match &options {
            None => (Located::default(), 0),
            // SAFETY: its arrays are null or readable, by contract.
            Some(options) => (unsafe { parse_hints(options) }?, options.deadline_ms),
        };
        let deadline = milliseconds(or_default(deadline_ms, FETCH_DEADLINE_MS));
        let run = Run {
            prefix,
            pages,
            blocks,
            count,
        };
        let begin = |node: &kvf_node, prefix: &Prefix, pages: &Pages, blocks: &[u32]| {
            let node = &node.node;
            let operation = node.fetch(prefix, first, pages, blocks, hints, deadline)?;
            Ok(Work::Fetch(operation))
        };
        // SAFETY: null or valid, by contract.
        unsafe { with_run(node, run, task_out, begin) }
    })
}

pub(crate) fn or_default(milliseconds: u32, default: u32) -> u32 {
    if milliseconds == 0 {
        default
    } else {
        milliseconds
    }
}

/// # Safety
/// The arrays of `options` are null or readable for their counts.
unsafe fn parse_hints(options: &kvf_fetch_options) -> Result<Located> {
    options::check_reserved(options.reserved, kvf_fetch_options::NAME)?;
    let (count, place) = (options.holder_count, "kvf_fetch_options.holders");
    // SAFETY: null or readable for its count, by this function's contract.
    let holders = unsafe { slice(options.holders, count, place) }?;
    let (count, place) = (options.shared_count, "kvf_fetch_options.shared");
    // SAFETY: null or readable for its count, by this function's contract.
    let shared = unsafe { slice(options.shared, count, place) }?;
    let holders = holders.iter().enumerate().map(|(position, holder)| {
        parse_holder(holder).map_err(|error| error.at(format_args!("holder {position}")))
    });
    Ok(Located {
        holders: holders.collect::<Result<_>>()?,
        shared: parse_shared(shared)?,
    })
}

fn parse_holder(holder: &kvf_holder) -> Result<Holder> {
    options::check_reserved(holder.reserved, "kvf_holder")?;
    let address = parse_fixed(&holder.peer_address, "peer_address")?;
    Ok(Holder {
        pod: PodName::new(parse_fixed(&holder.pod, "pod")?)?,
        depth: holder.depth,
        peer_address: (!address.is_empty()).then(|| address.to_owned()),
    })
}

/// The text in an array, which must have its NUL.
fn parse_fixed<'a>(array: &'a [c_char; KVF_NAME_CAPACITY], name: &str) -> Result<&'a str> {
    if !array.contains(&0) {
        let text = format!("{name} has no terminating NUL");
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    // SAFETY: a string, because there is a NUL within the array, which the reference keeps alive.
    unsafe { text(array.as_ptr(), name) }
}

fn parse_shared(shared: &[kvf_block_range]) -> Result<Vec<std::ops::Range<u32>>> {
    let mut end = 0;
    let mut ranges = Vec::with_capacity(shared.len());
    for (position, range) in shared.iter().enumerate() {
        let is_apart = position == 0 || range.start > end;
        if range.start >= range.end || !is_apart {
            let range = format!("{}..{}", range.start, range.end);
            let accepted = "ranges in order, apart from each other";
            let error = Error::invalid("range", range, accepted);
            return Err(error.at(format_args!("kvf_fetch_options.shared[{position}]")));
        }
        end = range.end;
        ranges.push(range.start..range.end);
    }
    Ok(ranges)
}

/// Begins to count how many blocks of a prefix this node's own tiers hold; see kvf_task_held. Does not count as a use.
///
/// # Safety
/// Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_held(
    node: *const kvf_node,
    prefix: *const kvf_prefix,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or valid, by contract.
        unsafe {
            with_prefix(node, prefix, task_out, |node, prefix| {
                Ok(Work::Held(node.node.held(prefix)))
            })
        }
    })
}
