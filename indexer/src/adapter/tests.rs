//! Tests of the wire format, with `rmpv` as the independent encoder.

mod noise;

use kvcache_core::event::{EngineEvent, NodeEvent};
use kvcache_core::{Epoch, ErrorKind, IndexKey, PodName};
use proptest::prelude::*;
use rmpv::Value;

use super::*;

fn pack(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).unwrap();
    bytes
}

fn list(values: impl IntoIterator<Item = Value>) -> Value {
    Value::Array(values.into_iter().collect())
}

fn map(fields: &[(&str, Value)]) -> Value {
    Value::Map(
        fields
            .iter()
            .map(|(name, value)| (Value::from(*name), value.clone()))
            .collect(),
    )
}

fn batch_of(events: Vec<Value>) -> Vec<u8> {
    pack(&list([Value::F64(2.5), Value::Array(events), Value::Nil]))
}

fn decode(payload: &[u8], kind: SourceKind) -> Vec<Result<SourceEvent>> {
    decode_batch(payload, kind).unwrap().events
}

/// The one event of a batch of one.
fn decode_one(event: Value, kind: SourceKind) -> Result<SourceEvent> {
    let mut events = decode(&batch_of(vec![event]), kind);
    assert_eq!(events.len(), 1);
    events.remove(0)
}

fn stored_map(extra: &[(&str, Value)]) -> Value {
    let mut fields = vec![
        ("type", Value::from("BlockStored")),
        ("block_hashes", list([Value::from(1_u64)])),
        ("parent_block_hash", Value::Nil),
        ("token_ids", list([5_u32, 6].map(Value::from))),
        ("block_size", Value::from(2)),
    ];
    fields.extend(extra.iter().cloned());
    map(&fields)
}

fn stored(event: Value, kind: SourceKind) -> StoredBlocks {
    match decode_one(event, kind).unwrap() {
        SourceEvent::Stored(blocks) => blocks,
        other => panic!("{other:?}"),
    }
}

/// Events that fail in every way stand between good ones.
#[test]
fn one_bad_event_never_costs_its_batch() {
    let good = || {
        list([
            Value::from("BlockRemoved"),
            list([Value::from(1)]),
            Value::from("GPU"),
        ])
    };
    let bad = [
        Value::from(7),
        list([]),
        list([
            Value::from("SomethingNew"),
            Value::from(1),
            list([Value::Nil]),
        ]),
        map(&[
            ("type", Value::from("SomethingNew")),
            ("x", list([Value::Nil])),
        ]),
        map(&[("block_hashes", list([]))]),
        list([Value::from("BlockRemoved"), Value::from("no list")]),
        list([Value::from("BlockRemoved"), list([Value::Nil])]),
        list([
            Value::from("BlockRemoved"),
            list([Value::from(1)]),
            Value::from("MOON"),
        ]),
        stored_map(&[("token_ids", list([Value::from(-1)]))]),
        stored_map(&[("token_ids", list([Value::from(1_u64 << 32)]))]),
        stored_map(&[("block_size", Value::from(3))]),
        stored_map(&[("extra_keys", list([Value::Nil, Value::Nil]))]),
        Value::Binary(pack(&Value::from(3))),
        Value::Binary(vec![0x92]),
        Value::Ext(1, vec![1, 2, 3]),
    ];
    let count = bad.len();
    let events = bad.into_iter().flat_map(|bad| [bad, good()]).collect();
    let events = decode(&batch_of(events), SourceKind::Vllm);
    assert_eq!(events.len(), 2 * count);
    for (position, pair) in events.chunks(2).enumerate() {
        let refusal = pair[0].as_ref().unwrap_err();
        assert!(
            refusal
                .context()
                .contains(&format!("event {}", 2 * position)),
            "{refusal}"
        );
        assert!(
            matches!(&pair[1], Ok(SourceEvent::Removed(_))),
            "after {refusal}"
        );
    }
    let unknown = events[4].as_ref().unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::Unsupported, "{unknown}");
    assert!(unknown.context().contains("SomethingNew"));
    assert!(events[14].as_ref().unwrap_err().context().contains("MOON"));
}

