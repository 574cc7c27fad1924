//! UCX, found in the system when it is asked for: one worker and what belongs to it, behind safe functions.
//!
//! The calls are those of UCX 1.13; newer ones keep them. What UCX says by callback is kept until it is asked for, so
//! nothing of ours runs inside of its calls.

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
    pub(super) mod ucp;
}
mod heard;
mod library;
mod memory;
mod operations;
mod post;
mod transports;
mod worker;

pub(crate) use library::Library;
pub(crate) use memory::Granted;
pub(crate) use operations::{EndpointId, Event, Moving, Started};
pub(crate) use worker::Worker;
