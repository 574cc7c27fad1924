//! Which block should leave a full tier next.

use std::fmt;

mod lru;
#[cfg(test)]
mod tests;

pub use lru::LeafLru;

/// Chooses victims among the blocks of one tier.
///
/// It is told of every block that enters, is used, is pinned or leaves, and names the one that should leave next. It
/// never removes a block by itself: the owner of the tier does, and then says so. Keys must be resident when they are
/// named to anything but [`EvictionPolicy::insert`]; implementations assert it.
pub trait EvictionPolicy<K>: fmt::Debug + Send {
    /// A block entered the tier, after `parent` in its sequence; it counts as just used.
    fn insert(&mut self, key: K, parent: Option<K>);

    /// A block left the tier, or is on its way out and must not be chosen again.
    fn remove(&mut self, key: &K);

    /// These blocks of one sequence, in its order, were used together: among them the last is the first to go.
    ///
    /// Keys that are not resident are skipped.
    fn touch(&mut self, chain: &[K]);

    /// The block must stay until it is unpinned; a pin does not nest here, the tier counts.
    fn pin(&mut self, key: &K);

    /// The block may be chosen again.
    fn unpin(&mut self, key: &K);

    /// The block that should leave next; none when everything is pinned.
    fn victim(&self) -> Option<K>;

    /// How many blocks could be chosen now.
    fn evictable(&self) -> usize;
}
