//! librdmacm, found in the system when it is asked for: connections that are made by IP address, of queue pairs that stay ours.
//!
//! The kernel finds the way to an address (which port, which path record), takes requests in for those who listen, and carries
//! what both sides must know of each other's queue pairs. An [`Id`] stands for one such connection; it knows nothing of
//! memory and work. What happens to ids is told by [`Events`], which nothing here waits for without a deadline.

mod address;
mod events;
#[allow(
    missing_docs,
    non_camel_case_types,
    unreachable_pub,
    unused,
    clippy::all,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    reason = "as the header has it"
)]
mod ffi;
mod id;
mod library;

pub(crate) use address::local_addresses;
pub(crate) use events::{Event, Events, Happened};
pub(crate) use id::{Id, Param};
pub(crate) use library::available;
