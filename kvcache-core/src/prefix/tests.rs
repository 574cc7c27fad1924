use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::key::IndexKey;
use crate::shape::TokensPerBlock;

const LLMD: &str = include_str!("../../../tests/golden/keys/llm-d.json");
const OWN: &str = include_str!("../../../tests/golden/keys/kvfabric.json");

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn block_size(tokens: u32) -> TokensPerBlock {
    TokensPerBlock::try_from(tokens).unwrap()
}

fn keys(
    scheme: &IndexScheme,
    namespace: &Namespace<'_>,
    tokens: &[u32],
    block: u32,
) -> Vec<IndexKey> {
    scheme
        .root(namespace)
        .chain(tokens, block_size(block))
        .collect()
}

fn number(text: &Value) -> u64 {
    let text = text.as_str().unwrap();
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => text.parse().unwrap(),
    }
}

fn numbers(keys: &Value) -> Vec<IndexKey> {
    keys.as_array()
        .unwrap()
        .iter()
        .map(|key| IndexKey(number(key)))
        .collect()
}

fn schemes() -> [IndexScheme; 3] {
    [
        IndexScheme::Xxh3 { seed: 1337 },
        IndexScheme::LlmdCborFnv {
            seed: "42".to_owned(),
        },
        IndexScheme::LlmdXxh64 {
            seed: "42".to_owned(),
        },
    ]
}

/// Keys that llm-d's own tests and its Go code produced.
#[test]
fn cbor_fnv_keys_equal_those_of_llmd() {
    let vectors = json(LLMD);
    let golden = &vectors["cbor_fnv64a"]["golden_from_repo"][0];
    let tokens: Vec<u32> = serde_tokens(&golden["tokens"]);
    let namespace = Namespace {
        model: golden["model"].as_str().unwrap(),
        ..Default::default()
    };
    let scheme = IndexScheme::LlmdCborFnv {
        seed: String::new(),
    };
    assert_eq!(
        keys(&scheme, &namespace, &tokens, 4),
        numbers(&golden["keys"])
    );

    let checked = vectors["cbor_fnv64a"]["own_cross_checked_with_go_code"]
        .as_array()
        .unwrap();
    assert_eq!(checked.len(), 6);
    for vector in checked {
        let seed = vector["seed"].as_str().unwrap_or_default();
        let model = vector["model"].as_str().unwrap_or_default();
        let tokens: Vec<u32> = match vector["tokens"].as_str().unwrap() {
            "1..16" => (1..=16).collect(),
            "1..32" => (1..=32).collect(),
            "1..128" => (1..=128).collect(),
            _ => [0, 23, 24, 255, 256, 65_535, 65_536, u32::MAX].repeat(2),
        };
        let scheme = IndexScheme::LlmdCborFnv {
            seed: seed.to_owned(),
        };
        let root = scheme.root(&Namespace {
            model,
            ..Default::default()
        });
        if vector["init"].is_string() {
            let start = llmd::Algorithm::CborFnv.root(seed, model);
            assert_eq!(start, number(&vector["init"]));
        }
        let mut chain = match vector["parent_key"].as_u64() {
            Some(parent) => IndexChain::after(&root, IndexKey(parent)),
            None => IndexChain::new(&root),
        };
        let mut multimodal: Vec<&str> = vector["mm_hashes_block0"]
            .as_array()
            .map(|hashes| hashes.iter().map(|hash| hash.as_str().unwrap()).collect())
            .unwrap_or_default();
        let block = vector["block_size"].as_u64().unwrap_or(16) as usize;
        let expected = numbers(&vector["keys"]);
        assert_eq!(tokens.len() / block, expected.len());
        for (tokens, expected) in tokens.chunks_exact(block).zip(expected) {
            assert_eq!(chain.push_with(tokens, &multimodal), expected, "{vector}");
            multimodal.clear();
        }
    }
}

fn serde_tokens(tokens: &Value) -> Vec<u32> {
    tokens
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token.as_u64().unwrap() as u32)
        .collect()
}

