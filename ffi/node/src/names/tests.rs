//! Names of blocks there and back, golden vectors from a program of their own, and bytes that are no names.

use kvcache_core::prefix::data::{ModelIdentity, Shard};
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::blocks::{Describer, EngineScheme};

const GOLDEN: &str = include_str!("../../tests/golden/names.json");

fn block_tokens(count: u32) -> TokensPerBlock {
    TokensPerBlock::try_from(count).unwrap()
}

fn bytes(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    let byte = |i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(byte).collect()
}

fn describer() -> Describer {
    Describer {
        model: "m".to_owned(),
        identity: ModelIdentity([0xab; 32]),
        shard: Shard::whole(1, 1),
        scheme: IndexScheme::default(),
        block_tokens: block_tokens(4),
        engine: Some(EngineScheme {
            name: "vllm/tagged".to_owned(),
            hash: "sha256_cbor".to_owned(),
            seed: "0".to_owned(),
        }),
    }
}

/// Packs what the vectors say, and makes data keys of it as a worker's node does.
#[test]
fn packed_names_and_the_keys_made_of_them_equal_their_golden_vectors() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let tokens: Vec<u32> = serde_json::from_value(golden["tokens"].clone()).unwrap();
    let hashes: Vec<Vec<u8>> = golden["hashes"]
        .as_array()
        .unwrap()
        .iter()
        .map(bytes)
        .collect();
    let hashes: Vec<&[u8]> = hashes.iter().map(Vec::as_slice).collect();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let text = |field: &str| case[field].as_str().unwrap();
        let (scheme, size) = (IndexScheme::default(), block_tokens(4));
        let mut chain = NameChain::new(&scheme, "m", size, text("lora"), text("cache_salt"));
        if case["adapter"].is_string() {
            chain = chain.with_adapter(bytes(&case["adapter"]).try_into().unwrap());
        }
        // In two parts, as a request grows.
        chain.extend(&tokens[..12], &hashes[..3]).unwrap();
        chain.extend(&tokens[12..], &hashes[3..]).unwrap();
        let number = |field: &str| case[field].as_u64().unwrap() as usize;
        let packed = chain.pack(number("start")..number("stop")).unwrap();
        assert_eq!(packed, bytes(&case["packed"]));

        let names = Names::parse(&packed).unwrap();
        let prefix = describer().prefix_of(&names, None).unwrap();
        let keys: Vec<String> = prefix.keys().iter().map(|key| key.to_hex()).collect();
        let expected: Vec<String> = serde_json::from_value(case["data_keys"].clone()).unwrap();
        assert_eq!(keys, expected);
        let keys = prefix
            .infos()
            .iter()
            .map(|info| format!("{:016x}", info.index_key.0));
        let expected: Vec<String> = serde_json::from_value(case["index_keys"].clone()).unwrap();
        assert_eq!(keys.collect::<Vec<_>>(), expected);
    }
}

