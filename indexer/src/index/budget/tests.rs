//! The bound, by histories that need several times as much. That only leaves go, and that what is left is answered
//! exactly, random histories say in `tests/property`.

use kvcache_core::EngineHash;
use kvcache_core::prefix::IndexScheme;

use super::super::ORPHAN_BLOCKS_MAX;
use super::super::answer::{Answer, Query};
use super::super::config::Applied;
use super::*;
use crate::adapter::{RemovedBlocks, StoredBlocks};
use crate::score::TierWeights;

const BLOCK_SIZE: u32 = 2;

fn config() -> IndexConfig {
    IndexConfig {
        scheme: IndexScheme::default(),
        model: String::new(),
        block_size: BLOCK_SIZE.try_into().unwrap(),
        weights: TierWeights::default(),
        orphan_blocks_max: ORPHAN_BLOCKS_MAX,
    }
}

fn bounded() -> KvIndex {
    KvIndex::bounded(config(), BYTES_MIN).unwrap()
}

fn add(index: &KvIndex, name: &str, kind: SourceKind) -> SourceId {
    let spec = SourceSpec {
        pod: kvcache_core::PodName::new(name).unwrap(),
        name: kind.name().to_owned(),
        kind,
        block_size: BLOCK_SIZE,
    };
    index.add_source(spec).unwrap()
}

/// `count` blocks of a prompt from its `first` on; the first block of all prompts of a hundred is the same.
fn blocks(prompt: u64, first: u64, count: u64) -> StoredBlocks {
    let name = |at: u64| match at {
        0 => EngineHash(prompt / 100 + 1),
        _ => EngineHash((prompt + 1) << 20 | at),
    };
    let tokens = |at: u64| match at {
        0 => [0, (prompt / 100) as u32],
        _ => [at as u32, prompt as u32],
    };
    StoredBlocks {
        hashes: (first..first + count).map(name).collect(),
        parent: first.checked_sub(1).map(name),
        tokens: (first..first + count).flat_map(tokens).collect(),
        block_size: BLOCK_SIZE,
        tier: Tier::Device,
        group: None,
        lora: None,
        cache_salt: None,
        identifiers: Vec::new(),
    }
}

fn store(index: &KvIndex, id: SourceId, blocks: StoredBlocks) -> Applied {
    index.apply(id, &SourceEvent::Stored(blocks)).unwrap()
}

fn remove(index: &KvIndex, id: SourceId, hashes: Vec<EngineHash>) -> Applied {
    let removed = RemovedBlocks {
        hashes,
        tier: Tier::Device,
        group: None,
    };
    index.apply(id, &SourceEvent::Removed(removed)).unwrap()
}

/// The depths of all pods that hold the beginning of a prompt.
fn depths(index: &KvIndex, prompt: u64, count: u64) -> Vec<u32> {
    let (mut keys, mut answer) = (Vec::new(), Answer::default());
    index.keys_of(None, None, &blocks(prompt, 0, count).tokens, &mut keys);
    index.lookup(&keys, &Query::default(), &mut answer);
    answer.pods.iter().map(|pod| pod.depth).collect()
}

fn assert_within(index: &KvIndex, what: &str) {
    let bytes = index.bytes();
    assert!(bytes <= BYTES_MIN, "{bytes} after {what}");
    let state = lock(&index.state);
    assert_eq!(index.bytes_counted(&state) as u64, bytes, "after {what}");
}

fn assert_bound(index: &KvIndex, what: &str) {
    assert_within(index, what);
    // Without what is still to be taken out.
    let Usage { bytes, .. } = index.usage();
    let parts: usize = index.parts().named().iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(parts as u64, bytes, "after {what}");
    let state = lock(&index.state);
    assert_eq!(index.bytes_counted(&state) as u64, bytes, "after {what}");
}