/// Two good events, then a cut at every byte: what was whole stays, and an error says that more was meant.
#[test]
fn a_payload_cut_short_keeps_the_events_before_the_cut() {
    let removed = |hash: u64| {
        list([
            Value::from("BlockRemoved"),
            list([Value::from(hash)]),
            Value::from("GPU"),
        ])
    };
    let whole = batch_of(vec![removed(1), removed(2)]);
    let second = whole.len() - 1 - pack(&removed(2)).len();
    for length in 0..whole.len() {
        match decode_batch(&whole[..length], SourceKind::Vllm) {
            Err(_) => assert!(length < second, "cut at {length}"),
            Ok(batch) => {
                let good = batch.events.iter().filter(|event| event.is_ok()).count();
                assert_eq!(
                    good,
                    usize::from(length >= second) + usize::from(length + 1 >= whole.len())
                );
                assert!(
                    good == 2 || batch.events.last().unwrap().is_err(),
                    "cut at {length}"
                );
            }
        }
    }
}

/// Lengths near 2^32 with nothing behind them, nesting without end, and counts over each limit.
#[test]
fn announced_sizes_are_not_believed() {
    for head in [
        [0xdd, 0xff],
        [0xdf, 0xff],
        [0xc6, 0xff],
        [0xdb, 0xff],
        [0xc9, 0xff],
    ] {
        let mut event = vec![0x93, 0xcb, 0, 0, 0, 0, 0, 0, 0, 0, 0x91];
        event.extend([head[0], head[1], 0xff, 0xff, 0xff, 0xc0]);
        let events = decode(&event, SourceKind::Vllm);
        assert!(events[0].is_err(), "{head:?}");
    }
    let mut deep = vec![0x93, 0xcb, 0, 0, 0, 0, 0, 0, 0, 0, 0x92];
    deep.extend([0x91; 100_000]);
    assert!(decode(&deep, SourceKind::Vllm)[0].is_err());

    let long = list(std::iter::repeat_n(Value::from(1), HASHES_MAX as usize + 1));
    let refusal = decode_one(list([Value::from("BlockRemoved"), long]), SourceKind::Vllm);
    assert!(refusal.unwrap_err().context().contains("131073"));

    let many = std::iter::repeat_n(
        list([Value::from("AllBlocksCleared")]),
        EVENTS_MAX as usize + 5,
    );
    let events = decode(&batch_of(many.collect()), SourceKind::Vllm);
    assert_eq!(events.len(), EVENTS_MAX as usize + 1);
    assert!(events.last().unwrap().is_err());

    let large = vec![0xc0; BATCH_BYTES_MAX + 1];
    assert_eq!(
        decode_batch(&large, SourceKind::Vllm).unwrap_err().kind(),
        ErrorKind::Invalid
    );
}

/// Every width an encoder may choose for one hash, by hand.
#[test]
fn hashes_of_any_width_and_sign_keep_their_bits() {
    for (encoded, bits) in [
        (&[0x05][..], 5),
        (&[0xff], u64::MAX),
        (&[0xcc, 0xc8], 200),
        (&[0xcd, 0x12, 0x34], 0x1234),
        (&[0xce, 0x80, 0, 0, 1], 0x8000_0001),
        (&[0xcf, 0xff, 0, 0, 0, 0, 0, 0, 1], 0xff00_0000_0000_0001),
        (&[0xd0, 0x80], -128_i64 as u64),
        (&[0xd1, 0xff, 0xfe], -2_i64 as u64),
        (&[0xd2, 0x80, 0, 0, 0], -0x8000_0000_i64 as u64),
        (&[0xd3, 0x80, 0, 0, 0, 0, 0, 0, 5], i64::MIN as u64 + 5),
        (&[0xc4, 2, 0x12, 0x34], 0x1234),
        (
            &[0xc4, 9, 0xaa, 1, 2, 3, 4, 5, 6, 7, 8],
            0x0102_0304_0506_0708,
        ),
    ] {
        let mut payload = vec![0x92, 0x01, 0x91, 0x92, 0xac];
        payload.extend(b"BlockRemoved");
        payload.push(0x91);
        payload.extend(encoded);
        let events = decode(&payload, SourceKind::Sglang);
        let Ok(SourceEvent::Removed(blocks)) = &events[0] else {
            panic!("{events:?}")
        };
        assert_eq!(blocks.hashes, [EngineHash(bits)], "{encoded:02x?}");
        assert_eq!(blocks.tier, Tier::Device);
    }
}