/// Keys of llm-d's XXH64 variant, from an independent program.
#[test]
fn xxh64_keys_equal_those_of_llmd() {
    let vector = &json(LLMD)["xxh64_router_variant_python_only"];
    let namespace = Namespace {
        model: "test-model",
        ..Default::default()
    };
    assert_eq!(
        llmd::Algorithm::Xxh64.root("", "test-model"),
        number(&vector["init"])
    );
    let scheme = IndexScheme::LlmdXxh64 {
        seed: String::new(),
    };
    let tokens: Vec<u32> = (1..=32).collect();
    assert_eq!(
        keys(&scheme, &namespace, &tokens, 16),
        numbers(&vector["keys"])
    );

    let mut chain = IndexChain::new(&scheme.root(&namespace));
    let key = chain.push_with(&tokens[..16], &["imgA"]);
    assert_eq!(key.0, number(&vector["with_mm_imgA_block0"]));
}

/// Our own vectors, computed by a separate program with the reference XXH3.
#[test]
fn xxh3_keys_equal_their_golden_vectors() {
    let vectors = json(OWN);
    let vectors = vectors["xxh3"].as_array().unwrap();
    assert_eq!(vectors.len(), 12);
    for vector in vectors {
        let first = vector["first_token"].as_u64().unwrap() as u32;
        let count = vector["token_count"].as_u64().unwrap() as u32;
        let tokens: Vec<u32> = (first..first + count).collect();
        let block = vector["block_size"].as_u64().unwrap() as usize;
        let scheme = IndexScheme::Xxh3 {
            seed: vector["seed"].as_u64().unwrap(),
        };
        let root = scheme.root(&Namespace {
            model: vector["model"].as_str().unwrap_or_default(),
            lora: vector["lora"].as_str(),
            cache_salt: vector["salt"].as_str(),
        });
        let mut multimodal: Vec<&str> = vector["mm"]
            .as_array()
            .map(|names| names.iter().map(|name| name.as_str().unwrap()).collect())
            .unwrap_or_default();
        let mut chain = IndexChain::new(&root);
        let mut found = Vec::new();
        for tokens in tokens.chunks_exact(block) {
            found.push(chain.push_with(tokens, &multimodal));
            multimodal.clear();
        }
        assert_eq!(found, numbers(&vector["keys"]), "{vector}");
    }
}

/// llm-d hashes the adapter in the model's place, and the salt as an extra of the first block.
#[test]
fn llmd_takes_the_adapter_for_the_model_and_the_salt_for_an_extra() {
    let tokens: Vec<u32> = (1..=32).collect();
    for scheme in &schemes()[1..] {
        let adapted = Namespace {
            model: "base",
            lora: Some("adapter"),
            cache_salt: None,
        };
        let named = Namespace {
            model: "adapter",
            ..Default::default()
        };
        assert_eq!(
            keys(scheme, &adapted, &tokens, 16),
            keys(scheme, &named, &tokens, 16)
        );

        let salted = Namespace {
            cache_salt: Some("imgA"),
            ..named
        };
        let mut chain = IndexChain::new(&scheme.root(&named));
        let first = chain.push_with(&tokens[..16], &["imgA"]);
        let second = chain.push(&tokens[16..]);
        assert_eq!(keys(scheme, &salted, &tokens, 16), [first, second]);
    }
}

