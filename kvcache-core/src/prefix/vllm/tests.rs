use serde_json::Value;

use super::*;

const VECTORS: &str = include_str!("../../../../tests/golden/keys/vllm.json");

fn vectors(kind: &str) -> Vec<Value> {
    let vectors: Value = serde_json::from_str(VECTORS).unwrap();
    vectors[kind].as_array().unwrap().clone()
}

fn hasher(vector: &Value, style: ExtraKeyStyle) -> Hasher {
    let algorithm = Algorithm::parse(vector["algo"].as_str().unwrap()).unwrap();
    match vector["PYTHONHASHSEED"].as_str() {
        Some(seed) => Hasher::new(algorithm, style, seed).unwrap(),
        None => Hasher::unseeded(algorithm, style).unwrap(),
    }
}

fn hex(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    let digits = (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16));
    digits.collect::<Result<_, _>>().unwrap()
}

fn tokens(vector: &Value) -> Vec<u32> {
    let tokens = vector["token_ids"].as_array().unwrap();
    tokens
        .iter()
        .map(|token| u32::try_from(token.as_u64().unwrap()).unwrap())
        .collect()
}

/// The keys of one block as the vectors write them; byte strings come in `bytes`.
fn extra_keys<'a>(keys: &'a Value, bytes: &'a [u8]) -> Vec<ExtraKey<'a>> {
    let Some(keys) = keys.as_array() else {
        return Vec::new();
    };
    let text = |value: &'a Value| value.as_str().unwrap();
    let key = |key: &'a Value| match text(&key[0]) {
        "lora" => ExtraKey::Lora {
            name: text(&key[1]),
            path: text(&key[2]),
        },
        "mm" => ExtraKey::Multimodal {
            identifier: text(&key[1]),
            offset: key[2].as_i64().unwrap(),
        },
        "cache_salt" => ExtraKey::CacheSalt(text(&key[1])),
        "prompt_embeds" => ExtraKey::PromptEmbeds(bytes),
        tag => panic!("a vector has an extra key tagged {tag}"),
    };
    keys.iter().map(key).collect()
}

fn embeds(keys: &Value) -> Vec<u8> {
    let digests = keys
        .as_array()
        .into_iter()
        .flatten()
        .map(|key| &key[1]["$bytes"]);
    digests
        .filter(|digest| digest.is_string())
        .flat_map(hex)
        .collect()
}

/// vLLM's own NONE_HASH for each algorithm and seed.
#[test]
fn none_hashes_equal_those_of_vllm() {
    let vectors = vectors("none_hash");
    assert_eq!(vectors.len(), 10);
    for vector in &vectors {
        let hash = hasher(vector, ExtraKeyStyle::Tagged).none_hash();
        assert_eq!(hash.as_bytes(), hex(&vector["none_hash"]), "{vector}");
        assert_eq!(hash.engine_hash().0, vector["ext_u64"].as_u64().unwrap());
    }
}

/// vLLM's own hashes and the bytes it hashed; those whose pickle refers back to an earlier object must be refused.
#[test]
fn block_hashes_equal_those_of_vllm() {
    let vectors = vectors("blocks");
    assert_eq!(vectors.len(), 78);
    let mut refused = 0;
    for vector in &vectors {
        let hasher = hasher(vector, ExtraKeyStyle::Tagged);
        let parent = vector["parent"].as_str().map(|_| hex(&vector["parent"]));
        let parent = parent.map(|parent| BlockHash::from_bytes(&parent).unwrap());
        let parent_bytes = parent.unwrap_or(hasher.none_hash());
        assert_eq!(parent_bytes.as_bytes(), hex(&vector["parent_bytes"]));

        let digest = embeds(&vector["extra_keys_tagged"]);
        let keys = extra_keys(&vector["extra_keys_tagged"], &digest);
        match hasher.block(parent.as_ref(), &tokens(vector), &keys) {
            Ok(hash) => {
                assert_eq!(hash.as_bytes(), hex(&vector["hash"]), "{vector}");
                assert_eq!(hash.engine_hash().0, vector["ext_u64"].as_u64().unwrap());
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                assert!(
                    !vector["algo"].as_str().unwrap().ends_with("cbor"),
                    "{error}"
                );
                assert_eq!(vector["name"], "lora_mm_salt");
                refused += 1;
            }
        }
    }
    println!(
        "{refused} of {} blocks refused: their pickles depend on object identity",
        vectors.len()
    );
    assert_eq!(refused, 3);
}

