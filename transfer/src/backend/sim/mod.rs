//! The simulated fabric: faults that real hardware shows once a month, on demand and from a seed.
//!
//! [`Network`] carries datagrams between named nodes with latency, bandwidth, loss, reordering, repetition, corruption
//! and partitions; [`Exchange`] makes reliable one-sided transfers of them, as an RDMA queue pair does. Both are state
//! machines in virtual time, so that the cluster simulation drives them too. [`SimNetwork`] puts agents of this process
//! on such a network.

mod driver;
mod exchange;
mod fabric;
mod link;
mod network;
mod random;
mod running;
mod transfer;

pub use driver::SimNetwork;
pub use exchange::{CHUNKS_MAX, Exchange, TRANSFERS_MAX};
pub use link::{Chance, LinkProfile};
pub use network::{
    Arrival, DATAGRAMS_MAX, Delivery, NODES_MAX, Network, SimNode, TRACE_EVENTS_MAX, TraceEvent,
    TraceKind,
};
pub use transfer::{Direction, Effect, ExchangeConfig, SimTransfer, SimTransferId};
