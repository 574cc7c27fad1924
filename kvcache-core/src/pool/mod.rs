//! A fixed number of slots, each for one block: vacant → filling → sealed → vacant.
//!
//! The states are types: a [`Slot`] is moved through [`Slots`] by value, so bytes can only be sealed once, and only by
//! who fills them. What outsiders hold is a [`HostSlot`](crate::place::HostSlot) or a pin: a number and a generation,
//! which says whether it still means the same bytes.

mod block_cache;
mod lease;
mod slot;
#[cfg(test)]
mod tests;

pub use block_cache::{Allocation, BlockCache};
pub use lease::Expiries;
pub use slot::{Filling, Quarantined, Sealed, Slot, Slots};
