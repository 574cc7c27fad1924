use proptest::prelude::*;
use serde_json::Value;

use super::*;

const OWN: &str = include_str!("../../../../tests/golden/keys/kvfabric.json");

const MODEL: ModelDescription<'static> = ModelDescription {
    weights: Weights::Snapshot {
        repository: "org/model",
        commit: "c0ffee",
    },
    element: "bf16",
    quantisation: "",
    layout: "vllm/LBHNC/1",
    attributes: &[],
};

fn identity() -> ModelIdentity {
    ModelIdentity::new(&MODEL).unwrap()
}

fn bytes32(text: &Value) -> [u8; 32] {
    let text = text.as_str().unwrap();
    std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
}

fn number(value: &Value) -> u32 {
    u32::try_from(value.as_u64().unwrap()).unwrap()
}

fn range(value: &Value) -> Range<u32> {
    number(&value[0])..number(&value[1])
}

fn weights(value: &Value) -> Weights<'_> {
    let text = |field: &str| value[field].as_str().unwrap();
    match text("kind") {
        "snapshot" => Weights::Snapshot {
            repository: text("repository"),
            commit: text("commit"),
        },
        "digest" => Weights::Digest(bytes32(&value["digest"])),
        _ => Weights::Named(text("name")),
    }
}

fn identity_of(vector: &Value) -> ModelIdentity {
    let model = &vector["model"];
    let text = |field: &str| model[field].as_str().unwrap();
    let attributes: Vec<(&str, &str)> = model["attributes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| (pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
        .collect();
    let identity = ModelIdentity::new(&ModelDescription {
        weights: weights(&model["weights"]),
        element: text("element"),
        quantisation: text("quantisation"),
        layout: text("layout"),
        attributes: &attributes,
    });
    let adapter = &vector["adapter"];
    match adapter["name"].as_str() {
        Some(name) => identity
            .unwrap()
            .with_adapter(name, &weights(&adapter["weights"]))
            .unwrap(),
        None => identity.unwrap(),
    }
}

fn shard_of(vector: &Value) -> Shard {
    let shard = &vector["shard"];
    Shard {
        tensor: Tensor::new(number(&shard["rank"]), number(&shard["size"])).unwrap(),
        layers: range(&shard["layers"]),
        heads: range(&shard["heads"]),
        cache_group: number(&shard["group"]),
    }
}

/// Our own vectors, computed by a separate program from the encoding in the documentation.
#[test]
fn keys_equal_their_golden_vectors() {
    let vectors: Value = serde_json::from_str(OWN).unwrap();
    let vectors = vectors["data"].as_array().unwrap();
    assert_eq!(vectors.len(), 5);
    for vector in vectors {
        let (identity, shard) = (identity_of(vector), shard_of(vector));
        assert_eq!(identity.0, bytes32(&vector["identity"]));

        let salt = vector["salt"].as_str();
        let mut chain = DataChain::new(&identity, &shard, salt).unwrap();
        let blocks = vector["blocks"].as_array().unwrap();
        assert_eq!(blocks.len(), 3);
        for (i, block) in blocks.iter().enumerate() {
            let tokens: Vec<u32> = block["tokens"]
                .as_array()
                .unwrap()
                .iter()
                .map(number)
                .collect();
            let extra =
                |extra: &'_ Value| (extra[0].as_str().unwrap().to_owned(), extra[1].as_i64());
            let extras: Vec<_> = block["extras"]
                .as_array()
                .unwrap()
                .iter()
                .map(extra)
                .collect();
            let extras: Vec<_> = extras
                .iter()
                .map(|(identifier, offset)| Extra {
                    identifier,
                    offset: offset.unwrap(),
                })
                .collect();
            assert_eq!(
                chain.push_with(&tokens, &extras).0,
                bytes32(&vector["keys"][i])
            );
        }

        let engine = &vector["engine"];
        let block = EngineBlock {
            engine: engine["engine"].as_str().unwrap(),
            algorithm: engine["algorithm"].as_str().unwrap(),
            seed: engine["seed"]
                .as_str()
                .map_or(EngineSeed::Random, EngineSeed::Fixed),
            hash: &bytes32(&engine["hash"]),
        };
        let bridged = from_engine_hash(&identity, &shard, salt, &block, Durability::Process);
        assert_eq!(bridged.unwrap().0, bytes32(&vector["bridged"]));
    }
}

/// Identities that differ in one field, or in where one field ends and the next begins.
fn different_identities() -> Vec<ModelIdentity> {
    let snapshot = |repository, commit| Weights::Snapshot { repository, commit };
    let with_weights = |weights| ModelDescription { weights, ..MODEL };
    let with_attributes = |attributes| ModelDescription {
        attributes,
        ..MODEL
    };
    let models = [
        MODEL,
        with_weights(snapshot("org/model", "c0ffef")),
        with_weights(snapshot("org/modelc0", "ffee")),
        with_weights(Weights::Named("org/modelc0ffee")),
        with_weights(Weights::Digest([7; 32])),
        ModelDescription {
            element: "fp8",
            ..MODEL
        },
        ModelDescription {
            element: "bf16v",
            layout: "llm/LBHNC/1",
            ..MODEL
        },
        ModelDescription {
            quantisation: "awq",
            ..MODEL
        },
        ModelDescription {
            layout: "vllm/LBHNC/2",
            ..MODEL
        },
        with_attributes(&[("rope", "llama3")]),
        with_attributes(&[("ropel", "lama3")]),
        with_attributes(&[("", ""), ("rope", "llama3")]),
    ];
    let adapters = [("a", "bc"), ("ab", "c")].map(|(name, weights)| {
        identity()
            .with_adapter(name, &Weights::Named(weights))
            .unwrap()
    });
    models
        .iter()
        .map(|model| ModelIdentity::new(model).unwrap())
        .chain(adapters)
        .collect()
}

/// Shards that each differ in one field from the whole model on one rank.
fn other_shards() -> Vec<Shard> {
    let whole = || Shard::whole(32, 8);
    let rank = |rank, size| Tensor::new(rank, size).unwrap();
    vec![
        Shard {
            tensor: rank(0, 2),
            ..whole()
        },
        Shard {
            tensor: rank(1, 2),
            ..whole()
        },
        Shard {
            layers: 0..16,
            ..whole()
        },
        Shard {
            layers: 16..32,
            ..whole()
        },
        Shard {
            heads: 0..4,
            ..whole()
        },
        Shard {
            heads: 4..8,
            ..whole()
        },
        Shard {
            cache_group: 1,
            ..whole()
        },
    ]
}

/// Each field of model, adapter, shard and salt is varied alone; no two of the keys may meet, in three blocks' depth.
#[test]
fn everything_that_shapes_the_bytes_changes_the_key() {
    let whole = Shard::whole(32, 8);
    let chain = |identity: &ModelIdentity, shard: &Shard, salt: Option<&str>| {
        DataChain::new(identity, shard, salt).unwrap()
    };
    let mut chains = Vec::new();
    chains.extend(
        different_identities()
            .iter()
            .map(|identity| chain(identity, &whole, None)),
    );
    chains.extend(
        other_shards()
            .iter()
            .map(|shard| chain(&identity(), shard, None)),
    );
    let salts = ["", "tenant-1", "tenant-2"];
    chains.extend(salts.map(|salt| chain(&identity(), &whole, Some(salt))));
    assert_eq!(chains.len(), 14 + 7 + 3);
    for _ in 0..3 {
        let mut keys: Vec<_> = chains
            .iter_mut()
            .map(|chain| chain.push(&[1, 2, 3, 4]))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), chains.len());
    }
}