/// Every scheme's name, and texts that are none.
#[test]
fn scheme_names_round_trip_and_others_are_refused() {
    for text in [
        "xxh3:0",
        "xxh3:18446744073709551615",
        "cbor-fnv:",
        "cbor-fnv:a:b",
        "xxh64:42",
    ] {
        assert_eq!(IndexScheme::parse(text).unwrap().name(), text);
    }
    assert_eq!(IndexScheme::parse("xxh3").unwrap(), IndexScheme::default());
    assert_eq!(IndexScheme::default().name(), "xxh3:1337");
    for text in [
        "",
        "md5:1",
        "xxh3:",
        "xxh3:-1",
        "xxh3:18446744073709551616",
        "XXH3:1",
    ] {
        let error = IndexScheme::parse(text).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Invalid);
        assert!(error.context().contains(&format!("{text:?}")), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// A longer prompt's keys begin with the shorter one's, in every scheme and by every way in.
    #[test]
    fn keys_of_a_prefix_are_a_prefix_of_the_keys(
        tokens in prop::collection::vec(any::<u32>(), 0..200),
        cut in 0usize..200,
        block in 1u32..20,
        salt in prop::option::of("[a-z]{0,3}"),
    ) {
        for scheme in schemes() {
            let namespace =
                Namespace { model: "m", lora: None, cache_salt: salt.as_deref() };
            let all = keys(&scheme, &namespace, &tokens, block);
            prop_assert_eq!(all.len(), tokens.len() / block as usize);
            let some = keys(&scheme, &namespace, &tokens[..cut.min(tokens.len())], block);
            prop_assert_eq!(&all[..some.len()], &some[..]);

            let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            let root = scheme.root(&namespace);
            let (mut from_bytes, mut chain) = (Vec::new(), IndexChain::new(&root));
            let (first, rest) = bytes.split_at(some.len() * block as usize * 4);
            for part in [first, rest] {
                chain.extend_le(part, block_size(block), &mut from_bytes);
            }
            prop_assert_eq!((&all, all.last().copied()), (&from_bytes, chain.last()));

            // Going on after a known key is the same as never having stopped.
            if let Some(last) = some.last() {
                let mut chain = IndexChain::after(&root, *last);
                let rest = &tokens[some.len() * block as usize..];
                for (i, tokens) in rest.chunks_exact(block as usize).enumerate() {
                    prop_assert_eq!(chain.push(tokens), all[some.len() + i]);
                }
            }
        }
    }

    /// One token changed: the keys before its block stay, all from it on differ.
    #[test]
    fn a_changed_token_changes_every_key_from_its_block_on(
        tokens in prop::collection::vec(any::<u32>(), 1..120),
        place in any::<prop::sample::Index>(),
        change in 1u32..,
        block in 1u32..20,
    ) {
        let place = place.index(tokens.len());
        let mut changed = tokens.clone();
        changed[place] ^= change;
        for scheme in schemes() {
            let before = keys(&scheme, &Namespace::default(), &tokens, block);
            let after = keys(&scheme, &Namespace::default(), &changed, block);
            for (i, (before, after)) in before.iter().zip(&after).enumerate() {
                prop_assert_eq!(before == after, i < place / block as usize);
            }
        }
    }

    /// Two namespaces share keys only when they mean the same.
    #[test]
    fn namespaces_share_no_key(
        names in prop::collection::vec(prop::option::of("[ab]{0,2}"), 6),
        tokens in prop::collection::vec(any::<u32>(), 32),
    ) {
        let namespace = |names: &'_ [Option<String>]| -> (String, Option<String>, Option<String>) {
            // An empty name is an absent one.
            let name = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());
            (name(&names[0]).unwrap_or_default(), name(&names[1]), name(&names[2]))
        };
        let (left, right) = (namespace(&names[..3]), namespace(&names[3..]));
        let all = |scheme: &IndexScheme, raw: &[Option<String>]| {
            let namespace = Namespace {
                model: raw[0].as_deref().unwrap_or_default(),
                lora: raw[1].as_deref(),
                cache_salt: raw[2].as_deref(),
            };
            keys(scheme, &namespace, &tokens, 16)
        };
        for scheme in schemes() {
            let (mut left, mut right) = (left.clone(), right.clone());
            if !matches!(scheme, IndexScheme::Xxh3 { .. }) {
                // llm-d has no place for a model beside an adapter.
                for side in [&mut left, &mut right] {
                    if let Some(lora) = side.1.take() {
                        side.0 = lora;
                    }
                }
            }
            let keys = (all(&scheme, &names[..3]), all(&scheme, &names[3..]));
            if left == right {
                prop_assert_eq!(keys.0, keys.1);
            } else {
                prop_assert!(keys.0.iter().zip(&keys.1).all(|(left, right)| left != right));
            }
        }
    }
}