/// Whole requests, block after block, up to the first that must be refused.
#[test]
fn request_chains_equal_those_of_vllm() {
    let vectors = vectors("request_chains");
    assert_eq!(vectors.len(), 30);
    let mut refused = 0;
    for vector in &vectors {
        let hasher = hasher(vector, ExtraKeyStyle::Tagged);
        let block_size = usize::try_from(vector["block_size"].as_u64().unwrap()).unwrap();
        let tokens = tokens(vector);
        let hashes = vector["hashes"].as_array().unwrap();
        assert_eq!(tokens.len() / block_size, hashes.len());
        let mut parent = None;
        for (i, block) in tokens.chunks_exact(block_size).enumerate() {
            let keys = extra_keys(&vector["extra_keys_tagged"][i], &[]);
            match hasher.block(parent.as_ref(), block, &keys) {
                Ok(hash) => {
                    assert_eq!(hash.as_bytes(), hex(&hashes[i]), "block {i} of {vector}");
                    let external = vector["ext_u64"][i].as_u64().unwrap();
                    assert_eq!(hash.engine_hash().0, external);
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Unsupported);
                    assert_eq!((vector["name"].as_str(), i), (Some("mm"), 1), "{error}");
                    refused += 1;
                }
            }
            parent = Some(BlockHash::from_bytes(&hex(&hashes[i])).unwrap());
        }
    }
    println!("{refused} chains have a block whose pickle depends on object identity");
    // Once for each algorithm over pickle and seed.
    assert_eq!(refused, 3);
}

/// The vectors' extra keys of each block, derived from the request alone.
#[test]
fn extra_keys_of_a_request_fall_on_the_blocks_they_touch() {
    let spans = [
        MultimodalSpan {
            identifier: "imgA",
            start: 4,
            len: 20,
        },
        MultimodalSpan {
            identifier: "imgB",
            start: 30,
            len: 10,
        },
    ];
    let requests = [
        ("plain", RequestKeys::default()),
        (
            "salt",
            RequestKeys {
                cache_salt: Some("tenant-1"),
                ..Default::default()
            },
        ),
        (
            "lora",
            RequestKeys {
                lora: Some(("adapterA", "/models/adapterA")),
                ..Default::default()
            },
        ),
        (
            "lora_salt",
            RequestKeys {
                lora: Some(("adapterA", "/models/adapterA")),
                cache_salt: Some("tenant-1"),
                ..Default::default()
            },
        ),
        (
            "mm",
            RequestKeys {
                multimodal: &spans,
                ..Default::default()
            },
        ),
    ];
    let vectors = vectors("request_chains");
    for (name, request) in requests {
        let vector = vectors
            .iter()
            .find(|vector| vector["name"] == name)
            .unwrap();
        for block in 0..3 {
            assert_eq!(
                request.of_block(block * 16..block * 16 + 16),
                extra_keys(&vector["extra_keys_tagged"][block as usize], &[]),
                "block {block} of {name}"
            );
        }
    }
}