/// Packs hashes alone, and reads them back as a node does: no block has a parent.
#[test]
fn packed_hashes_equal_their_golden_vectors_and_are_blocks_by_themselves() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let hashes = golden["hashes"].as_array().unwrap();
    let hashes: Vec<Vec<u8>> = hashes.iter().map(bytes).collect();
    let hashes: Vec<&[u8]> = hashes.iter().map(Vec::as_slice).collect();
    let cases = golden["without_tokens"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let count = case["count"].as_u64().unwrap() as usize;
        let packed = pack_hashes(&bytes(&case["root"]), &hashes[..count]).unwrap();
        assert_eq!(packed, bytes(&case["packed"]));
        let names = Names::parse(&packed).unwrap();
        let read: Vec<&[u8]> = names.iter().map(|name| name.hash).collect();
        assert_eq!((read, names.parent()), (hashes[..count].to_vec(), None));
    }
    let error = pack_hashes(b"", &[&[1; 32], &[1; 31]]).unwrap_err();
    assert!(error.to_string().contains("31"), "{error}");
    for hash in [&[][..], &[1; HASH_BYTES_MAX + 1]] {
        let error = pack_hashes(b"", &[hash]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
}

/// A run from the middle has the parents that the whole chain has there.
#[test]
fn a_run_of_names_goes_on_where_the_chain_before_it_ended() {
    let mut chain = NameChain::new(&IndexScheme::default(), "m", block_tokens(1), "", "");
    let hashes: Vec<[u8; 32]> = (0..5).map(|i| [i; 32]).collect();
    let hashes: Vec<&[u8]> = hashes.iter().map(|hash| &hash[..]).collect();
    chain.extend(&[1, 2, 3, 4, 5], &hashes).unwrap();
    let infos = |range| {
        let names = Names::parse(&chain.pack(range).unwrap()).unwrap();
        describer()
            .prefix_of(&names, None)
            .unwrap()
            .infos()
            .to_vec()
    };
    let whole = infos(0..5);
    assert_eq!((whole[0].parent, whole[0].index_parent), (None, None));
    for pair in whole.windows(2) {
        assert_eq!(pair[1].parent, Some(pair[0].key));
        assert_eq!(pair[1].index_parent, Some(pair[0].index_key));
    }
    assert_eq!(infos(2..4), whole[2..4]);
}

/// Adapters: named by the names, by the caller, by both alike, by both differently.
#[test]
fn another_adapter_names_other_blocks_and_a_contradiction_is_refused() {
    let chain = |adapter: Option<[u8; 32]>| {
        let chain = NameChain::new(&IndexScheme::default(), "m", block_tokens(1), "", "");
        let mut chain = match adapter {
            Some(adapter) => chain.with_adapter(adapter),
            None => chain,
        };
        chain.extend(&[7], &[&[1; 32]]).unwrap();
        Names::parse(&chain.pack(0..1).unwrap()).unwrap()
    };
    let key = |names: &Names, adapter| describer().prefix_of(names, adapter).map(|p| p.keys()[0]);
    let (plain, one) = (chain(None), chain(Some([1; 32])));
    let with_one = key(&one, None).unwrap();
    assert_ne!(with_one, key(&plain, None).unwrap());
    assert_ne!(with_one, key(&chain(Some([2; 32])), None).unwrap());
    assert_eq!(with_one, key(&plain, Some([1; 32])).unwrap());
    assert_eq!(with_one, key(&one, Some([1; 32])).unwrap());
    let error = key(&one, Some([2; 32])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

/// Hashes too short to name bytes for long, and a node that was told of no engine.
#[test]
fn hashes_that_cannot_name_bytes_are_refused() {
    let mut chain = NameChain::new(&IndexScheme::default(), "m", block_tokens(1), "", "");
    chain.extend(&[7], &[&[1; 8]]).unwrap();
    let names = Names::parse(&chain.pack(0..1).unwrap()).unwrap();
    let error = describer().prefix_of(&names, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("8 bytes"), "{error}");
    let nobody = Describer {
        engine: None,
        ..describer()
    };
    let error = nobody.prefix_of(&names, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("[engine]"), "{error}");
}

/// Tokens that fill no block, hashes of different lengths, ranges outside; the chain stays as it was.
#[test]
fn what_does_not_fit_into_a_chain_is_refused() {
    let mut chain = NameChain::new(&IndexScheme::default(), "m", block_tokens(2), "", "");
    chain.extend(&[1, 2], &[&[1; 32]]).unwrap();
    let long = [1; HASH_BYTES_MAX + 1];
    let cases: [(&[u32], &[&[u8]]); 5] = [
        (&[3], &[&[2; 32]]),
        (&[3, 4, 5], &[&[2; 32]]),
        (&[3, 4], &[]),
        (&[3, 4], &[&[2; 31]]),
        (&[3, 4, 5, 6], &[&[2; 32], &[3; 16]]),
    ];
    for (tokens, hashes) in cases {
        let error = chain.extend(tokens, hashes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    assert_eq!(chain.len(), 1);
    #[expect(clippy::reversed_empty_ranges, reason = "one of the wrong ones")]
    for range in [0..2, 1..0, 2..2] {
        assert_eq!(chain.pack(range).unwrap_err().kind(), ErrorKind::Invalid);
    }
    let mut empty = NameChain::new(&IndexScheme::default(), "m", block_tokens(2), "", "");
    for hash in [&[][..], &long] {
        let error = empty.extend(&[1, 2], &[hash]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    let names = Names::parse(&empty.pack(0..0).unwrap()).unwrap();
    assert!(names.is_empty() && names.parent().is_none());
}

/// One fault each, in an otherwise good run of two names with a parent.
#[test]
fn each_fault_of_packed_names_is_named() {
    let mut chain = NameChain::new(&IndexScheme::default(), "m", block_tokens(1), "", "");
    chain
        .extend(&[1, 2, 3], &[&[1; 32], &[2; 32], &[3; 32]])
        .unwrap();
    let good = chain.pack(1..3).unwrap();
    Names::parse(&good).unwrap();
    let with = |position: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[position] = value;
        bytes
    };
    let longer = [&good[..], &[0]].concat();
    let cases: [(&[u8], ErrorKind, &str); 11] = [
        (&[], ErrorKind::Invalid, "bytes is 0"),
        (&good[..7], ErrorKind::Invalid, "bytes is 7"),
        (&with(0, 2), ErrorKind::Version, "version is 2"),
        (&with(1, 4), ErrorKind::Version, "flags are 0x4"),
        (&with(1, 0), ErrorKind::Invalid, "bytes of entries is 120"),
        (&with(1, 3), ErrorKind::Invalid, "bytes of entries is 88"),
        (&with(2, 0), ErrorKind::Invalid, "bytes of a hash is 0"),
        (&with(2, 65), ErrorKind::Invalid, "bytes of a hash is 65"),
        (&with(4, 3), ErrorKind::Invalid, "bytes of entries"),
        (&with(7, 255), ErrorKind::Invalid, "count of blocks"),
        (&longer, ErrorKind::Invalid, "bytes of entries is 121"),
    ];
    for (bytes, kind, words) in cases {
        let error = Names::parse(bytes).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains("names of blocks"), "{error}");
        assert!(error.to_string().contains(words), "{error}, wanted {words}");
    }
}

/// Headers that promise something and are mostly right, before bytes of any length.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let header = (
        0_u8..3,
        0_u8..5,
        0_u16..70,
        prop_oneof![0_u32..4, any::<u32>()],
    );
    (header, prop::collection::vec(any::<u8>(), 0..300)).prop_map(
        |((version, flags, hash, count), rest)| {
            let mut bytes = vec![version, flags];
            bytes.extend_from_slice(&hash.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&rest);
            bytes
        },
    )
}

/// The packed form by its documentation, put together from what was read.
fn packed_again(names: &Names) -> Vec<u8> {
    let adapter = names.adapter();
    let parent = names.parent();
    let flags = u8::from(parent.is_some()) | u8::from(adapter.is_some()) << 1;
    let mut bytes = vec![1, flags];
    bytes.extend_from_slice(&(names.hash_bytes as u16).to_le_bytes());
    bytes.extend_from_slice(&(names.iter().count() as u32).to_le_bytes());
    bytes.extend(adapter.iter().flatten());
    for name in parent.into_iter().chain(names.iter()) {
        bytes.extend_from_slice(name.hash);
        bytes.extend_from_slice(&name.index_key.0.to_le_bytes());
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever is read says exactly what was sent; everything else is refused without a panic.
    #[test]
    fn any_bytes_are_read_back_as_they_were_or_refused(bytes in prop_oneof![hostile(), prop::collection::vec(any::<u8>(), 0..64)]) {
        if let Ok(names) = Names::parse(&bytes) {
            prop_assert_eq!(packed_again(&names), bytes);
            prop_assert_eq!(names.len(), names.iter().count());
        }
    }

    /// A good run, cut short, made longer, or with one bit turned: never a panic, and a cut is never accepted.
    #[test]
    fn damaged_names_are_refused_or_read_as_other_names(
        count in 1_usize..5,
        start in 0_usize..5,
        cut in any::<prop::sample::Index>(),
        bit in any::<prop::sample::Index>(),
        adapter in any::<Option<[u8; 32]>>(),
    ) {
        let mut chain = NameChain::new(&IndexScheme::default(), "m", block_tokens(1), "", "");
        if let Some(adapter) = adapter {
            chain = chain.with_adapter(adapter);
        }
        let tokens: Vec<u32> = (0..count as u32).collect();
        let hashes: Vec<[u8; 20]> = (0..count).map(|i| [i as u8; 20]).collect();
        let hashes: Vec<&[u8]> = hashes.iter().map(|hash| &hash[..]).collect();
        chain.extend(&tokens, &hashes).unwrap();
        let start = start.min(count);
        let good = chain.pack(start..count).unwrap();
        let names = Names::parse(&good).unwrap();
        prop_assert_eq!(names.len(), count - start);
        prop_assert_eq!(names.adapter(), adapter);
        prop_assert_eq!(names.parent().map(|name| name.hash), start.checked_sub(1).map(|i| hashes[i]));
        let cut = cut.index(good.len());
        prop_assert!(Names::parse(&good[..cut]).is_err());
        let mut turned = good.clone();
        let bit = bit.index(good.len() * 8);
        turned[bit / 8] ^= 1 << (bit % 8);
        if let Ok(names) = Names::parse(&turned) {
            prop_assert_eq!(packed_again(&names), turned);
        }
    }
}
