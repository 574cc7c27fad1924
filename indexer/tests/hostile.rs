//! Publishers that are none, or that mean harm: the index refuses them and follows the others.
#![cfg(test)]

mod rig;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;

use kvcache_core::Tier;
use kvfabric_indexer::adapter::encode_engine_batch;
use kvfabric_indexer::config::StaticSource;
use rig::*;

/// A greeting and a READY of a PUB socket, as libzmq's begin.
fn handshake() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    (bytes[0], bytes[9], bytes[10]) = (0xff, 0x7f, 3);
    bytes[12..16].copy_from_slice(b"NULL");
    bytes.extend(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB");
    bytes
}

/// Listens and sends the same bytes to whoever connects; tells of each connection. Connections end when the other side
/// ends them.
fn stranger(listener: TcpListener, sent: Vec<u8>) -> (SocketAddr, mpsc::Receiver<()>) {
    let address = listener.local_addr().unwrap();
    let (connected, connections) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, sent) = (stream.unwrap(), sent.clone());
            std::thread::spawn(move || {
                let _ = stream.write_all(&sent);
                let mut sink = [0; 4096];
                while stream.read(&mut sink).is_ok_and(|read| read > 0) {}
            });
            if connected.send(()).is_err() {
                return;
            }
        }
    });
    (address, connections)
}

fn configured(pod: &str, endpoint: String, replay_endpoint: Option<String>) -> StaticSource {
    StaticSource {
        pod: pod.to_owned(),
        name: "engine".to_owned(),
        kind: "vllm".to_owned(),
        endpoint,
        replay_endpoint,
        model: "m".to_owned(),
        peer_address: None,
        data_parallel_rank: None,
        data_parallel_size: None,
        pool_for: Vec::new(),
        engine_block_size: None,
        groups: Vec::new(),
    }
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// One stranger a pod, each connected to at least twice; beside them an engine whose events arrive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused_again_and_again_and_cost_nobody_else_anything() {
    let announced = |flags: u8, length: u64| {
        let mut bytes = handshake();
        bytes.push(flags);
        bytes.extend(length.to_be_bytes());
        bytes
    };
    let crowd = [handshake(), [1, 0].repeat(1_000_000)].concat();
    let garbage: Vec<u8> = (0..100_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let behaviours = [
        announced(2, 1 << 40),
        announced(3, u64::MAX),
        crowd,
        garbage.clone(),
        [handshake(), garbage].concat(),
        handshake()[..32].to_vec(),
        Vec::new(),
    ];
    let mut config = config();
    let mut strangers = Vec::new();
    for (number, sent) in behaviours.into_iter().enumerate() {
        let (address, connections) = stranger(TcpListener::bind("127.0.0.1:0").unwrap(), sent);
        config.sources.push(configured(
            &format!("stranger-{number}"),
            format!("tcp://{address}"),
            None,
        ));
        strangers.push(connections);
    }
    let engine = engine("pod-0");
    let replay = Some(engine.replay_endpoint().to_owned());
    config
        .sources
        .push(configured("pod-0", engine.endpoint().to_owned(), replay));
    let before = resident_bytes();
    let server = start(config).await;
    let client = client(&server);
    engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    assert_eq!(depth_at(&client, "pod-0", &engine).await, 1);
    tokio::task::spawn_blocking(move || {
        for (number, connections) in strangers.iter().enumerate() {
            for _ in 0..2 {
                connections
                    .recv_timeout(PATIENCE)
                    .unwrap_or_else(|_| panic!("stranger {number} was not tried again"));
            }
        }
    })
    .await
    .unwrap();
    engine.publish_engine(vec![stored(&[2], Some(1), &TOKENS[4..], Tier::Device)]);
    assert_eq!(depth_at(&client, "pod-0", &engine).await, 2);
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more");
}

/// The publisher dies and a stranger has its port, who shakes hands and then announces too much, again and again, while
/// replays are answered as before: that is no sign of life.
#[tokio::test]
async fn a_source_whose_place_a_stranger_took_is_forgotten_after_its_ttl() {
    let mut config = config();
    config.source_ttl_ms = 300;
    let server = start(config).await;
    let client = client(&server);
    let (engine, twin) = (engine("pod-0"), engine("pod-0"));
    let batch = encode_engine_batch(1.5, &[stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    engine.publish_payload(batch.clone());
    twin.publish_payload(batch);
    let address = engine.endpoint().strip_prefix("tcp://").unwrap().to_owned();
    let replay = twin.replay_endpoint().to_owned();
    let source = by_hand(engine.endpoint().to_owned(), replay);
    let _registered = join(&client, "pod-0", [source]).await;
    assert_eq!(client.status().await.unwrap().entries, 1);
    drop(engine);
    let sent = [
        handshake(),
        [[2_u8].as_slice(), &(1_u64 << 40).to_be_bytes()].concat(),
    ]
    .concat();
    let (_, connections) = stranger(TcpListener::bind(address).unwrap(), sent);
    wait_until(&client, |status| status.entries == 0).await;
    drop(connections);
}

/// A batch above the configured length is refused; one below it passes.
#[tokio::test]
async fn the_longest_message_is_configured() {
    let mut config = config();
    config.event_bytes_max = 64 << 10;
    config.source_ttl_ms = 300;
    let server = start(config).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    let _registered = join_engine(&client, "pod-0", &engine).await;
    assert_eq!(depth_at(&client, "pod-0", &engine).await, 1);
    engine.publish_payload(vec![0; 65 << 10]);
    // It is refused live and by replay, so the source cannot be followed any more.
    wait_until(&client, |status| status.entries == 0).await;
}
