//! Tests of the index by hand-made histories; random ones are in `tests/property`.

mod amounts;
mod buried;
mod images;

use std::sync::atomic::{AtomicBool, Ordering};

use kvcache_core::prefix::IndexScheme;
use kvcache_core::{EngineHash, Tier};

use super::*;
use crate::adapter::{CacheGroup, GroupRule, RemovedBlocks, StoredBlocks};
use crate::score::TierWeights;

const BLOCK_SIZE: u32 = 2;

fn index() -> KvIndex {
    KvIndex::new(IndexConfig {
        scheme: IndexScheme::default(),
        model: String::new(),
        block_size: BLOCK_SIZE.try_into().unwrap(),
        weights: TierWeights::default(),
        orphan_blocks_max: ORPHAN_BLOCKS_MAX,
    })
}

fn pod(name: &str) -> PodName {
    PodName::new(name).unwrap()
}

fn add(index: &KvIndex, name: &str, kind: SourceKind) -> SourceId {
    let spec = SourceSpec {
        pod: pod(name),
        name: kind.name().to_owned(),
        kind,
        block_size: BLOCK_SIZE,
    };
    index.add_source(spec).unwrap()
}

/// `count` blocks from the start of the sequence that `prompt` names; their hashes tell both apart.
fn chain(prompt: u32, count: u32) -> StoredBlocks {
    StoredBlocks {
        hashes: (0..count)
            .map(|at| EngineHash(u64::from(prompt) << 32 | u64::from(at)))
            .collect(),
        parent: None,
        tokens: tokens(prompt, count),
        block_size: BLOCK_SIZE,
        tier: Tier::Device,
        group: None,
        lora: None,
        cache_salt: None,
        identifiers: Vec::new(),
    }
}

fn tokens(prompt: u32, blocks: u32) -> Vec<u32> {
    (0..blocks * BLOCK_SIZE)
        .map(|at| prompt * 1000 + at)
        .collect()
}

fn store(index: &KvIndex, id: SourceId, blocks: StoredBlocks) -> Applied {
    index.apply(id, &SourceEvent::Stored(blocks)).unwrap()
}

fn remove(index: &KvIndex, id: SourceId, hashes: &[EngineHash], tier: Tier) -> Applied {
    let blocks = RemovedBlocks {
        hashes: hashes.to_vec(),
        tier,
        group: None,
    };
    index.apply(id, &SourceEvent::Removed(blocks)).unwrap()
}

fn ask(index: &KvIndex, prompt: &[u32], lora: Option<&str>, salt: Option<&str>) -> Answer {
    let (mut keys, mut answer) = (Vec::new(), Answer::default());
    index.keys_of(lora, salt, prompt, &mut keys);
    index.lookup(&keys, &Query::default(), &mut answer);
    answer
}

/// The depth that a lookup finds, when one pod at most is found.
fn depth(index: &KvIndex, prompt: &[u32], lora: Option<&str>, salt: Option<&str>) -> u32 {
    let answer = ask(index, prompt, lora, salt);
    assert!(answer.pods.len() <= 1, "{answer:?}");
    answer.pods.first().map_or(0, |pod| pod.depth)
}

/// The same tokens under an adapter, under a salt, under both and plain; children do not repeat the salt.
#[test]
fn adapters_and_salts_share_nothing_with_each_other() {
    let index = index();
    let id = add(&index, "pod", SourceKind::Vllm);
    let names = [None, Some("name")];
    for (variant, (lora, salt)) in names
        .into_iter()
        .flat_map(|lora| names.map(|salt| (lora, salt)))
        .enumerate()
    {
        let mut first = chain(1, 1);
        first.hashes = vec![EngineHash(100 + variant as u64)];
        (first.lora, first.cache_salt) = (lora.map(str::to_owned), salt.map(str::to_owned));
        let mut second = chain(1, 2);
        second.hashes = vec![EngineHash(200 + variant as u64)];
        second.tokens.drain(..BLOCK_SIZE as usize);
        (second.parent, second.lora) = (Some(first.hashes[0]), first.lora.clone());
        let prompt = tokens(1, 3);
        assert_eq!(depth(&index, &prompt, lora, salt), 0, "{lora:?} {salt:?}");
        store(&index, id, first);
        store(&index, id, second);
        assert_eq!(depth(&index, &prompt, lora, salt), 2, "{lora:?} {salt:?}");
    }
    assert_eq!((index.entries(), index.blocks()), (8, 8));
}