/// SGLang's own names and habits: signed hashes, pairs of tokens, a salt in a field, seven meaning something else.
#[test]
fn sglang_is_understood_in_its_own_terms() {
    let pairs = list([[8_u32, 9], [9, 10]].map(|pair| list(pair.map(Value::from))));
    let blocks = stored(
        map(&[
            ("type", Value::from("BlockStored")),
            ("block_hashes", list([Value::from(-5)])),
            ("parent_block_hash", Value::from(-6)),
            ("token_ids", pairs),
            ("block_size", Value::from(2)),
            ("lora_id", Value::Nil),
            ("medium", Value::from("CPU_PINNED")),
            ("cache_salt", Value::from("tenant")),
        ]),
        SourceKind::Sglang,
    );
    assert_eq!(
        (blocks.hashes[0].0 as i64, blocks.parent.unwrap().0 as i64),
        (-5, -6)
    );
    assert_eq!((blocks.tokens, blocks.tier), (vec![8, 9], Tier::Host));
    assert_eq!(blocks.cache_salt.as_deref(), Some("tenant"));

    let array = list([
        Value::from("BlockStored"),
        list([Value::from(1)]),
        Value::Nil,
        list([Value::from(3)]),
        Value::from(1),
        Value::Nil,
        Value::from("DISK"),
        map(&[("metadata", Value::Nil)]),
    ]);
    let blocks = stored(array, SourceKind::Sglang);
    assert_eq!((blocks.tier, blocks.lora), (Tier::Disk, None));
}

/// The adapter's name goes, images stay, the salt is the last bare string of a first block.
#[test]
fn extra_keys_are_sorted_into_adapter_images_and_salt() {
    let image = |name: &str, offset: i64| list([Value::from(name), Value::from(offset)]);
    let two_blocks = |first: Value, second: Value, parent: Value| {
        stored_map(&[
            ("block_hashes", list([1, 2].map(Value::from))),
            ("parent_block_hash", parent),
            ("token_ids", list([1, 2, 3, 4].map(Value::from))),
            ("lora_name", Value::from("adapter")),
            ("extra_keys", list([first, second])),
        ])
    };
    let first = list([Value::from("adapter"), image("one", 1), Value::from("salt")]);
    let second = list([Value::from("adapter"), image("one", -1), image("two", 1)]);
    let blocks = stored(
        two_blocks(first.clone(), second.clone(), Value::Nil),
        SourceKind::Vllm,
    );
    assert_eq!(blocks.lora.as_deref(), Some("adapter"));
    assert_eq!(blocks.cache_salt.as_deref(), Some("salt"));
    assert_eq!(blocks.identifiers, [vec!["one"], vec!["one", "two"]]);

    // In the middle of a sequence a bare string is an image of an older version.
    let blocks = stored(
        two_blocks(first, Value::Nil, Value::from(9)),
        SourceKind::Vllm,
    );
    assert_eq!(
        (blocks.cache_salt, blocks.parent),
        (None, Some(EngineHash(9)))
    );
    assert_eq!(blocks.identifiers, [vec!["one", "salt"], vec![]]);

    let digest = list([Value::Binary(vec![0xab, 0x01])]);
    let blocks = stored(two_blocks(digest, Value::Nil, Value::Nil), SourceKind::Vllm);
    assert_eq!(
        (blocks.cache_salt, &blocks.identifiers[0]),
        (None, &vec!["ab01".to_owned()])
    );
}

/// Kinds of groups, and an offloaded block with and without its extra keys.
#[test]
fn groups_and_offloaded_blocks_say_what_can_be_believed() {
    let window = |tokens| GroupRule::Window { tokens };
    for (kind, told, rule) in [
        ("full_attention", None, GroupRule::Full),
        ("mla_attention", None, GroupRule::Full),
        ("sliding_window", Some(1024), window(1024)),
        ("sliding_window_mla", Some(2), window(2)),
        ("sliding_window", None, GroupRule::Full),
        ("chunked_local_attention", None, GroupRule::Full),
        ("of_tomorrow", Some(7), GroupRule::Full),
        ("mamba", None, GroupRule::State),
        ("cross_attention", None, GroupRule::Nothing),
    ] {
        let told = told.map_or(Value::Nil, Value::from);
        let event = stored_map(&[
            ("group_idx", Value::from(3)),
            ("kv_cache_spec_kind", Value::from(kind)),
            ("kv_cache_spec_sliding_window", told),
        ]);
        let group = stored(event, SourceKind::Vllm).group.unwrap();
        let block_size = group.block_size;
        assert_eq!(
            (group.number, group.rule, block_size),
            (3, rule, 2),
            "{kind}"
        );
    }
    let offloaded = stored(
        stored_map(&[("medium", Value::from("CPU"))]),
        SourceKind::Vllm,
    );
    assert!(
        offloaded.tokens.is_empty(),
        "nothing says what else shaped it"
    );
    let whole = [
        ("medium", Value::from("CPU")),
        ("extra_keys", list([Value::Nil])),
    ];
    assert_eq!(stored(stored_map(&whole), SourceKind::Vllm).tokens, [5, 6]);
    let other = stored(
        stored_map(&[("medium", Value::from("CPU"))]),
        SourceKind::Sglang,
    );
    assert_eq!(other.tokens, [5, 6], "SGLang's tokens say all");
}

