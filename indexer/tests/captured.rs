//! Frames captured from a real vLLM, sent through real sockets, must answer for the prompts that caused them.
#![cfg(test)]

mod rig;

use std::path::PathBuf;

use kvfabric_indexer::client::{Prompt, SourceKind, SourcePosition};
use rig::*;
use serde_json::Value;

/// Tokens a block in the captures.
const CAPTURED_BLOCK: u32 = 32;

fn capture(name: &str) -> Vec<Value> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/events")
        .join(name);
    let text = std::fs::read_to_string(&path).expect("capture");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for digit in text.bytes().filter(|digit| *digit != b'=') {
        let value = DIGITS
            .iter()
            .position(|known| *known == digit)
            .expect("a digit") as u32;
        (bits, count) = (bits << 6 | value, count + 6);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}

fn tokens(list: &Value) -> Vec<u32> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|token| token.as_u64().unwrap() as u32)
        .collect()
}

/// The prompts of a request: one, or a list of them.
fn prompts(request: &Value) -> Vec<Vec<u32>> {
    let prompt = &request["body"]["prompt"];
    match prompt.as_array() {
        Some(list) if list.first().is_some_and(Value::is_array) => {
            list.iter().map(tokens).collect()
        }
        Some(_) => vec![tokens(prompt)],
        None => Vec::new(),
    }
}

/// An engine that has just answered a request holds every full block of its prompt: the capture is published frame by
/// frame, and after each request its prompts are looked up. Salted prompts are found with their salt only.
#[tokio::test]
async fn captured_frames_answer_for_the_prompts_that_caused_them() {
    for name in [
        "sha256_cbor_int",
        "sha256_cbor_bytes",
        "sha256_pickle_int",
        "xxhash_cbor_int",
        "sha256_cbor_noseed_int",
    ] {
        let mut config = config();
        config.block_size = CAPTURED_BLOCK;
        let server = start(config).await;
        let client = client(&server);
        let engine = engine("pod0");
        let mut registration = registration("pod0", [engine.source("engine", SourceKind::Vllm)]);
        registration.block_size = CAPTURED_BLOCK;
        let registered = client.register(registration);
        registered.ready(PATIENCE).await.unwrap();

        let (mut frames, mut asked, mut salted) = (0, 0, 0);
        for line in capture(&format!("{name}.jsonl")) {
            if line["kind"] == "frame" {
                assert_eq!(line["seq"], frames, "{name}: the capture has a hole");
                engine.publish_payload(base64(line["payload_b64"].as_str().unwrap()));
                frames += 1;
            }
            if line["kind"] != "request" {
                continue;
            }
            for prompt in prompts(&line) {
                let blocks = prompt.len() as u32 / CAPTURED_BLOCK;
                let mut question = question(Prompt::Tokens(prompt));
                question.min_position = vec![SourcePosition::new(
                    &pod("pod0"),
                    "engine",
                    engine.position(),
                )];
                if let Some(salt) = line["body"]["cache_salt"].as_str() {
                    question.cache_salt = salt.to_owned();
                    salted += 1;
                }
                let answer = client.lookup(question).await.unwrap();
                let depth = answer.pods.first().map_or(0, |pod| pod.depth);
                assert_eq!(
                    depth, blocks,
                    "{name}: request {asked} after frame {frames}"
                );
                asked += 1;
            }
        }
        let status = client.status().await.unwrap();
        assert_eq!(status.events_rejected, 0, "{name}");
        assert_eq!(status.pods[0].sources[0].gaps, 0, "{name}");
        assert!(
            frames >= 8 && asked >= 5,
            "{name}: {frames} frames, {asked} prompts"
        );
        assert!(salted > 0 || name == "sha256_cbor_noseed_int" || !name.starts_with("sha256_cbor"));
    }
}

/// The whole capture is there before anybody listens, so all of it comes through the replay socket; the last request
/// of the capture comes after a reset and two evictions.
#[tokio::test]
async fn a_replayed_capture_gives_the_same_index_as_the_live_one() {
    let mut config = config();
    config.block_size = CAPTURED_BLOCK;
    let server = start(config).await;
    let client = client(&server);
    let (live, late) = (engine("live"), engine("late"));
    let lines = capture("sha256_cbor_int.jsonl");
    let payloads = || {
        lines
            .iter()
            .filter(|line| line["kind"] == "frame")
            .map(|line| base64(line["payload_b64"].as_str().unwrap()))
    };
    payloads().for_each(|payload| {
        late.publish_payload(payload);
    });
    let mut kept = Vec::new();
    for (name, engine) in [("live", &live), ("late", &late)] {
        let source = engine.source("engine", SourceKind::Vllm);
        let mut registration = registration(name, [source]);
        registration.block_size = CAPTURED_BLOCK;
        let registered = client.register(registration);
        registered.ready(PATIENCE).await.unwrap();
        kept.push(registered);
    }
    payloads().for_each(|payload| {
        live.publish_payload(payload);
    });
    let positions: Vec<_> = [("live", &live), ("late", &late)]
        .map(|(name, engine)| SourcePosition::new(&pod(name), "engine", engine.position()))
        .into();
    let mut found = 0;
    for prompt in lines
        .iter()
        .filter(|line| line["kind"] == "request")
        .flat_map(prompts)
    {
        let mut question = question(Prompt::Tokens(prompt));
        question.min_position = positions.clone();
        let answer = client.lookup(question).await.unwrap();
        let depths: Vec<u32> = answer.pods.iter().map(|pod| pod.depth).collect();
        assert!(
            depths.is_empty() || (depths.len() == 2 && depths[0] == depths[1]),
            "{depths:?}"
        );
        found += depths.len();
    }
    assert!(found > 0);
}