/// Two images behind the same placeholder tokens.
#[test]
fn an_image_places_its_block_apart_from_the_bare_tokens() {
    let index = index();
    let id = add(&index, "pod", SourceKind::Vllm);
    let mut blocks = chain(1, 3);
    blocks.identifiers = vec![vec![], vec!["image".to_owned()], vec![]];
    store(&index, id, blocks);
    assert_eq!(
        depth(&index, &tokens(1, 3), None, None),
        1,
        "the image's block is another one"
    );
}

/// A salted block is offloaded: its host event has the hash only, and comes before, between and after.
#[test]
fn an_offloaded_block_is_placed_by_its_device_event_only() {
    let index = index();
    let id = add(&index, "pod", SourceKind::Vllm);
    let mut salted = chain(1, 2);
    salted.cache_salt = Some("tenant".to_owned());
    let hashes = salted.hashes.clone();
    let offloaded = |at: usize| {
        let mut blocks = chain(1, 1);
        (blocks.hashes, blocks.tokens, blocks.block_size) = (vec![hashes[at]], vec![], 0);
        blocks.tier = Tier::Host;
        blocks
    };
    assert_eq!(store(&index, id, offloaded(1)).orphaned, 1);
    assert_eq!((index.entries(), index.orphans(id)), (0, 1));
    store(&index, id, salted);
    store(&index, id, offloaded(0));
    assert_eq!((index.entries(), index.orphans(id)), (4, 0));
    index.apply(id, &SourceEvent::Cleared).unwrap();
    let prompt = tokens(1, 2);
    let answer = ask(&index, &prompt, None, Some("tenant"));
    assert_eq!(
        answer.pods[0].by_tier,
        [0, 2, 0, 0],
        "a clear empties the accelerator's cache only"
    );
    assert_eq!(
        depth(&index, &prompt, None, None),
        0,
        "nobody else finds the tenant's blocks"
    );
}

/// One node stores into the shared tier and dies; another deletes.
#[test]
fn a_shared_tier_outlives_the_pod_that_wrote_it() {
    let index = index();
    let (writer, deleter) = (
        add(&index, "writer", SourceKind::Node),
        add(&index, "deleter", SourceKind::Node),
    );
    let mut keys = Vec::new();
    index.keys_of(None, None, &tokens(1, 3), &mut keys);
    let mut blocks = chain(1, 3);
    blocks.hashes = keys.iter().map(|key| EngineHash(key.0)).collect();
    (blocks.tokens, blocks.block_size) = (vec![], 0);
    for tier in [Tier::Host, Tier::Object] {
        store(
            &index,
            writer,
            StoredBlocks {
                tier,
                ..blocks.clone()
            },
        );
    }
    let answer = ask(&index, &tokens(1, 3), None, None);
    assert_eq!(
        (answer.shared_depth, answer.pods[0].by_tier),
        (3, [0, 3, 0, 0])
    );
    index.apply(writer, &SourceEvent::Cleared).unwrap();
    index.remove_pod(&pod("writer"));
    let answer = ask(&index, &tokens(1, 3), None, None);
    assert_eq!(
        (answer.shared_depth, answer.pods.len(), index.entries()),
        (3, 0, 3)
    );
    assert_eq!(
        remove(&index, deleter, &blocks.hashes[1..2], Tier::Object).removed,
        1
    );
    assert_eq!(ask(&index, &tokens(1, 3), None, None).shared_depth, 1);
}