/// The bytes that vLLM 0.30 hashes for a salted adapter block: bare values, no path.
#[test]
fn untagged_keys_are_bare_values() {
    let hasher = Hasher::new(Algorithm::Sha256Cbor, ExtraKeyStyle::Untagged, "0").unwrap();
    let keys = [
        ExtraKey::Lora {
            name: "adapterA",
            path: "/models/adapterA",
        },
        ExtraKey::Multimodal {
            identifier: "imgA",
            offset: -12,
        },
        ExtraKey::CacheSalt("salt"),
    ];
    let parent = hasher.none_hash();
    let serialised = hasher.block_cbor(parent.as_bytes(), &[7], &keys);
    let mut expected = vec![0x83, 0x58, 0x20];
    expected.extend(parent.as_bytes());
    expected.extend([0x81, 0x07, 0x83, 0x68]);
    expected.extend(b"adapterA");
    expected.extend([0x82, 0x64]);
    expected.extend(b"imgA");
    expected.extend([0x2b, 0x64]);
    expected.extend(b"salt");
    assert_eq!(serialised, expected);

    let other_path = [
        ExtraKey::Lora {
            name: "adapterA",
            path: "/elsewhere",
        },
        keys[1],
        keys[2],
    ];
    let hash = hasher.block(None, &[7], &keys).unwrap();
    assert_eq!(hash, hasher.block(None, &[7], &other_path).unwrap());
}

/// Integers at every width that pickle and CBOR tell apart, against bytes written down from Python.
#[test]
fn integers_are_written_in_pythons_widths() {
    let cases: [(i64, &[u8], &[u8]); 10] = [
        (0, &[b'K', 0], &[0]),
        (255, &[b'K', 255], &[0x18, 255]),
        (256, &[b'M', 0, 1], &[0x19, 1, 0]),
        (65_536, &[b'J', 0, 0, 1, 0], &[0x1a, 0, 1, 0, 0]),
        (-1, &[b'J', 255, 255, 255, 255], &[0x20]),
        (-12, &[b'J', 0xf4, 255, 255, 255], &[0x2b]),
        (
            2_147_483_648,
            &[0x8a, 5, 0, 0, 0, 0x80, 0],
            &[0x1a, 0x80, 0, 0, 0],
        ),
        (
            -2_147_483_649,
            &[0x8a, 5, 255, 255, 255, 0x7f, 255],
            &[0x3a, 0x80, 0, 0, 0],
        ),
        (
            1 << 40,
            &[0x8a, 6, 0, 0, 0, 0, 0, 1],
            &[0x1b, 0, 0, 1, 0, 0, 0, 0, 0],
        ),
        (
            i64::MIN,
            &[0x8a, 8, 0, 0, 0, 0, 0, 0, 0, 0x80],
            &[0x3b, 0x7f, 255, 255, 255, 255, 255, 255, 255],
        ),
    ];
    for (value, pickled, encoded) in cases {
        let mut pickle = Pickle::new();
        pickle.int(value);
        let pickle = pickle.finish().unwrap();
        // Behind the protocol come the frame's head, if the body is long enough for one, and the body with its stop.
        assert!(
            pickle.ends_with(&[pickled, b"."].concat()),
            "{value}: {pickle:02x?}"
        );
        let mut buffer = Vec::new();
        cbor::signed(&mut buffer, value);
        assert_eq!(buffer, encoded, "{value}");
    }
}

/// A pickle longer than a frame, a random seed, a digest of a strange length: each is refused by name.
#[test]
fn what_cannot_be_reproduced_is_refused() {
    let pickled = Hasher::new(Algorithm::Sha256, ExtraKeyStyle::Tagged, "0").unwrap();
    let long = vec![u32::MAX; 16_384];
    let error = pickled.block(None, &long, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);

    let error = Hasher::unseeded(Algorithm::XxhashCbor, ExtraKeyStyle::Tagged).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.context().contains("xxhash_cbor"), "{error}");

    let error = BlockHash::from_bytes(&[0; 20]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.context().contains("20"), "{error}");

    let error = Algorithm::parse("md5").unwrap_err();
    assert!(error.context().contains("md5"), "{error}");
}
