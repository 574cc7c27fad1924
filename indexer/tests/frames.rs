//! Frames captured from real engines are decoded and indexed, and the index answers for their prompts.
#![cfg(test)]

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use kvcache_core::prefix::IndexScheme;
use kvcache_core::prefix::vllm::{Algorithm, BlockHash, ExtraKey, ExtraKeyStyle, Hasher};
use kvcache_core::{EngineHash, PodName};
use kvfabric_indexer::adapter::{
    Batch, SourceEvent, SourceKind, StoredBlocks, Topic, decode_batch, encode_engine_batch,
};
use kvfabric_indexer::index::{Answer, IndexConfig, KvIndex, ORPHAN_BLOCKS_MAX, Query, SourceSpec};
use kvfabric_indexer::score::TierWeights;
use serde_json::Value;

const BLOCK_SIZE: u32 = 32;

const CAPTURES: [&str; 6] = [
    "sha256_cbor_int",
    "sha256_cbor_bytes",
    "sha256_cbor_noseed_int",
    "sha256_pickle_int",
    "xxhash_cbor_int",
    "offloading_oot_sha256_cbor_int",
];

fn golden(file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|cause| panic!("{}: {cause}", path.display()))
}

fn lines(capture: &str) -> Vec<Value> {
    let text = golden(&format!("events/{capture}.jsonl"));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn of_kind<'a>(lines: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    lines.iter().filter(move |line| line["kind"] == kind)
}

fn base64(text: &str) -> Vec<u8> {
    let digits = text
        .bytes()
        .take_while(|byte| *byte != b'=')
        .map(|byte| match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            other => panic!("{other} is no base64 digit"),
        });
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0_u32, 0);
    for digit in digits {
        bits = (bits << 6) | u32::from(digit);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

fn payload(frame: &Value) -> Vec<u8> {
    base64(frame["payload_b64"].as_str().unwrap())
}

fn u32s(list: &Value) -> Vec<u32> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|token| token.as_u64().unwrap() as u32)
        .collect()
}

/// A hash in the decoded form beside the frame: a number, or a digest in hexadecimal.
fn hash_of(value: &Value) -> Option<u64> {
    match value {
        Value::Null => None,
        Value::Number(number) => number.as_u64(),
        other => {
            let digest = hex(other["$bytes"].as_str().unwrap());
            Some(
                digest[digest.len() - 8..]
                    .iter()
                    .fold(0, |hash, byte| hash << 8 | u64::from(*byte)),
            )
        }
    }
}

fn index() -> KvIndex {
    KvIndex::new(IndexConfig {
        scheme: IndexScheme::default(),
        model: String::new(),
        block_size: BLOCK_SIZE.try_into().unwrap(),
        weights: TierWeights::default(),
        orphan_blocks_max: ORPHAN_BLOCKS_MAX,
    })
}

/// What makes a block the next one: the block before it, its tokens and its salt.
type Following = (Option<u64>, Vec<u32>, Option<String>);

/// What the decoded events say, read literally: copies by medium and hash, and which block follows which.
#[derive(Default)]
struct Literal {
    copies: BTreeMap<(String, u64), i64>,
    next: HashMap<Following, u64>,
}

impl Literal {
    fn apply(&mut self, event: &Value) {
        let hashes = || {
            event["block_hashes"]
                .as_array()
                .unwrap()
                .iter()
                .map(hash_of)
        };
        let medium = event["medium"].as_str().unwrap_or_default().to_owned();
        match event["type"].as_str().unwrap() {
            "BlockStored" => {
                let mut parent = hash_of(&event["parent_block_hash"]);
                let tokens = u32s(&event["token_ids"]);
                for (position, hash) in hashes().enumerate() {
                    let tokens = tokens
                        .chunks(BLOCK_SIZE as usize)
                        .nth(position)
                        .unwrap()
                        .to_vec();
                    let salt = event["extra_keys"][position][0].as_str().map(str::to_owned);
                    if medium == "GPU" {
                        self.next.insert((parent, tokens, salt), hash.unwrap());
                    }
                    *self
                        .copies
                        .entry((medium.clone(), hash.unwrap()))
                        .or_default() += 1;
                    parent = hash;
                }
            }
            "BlockRemoved" => {
                for hash in hashes() {
                    *self
                        .copies
                        .get_mut(&(medium.clone(), hash.unwrap()))
                        .unwrap() -= 1;
                }
            }
            "AllBlocksCleared" => self.copies.retain(|(medium, _), _| medium != "GPU"),
            other => panic!("event {other}"),
        }
    }

