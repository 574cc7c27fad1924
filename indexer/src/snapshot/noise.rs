//! Images that say anything at all, taken up by an index.

use std::sync::Arc;

use kvcache_core::prefix::IndexScheme;
use kvcache_core::{IndexKey, PodName};
use proptest::prelude::*;
use proptest::sample::Index;
use prost::Message;

use super::tests::{TOKENS_PER_BLOCK, engine_image, node_image, shared};
use super::*;
use crate::index::{Answer, IndexConfig, KvIndex, ORPHAN_BLOCKS_MAX, Query, SourceId, SourceSpec};
use crate::score::TierWeights;

/// An index with one pod that has its blocks by events, and a source that takes up an image.
fn index(kind: wire::SourceKind) -> (Arc<KvIndex>, SourceId, SourceId) {
    let index = KvIndex::new(IndexConfig {
        scheme: IndexScheme::default(),
        model: "m".to_owned(),
        block_size: TOKENS_PER_BLOCK.try_into().unwrap(),
        weights: TierWeights::default(),
        orphan_blocks_max: ORPHAN_BLOCKS_MAX,
    });
    let add = |pod: &str, kind| {
        let spec = SourceSpec {
            pod: PodName::new(pod).unwrap(),
            name: "source".to_owned(),
            kind,
            block_size: TOKENS_PER_BLOCK,
        };
        index.add_source(spec).unwrap()
    };
    let (own, taken) = (add("own", wire::SourceKind::Node), add("taken", kind));
    index.import(own, &node_image()).unwrap();
    (Arc::new(index), own, taken)
}

fn depths(index: &KvIndex, keys: &[IndexKey]) -> Vec<(String, u32)> {
    let mut answer = Answer::default();
    index.lookup(keys, &Query::default(), &mut answer);
    let pods = answer.pods.iter();
    pods.map(|pod| (pod.pod.to_string(), pod.depth)).collect()
}

/// The bytes of an image with some changed, cut out or there again.
fn changed(mut bytes: Vec<u8>, changes: &[(Index, u8, u8)]) -> Vec<u8> {
    for (at, byte, what) in changes {
        if bytes.is_empty() {
            return vec![*byte];
        }
        let place = at.index(bytes.len());
        match what {
            0..5 => bytes[place] = *byte,
            5 => drop(bytes.remove(place)),
            6 => bytes.insert(place, *byte),
            _ => {
                let piece = bytes[place..].to_vec();
                bytes.splice(place..place, piece);
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Images of an engine, a node and shared tiers with some bytes changed, twice each: taken up or refused. What others
    /// hold is answered as before, what was taken up can be told on, and when the source goes nothing of it stays.
    #[test]
    fn whatever_an_image_says_costs_its_own_source_only(
        which in 0..3_usize,
        changes in prop::collection::vec((any::<Index>(), any::<u8>(), 0..8_u8), 1..6),
    ) {
        let kind = if which == 0 { wire::SourceKind::Vllm } else { wire::SourceKind::Node };
        let image = match which {
            0 => image_to_wire(&engine_image(), kind),
            1 => image_to_wire(&node_image(), kind),
            _ => shared_to_wire(&shared()),
        };
        let bytes = changed(image.encode_to_vec(), &changes);
        let Ok(image) = v1::SnapshotImage::decode(bytes.as_slice()) else {
            return Ok(());
        };
        let (index, own, taken) = index(kind);
        let (keys, empty) = ([IndexKey(21)], index.entries());
        if which == 2 {
            let Ok(blocks) = image::shared_from_wire(&image) else {
                return Ok(());
            };
            let _ = index.import_shared(&blocks);
            prop_assert!(index.entries() <= empty + blocks.len() as u64);
            prop_assert_eq!(depths(&index, &keys), [("own".to_owned(), 1)]);
            return Ok(());
        }
        let Ok(piece) = image::image_from_wire(image, kind, TOKENS_PER_BLOCK) else {
            return Ok(());
        };
        let told = piece.blocks.len() + piece.orphans.len();
        for _ in 0..2 {
            let _ = index.import(taken, &piece);
            prop_assert!(index.entries() <= empty + 4 * told as u64);
        }
        let found = depths(&index, &keys);
        prop_assert!(found.contains(&("own".to_owned(), 1)), "{found:?}");
        for block in &piece.blocks {
            depths(&index, &[block.key]);
        }
        let exported = index.export(taken);
        prop_assert!(exported.is_ok(), "{:?}", exported.err());
        prop_assert!(index.orphans(taken) <= piece.orphans.len() as u64);
        index.remove_source(taken);
        // What is in shared tiers outlives its source.
        let shared = piece.blocks.iter().filter(|block| block.copies[Tier::Object as usize] > 0);
        let shared = shared.count() as u64;
        prop_assert!(index.entries() <= empty + shared, "{} entries stay", index.entries());
        prop_assert_eq!(depths(&index, &keys), [("own".to_owned(), 1)]);
        index.remove_source(own);
    }
}