/// Blocks of a group without a rule come with the same hashes under another group's number.
#[test]
fn groups_that_need_nothing_neither_store_nor_remove() {
    let index = index();
    let id = add(&index, "pod", SourceKind::Vllm);
    let group = |number, rule| {
        Some(CacheGroup {
            number,
            rule,
            block_size: 4,
        })
    };
    let hashes = chain(1, 3).hashes;
    store(
        &index,
        id,
        StoredBlocks {
            group: group(1, GroupRule::Full),
            ..chain(1, 3)
        },
    );
    let applied = store(
        &index,
        id,
        StoredBlocks {
            group: group(0, GroupRule::Nothing),
            ..chain(1, 3)
        },
    );
    assert_eq!((applied.ignored, applied.stored), (3, 0));
    let window = RemovedBlocks {
        hashes,
        tier: Tier::Device,
        group: Some(0),
    };
    assert_eq!(
        index
            .apply(id, &SourceEvent::Removed(window))
            .unwrap()
            .ignored,
        3
    );
    assert_eq!(depth(&index, &tokens(1, 3), None, None), 3);
}

/// Two sources come and go and change while readers ask; a third one's answer must stand still.
#[test]
fn readers_beside_writers_see_whole_states() {
    const BLOCKS: u32 = 64;
    let index = index();
    let still = add(&index, "still", SourceKind::Vllm);
    store(&index, still, chain(1, BLOCKS));
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (index, is_done) = (&index, &is_done);
            scope.spawn(move || {
                let (mut keys, mut answer) = (Vec::new(), Answer::default());
                index.keys_of(None, None, &tokens(1, BLOCKS + reader), &mut keys);
                while !is_done.load(Ordering::Relaxed) {
                    index.lookup(&keys, &Query::default(), &mut answer);
                    let still = answer
                        .pods
                        .iter()
                        .find(|found| found.pod.as_str() == "still");
                    assert_eq!(still.unwrap().by_tier, [BLOCKS, 0, 0, 0]);
                    for found in &answer.pods {
                        assert_eq!(found.by_tier.iter().sum::<u32>(), found.depth);
                    }
                }
            });
        }
        let writers: Vec<_> = ["one", "two"]
            .map(|name| {
                let index = &index;
                scope.spawn(move || {
                    for round in 0..200 {
                        let id = add(index, name, SourceKind::Vllm);
                        store(index, id, chain(1, BLOCKS));
                        let hole = chain(1, BLOCKS).hashes[round as usize % BLOCKS as usize];
                        remove(index, id, &[hole], Tier::Device);
                        if round % 2 == 0 {
                            index.clear_source(id);
                        }
                        index.remove_pod(&pod(name));
                    }
                })
            })
            .into_iter()
            .collect();
        let outcomes: Vec<_> = writers
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        is_done.store(true, Ordering::Relaxed);
        assert!(outcomes.iter().all(Result::is_ok));
    });
    assert_eq!(
        (index.entries(), index.blocks()),
        (u64::from(BLOCKS), u64::from(BLOCKS))
    );
    assert_eq!(lock(&index.state).writer.tree.sets(), 0);
}

/// The id of a source that is gone, and a name that is taken.
#[test]
fn sources_are_refused_by_name_and_ids_are_never_reused() {
    let index = index();
    let id = add(&index, "pod", SourceKind::Vllm);
    let again = SourceSpec {
        pod: pod("pod"),
        name: SourceKind::Vllm.name().to_owned(),
        kind: SourceKind::Vllm,
        block_size: BLOCK_SIZE,
    };
    let refusal = index.add_source(again).unwrap_err();
    assert!(refusal.context().contains("pod"), "{refusal}");
    index.remove_source(id);
    let refusal = index.apply(id, &SourceEvent::Cleared).unwrap_err();
    assert_eq!(refusal.kind(), ErrorKind::NotFound);
    assert_ne!(add(&index, "pod", SourceKind::Vllm), id);
    index.clear_source(id);
}

