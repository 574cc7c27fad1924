//! Nodes: the tiers of a pod, its fabric and its place in the index.

use std::ffi::c_char;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvfabric::life::Life;
use kvfabric::{AttachedNode, Error, ErrorKind, NodeConfig, Result};

use crate::agent::kvf_agent;
use crate::boundary::{
    Handle, Listing, Out, boundary, enter, fixed, into_raw, milliseconds, optional_text, slice,
    take, text,
};
use crate::options::{self, SizePrefixed};
use crate::status::kvf_status;

/// The node keeps to the time that it is given; this is how long its last steps may take beyond it.
pub(crate) const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// Bytes that the name of a counter has room for, with its terminating NUL.
pub const KVF_STAT_NAME_CAPACITY: usize = 56;

/// Keeps blocks in host memory, on disk and in a shared store, reads those of its peers, and tells the index.
pub struct kvf_node {
    pub(crate) node: Arc<AttachedNode>,
}

impl Handle for kvf_node {
    const NAME: &'static str = "node";

    fn life(&self) -> &Arc<Life> {
        self.node.life()
    }
}

/// One setting of a node's configuration, such as "host.bytes" = "1073741824", or of UCX.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_setting {
    /// The key as in the configuration file, with a dot between a table and its key; UCX has no tables.
    pub key: *const c_char,
    /// Its value, as text.
    pub value: *const c_char,
}

/// Where a node's configuration comes from: a text or a file, then variables KVFABRIC_NODE_..., then settings; the later
/// one wins.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_node_options {
    /// sizeof(struct kvf_node_options).
    pub size: usize,
    /// TOML with the keys of docs/configuration.md; NULL for none.
    pub toml: *const c_char,
    /// The path of such a file; NULL for none. Not both.
    pub file: *const c_char,
    /// What overrides everything else; NULL for nothing.
    pub settings: *const kvf_setting,
    /// How many.
    pub setting_count: usize,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_node_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_node_options";
}

/// Opens a node: takes its memory, recovers what its disk holds, serves its peers, and registers with the index if one is
/// configured. Blocks until then.
///
/// KVF_INVALID for a configuration that is not one, with the key; KVF_BUSY when another process uses its folder; what the
/// system or the index says otherwise.
///
/// # Safety
/// Each pointer is null or valid: `options` with its strings and settings for reads, `node_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_open(
    options: *const kvf_node_options,
    node_out: *mut *mut kvf_node,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read(options) }?;
        // SAFETY: its strings and settings are null or valid, by contract.
        let config = unsafe { parse_config(&options) }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(node_out, "node_out") }?;
        let node = Arc::new(AttachedNode::open(config)?);
        out.write(into_raw(kvf_node { node }));
        Ok(())
    })
}

/// # Safety
/// The strings and settings of `options` are null or valid.
unsafe fn parse_config(options: &kvf_node_options) -> Result<NodeConfig> {
    // SAFETY: null or a string, by this function's contract.
    let toml = unsafe { optional_text(options.toml, "kvf_node_options.toml") }?;
    // SAFETY: null or a string, by this function's contract.
    let file = unsafe { optional_text(options.file, "kvf_node_options.file") }?;
    let (count, place) = (options.setting_count, "kvf_node_options.settings");
    // SAFETY: null or readable for its count, by this function's contract.
    let settings = unsafe { slice(options.settings, count, place) }?;
    let mut overrides = Vec::with_capacity(settings.len());
    for (position, setting) in settings.iter().enumerate() {
        let at = |error: Error| error.at(format_args!("setting {position}"));
        // SAFETY: null or a string, by this function's contract.
        let key = unsafe { text(setting.key, "key") }.map_err(at)?;
        // SAFETY: null or a string, by this function's contract.
        let value = unsafe { text(setting.value, "value") }.map_err(at)?;
        overrides.push((key.to_owned(), value.to_owned()));
    }
    match (toml, file) {
        (Some(_), Some(_)) => {
            let text = "kvf_node_options has both a toml and a file";
            Err(Error::new(ErrorKind::Invalid, text))
        }
        (Some(toml), None) => NodeConfig::from_toml(toml, &overrides),
        (None, file) => NodeConfig::load(file.map(Path::new), &overrides),
    }
}

/// Ends a node in order, within about `timeout_ms`: it lends nothing more, withdraws what it told the index, and writes out
/// what is on its way to the disk. Later stores and fetches answer KVF_CANCELLED. The handle must still be freed.
///
/// KVF_TIMEOUT when not everything was written in time: it is lost, and nothing is wrong.
///
/// # Safety
/// `node` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_shutdown(node: *const kvf_node, timeout_ms: u32) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        let timeout = milliseconds(timeout_ms);
        let ending = node.node.shutdown(timeout);
        match ending.wait(timeout + SHUTDOWN_GRACE) {
            Some(ended) => ended.copied(),
            None => {
                let text = format!("the node has not ended after {timeout_ms} ms");
                Err(Error::new(ErrorKind::Timeout, text))
            }
        }
    })
}

/// Gives a node back. It ends when its agents, prefixes, pages and tasks are freed too; without kvf_node_shutdown before,
/// what is still on its way to the disk may be lost.
///
/// # Safety
/// `node` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_free(node: *mut kvf_node) -> kvf_status {
    boundary(|| take(node, "node", |_| Ok(())))
}

/// The node's agent: register the engine's memory with it. To be freed with kvf_agent_free.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `agent_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_agent(
    node: *const kvf_node,
    agent_out: *mut *mut kvf_agent,
) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(agent_out, "agent_out") }?;
        out.write(into_raw(kvf_agent::of_node(&node.node)));
        Ok(())
    })
}

/// Copies out where peers ask this node for blocks, "host:port"; empty if it serves none. Buffers as in kvf_peer_path.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `buffer` for `capacity` writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_peer_address(
    node: *const kvf_node,
    buffer: *mut c_char,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        let address = node.node.node().peer_address();
        let address = address.map_or_else(String::new, |address| address.to_string());
        listing.fill_text(&address, "peer address")
    })
}

/// A counter or a level of a node; docs/metrics.md says what each means.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_stat {
    /// Its name, with a terminating NUL.
    pub name: [c_char; KVF_STAT_NAME_CAPACITY],
    /// Its value.
    pub value: u64,
}

/// Copies out the node's counters and levels, always in the same order, waiting at most `timeout_ms`.
///
/// With `stats` NULL only their number is told. KVF_INVALID when `capacity` is too small; `count_out` is written then too.
///
/// # Safety
/// Each pointer is null or valid: `node` live, `stats` for `capacity` writes, `count_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_node_stats(
    node: *const kvf_node,
    timeout_ms: u32,
    stats: *mut kvf_stat,
    capacity: usize,
    count_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let node = enter(node, "node")?;
        // SAFETY: null or writable, `stats` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(stats, capacity, count_out, "stats") }?;
        let operation = node.node.stats();
        let entries = operation.wait(milliseconds(timeout_ms)).ok_or_else(|| {
            let text = format!("the node did not tell its counters within {timeout_ms} ms");
            Error::new(ErrorKind::Timeout, text)
        })??;
        let entries = entries.iter().map(|(name, value)| kvf_stat {
            name: fixed(name),
            value: *value,
        });
        listing.fill(&entries.collect::<Vec<_>>(), "counters")
    })
}
