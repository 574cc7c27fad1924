//! What is written is read back; what is changed on the way is read or refused.

use super::*;

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![
        Just(Tier::Device),
        Just(Tier::Host),
        Just(Tier::Disk),
        Just(Tier::Object)
    ]
}

fn node_event() -> impl Strategy<Value = NodeEvent> {
    // Few keys, so that neighbours often go on with each other.
    let key = || prop_oneof![4 => 1..6_u64, 1 => 1..=u64::MAX].prop_map(IndexKey);
    prop_oneof![
        6 => (key(), proptest::option::of(key()), tier())
            .prop_map(|(key, parent, tier)| NodeEvent::Stored { key, parent, tier }),
        4 => (key(), tier()).prop_map(|(key, tier)| NodeEvent::Removed { key, tier }),
        1 => Just(NodeEvent::Cleared),
    ]
}

fn engine_event() -> impl Strategy<Value = EngineEvent> {
    let hash = || (1..=u64::MAX).prop_map(EngineHash);
    let hashes = proptest::collection::vec(hash(), 1..40);
    prop_oneof![
        (
            hashes.clone(),
            proptest::option::of(hash()),
            1..5_u32,
            any::<u32>()
        )
            .prop_map(|(hashes, parent, block_size, seed)| {
                let tokens = (0..hashes.len() as u32 * block_size).map(|at| at.wrapping_mul(seed));
                let tokens = tokens.collect();
                EngineEvent::Stored {
                    hashes,
                    parent,
                    tokens,
                    block_size,
                    tier: Tier::Device,
                }
            }),
        (hashes, tier()).prop_map(|(hashes, tier)| EngineEvent::Removed { hashes, tier }),
        Just(EngineEvent::Cleared),
    ]
}

/// Node events block by block, however they were grouped on the wire.
fn flat(events: Vec<Result<SourceEvent>>) -> Vec<NodeEvent> {
    let mut flat = Vec::new();
    for event in events {
        match event.unwrap() {
            SourceEvent::Stored(blocks) => {
                let mut parent = blocks.parent.map(|hash| IndexKey(hash.0));
                for hash in blocks.hashes {
                    let key = IndexKey(hash.0);
                    flat.push(NodeEvent::Stored {
                        key,
                        parent,
                        tier: blocks.tier,
                    });
                    parent = Some(key);
                }
            }
            SourceEvent::Removed(blocks) => {
                flat.extend(blocks.hashes.into_iter().map(|hash| NodeEvent::Removed {
                    key: IndexKey(hash.0),
                    tier: blocks.tier,
                }));
            }
            SourceEvent::Cleared => flat.push(NodeEvent::Cleared),
        }
    }
    flat
}

/// A place, a byte, and whether it is changed, cut out or put in.
type Mutation = (proptest::sample::Index, u8, u8);

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    proptest::collection::vec(
        (any::<proptest::sample::Index>(), any::<u8>(), 0..3_u8),
        1..6,
    )
}

fn mutate(payload: &mut Vec<u8>, mutations: Vec<Mutation>) {
    for (place, byte, what) in mutations {
        let place = place.index(payload.len());
        match what {
            0 => payload[place] = byte,
            1 => drop(payload.remove(place)),
            _ => payload.insert(place, byte),
        }
    }
}

proptest! {
    /// What a node publishes arrives as it was meant, block by block and in order.
    #[test]
    fn node_batches_round_trip(events in proptest::collection::vec(node_event(), 0..60)) {
        let payload = encode_node_batch(7.25, &events);
        let batch = decode_batch(&payload, SourceKind::Node).unwrap();
        prop_assert_eq!((batch.timestamp, batch.rank), (7.25, Some(0)));
        prop_assert_eq!(flat(batch.events), events);
    }

    /// The same for engines' events; and `rmpv` reads the whole payload, so nothing is left over.
    #[test]
    fn engine_batches_round_trip(events in proptest::collection::vec(engine_event(), 0..20)) {
        let payload = encode_engine_batch(1.0, &events);
        let mut rest = payload.as_slice();
        rmpv::decode::read_value(&mut rest).unwrap();
        prop_assert!(rest.is_empty());
        let decoded: Vec<_> = decode(&payload, SourceKind::Vllm)
            .into_iter()
            .map(|event| match event.unwrap() {
                SourceEvent::Stored(StoredBlocks { hashes, parent, tokens, block_size, tier, .. }) => {
                    EngineEvent::Stored { hashes, parent, tokens, block_size, tier }
                }
                SourceEvent::Removed(RemovedBlocks { hashes, tier, .. }) => {
                    EngineEvent::Removed { hashes, tier }
                }
                SourceEvent::Cleared => EngineEvent::Cleared,
            })
            .collect();
        prop_assert_eq!(decoded, events);
    }

    /// Real topics with some bytes changed, and any text: what is read is written the same again.
    #[test]
    fn topics_are_read_as_they_are_written_or_refused(
        text in "(kv@)?[a-z@/:. é]{0,40}",
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
    ) {
        for mut topic in [text.into_bytes(), b"kv@10.0.0.1:8000@org/model@17".to_vec()] {
            for (place, value) in &changes {
                if !topic.is_empty() {
                    let place = place.index(topic.len());
                    topic[place] = *value;
                }
            }
            if let Ok(read) = Topic::parse(&topic, SourceKind::Vllm) {
                prop_assert_eq!(read.to_string().into_bytes(), topic.clone());
            }
            if let Ok(read) = Topic::parse(&topic, SourceKind::Node) {
                prop_assert_eq!(Topic::parse(read.to_string().as_bytes(), SourceKind::Node).unwrap(), read);
            }
        }
    }

    /// A node's batches with some bytes changed, cut out or doubled.
    #[test]
    fn mutated_batches_of_nodes_never_panic(
        events in proptest::collection::vec(node_event(), 1..20),
        mutations in mutations(),
    ) {
        let mut payload = encode_node_batch(7.25, &events);
        mutate(&mut payload, mutations);
        if let Ok(batch) = decode_batch(&payload, SourceKind::Node) {
            prop_assert!(batch.events.len() <= payload.len());
        }
    }

    /// Bytes of no meaning, read as every kind of source.
    #[test]
    fn random_bytes_are_refused_or_read_but_never_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        for kind in [SourceKind::Vllm, SourceKind::VllmFull, SourceKind::Sglang, SourceKind::Node] {
            // Whatever comes out, it came from no more bytes than there are.
            if let Ok(batch) = decode_batch(&bytes, kind) {
                prop_assert!(batch.events.len() <= bytes.len());
            }
        }
    }

    /// Real encodings of every version with some bytes changed, cut out or doubled.
    #[test]
    fn mutated_real_payloads_never_panic(
        version in 0..7_usize,
        mutations in mutations(),
    ) {
        let text = include_str!("../../../../tests/golden/events/legacy_event_encodings.json");
        let versions: serde_json::Value = serde_json::from_str(text).unwrap();
        let hex = versions[version]["payload_hex"].as_str().unwrap();
        let mut payload: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect();
        mutate(&mut payload, mutations);
        for kind in [SourceKind::Vllm, SourceKind::Sglang, SourceKind::Node] {
            if let Ok(batch) = decode_batch(&payload, kind) {
                for event in batch.events.into_iter().flatten() {
                    if let SourceEvent::Stored(blocks) = event {
                        let whole = blocks.hashes.len() * blocks.block_size as usize;
                        prop_assert_eq!(blocks.tokens.len(), if blocks.tokens.is_empty() { 0 } else { whole });
                    }
                }
            }
        }
    }
}
