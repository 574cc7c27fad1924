//! What one source says it holds, and where its blocks belong in the index: only the source's own events read this.

mod copies;
mod engine;
mod node;
mod orphans;
mod roots;

pub(super) use engine::EngineLedger;
pub(super) use node::NodeLedger;
pub(super) use roots::Keys;
