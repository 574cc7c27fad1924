use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// The obvious way: everything in one map, and a search for each victim.
#[derive(Debug, Default)]
struct Slow {
    blocks: BTreeMap<u8, SlowBlock>,
    clock: u64,
}

#[derive(Debug)]
struct SlowBlock {
    parent: Option<u8>,
    used: u64,
    is_pinned: bool,
}

impl Slow {
    fn victim(&self) -> Option<u8> {
        let has_child = |key: u8| self.blocks.values().any(|block| block.parent == Some(key));
        let free = self.blocks.iter().filter(|(_, block)| !block.is_pinned);
        free.min_by_key(|(key, block)| (has_child(**key), block.used))
            .map(|(key, _)| *key)
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

#[derive(Clone, Debug)]
enum Action {
    Insert { key: u8, parent: Option<u8> },
    Remove(u8),
    Touch(Vec<u8>),
    Pin(u8),
    Evict,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let key = || 0..12u8;
    let action = prop_oneof![
        6 => (key(), prop::option::of(key()))
            .prop_map(|(key, parent)| Action::Insert { key, parent }),
        1 => key().prop_map(Action::Remove),
        3 => prop::collection::vec(key(), 0..5).prop_map(Action::Touch),
        3 => key().prop_map(Action::Pin),
        3 => Just(Action::Evict),
    ];
    prop::collection::vec(action, 0..200)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Random histories, parents that are absent, come later or form rings among them.
    #[test]
    fn leaf_lru_names_the_victim_that_a_search_finds(actions in actions()) {
        let mut fast = LeafLru::new();
        let mut slow = Slow::default();
        for action in actions {
            match action {
                Action::Insert { key, parent } if !slow.blocks.contains_key(&key) => {
                    let parent = parent.filter(|parent| *parent != key);
                    let used = slow.tick();
                    slow.blocks.insert(key, SlowBlock { parent, used, is_pinned: false });
                    fast.insert(key, parent);
                }
                Action::Remove(key) if slow.blocks.remove(&key).is_some() => fast.remove(&key),
                Action::Touch(chain) => {
                    for key in chain.iter().rev() {
                        let used = slow.tick();
                        if let Some(block) = slow.blocks.get_mut(key) {
                            block.used = used;
                        }
                    }
                    fast.touch(&chain);
                }
                Action::Pin(key) => {
                    if let Some(block) = slow.blocks.get_mut(&key) {
                        block.is_pinned = !block.is_pinned;
                        if block.is_pinned { fast.pin(&key) } else { fast.unpin(&key) }
                    }
                }
                Action::Evict => {
                    if let Some(victim) = fast.victim() {
                        fast.remove(&victim);
                        slow.blocks.remove(&victim);
                    }
                }
                Action::Insert { .. } | Action::Remove(_) => {}
            }
            prop_assert_eq!(fast.victim(), slow.victim());
            let evictable = slow.blocks.values().filter(|block| !block.is_pinned).count();
            prop_assert_eq!(fast.evictable(), evictable);
        }
        for key in slow.blocks.keys() {
            fast.remove(key);
        }
        prop_assert!(fast.is_forgotten(), "parents are remembered for no child");
    }
}

#[test]
fn of_blocks_used_together_the_tail_goes_first() {
    let mut lru = LeafLru::new();
    for key in ["a", "b", "c"] {
        lru.insert(key, None);
    }
    lru.touch(&["a", "b", "c"]);
    let order: Vec<_> = std::iter::from_fn(|| {
        let victim = lru.victim()?;
        lru.remove(&victim);
        Some(victim)
    })
    .collect();
    assert_eq!(order, ["c", "b", "a"]);
}

#[test]
fn a_parent_goes_only_when_its_children_are_pinned() {
    let mut lru = LeafLru::new();
    lru.insert("parent", None);
    lru.insert("child", Some("parent"));
    assert_eq!(lru.victim(), Some("child"));
    lru.pin(&"child");
    assert_eq!(lru.victim(), Some("parent"));
    lru.pin(&"parent");
    assert_eq!(lru.victim(), None);
}

/// A hundred thousand blocks in one chain and as many in pairs: any scan per operation would not end in time.
#[test]
fn a_large_cache_is_emptied_leaf_by_leaf() {
    const BLOCKS: u32 = 100_000;
    let mut lru = LeafLru::new();
    for key in 0..BLOCKS {
        lru.insert(key, key.checked_sub(1));
        lru.insert(BLOCKS + key, (key % 2 == 1).then(|| BLOCKS + key - 1));
    }
    let mut last_of_chain = BLOCKS;
    let mut count = 0;
    while let Some(victim) = lru.victim() {
        if victim < BLOCKS {
            assert_eq!(victim + 1, last_of_chain);
            last_of_chain = victim;
        }
        lru.remove(&victim);
        count += 1;
    }
    assert_eq!(count, 2 * BLOCKS);
}