/// Runs of many lengths that cross segments and end in each other; every depth of each is asked for, with and without
/// more behind.
#[test]
fn every_depth_of_long_runs_is_found() {
    const LONGEST: u32 = 5000;
    let index = index();
    let id = add(&index, "pod", SourceKind::Vllm);
    let lengths = [1, 15, 16, 17, 31, 193, 257, 288, 289, 1088, LONGEST];
    for (prompt, length) in lengths.into_iter().enumerate() {
        store(&index, id, chain(prompt as u32, length));
    }
    assert_eq!(index.entries(), u64::from(lengths.iter().sum::<u32>()));
    let mut depths = Depths::default();
    for (prompt, length) in lengths.into_iter().enumerate() {
        let (mut keys, mut other) = (Vec::new(), Vec::new());
        index.keys_of(None, None, &tokens(prompt as u32, length), &mut keys);
        index.keys_of(
            None,
            None,
            &tokens(prompt as u32 + 100, length + 40),
            &mut other,
        );
        let step = if length > 300 { 37 } else { 1 };
        for depth in (1..=length as usize).step_by(step).chain([length as usize]) {
            for more in [0, 1, 40] {
                let mut question = keys[..depth].to_vec();
                question.extend_from_slice(&other[depth..][..more.min(other.len() - depth)]);
                index.depths(&question, 0, &[], &mut depths);
                assert_eq!(
                    depths.pods[0].depth as usize, depth,
                    "of {length}, {more} behind"
                );
            }
        }
    }
}

/// A node that knows no tokens names blocks by hashes of whole prefixes, and is asked for any of them.
#[test]
fn a_block_that_a_node_tells_is_found_by_itself() {
    let index = index();
    let node = add(&index, "node", SourceKind::Node);
    let keys: Vec<_> = (1..=600).map(|key| IndexKey(key << 32)).collect();
    let hashes: Vec<_> = keys.iter().map(|key| EngineHash(key.0)).collect();
    let told = StoredBlocks {
        hashes: hashes.clone(),
        tokens: vec![],
        block_size: 0,
        tier: Tier::Host,
        ..chain(1, 1)
    };
    store(&index, node, told);
    let depth_from = |first: usize| {
        let mut answer = Answer::default();
        index.lookup(&keys[first..], &Query::default(), &mut answer);
        answer.pods.first().map_or(0, |pod| pod.depth as usize)
    };
    for first in 0..keys.len() {
        assert_eq!(depth_from(first), keys.len() - first);
    }
    remove(&index, node, &hashes[3..4], Tier::Host);
    remove(&index, node, &hashes[590..], Tier::Host);
    assert_eq!([2, 3, 4, 589, 590].map(depth_from), [1, 0, 586, 1, 0]);
    index.remove_pod(&pod("node"));
    assert_eq!((index.blocks(), index.entries(), depth_from(4)), (0, 0, 0));
}

/// Two engines mean different blocks by the same hash, and the same block by different ones.
#[test]
fn a_hash_means_what_its_own_source_says() {
    let index = index();
    let (one, two) = (
        add(&index, "one", SourceKind::Vllm),
        add(&index, "two", SourceKind::Vllm),
    );
    store(&index, one, chain(1, 20));
    let mut same_names = chain(2, 20);
    same_names.hashes = chain(1, 20).hashes;
    store(&index, two, same_names);
    let held = |prompt| {
        let answer = ask(&index, &tokens(prompt, 20), None, None);
        let held = answer
            .pods
            .iter()
            .map(|found| (found.pod.to_string(), found.depth));
        held.collect::<Vec<_>>()
    };
    assert_eq!(held(1), [("one".to_owned(), 20)]);
    assert_eq!(held(2), [("two".to_owned(), 20)]);
    assert_eq!(
        remove(&index, two, &chain(1, 20).hashes[5..], Tier::Device).removed,
        15
    );
    assert_eq!(held(1), [("one".to_owned(), 20)]);
    assert_eq!(held(2), [("two".to_owned(), 5)]);
    index.remove_source(one);
    assert_eq!(held(2), [("two".to_owned(), 5)]);
    let mut next = chain(2, 6);
    next.hashes = vec![EngineHash(99)];
    next.tokens.drain(..5 * BLOCK_SIZE as usize);
    next.parent = Some(chain(1, 5).hashes[4]);
    store(&index, two, next);
    assert_eq!(held(2), [("two".to_owned(), 6)]);
    index.remove_source(two);
    assert_eq!((index.blocks(), index.entries()), (0, 0));
}