/// An outer map with its fields in another order, and a batch without a rank.
#[test]
fn batches_are_maps_or_arrays_of_two_or_more() {
    let events = || {
        list([list([
            Value::from("AllBlocksCleared"),
            Value::from("later field"),
        ])])
    };
    for (batch, rank) in [
        (list([Value::from(3), events()]), None),
        (
            list([
                Value::F32(3.0),
                events(),
                Value::from(2),
                Value::from("more"),
            ]),
            Some(2),
        ),
        (
            map(&[
                ("data_parallel_rank", Value::from(2)),
                ("events", events()),
                ("more", Value::Nil),
                ("ts", Value::F64(3.0)),
            ]),
            Some(2),
        ),
    ] {
        let batch = decode_batch(&pack(&batch), SourceKind::Vllm).unwrap();
        assert_eq!((batch.timestamp, batch.rank), (3.0, rank));
        assert!(matches!(
            batch.events.as_slice(),
            [Ok(SourceEvent::Cleared)]
        ));
    }
    for no_batch in [
        Value::Nil,
        list([Value::F64(1.0)]),
        map(&[("ts", Value::F64(1.0))]),
    ] {
        assert!(
            decode_batch(&pack(&no_batch), SourceKind::Vllm).is_err(),
            "{no_batch}"
        );
    }
}

/// Both forms of topic, and models that contain the separator.
#[test]
fn topics_read_back_as_they_were_written() {
    let pod = PodName::new("10.0.0.1:8000").unwrap();
    for model in ["", "meta/llama", "org/model@v1", "odd@7"] {
        for (topic, kind) in [
            (Topic::engine(&pod, model), SourceKind::Vllm),
            (Topic::node(&pod, model, Epoch(u64::MAX)), SourceKind::Node),
        ] {
            assert_eq!(
                Topic::parse(topic.to_string().as_bytes(), kind).unwrap(),
                topic
            );
        }
    }
    for bad in [
        "",
        "kv@",
        "kv@pod",
        "kv@@model",
        "xx@pod@model",
        "kv@pod@model@x",
        "kv@pod@model",
    ] {
        let refusal = Topic::parse(bad.as_bytes(), SourceKind::Node).unwrap_err();
        assert!(refusal.context().contains(bad), "{refusal}");
    }
    assert!(Topic::parse(&[b'k', 0xff], SourceKind::Vllm).is_err());
    assert!(Topic::parse(&vec![b'a'; TOPIC_BYTES_MAX + 1], SourceKind::Vllm).is_err());
}

/// A run from the start of a tenant's sequence and the one after it, for each owner; the salt is the first one's to tell.
#[test]
fn the_owner_of_a_batch_is_read_back() {
    let stored = |hashes: [u64; 2], parent| EngineEvent::Stored {
        hashes: hashes.map(EngineHash).into(),
        parent,
        tokens: vec![1, 2],
        block_size: 1,
        tier: Tier::Host,
    };
    let events = [stored([1, 2], None), stored([3, 4], Some(EngineHash(2)))];
    for lora in [None, Some("adapter")] {
        for cache_salt in [None, Some("tenant"), Some("adapter")] {
            let owner = BatchOwner { lora, cache_salt };
            let payload = encode_engine_batch_of(1.0, &owner, &events);
            let read: Vec<StoredBlocks> = decode(&payload, SourceKind::Vllm)
                .into_iter()
                .map(|event| match event.unwrap() {
                    SourceEvent::Stored(blocks) => blocks,
                    other => panic!("{other:?} was not published"),
                })
                .collect();
            for blocks in &read {
                assert_eq!(blocks.lora.as_deref(), lora);
                assert!(blocks.identifiers.is_empty(), "{blocks:?}");
            }
            assert_eq!(read[0].cache_salt.as_deref(), cache_salt);
            assert_eq!(read[1].cache_salt, None);
        }
    }
}
