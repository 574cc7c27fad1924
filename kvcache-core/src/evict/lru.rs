//! Least recently used, leaves first.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::hash::Hash;

use super::EvictionPolicy;
use crate::table::KeyMap;

/// Evicts the least recently used block that no resident block follows, so that what stays is always a prefix.
///
/// A block with a resident child is only chosen when nothing else can be. Every operation costs one or two hash
/// look-ups and O(log n) in the number of resident blocks.
#[derive(Debug)]
pub struct LeafLru<K> {
    nodes: KeyMap<K, Node<K>>,
    /// Unpinned resident blocks without resident children, oldest first; stamps are unique.
    leaves: BTreeMap<u64, K>,
    /// Unpinned resident blocks with resident children, oldest first.
    inner: BTreeMap<u64, K>,
    clock: u64,
}

/// What is known of a block: it is resident, or a resident block names it as its parent, or both.
#[derive(Debug)]
struct Node<K> {
    parent: Option<K>,
    /// Resident blocks that name this one as their parent.
    children: u32,
    stamp: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Absent,
    Evictable,
    Pinned,
}

impl<K> Default for LeafLru<K> {
    fn default() -> Self {
        Self {
            nodes: KeyMap::default(),
            leaves: BTreeMap::new(),
            inner: BTreeMap::new(),
            clock: 0,
        }
    }
}

impl<K: Copy + Eq + Hash + Debug + Send> LeafLru<K> {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is remembered of any block.
    #[cfg(test)]
    pub(crate) fn is_forgotten(&self) -> bool {
        self.nodes.is_empty() && self.leaves.is_empty() && self.inner.is_empty()
    }

    /// Takes a block out of the order of victims; before anything that its place there depends on changes.
    fn unlist(&mut self, key: &K) {
        if let Some(node) = self.nodes.get(key)
            && node.state == State::Evictable
        {
            let list = if node.children == 0 {
                &mut self.leaves
            } else {
                &mut self.inner
            };
            let listed = list.remove(&node.stamp);
            assert!(listed == Some(*key), "{key:?} is evictable but not listed");
        }
    }

    /// Puts a block back into the order of victims, if it may be evicted.
    fn list(&mut self, key: &K) {
        if let Some(node) = self.nodes.get(key)
            && node.state == State::Evictable
        {
            let list = if node.children == 0 {
                &mut self.leaves
            } else {
                &mut self.inner
            };
            list.insert(node.stamp, *key);
        }
    }

    fn set_state(&mut self, key: &K, from: State, to: State) {
        self.unlist(key);
        let node = self.nodes.get_mut(key);
        assert!(
            node.as_ref().is_some_and(|node| node.state == from),
            "{key:?} should be {from:?} but is {:?}",
            node.map_or(State::Absent, |node| node.state)
        );
        if let Some(node) = node {
            node.state = to;
        }
        self.list(key);
    }

    /// One resident child more or less of a block that need not be resident itself.
    fn count_child(&mut self, parent: K, entered: bool) {
        self.unlist(&parent);
        let node = self.nodes.entry(parent).or_insert_with(Node::absent);
        if entered {
            node.children += 1;
        } else {
            assert!(
                node.children > 0,
                "{parent:?} lost a child that it did not have"
            );
            node.children -= 1;
        }
        if node.children == 0 && node.state == State::Absent {
            self.nodes.remove(&parent);
        } else {
            self.list(&parent);
        }
    }
}

impl<K> Node<K> {
    fn absent() -> Self {
        Self {
            parent: None,
            children: 0,
            stamp: 0,
            state: State::Absent,
        }
    }
}

impl<K: Copy + Eq + Hash + Debug + Send> EvictionPolicy<K> for LeafLru<K> {
    fn insert(&mut self, key: K, parent: Option<K>) {
        self.clock += 1;
        let stamp = self.clock;
        let node = self.nodes.entry(key).or_insert_with(Node::absent);
        assert!(node.state == State::Absent, "{key:?} entered twice");
        node.parent = parent;
        node.stamp = stamp;
        node.state = State::Evictable;
        self.list(&key);
        if let Some(parent) = parent {
            self.count_child(parent, true);
        }
    }

    fn remove(&mut self, key: &K) {
        self.unlist(key);
        let node = self.nodes.get_mut(key);
        assert!(
            node.as_ref()
                .is_some_and(|node| node.state != State::Absent),
            "{key:?} left without having entered"
        );
        let Some(node) = node else { return };
        node.state = State::Absent;
        let parent = node.parent.take();
        if node.children == 0 {
            self.nodes.remove(key);
        }
        if let Some(parent) = parent {
            self.count_child(parent, false);
        }
    }

    fn touch(&mut self, chain: &[K]) {
        // The tail gets the oldest stamp of the batch, so that among equals it goes first.
        for key in chain.iter().rev() {
            if self
                .nodes
                .get(key)
                .is_none_or(|node| node.state == State::Absent)
            {
                continue;
            }
            self.unlist(key);
            self.clock += 1;
            if let Some(node) = self.nodes.get_mut(key) {
                node.stamp = self.clock;
            }
            self.list(key);
        }
    }

    fn pin(&mut self, key: &K) {
        self.set_state(key, State::Evictable, State::Pinned);
    }

    fn unpin(&mut self, key: &K) {
        self.set_state(key, State::Pinned, State::Evictable);
    }

    fn victim(&self) -> Option<K> {
        self.leaves
            .values()
            .chain(self.inner.values())
            .next()
            .copied()
    }

    fn evictable(&self) -> usize {
        self.leaves.len() + self.inner.len()
    }
}