    /// Depth, and for how many blocks the accelerator and the host are the fastest place.
    fn depth(&self, prompt: &[u32], salt: Option<&str>) -> (u32, u32, u32) {
        let (mut parent, mut on_device, mut on_host) = (None, 0, 0);
        for (position, block) in prompt.chunks_exact(BLOCK_SIZE as usize).enumerate() {
            let salt = salt.filter(|_| position == 0).map(str::to_owned);
            let Some(&hash) = self.next.get(&(parent, block.to_vec(), salt)) else {
                break;
            };
            let holds = |medium: &str| {
                self.copies
                    .get(&(medium.to_owned(), hash))
                    .is_some_and(|copies| *copies > 0)
            };
            match (holds("GPU"), holds("CPU")) {
                (true, _) => on_device += 1,
                (false, true) => on_host += 1,
                (false, false) => break,
            }
            parent = Some(hash);
        }
        (on_device + on_host, on_device, on_host)
    }
}

/// The prompts of a capture's requests with their salts; some requests have several.
fn prompts(lines: &[Value]) -> Vec<(Vec<u32>, Option<String>)> {
    let mut prompts = Vec::new();
    for request in of_kind(lines, "request") {
        let salt = request["body"]["cache_salt"].as_str().map(str::to_owned);
        let list = &request["prompt_token_ids"];
        if list[0].is_array() {
            let several = list.as_array().unwrap();
            prompts.extend(several.iter().map(|prompt| (u32s(prompt), salt.clone())));
        } else {
            prompts.push((u32s(list), salt));
        }
    }
    prompts
}

fn decode_whole(payload: &[u8]) -> Batch {
    let batch = decode_batch(payload, SourceKind::Vllm).unwrap();
    for event in &batch.events {
        assert!(event.is_ok(), "{event:?}");
    }
    batch
}

/// After every captured frame, every prompt of the capture is looked up and compared with a literal reading.
#[test]
fn captured_frames_answer_for_their_prompts_with_the_depth_that_the_events_imply() {
    for capture in CAPTURES {
        let lines = lines(capture);
        let prompts = prompts(&lines);
        let index = index();
        let pod = PodName::new("pod0").unwrap();
        let source = index
            .add_source(SourceSpec {
                pod: pod.clone(),
                name: "engine".to_owned(),
                kind: SourceKind::Vllm,
                block_size: BLOCK_SIZE,
            })
            .unwrap();
        let mut literal = Literal::default();
        let mut deepest = 0;
        for frame in of_kind(&lines, "frame") {
            let topic = Topic::parse(
                frame["topic"].as_str().unwrap().as_bytes(),
                SourceKind::Vllm,
            );
            assert_eq!(topic.unwrap(), Topic::engine(&pod, "model"));
            for event in decode_whole(&payload(frame)).events {
                let applied = index.apply(source, &event.unwrap()).unwrap();
                assert_eq!((applied.unknown, applied.refused), (0, 0), "{capture}");
            }
            frame["decoded"][1]
                .as_array()
                .unwrap()
                .iter()
                .for_each(|event| literal.apply(event));
            for (prompt, salt) in &prompts {
                let mut keys = Vec::new();
                index.keys_of(None, salt.as_deref(), prompt, &mut keys);
                let mut answer = Answer::default();
                index.lookup(&keys, &Query::default(), &mut answer);
                let (depth, on_device, on_host) = literal.depth(prompt, salt.as_deref());
                deepest = deepest.max(depth);
                if depth == 0 {
                    assert_eq!(answer.pods, [], "{capture}, frame {}", frame["seq"]);
                    continue;
                }
                let [found] = answer.pods.as_slice() else {
                    panic!(
                        "{capture}, frame {}: {} pods",
                        frame["seq"],
                        answer.pods.len()
                    );
                };
                assert_eq!(found.pod, pod);
                assert_eq!(found.depth, depth, "{capture}, frame {}", frame["seq"]);
                assert_eq!(found.by_tier, [on_device, on_host, 0, 0]);
            }
        }
        assert_eq!(index.orphans(source), 0, "{capture}");
        assert_eq!(
            index.entries(),
            literal
                .copies
                .values()
                .filter(|copies| **copies > 0)
                .count() as u64,
            "{capture}"
        );
        assert!(deepest >= 2, "{capture} shows no depth at all");
    }
}

