use serde_json::Value;

use super::*;

const VECTORS: &str = include_str!("../../../../tests/golden/keys/sglang.json");

fn vectors() -> Value {
    serde_json::from_str(VECTORS).unwrap()
}

fn hex(hash: PageHash) -> String {
    hash.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn tokens(value: &Value) -> Vec<u32> {
    let tokens = value.as_array().unwrap().iter();
    tokens
        .map(|token| u32::try_from(token.as_u64().unwrap()).unwrap())
        .collect()
}

fn check_chain(mut chain: Chain, tokens: &[u32], page_size: usize, expected: &Value) {
    let hashes = expected["hashes"].as_array().unwrap();
    assert_eq!(tokens.len() / page_size, hashes.len());
    for (i, page) in tokens.chunks_exact(page_size).enumerate() {
        let hash = chain.push(page);
        assert_eq!(hex(hash), hashes[i].as_str().unwrap(), "page {i}");
        if let Some(events) = expected["event_int64"].as_array() {
            assert_eq!(hash.event_hash(), events[i].as_i64().unwrap(), "page {i}");
            assert_eq!(hash.engine_hash().0, events[i].as_i64().unwrap() as u64);
        }
    }
}

/// SGLang's own chains for pages of 1, 16 and 64 tokens.
#[test]
fn chains_equal_those_of_sglang() {
    let vectors = vectors();
    let chains = vectors["chains"].as_array().unwrap();
    assert_eq!(chains.len(), 6);
    for vector in chains {
        let page_size = vector["page_size"].as_u64().unwrap() as usize;
        check_chain(
            Chain::new(),
            &tokens(&vector["token_ids"]),
            page_size,
            vector,
        );
    }
}

/// Both of SGLang's ways to keep a tenant apart.
#[test]
fn salted_chains_equal_those_of_sglang() {
    let vectors = vectors();
    let event = &vectors["salt_tenant-1_event_chain"];
    let tokens = tokens(&event["token_ids"]);
    let chain = Chain::salted("tenant-1");
    assert_eq!(hex(chain.last().unwrap()), event["seed"].as_str().unwrap());
    check_chain(chain, &tokens, 16, event);

    let storage = &vectors["salt_tenant-1_storage_chain"];
    let chain = Chain::storage(None, Some("tenant-1"));
    assert_eq!(
        hex(chain.last().unwrap()),
        storage["seed"].as_str().unwrap()
    );
    check_chain(chain, &tokens, 16, storage);
}

/// A bigram page over tokens 0 to 16, and a page in which one token needs 64 bits.
#[test]
fn bigrams_and_wide_tokens_equal_those_of_sglang() {
    let vectors = vectors();
    let tokens: Vec<u32> = (0..17).collect();
    let bigrams = Chain::new().push_bigrams(&tokens);
    assert_eq!(hex(bigrams), vectors["bigram_0..16"][0].as_str().unwrap());

    let tokens: Vec<u64> = std::iter::once(1 << 40).chain(0..15).collect();
    let wide = Chain::new().push_wide(&tokens).unwrap();
    assert_eq!(hex(wide), vectors["wide_2^40"][0].as_str().unwrap());

    let narrow = Chain::new().push_wide(&[1, 2, 3]).unwrap();
    assert_eq!(narrow, Chain::new().push(&[1, 2, 3]));
    let error = Chain::new().push_wide(&[1, u64::MAX]).unwrap_err();
    assert!(error.context().contains(&u64::MAX.to_string()), "{error}");
}

/// Absent, empty and joined parts of a namespace.
#[test]
fn storage_namespaces_do_not_run_into_each_other() {
    let parts = [None, Some(""), Some("a"), Some("ab"), Some("b")];
    let mut seeds = Vec::new();
    for extra_key in parts {
        for salt in parts {
            seeds.push(Chain::storage(extra_key, salt).last());
        }
    }
    for (i, seed) in seeds.iter().enumerate() {
        assert!(
            !seeds[..i].contains(seed),
            "namespace {i} has the seed of an earlier one"
        );
    }
}
