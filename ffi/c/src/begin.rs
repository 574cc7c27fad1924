//! How calls begin work on a node: what they have in common.

use kvfabric::{Error, ErrorKind, Pages, Prefix, Result};

use crate::boundary::{Entered, Out, enter, slice};
use crate::node::kvf_node;
use crate::pages::kvf_pages;
use crate::prefix::kvf_prefix;
use crate::task::{Work, kvf_task};

/// Begins work on a node.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `task_out` for a write.
pub(crate) unsafe fn with_node(
    node: *const kvf_node,
    task_out: *mut *mut kvf_task,
    begin: impl FnOnce(&kvf_node) -> Result<Work>,
) -> Result<()> {
    let node = enter(node, "node")?;
    // SAFETY: null or writable, by this function's contract.
    let out = unsafe { Out::new(task_out, "task_out") }?;
    let work = begin(&node)?;
    out.write(kvf_task::begin(node.node.life(), node.node.clone(), work));
    Ok(())
}

/// Begins work on a whole prefix.
///
/// # Safety
/// Each pointer is null or valid: `node` and `prefix` live, `task_out` for a write.
pub(crate) unsafe fn with_prefix(
    node: *const kvf_node,
    prefix: *const kvf_prefix,
    task_out: *mut *mut kvf_task,
    begin: impl FnOnce(&kvf_node, &Prefix) -> Result<Work>,
) -> Result<()> {
    let begin = |node: &kvf_node| {
        let prefix = enter_prefix(node, prefix)?;
        let prefix = prefix.lock();
        begin(node, &prefix)
    };
    // SAFETY: null or valid, by this function's contract.
    unsafe { with_node(node, task_out, begin) }
}

/// Blocks of a prefix, and where the engine has them.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    pub(crate) prefix: *const kvf_prefix,
    pub(crate) pages: *const kvf_pages,
    pub(crate) blocks: *const u32,
    pub(crate) count: usize,
}

/// Begins work on blocks in an engine's memory.
///
/// # Safety
/// Each pointer is null or valid: `node`, `run.prefix` and `run.pages` live, `run.blocks` for `run.count` reads, `task_out`
/// for a write.
pub(crate) unsafe fn with_run(
    node: *const kvf_node,
    run: Run,
    task_out: *mut *mut kvf_task,
    begin: impl FnOnce(&kvf_node, &Prefix, &Pages, &[u32]) -> Result<Work>,
) -> Result<()> {
    let begin = |node: &kvf_node| {
        let prefix = enter_prefix(node, run.prefix)?;
        let pages = enter(run.pages, "pages")?;
        if !pages.is_of(node) {
            return Err(of_another_node("the pages were made by another node"));
        }
        // SAFETY: null or readable for `count` values, by this function's contract.
        let blocks = unsafe { slice(run.blocks, run.count, "blocks") }?;
        let prefix = prefix.lock();
        begin(node, &prefix, &pages.pages, blocks)
    };
    // SAFETY: null or valid, by this function's contract.
    unsafe { with_node(node, task_out, begin) }
}

fn enter_prefix(node: &kvf_node, prefix: *const kvf_prefix) -> Result<Entered<kvf_prefix>> {
    let prefix = enter(prefix, "prefix")?;
    if prefix.is_of(node) {
        return Ok(prefix);
    }
    Err(of_another_node("the prefix was made by another node"))
}

fn of_another_node(text: &'static str) -> Error {
    Error::new(ErrorKind::Invalid, text)
}