/// vLLM's own hash functions, run over the tokens of the decoded events, give the hashes in the same events.
#[test]
fn hashes_recomputed_from_decoded_tokens_are_those_of_the_engine() {
    for (capture, algorithm, seed) in [
        ("sha256_cbor_int", Algorithm::Sha256Cbor, Some("0")),
        ("sha256_cbor_bytes", Algorithm::Sha256Cbor, Some("0")),
        ("sha256_cbor_noseed_int", Algorithm::Sha256Cbor, None),
        ("sha256_pickle_int", Algorithm::Sha256, Some("0")),
        ("xxhash_cbor_int", Algorithm::XxhashCbor, Some("0")),
        (
            "offloading_oot_sha256_cbor_int",
            Algorithm::Sha256Cbor,
            Some("0"),
        ),
    ] {
        let hasher = match seed {
            Some(seed) => Hasher::new(algorithm, ExtraKeyStyle::Tagged, seed),
            None => Hasher::unseeded(algorithm, ExtraKeyStyle::Tagged),
        }
        .unwrap();
        let mut digests: HashMap<EngineHash, BlockHash> = HashMap::new();
        let mut checked = 0;
        for frame in of_kind(&lines(capture), "frame") {
            for event in decode_whole(&payload(frame)).events {
                let Ok(SourceEvent::Stored(blocks)) = event else {
                    continue;
                };
                checked += check_hashes(&hasher, &blocks, &mut digests, capture);
            }
        }
        assert!(checked >= 8, "{capture}: {checked} hashes");
    }
}

fn check_hashes(
    hasher: &Hasher,
    blocks: &StoredBlocks,
    digests: &mut HashMap<EngineHash, BlockHash>,
    capture: &str,
) -> usize {
    let mut parent = blocks.parent.map(|parent| digests[&parent]);
    let tokens = blocks.tokens.chunks_exact(BLOCK_SIZE as usize);
    let blocks_with_tokens = tokens.len();
    for (position, (hash, tokens)) in blocks.hashes.iter().zip(tokens).enumerate() {
        let salt = blocks.cache_salt.as_deref().filter(|_| position == 0);
        let extra: Vec<_> = salt.map(ExtraKey::CacheSalt).into_iter().collect();
        let digest = hasher.block(parent.as_ref(), tokens, &extra).unwrap();
        assert_eq!(digest.engine_hash(), *hash, "{capture}");
        digests.insert(*hash, digest);
        parent = Some(digest);
    }
    blocks_with_tokens
}

/// Replies to replay requests, in their 3- and 4-part framings, against the live frames with the same number.
#[test]
fn replayed_payloads_are_the_live_ones_and_decode_alike() {
    for capture in CAPTURES {
        let lines = lines(capture);
        let live: HashMap<u64, Vec<u8>> = of_kind(&lines, "frame")
            .map(|frame| (frame["seq"].as_u64().unwrap(), payload(frame)))
            .collect();
        let (mut replayed, mut ends) = (0, 0);
        for reply in of_kind(&lines, "replay_reply") {
            let parts = reply["parts_hex"].as_array().unwrap();
            let parts: Vec<_> = parts
                .iter()
                .map(|part| hex(part.as_str().unwrap()))
                .collect();
            let [.., sequence, payload] = parts.as_slice() else {
                panic!("{parts:?}")
            };
            let sequence = u64::from_be_bytes(sequence.as_slice().try_into().unwrap());
            if sequence == u64::MAX {
                ends += 1;
                continue;
            }
            assert_eq!(live[&sequence], *payload, "{capture}, batch {sequence}");
            decode_whole(payload);
            replayed += 1;
        }
        assert!(
            replayed > 0 && ends > 0,
            "{capture}: {replayed} replayed, {ends} ends"
        );
    }
}

/// Decoded events without salts or sessions, encoded again, against the very bytes that the engine sent.
#[test]
fn our_encoding_is_the_engines_byte_for_byte() {
    let mut compared = 0;
    for capture in CAPTURES
        .into_iter()
        .filter(|capture| !capture.contains("bytes"))
    {
        for frame in of_kind(&lines(capture), "frame") {
            let events = frame["decoded"][1].as_array().unwrap();
            let is_plain = events.iter().all(|event| {
                let extra_keys = event["extra_keys"].as_array().into_iter().flatten();
                event["session_id"].is_null() && extra_keys.into_iter().all(Value::is_null)
            });
            if !is_plain {
                continue;
            }
            let sent = payload(frame);
            let batch = decode_whole(&sent);
            let events: Vec<_> = batch
                .events
                .into_iter()
                .zip(events)
                .map(|(event, decoded)| engine_event(event.unwrap(), decoded))
                .collect();
            assert_eq!(
                encode_engine_batch(batch.timestamp, &events),
                sent,
                "{capture}"
            );
            compared += 1;
        }
    }
    assert!(compared >= 60, "{compared} frames compared");
}

