//! What takes how much of the index.

use super::source::Source;
use super::tree::{Shared, Tree};
use super::{KvIndex, lock, read};

/// The bytes of an index by what they are for; together they are [`KvIndex::bytes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Keys and names of blocks, by position.
    pub columns: usize,
    /// From names (and from keys, while nodes are among the sources) to positions.
    pub names: usize,
    /// Headers of runs, and entries into them.
    pub runs: usize,
    /// Lists: interned sets of holders, and spans and segments that do not fit into headers.
    pub sets: usize,
    /// When runs were used and what follows them, for eviction.
    pub recency: usize,
    /// What sources keep apart, waiting blocks among it.
    pub sources: usize,
    /// Pods, roots, and what the writer keeps between events.
    pub rest: usize,
}

impl Parts {
    /// Each part by its name.
    #[must_use]
    pub const fn named(&self) -> [(&'static str, usize); 7] {
        [
            ("columns", self.columns),
            ("names", self.names),
            ("runs", self.runs),
            ("sets", self.sets),
            ("recency", self.recency),
            ("sources", self.sources),
            ("rest", self.rest),
        ]
    }
}

impl Tree {
    fn parts(&self, shared: &Shared) -> Parts {
        Parts {
            columns: self.segments.bytes() + shared.keys.bytes(),
            names: self.names_bytes(),
            runs: self.slots.bytes() + shared.runs.bytes() + shared.doors.bytes(),
            sets: self.lists.bytes() + self.sets.bytes() + shared.words.bytes(),
            recency: self.leaves_bytes() + shared.recency.bytes(),
            ..Parts::default()
        }
    }
}

impl KvIndex {
    /// What the index takes, by what for.
    #[must_use]
    pub fn parts(&self) -> Parts {
        let state = lock(&self.state);
        let sources: usize = state.sources.values().map(Source::bytes).sum();
        let all = sources + self.bytes_beside_sources(&state);
        let parts = state.writer.tree.parts(&read(&self.view).tree);
        let counted = parts.columns + parts.names + parts.runs + parts.sets + parts.recency;
        Parts {
            sources,
            rest: all - sources - counted,
            ..parts
        }
    }
}