/// Chains of many lengths, each block a run, copies, several sources on one chain, blocks that wait, removals, sources that
/// end: the bound is looked at after every single call. Without evictions the same calls take several times as much.
#[test]
fn after_every_call_the_index_takes_at_most_its_bound() {
    let (bounded, free) = (bounded(), KvIndex::new(config()));
    let kinds = [SourceKind::Vllm, SourceKind::VllmFull, SourceKind::Sglang];
    let names = ["a", "b", "c"];
    let add_all = |index: &KvIndex| -> Vec<SourceId> {
        let sources = names.iter().zip(kinds);
        sources.map(|(name, kind)| add(index, name, kind)).collect()
    };
    let (ids, free_ids) = (add_all(&bounded), add_all(&free));
    for prompt in 0..40_000 {
        let place = (prompt % 3) as usize;
        let stored = match prompt % 7 {
            0 => blocks(prompt, 0, 1 + prompt % 90),
            // Nobody has told what comes before.
            1 if prompt % 2 == 0 => blocks(prompt, 3, 2),
            // What others have already, and then a second copy of it.
            2 => blocks(prompt - 2, 0, 1 + prompt % 90),
            _ => blocks(prompt, 0, 2),
        };
        store(&free, free_ids[place], stored.clone());
        let hashes = stored.hashes.clone();
        store(&bounded, ids[place], stored);
        assert_bound(&bounded, "a store");
        if prompt % 11 == 0 {
            remove(&bounded, ids[place], hashes);
            assert_bound(&bounded, "a removal");
        }
        if prompt % 9_000 == 8_999 {
            bounded.clear_source(ids[place]);
            assert_bound(&bounded, "a restart");
        }
    }
    let usage = bounded.usage();
    assert!(usage.evicted_blocks > 1000, "{usage:?}");
    assert!(usage.bytes > BYTES_MIN / 2, "{usage:?}");
    assert!(free.bytes() > BYTES_MIN * 9 / 8, "{}", free.bytes());
    for name in names {
        bounded.remove_pod(&kvcache_core::PodName::new(name).unwrap());
        assert_bound(&bounded, "a pod's end");
    }
    assert_eq!((bounded.entries(), bounded.blocks()), (0, 0));
}

/// Most of the bound is of a pod that goes, what another one holds is older; then the bound becomes half of what it was.
#[test]
fn what_a_pod_that_is_gone_held_goes_before_anything_else() {
    let index = KvIndex::bounded(config(), 2 * BYTES_MIN).unwrap();
    let [kept, gone] = ["kept", "gone"].map(|name| add(&index, name, SourceKind::Vllm));
    store(&index, kept, blocks(7_000_000, 0, 500));
    for prompt in 0..45_000 {
        store(&index, gone, blocks(prompt, 0, 2));
    }
    index.remove_source(gone);
    assert_eq!(index.entries(), 500);
    assert!(index.bytes() > BYTES_MIN, "{}", index.bytes());
    index.set_bytes_max(BYTES_MIN).unwrap();
    assert_within(&index, "a smaller bound");
    assert_eq!(index.usage().evicted_blocks, 0);
    assert_eq!(depths(&index, 7_000_000, 500), [500]);
}

/// Twenty prompts in their order; the older half is asked for before half of the blocks go.
#[test]
fn blocks_that_were_asked_for_outlive_newer_ones() {
    let index = bounded();
    let id = add(&index, "pod", SourceKind::Vllm);
    let prompts: Vec<u64> = (0..20).map(|prompt| prompt * 100).collect();
    for prompt in &prompts {
        store(&index, id, blocks(*prompt, 0, 16));
    }
    for prompt in &prompts[..10] {
        assert_eq!(depths(&index, *prompt, 16), [16]);
    }
    assert_eq!(index.evict(160), 160);
    for (place, prompt) in prompts.iter().enumerate() {
        let left: &[u32] = if place < 10 { &[16] } else { &[] };
        assert_eq!(depths(&index, *prompt, 16), left, "prompt {place}");
    }
    // Storing is a use too.
    store(&index, id, blocks(prompts[0], 16, 1));
    assert_eq!(index.evict(9 * 16), 144);
    assert_eq!(depths(&index, prompts[0], 17), [17]);
}

/// Five prompts that share their first block, which is the oldest of all; one block goes at a time.
#[test]
fn a_shared_beginning_goes_after_everything_that_follows_it() {
    let index = bounded();
    let id = add(&index, "pod", SourceKind::Vllm);
    for prompt in 0..5 {
        store(&index, id, blocks(prompt, 0, 4));
    }
    assert_eq!(index.blocks(), 16);
    let mut found: Vec<u32> = Vec::new();
    while index.blocks() > 0 {
        let before = index.blocks();
        assert_eq!(index.evict(1), 1);
        assert_eq!(index.blocks(), before - 1);
        let depths: Vec<u32> = (0..5)
            .map(|prompt| depths(&index, prompt, 4).first().copied().unwrap_or(0))
            .collect();
        // What a lookup reaches is all that there is: nothing is behind a hole.
        let tails: u32 = depths.iter().map(|depth| depth.saturating_sub(1)).sum();
        let heads = depths.iter().max().copied().unwrap_or(0).min(1);
        assert_eq!(u64::from(tails + heads), index.blocks(), "{depths:?}");
        found.push(tails + heads);
    }
    assert_eq!(found.len(), 16);
}

