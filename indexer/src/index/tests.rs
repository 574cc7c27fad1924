//! Tests of the index by hand-made histories; random ones are in `tests/property.rs`.

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

/// Three hundred pods share a beginning; each holds more of it than the one before.
#[test]
fn hundreds_of_pods_are_ranked_and_their_shared_blocks_cost_little() {
    let index = index();
    const PODS: u32 = 300;
    const SHARED: u32 = 500;
    for number in 0..PODS {
        let id = add(&index, &format!("pod-{number:03}"), SourceKind::Vllm);
        store(&index, id, chain(1, SHARED + number));
    }
    let answer = ask(&index, &tokens(1, SHARED + PODS), None, None);
    assert_eq!(answer.pods.len(), PODS as usize);
    for (position, found) in answer.pods.iter().enumerate() {
        let number = PODS - 1 - position as u32;
        assert_eq!(found.depth, SHARED + number);
        assert_eq!(found.pod, pod(&format!("pod-{number:03}")));
    }
    let (mut keys, mut few) = (Vec::new(), Answer::default());
    index.keys_of(None, None, &tokens(1, SHARED + PODS), &mut keys);
    index.lookup(
        &keys,
        &Query {
            pods_max: 5,
            pods: &[],
        },
        &mut few,
    );
    assert_eq!(few.pods, answer.pods[..5]);
    // One set for the shared beginning and one for each further block but the last, whose holder is alone.
    assert_eq!(lock(&index.state).writer.tree.sets() as u32, PODS - 1);
    let (bytes, entries) = (index.bytes(), index.entries());
    assert!(bytes / entries < 56, "{bytes} bytes for {entries}");
}

