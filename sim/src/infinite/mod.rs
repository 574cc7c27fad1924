//! What a cache without limits, shared by all, would hit: the judge of the real one.
//!
//! It keeps every block of every sequence in a tree of the tokens (or ids) themselves. No key, no hash chain and no code
//! of the cache under test is involved, so the two can only agree by both being right.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use crate::workload::{Prompt, Request};

/// Block accesses of one request, or of many, and how many of them were hits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accesses {
    /// Entries of the prompt's block list.
    pub accesses: u64,
    /// How many of them, from the first, were there already: the depth that a lookup should have found.
    pub hits: u64,
}

impl Accesses {
    /// Hits per access; 0 without any access.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        if self.accesses == 0 {
            0.0
        } else {
            self.hits as f64 / self.accesses as f64
        }
    }
}

/// A block's place in the tree: the sequence of blocks that leads to it.
type Node = u32;

/// The empty sequence.
const ROOT: Node = 0;

/// A cache that never forgets.
#[derive(Clone, Debug)]
pub struct InfiniteCache {
    block_tokens: u32,
    by_tokens: HashMap<(Node, Box<[u32]>), Node>,
    by_id: HashMap<(Node, u64), Node>,
    nodes: Node,
    total: Accesses,
}

impl InfiniteCache {
    /// An empty cache for blocks of so many tokens; a trace's ids are blocks whatever this says.
    ///
    /// # Panics
    /// If `block_tokens` is 0.
    #[must_use]
    pub fn new(block_tokens: u32) -> Self {
        assert!(block_tokens > 0, "a block has at least one token");
        Self {
            block_tokens,
            by_tokens: HashMap::new(),
            by_id: HashMap::new(),
            nodes: ROOT,
            total: Accesses::default(),
        }
    }

    /// Serves one request: counts its prompt, then keeps its blocks, those of its answer included.
    ///
    /// The answer of a trace's request is not kept: no prompt can contain it.
    pub fn observe(&mut self, request: &Request) -> Accesses {
        let counted = match &request.prompt {
            Prompt::Tokens(_) => self.observe_tokens(request),
            Prompt::Ids(ids) => self.observe_ids(ids),
        };
        self.total.accesses += counted.accesses;
        self.total.hits += counted.hits;
        counted
    }

    /// Everything observed so far.
    #[must_use]
    pub fn total(&self) -> Accesses {
        self.total
    }

    /// Different blocks kept.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.by_tokens.len() + self.by_id.len()
    }

    fn observe_tokens(&mut self, request: &Request) -> Accesses {
        let accesses = request.prompt_blocks(self.block_tokens) as u64;
        let reusable = request.reusable_blocks(self.block_tokens) as u64;
        let tokens = request.all_tokens();
        let (mut node, mut known) = (ROOT, 0);
        for block in tokens.chunks_exact(self.block_tokens as usize) {
            let before = self.nodes;
            node = *self
                .by_tokens
                .entry((node, block.into()))
                .or_insert_with(|| {
                    self.nodes += 1;
                    self.nodes
                });
            if self.nodes == before {
                known += 1;
            }
        }
        Accesses {
            accesses,
            hits: reusable.min(known),
        }
    }

    fn observe_ids(&mut self, ids: &[u64]) -> Accesses {
        let (mut node, mut hits) = (ROOT, 0);
        for id in ids {
            let before = self.nodes;
            node = *self.by_id.entry((node, *id)).or_insert_with(|| {
                self.nodes += 1;
                self.nodes
            });
            if self.nodes == before {
                hits += 1;
            }
        }
        Accesses {
            accesses: ids.len() as u64,
            hits,
        }
    }
}
