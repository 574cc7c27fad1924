//! An index that grows in a row and then rests: what takes the fast ways is where it belongs, and memory comes back.
#![cfg(test)]

use kvcache_core::prefix::IndexScheme;
use kvcache_core::{EngineHash, IndexKey, PodName, Tier};
use kvfabric_indexer::adapter::{RemovedBlocks, SourceEvent, SourceKind, StoredBlocks};
use kvfabric_indexer::index::{
    Depths, IndexConfig, KvIndex, ORPHAN_BLOCKS_MAX, SourceId, SourceSpec,
};
use kvfabric_indexer::score::TierWeights;

/// Blocks of one token each.
fn index_with_a_source() -> (KvIndex, SourceId) {
    let index = KvIndex::new(IndexConfig {
        scheme: IndexScheme::default(),
        model: String::new(),
        block_size: 1.try_into().unwrap(),
        weights: TierWeights::default(),
        orphan_blocks_max: ORPHAN_BLOCKS_MAX,
    });
    let source = add_source(&index, "pod");
    (index, source)
}

fn add_source(index: &KvIndex, pod: &str) -> SourceId {
    index
        .add_source(SourceSpec {
            pod: PodName::new(pod).unwrap(),
            name: "engine".into(),
            kind: SourceKind::Vllm,
            block_size: 1,
        })
        .unwrap()
}

fn scrambled(number: u32) -> u64 {
    let word = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word ^ word >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

fn stored(names: &[u64], tokens: &[u32], parent: Option<u64>) -> SourceEvent {
    SourceEvent::Stored(StoredBlocks {
        hashes: names.iter().copied().map(EngineHash).collect(),
        parent: parent.map(EngineHash),
        tokens: tokens.to_vec(),
        block_size: 1,
        tier: Tier::Device,
        group: None,
        lora: None,
        cache_salt: None,
        identifiers: Vec::new(),
    })
}

fn depth(index: &KvIndex, tokens: &[u32]) -> u32 {
    let mut keys: Vec<IndexKey> = Vec::new();
    index.keys_of(None, None, tokens, &mut keys);
    let mut depths = Depths::default();
    index.depths(&keys, 0, &[], &mut depths);
    depths.pods.first().map_or(0, |pod| pod.depth)
}

/// Stores one long chain, and asks for prompts that leave it after each of its blocks.
#[test]
fn every_depth_of_a_long_chain_is_found() {
    const BLOCKS: u32 = 1500;
    let (index, source) = index_with_a_source();
    let tokens: Vec<u32> = (0..BLOCKS).collect();
    let names: Vec<u64> = (0..u64::from(BLOCKS)).map(|name| name << 32).collect();
    index.apply(source, &stored(&names, &tokens, None)).unwrap();
    for leaves in 0..=BLOCKS {
        let mut asked = tokens.clone();
        asked[leaves as usize..].fill(u32::MAX);
        assert_eq!(depth(&index, &asked), leaves);
        assert_eq!(depth(&index, &tokens[..leaves as usize]), leaves);
    }
}

/// A name that comes again for another block of the same event means the later one from then on.
#[test]
fn a_name_that_comes_twice_in_an_event_means_the_later_block() {
    let (index, source) = index_with_a_source();
    let event = stored(&[10, 20, 10, 30], &[1, 2, 3, 4], None);
    index.apply(source, &event).unwrap();
    assert_eq!(depth(&index, &[1, 2, 3, 4]), 4);
    let removed = SourceEvent::Removed(RemovedBlocks {
        hashes: vec![EngineHash(10)],
        tier: Tier::Device,
        group: None,
    });
    index.apply(source, &removed).unwrap();
    assert_eq!(depth(&index, &[1, 2, 3, 4]), 2);
}

/// Many blocks in a row, then nothing: after some calls that find nothing new the tables are as small as one call makes them.
#[test]
fn an_index_at_rest_gives_back_what_it_has_for_growing() {
    const CHAINS: u32 = 10_000;
    const BLOCKS: u32 = 100;
    let fill = || {
        let (index, source) = index_with_a_source();
        let events: Vec<_> = (0..CHAINS)
            .map(|chain| {
                let tokens: Vec<u32> = (0..BLOCKS).map(|block| chain << 8 | block).collect();
                let names: Vec<u64> = tokens.iter().map(|token| u64::from(*token)).collect();
                (source, stored(&names, &tokens, None))
            })
            .collect();
        index.apply_all(&events, |applied| {
            assert_eq!(applied.unwrap().stored, BLOCKS);
        });
        index
    };
    let (compacted, rested) = (fill(), fill());
    let growing = compacted.parts();
    compacted.compact();
    let compact = compacted.parts();
    assert!(
        compact.names * 100 < growing.names * 95,
        "{growing:?} {compact:?}"
    );
    // The first round looks, the second one finds that nothing came.
    for _ in 0..2 {
        while rested.tidy_some() {}
    }
    assert_eq!(rested.parts().names, compact.names);
    assert!(!rested.tidy_some(), "nothing is left to do");
    for chain in 0..CHAINS {
        let tokens: Vec<u32> = (0..BLOCKS).map(|block| chain << 8 | block).collect();
        assert_eq!(depth(&compacted, &tokens), BLOCKS);
        assert_eq!(depth(&rested, &tokens), BLOCKS);
    }
}

/// A million pairs at rest, each block one pod's and then four pods' together. Of ten million the first take 23.9 bytes each
/// and the others 6.6 (docs/benchmarks.md); of one million what comes in large pieces weighs more, 29.9 and 9.7. Where names go
/// is random, and now and then one more of those pieces is needed: so it is the least of some indexes.
#[test]
fn a_pair_takes_hardly_more_bytes_than_it_did_when_that_was_measured() {
    for (holders, chains, tenths_max) in [(1, 10_000, 305), (4, 2_500, 100)] {
        let indexes = (0..4).map(|_| index_of_pairs(holders, chains));
        let least = indexes.min_by_key(KvIndex::bytes).unwrap();
        let (bytes, pairs) = (least.bytes(), least.entries());
        assert!(
            bytes * 10 <= pairs * tenths_max,
            "{bytes} bytes for {pairs} pairs: {:?}",
            least.parts()
        );
    }
}

/// Chains that so many pods hold, at rest.
fn index_of_pairs(holders: u32, chains: u32) -> KvIndex {
    const BLOCKS: u32 = 96;
    let (index, first) = index_with_a_source();
    let others = (1..holders).map(|number| add_source(&index, &format!("pod-{number}")));
    let sources: Vec<_> = std::iter::once(first).chain(others).collect();
    for chain in 0..chains {
        let tokens: Vec<u32> = (0..BLOCKS).map(|block| chain << 8 | block).collect();
        // As engines name blocks: nothing of one name is in the next.
        let names: Vec<u64> = tokens.iter().copied().map(scrambled).collect();
        for source in &sources {
            let event = stored(&names, &tokens, None);
            index.apply(*source, &event).unwrap();
        }
    }
    index.compact();
    assert_eq!(index.entries(), u64::from(holders * chains * BLOCKS));
    index
}
