//! The simulated fabric: faults that real hardware shows once a month, on demand and from a seed.
//!
//! [`Network`] carries datagrams between named nodes with latency, bandwidth, loss, reordering, repetition, corruption
//! and partitions; [`Exchange`] makes reliable one-sided transfers of them, as an RDMA queue pair does. Both are state
//! machines in virtual time, so that the cluster simulation drives them too. [`SimNetwork`] puts agents of this process
//! on such a network.

mod exchange;
mod fabric;
mod network;
mod random;

pub use exchange::{
    CHUNKS_MAX, Direction, Effect, Exchange, ExchangeConfig, SimTransfer, SimTransferId,
    TRANSFERS_MAX,
};
pub use fabric::SimNetwork;
pub use network::{
    Arrival, Chance, DATAGRAMS_MAX, Delivery, LinkProfile, NODES_MAX, Network, SimNode,
    TRACE_EVENTS_MAX, TraceEvent, TraceKind,
};