/// The event as the encoder takes it; tokens that the decoder leaves out on purpose come from the frame's JSON.
fn engine_event(event: SourceEvent, decoded: &Value) -> kvcache_core::event::EngineEvent {
    use kvcache_core::event::EngineEvent;
    match event {
        SourceEvent::Stored(blocks) => EngineEvent::Stored {
            hashes: blocks.hashes,
            parent: blocks.parent,
            tokens: u32s(&decoded["token_ids"]),
            block_size: BLOCK_SIZE,
            tier: blocks.tier,
        },
        SourceEvent::Removed(blocks) => EngineEvent::Removed {
            hashes: blocks.hashes,
            tier: blocks.tier,
        },
        SourceEvent::Cleared => EngineEvent::Cleared,
    }
}

/// The same four events in the encodings of seven versions, from arrays of seven fields to maps of twelve.
#[test]
fn every_version_of_vllm_is_understood_alike() {
    let versions: Vec<Value> =
        serde_json::from_str(&golden("events/legacy_event_encodings.json")).unwrap();
    assert_eq!(versions.len(), 7);
    for version in versions {
        let name = version["version"].as_str().unwrap();
        let batch = decode_whole(&hex(version["payload_hex"].as_str().unwrap()));
        assert_eq!((batch.timestamp, batch.rank), (1.5, Some(3)), "{name}");
        let events: Vec<_> = batch.events.into_iter().map(Result::unwrap).collect();
        let [
            SourceEvent::Stored(first),
            SourceEvent::Stored(second),
            SourceEvent::Removed(removed),
            SourceEvent::Cleared,
        ] = events.as_slice()
        else {
            panic!("{name}: {events:?}");
        };
        assert_eq!(
            first.hashes,
            [EngineHash(11), EngineHash(u64::MAX)],
            "{name}"
        );
        assert_eq!(first.tokens, (0..32).collect::<Vec<_>>(), "{name}");
        assert_eq!(
            (first.parent, first.block_size, &first.lora),
            (None, 16, &None),
            "{name}"
        );
        assert_eq!(second.hashes, [EngineHash(0x1819_1a1b_1c1d_1e1f)], "{name}");
        assert_eq!(
            second.parent,
            Some(EngineHash(0xaaaa_aaaa_aaaa_aaaa)),
            "{name}"
        );
        assert_eq!(removed.hashes, [EngineHash(11)], "{name}");
        if name == "0.12.0" {
            // That version names no adapter and no extra keys: a number keeps the blocks apart, and
            // tokens are not believed.
            assert_eq!(second.lora.as_deref(), Some("#7"));
            assert!(second.tokens.is_empty());
        } else {
            assert_eq!(second.lora.as_deref(), Some("adapterA"), "{name}");
            assert_eq!(second.tokens, (1000..1016).collect::<Vec<_>>(), "{name}");
            // The block is not the first of its sequence, so the bare string cannot be a salt.
            assert_eq!(second.identifiers, [["imgA", "salt"]], "{name}");
            assert_eq!(second.cache_salt, None, "{name}");
        }
    }
}

/// llm-d's encodings, among them two that llm-d itself refuses.
#[test]
fn encodings_of_other_publishers_are_understood() {
    let vectors: Value = serde_json::from_str(&golden("keys/llm-d.json")).unwrap();
    let vectors = vectors["events_msgpack_hex"].as_object().unwrap();
    let event = |name: &str| {
        let (_, text) = vectors
            .iter()
            .find(|(key, _)| key.starts_with(name))
            .unwrap();
        let mut batch = decode_whole(&hex(text.as_str().unwrap()));
        assert_eq!((batch.timestamp, batch.events.len()), (1.5, 1), "{name}");
        (batch.rank, batch.events.remove(0).unwrap())
    };
    for (name, rank) in [
        ("array_batch_BlockStored", Some(0)),
        ("two_element_batch", None),
    ] {
        let (told, SourceEvent::Stored(blocks)) = event(name) else {
            panic!("{name}")
        };
        assert_eq!(told, rank);
        assert_eq!(blocks.hashes, [EngineHash(0x0102_0304_0506_0708)]);
        assert_eq!((blocks.tokens, blocks.block_size), (vec![1, 2, 3, 4], 4));
    }
    let (_, SourceEvent::Removed(blocks)) = event("map_event_BlockRemoved") else {
        panic!()
    };
    assert_eq!(blocks.hashes, [EngineHash(5)]);
    let (_, SourceEvent::Stored(blocks)) = event("fs_backend_bin_wrapped") else {
        panic!()
    };
    assert_eq!((blocks.hashes, blocks.parent), (vec![EngineHash(5)], None));
    assert_eq!(blocks.tier, kvcache_core::Tier::Object);
    let (_, SourceEvent::Removed(blocks)) = event("BlockRemoved_32B") else {
        panic!()
    };
    assert_eq!(blocks.hashes, [EngineHash(0x1819_1a1b_1c1d_1e1f)]);
    assert_eq!(event("AllBlocksCleared"), (Some(0), SourceEvent::Cleared));
}