/// A block with two copies is evicted; then the engine takes both away, and stores it anew.
#[test]
fn removals_of_evicted_blocks_are_no_fault_and_storing_brings_them_back() {
    let index = bounded();
    let id = add(&index, "pod", SourceKind::Vllm);
    store(&index, id, blocks(0, 0, 3));
    store(&index, id, blocks(0, 0, 3));
    assert_eq!(index.evict(1), 1);
    assert_eq!(depths(&index, 0, 3), [2]);
    let last = blocks(0, 2, 1).hashes;
    let applied = remove(&index, id, last.clone());
    assert_eq!((applied.evicted_before, applied.unknown), (1, 0));
    let applied = remove(&index, id, last.clone());
    assert_eq!(
        (applied.evicted_before, applied.unknown),
        (0, 1),
        "one entry was evicted"
    );
    // One copy, so one removal takes it.
    store(&index, id, blocks(0, 2, 1));
    assert_eq!(depths(&index, 0, 3), [3]);
    assert_eq!(remove(&index, id, last).removed, 1);
    assert_eq!(depths(&index, 0, 3), [2]);
    // The block before goes too; what follows it waits until it is told anew.
    index.evict(1);
    let applied = store(&index, id, blocks(0, 2, 1));
    assert_eq!((applied.stored, applied.orphaned), (0, 1));
    assert_eq!(depths(&index, 0, 3), [1]);
    store(&index, id, blocks(0, 1, 1));
    assert_eq!(depths(&index, 0, 3), [3]);
}

/// An image of twice the bound, taken up piece by piece beside what is there.
#[test]
fn an_image_larger_than_the_bound_is_taken_up_within_it() {
    let free = KvIndex::new(config());
    let from = add(&free, "pod", SourceKind::Vllm);
    for prompt in 0..60_000 {
        store(&free, from, blocks(prompt, 0, 2));
    }
    let image = free.export(from).unwrap();
    assert!(free.bytes() > BYTES_MIN * 3 / 2, "{}", free.bytes());
    let index = bounded();
    let other = add(&index, "other", SourceKind::Vllm);
    for prompt in 0..10_000 {
        store(&index, other, blocks(1_000_000 + prompt, 0, 2));
    }
    let id = add(&index, "pod", SourceKind::Vllm);
    for piece in &image.pieces {
        index.import(id, piece).unwrap();
        assert_bound(&index, "a piece");
    }
    index.tidy();
    assert_bound(&index, "tidying");
    let usage = index.usage();
    assert!(usage.evicted_blocks > 0 && index.blocks() > 0, "{usage:?}");
    // It goes on as any source does.
    store(&index, id, blocks(7_000_000, 0, 5));
    assert_eq!(depths(&index, 7_000_000, 5), [5]);
}

/// Too little from the start, too little later, half of it later, and a bound for an index that has none.
#[test]
fn bounds_are_checked_and_may_change() {
    let refusal = KvIndex::bounded(config(), 4096).err().unwrap().to_string();
    assert!(
        refusal.contains("4096") && refusal.contains(&BYTES_MIN.to_string()),
        "{refusal}"
    );
    let index = KvIndex::bounded(config(), 2 * BYTES_MIN).unwrap();
    assert_eq!(
        index.set_bytes_max(0).unwrap_err().kind(),
        ErrorKind::Invalid
    );
    let id = add(&index, "pod", SourceKind::Vllm);
    for prompt in 0..45_000 {
        store(&index, id, blocks(prompt, 0, 2));
    }
    assert!(index.bytes() > BYTES_MIN, "{}", index.bytes());
    index.set_bytes_max(BYTES_MIN).unwrap();
    assert_bound(&index, "a smaller bound");
    assert_eq!(depths(&index, 44_999, 2), [2], "the newest is left");
    let refusal = KvIndex::new(config()).set_bytes_max(BYTES_MIN).unwrap_err();
    assert_eq!(refusal.kind(), ErrorKind::Unsupported);
}

/// An event of more blocks than the bound has room for.
#[test]
fn an_event_that_fits_nowhere_is_refused_by_name() {
    let index = bounded();
    let id = add(&index, "pod", SourceKind::Vllm);
    let refusal = index
        .apply(id, &SourceEvent::Stored(blocks(0, 0, 300_000)))
        .unwrap_err();
    assert_eq!(refusal.kind(), ErrorKind::Busy);
    assert!(refusal.to_string().contains("300000 blocks"), "{refusal}");
    assert_bound(&index, "a refusal");
    assert_eq!(index.usage().refused, 1);
}