/// Fills and empties an index, by removals and by taking the source away.
#[test]
fn memory_comes_back_when_blocks_go() {
    let index = index();
    let empty = index.bytes();
    for by_events in [true, false] {
        let id = add(&index, "pod", SourceKind::Vllm);
        for prompt in 0..2000 {
            store(&index, id, chain(prompt, 64));
        }
        assert_eq!(index.entries(), 128_000);
        let full = index.bytes();
        assert!(full > empty + 128_000 * 20, "{full} bytes");
        if by_events {
            for prompt in 0..2000 {
                remove(&index, id, &chain(prompt, 64).hashes, Tier::Device);
            }
        }
        index.remove_source(id);
        assert_eq!((index.entries(), index.blocks()), (0, 0));
        assert!(
            index.bytes() < empty + (full - empty) / 4,
            "{} of {full}",
            index.bytes()
        );
    }
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

/// A source beside another one: names of its own, two copies, two tiers, holes, waiting blocks, a salted chain. Returns it,
/// its names of the first chain, and the salted one.
fn fill_for_image(first: &KvIndex) -> (SourceId, Vec<EngineHash>, StoredBlocks) {
    let (other, id) = (
        add(first, "other", SourceKind::Vllm),
        add(first, "pod", SourceKind::Vllm),
    );
    store(first, other, chain(1, 40));
    let mut renamed = chain(1, 30);
    renamed.hashes.iter_mut().for_each(|hash| hash.0 += 1 << 50);
    let hashes = renamed.hashes.clone();
    for _ in 0..2 {
        store(first, id, renamed.clone());
    }
    store(
        first,
        id,
        StoredBlocks {
            tier: Tier::Host,
            ..renamed.clone()
        },
    );
    remove(first, id, &hashes[10..12], Tier::Device);
    remove(first, id, &hashes[20..], Tier::Host);
    let mut waiting = chain(7, 3);
    waiting.hashes.remove(0);
    waiting.tokens.drain(..BLOCK_SIZE as usize);
    waiting.parent = Some(chain(7, 1).hashes[0]);
    assert_eq!(store(first, id, waiting).orphaned, 2);
    let mut salted = chain(2, 5000);
    salted.cache_salt = Some("tenant".to_owned());
    store(first, id, salted.clone());
    (id, hashes, salted)
}

/// What a source holds, under names of its own, twice, in two tiers and waiting, is written down and taken up elsewhere;
/// then both go on alike.
#[test]
fn a_source_taken_up_elsewhere_goes_on_alike() {
    let first = index();
    let (id, hashes, salted) = fill_for_image(&first);
    let second = index();
    let add_other = add(&second, "other", SourceKind::Vllm);
    store(&second, add_other, chain(1, 40));
    let image = first.export(id).unwrap();
    let sizes = image
        .pieces
        .iter()
        .map(|piece| piece.blocks.len() + piece.orphans.len());
    assert!(sizes.clone().all(|size| size <= IMAGE_BLOCKS_MAX) && sizes.count() == 2);
    let taken = second.add_source(image.spec.clone()).unwrap();
    second.follow_group(taken, image.group).unwrap();
    for piece in &image.pieces {
        second.import(taken, piece).unwrap();
    }
    second.tidy();
    let mut again = second.export(taken).unwrap();
    let orphans = |image: &mut SourceImage| {
        image
            .pieces
            .iter_mut()
            .for_each(|piece| piece.orphans.sort_by_key(|orphan| orphan.hash));
        let blocks = image.pieces.iter_mut().flat_map(|piece| &mut piece.blocks);
        let mut blocks: Vec<_> = blocks
            .map(|block| (block.hash, block.key, block.copies))
            .collect();
        blocks.sort_unstable();
        blocks
    };
    let mut image = image;
    assert_eq!(orphans(&mut image), orphans(&mut again));
    let mut next = chain(2, 5001);
    next.hashes.drain(..5000);
    next.tokens.drain(..5000 * BLOCK_SIZE as usize);
    next.parent = salted.hashes.last().copied();
    for (index, id) in [(&first, id), (&second, taken)] {
        store(index, id, next.clone());
        remove(index, id, &hashes[..10], Tier::Device);
        store(index, id, chain(7, 1));
        assert_eq!(index.orphans(id), 0);
    }
    assert_eq!(first.entries(), second.entries());
    for (prompt, salt) in [(1, None), (2, Some("tenant")), (7, None)] {
        let (one, two) = (
            ask(&first, &tokens(prompt, 5002), None, salt),
            ask(&second, &tokens(prompt, 5002), None, salt),
        );
        assert_eq!(one.pods, two.pods);
        assert!(!one.pods.is_empty());
    }
    for (index, id) in [(&first, id), (&second, taken)] {
        index.remove_source(id);
        assert_eq!(index.entries(), 40);
    }
}

/// A piece that points outside itself, one that is too long, and a block that waits with too few tokens.
#[test]
fn a_piece_that_contradicts_itself_is_refused_whole() {
    let index = index();
    let id = add(&index, "pod", SourceKind::Vllm);
    let block = ImageBlock {
        hash: EngineHash(1),
        key: IndexKey(1),
        follows: false,
        is_apart: false,
        namespace: Some(0),
        copies: [1, 0, 0, 0],
    };
    let orphan = ImageOrphan {
        hash: EngineHash(2),
        copies: [1, 0, 0, 0],
        content: Some(ImageContent {
            parent: EngineHash(1),
            tokens: vec![1],
            identifiers: vec![],
        }),
    };
    let outside = ImagePiece {
        blocks: vec![block],
        ..ImagePiece::default()
    };
    let long = ImagePiece {
        blocks: vec![
            ImageBlock {
                namespace: None,
                ..block
            };
            IMAGE_BLOCKS_MAX + 1
        ],
        ..ImagePiece::default()
    };
    let short = ImagePiece {
        orphans: vec![orphan],
        ..ImagePiece::default()
    };
    for (piece, named) in [(outside, "namespace"), (long, "4097"), (short, "tokens")] {
        let refusal = index.import(id, &piece).unwrap_err();
        assert!(refusal.context().contains(named), "{refusal}");
        assert_eq!(index.entries(), 0);
    }
}

/// Nodes tell blocks in an order that contradicts what an engine's tokens say; the engine's blocks are found all the same.
#[test]
fn a_told_order_that_is_wrong_hides_nothing() {
    let index = index();
    let liar = add(&index, "liar", SourceKind::Node);
    let honest = add(&index, "honest", SourceKind::Vllm);
    let mut keys = Vec::new();
    index.keys_of(None, None, &tokens(1, 6), &mut keys);
    let told = |order: &[usize]| StoredBlocks {
        hashes: order.iter().map(|at| EngineHash(keys[*at].0)).collect(),
        tokens: vec![],
        block_size: 0,
        tier: Tier::Host,
        ..chain(1, 1)
    };
    store(&index, liar, told(&[4, 1, 0, 5, 2]));
    store(&index, honest, chain(1, 6));
    let answer = ask(&index, &tokens(1, 6), None, None);
    let depths: Vec<_> = answer
        .pods
        .iter()
        .map(|pod| (pod.pod.as_str(), pod.depth))
        .collect();
    assert_eq!(depths, [("honest", 6), ("liar", 3)]);
    assert_eq!((index.blocks(), index.entries()), (6, 11));
    index.remove_pod(&pod("liar"));
    assert_eq!(depth(&index, &tokens(1, 6), None, None), 6);
    index.remove_pod(&pod("honest"));
    assert_eq!((index.blocks(), index.entries()), (0, 0));
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

/// Pods come, store beginnings of a few chains and go, while sources that went before are still taken out, a few blocks an
/// event; after every step every chain is asked for.
#[test]
fn a_pod_that_leaves_little_by_little_is_gone_at_once() {
    const PODS: usize = 4;
    const PROMPTS: u32 = 3;
    const LONGEST: u32 = 70;
    let index = index();
    let names: Vec<String> = (0..PODS).map(|number| format!("pod-{number}")).collect();
    let mut ids: Vec<Option<SourceId>> = vec![None; PODS];
    let mut held = [[0; PROMPTS as usize]; PODS];
    let keys: Vec<Vec<IndexKey>> = (0..PROMPTS)
        .map(|prompt| {
            let mut keys = Vec::new();
            index.keys_of(None, None, &tokens(prompt, LONGEST), &mut keys);
            keys
        })
        .collect();
    let (mut state, mut depths, mut waited) = (1_u64, Depths::default(), false);
    for step in 0..3000 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let choice = (state >> 33) as u32;
        let (number, prompt) = (choice as usize % PODS, choice / 7 % PROMPTS);
        if (choice / 64).is_multiple_of(8) {
            index.remove_pod(&pod(&names[number]));
            (ids[number], held[number]) = (None, [0; PROMPTS as usize]);
            assert_eq!(index.pod_number(&pod(&names[number])), None);
        } else {
            let id =
                *ids[number].get_or_insert_with(|| add(&index, &names[number], SourceKind::Sglang));
            let length = choice / 1024 % LONGEST + 1;
            store(&index, id, chain(prompt, length));
            let deepest = &mut held[number][prompt as usize];
            *deepest = length.max(*deepest);
        }
        waited |= lock(&index.state).leaving.len() > 1;
        let entries: u32 = held.iter().flatten().sum();
        assert_eq!(index.entries(), u64::from(entries), "step {step}");
        for (prompt, keys) in keys.iter().enumerate() {
            index.depths(keys, 0, &[], &mut depths);
            let mut found: Vec<_> = depths
                .pods
                .iter()
                .map(|found| (index.pod_name(found.pod).unwrap().to_string(), found.depth))
                .collect();
            found.sort_unstable();
            let wanted = (0..PODS).filter(|number| held[*number][prompt] > 0);
            let wanted: Vec<_> = wanted
                .map(|number| (names[number].clone(), held[number][prompt]))
                .collect();
            assert_eq!(found, wanted, "step {step}");
        }
    }
    assert!(waited, "no source was still leaving when another one left");
    let longest = |prompt: usize| held.iter().map(|held| held[prompt]).max().unwrap_or(0);
    let blocks: u32 = (0..PROMPTS as usize).map(longest).sum();
    assert_eq!(index.blocks(), u64::from(blocks));
    assert!(lock(&index.state).leaving.is_empty());
}