/// The order in which attributes are given means nothing; a name given twice is an error.
#[test]
fn attributes_are_a_set_of_names() {
    let forth = [("a", "1"), ("b", "2")];
    let back = [forth[1], forth[0]];
    let of = |attributes| {
        ModelIdentity::new(&ModelDescription {
            attributes,
            ..MODEL
        })
    };
    assert_eq!(of(&forth).unwrap(), of(&back).unwrap());
    let error = of(&[("a", "1"), ("b", "2"), ("a", "3")]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.context().contains("\"a\""), "{error}");
}

/// Weights without a name, shards without heads.
#[test]
fn descriptions_that_name_nothing_are_refused() {
    let empty = [
        Weights::Named(""),
        Weights::Snapshot {
            repository: "org/model",
            commit: "",
        },
    ];
    for weights in empty {
        let error = ModelIdentity::new(&ModelDescription { weights, ..MODEL }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert_eq!(
            identity().with_adapter("a", &weights).unwrap_err().kind(),
            error.kind()
        );
    }
    for shard in [Shard::whole(0, 8), Shard::whole(32, 0)] {
        let error = DataChain::new(&identity(), &shard, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}

/// What an engine's hash must be to name bytes on disk, each condition missed alone.
#[test]
fn weak_engine_hashes_are_refused_for_durable_tiers() {
    let strong = EngineBlock {
        engine: "vllm/tagged",
        algorithm: "sha256_cbor",
        seed: EngineSeed::Fixed("0"),
        hash: &[1; 32],
    };
    let weak = [
        EngineBlock {
            seed: EngineSeed::Random,
            ..strong
        },
        EngineBlock {
            algorithm: "xxhash_cbor",
            hash: &[1; 16],
            ..strong
        },
        EngineBlock {
            algorithm: "builtin",
            ..strong
        },
        EngineBlock {
            hash: &[1; 8],
            ..strong
        },
    ];
    let bridge = |block: &EngineBlock<'_>, durability| {
        from_engine_hash(&identity(), &Shard::whole(1, 1), None, block, durability)
    };
    bridge(&strong, Durability::Durable).unwrap();
    for block in weak {
        let error = bridge(&block, Durability::Durable).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.context().contains(block.algorithm), "{error}");
        bridge(&block, Durability::Process).unwrap();
    }
    let nothing = EngineBlock {
        hash: &[],
        ..strong
    };
    assert_eq!(
        bridge(&nothing, Durability::Process).unwrap_err().kind(),
        ErrorKind::Invalid
    );
}

/// A block known by tokens and the same known by its engine's hash, even one that equals the token key.
#[test]
fn token_keys_and_bridged_keys_never_meet() {
    let shard = Shard::whole(1, 1);
    let token_key = DataChain::new(&identity(), &shard, None)
        .unwrap()
        .push(&[1, 2, 3]);
    let block = EngineBlock {
        engine: "",
        algorithm: "sha256",
        seed: EngineSeed::Fixed(""),
        hash: &token_key.0,
    };
    let bridged = from_engine_hash(&identity(), &shard, None, &block, Durability::Durable).unwrap();
    assert_ne!(bridged, token_key);
    // Bytes moved between engine, algorithm, seed and hash.
    let moved = [
        EngineBlock {
            engine: "s",
            algorithm: "ha256",
            ..block
        },
        EngineBlock {
            engine: "sha256",
            algorithm: "",
            ..block
        },
        EngineBlock {
            algorithm: "sha25",
            seed: EngineSeed::Fixed("6"),
            ..block
        },
        EngineBlock {
            seed: EngineSeed::Random,
            ..block
        },
        EngineBlock {
            hash: &token_key.0[..31],
            ..block
        },
    ];
    for moved in moved {
        let key = from_engine_hash(&identity(), &shard, None, &moved, Durability::Process);
        assert_ne!(key.unwrap(), bridged, "{moved:?}");
    }
}

/// Tokens, and multimodal inputs with their offsets.
type Block = (Vec<u32>, Vec<(String, i64)>);

fn chain_keys(blocks: &[Block]) -> Vec<BlockKey> {
    let mut chain = DataChain::new(&identity(), &Shard::whole(1, 1), None).unwrap();
    let push = |(tokens, extras): &Block| {
        let extras: Vec<_> = extras
            .iter()
            .map(|(identifier, offset)| Extra {
                identifier,
                offset: *offset,
            })
            .collect();
        chain.push_with(tokens, &extras)
    };
    blocks.iter().map(push).collect()
}

fn blocks() -> impl Strategy<Value = Vec<Block>> {
    let token = prop::sample::select(vec![0u32, 1, 2, u32::MAX]);
    let extra = ("[ab]{0,2}", -1i64..2);
    let block = (
        prop::collection::vec(token, 0..4),
        prop::collection::vec(extra, 0..3),
    );
    prop::collection::vec(block, 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Keys are equal exactly as far as the two sequences are, however tokens and inputs are cut into blocks.
    #[test]
    fn keys_agree_exactly_as_far_as_the_sequences(left in blocks(), right in blocks()) {
        let (left_keys, right_keys) = (chain_keys(&left), chain_keys(&right));
        let equal = left.iter().zip(&right).take_while(|(left, right)| left == right).count();
        for (i, (left, right)) in left_keys.iter().zip(&right_keys).enumerate() {
            prop_assert_eq!(left == right, i < equal);
        }
    }

    /// Going on after a known key is the same as never having stopped.
    #[test]
    fn a_chain_can_be_continued_from_its_last_key(
        tokens in prop::collection::vec(any::<u32>(), 0..64),
        cut in 0usize..16,
    ) {
        let shard = Shard::whole(1, 1);
        let all: Vec<_> = tokens.chunks_exact(4).map(|block| (block.to_vec(), Vec::new())).collect();
        let keys = chain_keys(&all);
        if let Some(last) = keys.get(cut) {
            let mut chain = DataChain::after(&identity(), &shard, None, *last).unwrap();
            prop_assert_eq!(chain.last(), Some(*last));
            for (block, key) in all[cut + 1..].iter().zip(&keys[cut + 1..]) {
                prop_assert_eq!(chain.push(&block.0), *key);
            }
        }
    }
}
