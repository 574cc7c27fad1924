//! libibverbs, found in the system when it is asked for: devices, memory, queue pairs, behind safe functions.
//!
//! What the headers have as inline functions (posting, polling) is called through the table of the context. Memory that
//! work was posted on is held by its queue pair until that work is over, or until there is no queue pair any more.

#[allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unused,
    clippy::all,
    clippy::missing_safety_doc,
    clippy::too_many_lines,
    clippy::multiple_unsafe_ops_per_block,
    clippy::undocumented_unsafe_blocks,
    reason = "generated from the headers"
)]
mod generated {
    pub(super) mod ibverbs;
}
pub(crate) mod cm;
mod connecting;
mod context;
mod device;
mod events;
mod facts;
mod library;
mod memory;
mod pair;
mod slots;
mod status;

pub(crate) use connecting::Reached;
pub(crate) use context::{Context, Limits, Port, device_names};
pub(crate) use device::takes_dma_bufs;
pub(crate) use events::{Channel, Notice};
pub(crate) use facts::{Gid, GidKind};
pub(crate) use memory::{Access, Domain, Memory};
pub(crate) use pair::{Depth, End, Far, Finished, Pair, PairSettings, Place, Work};
