//! What happens to the others, and to what is known, when one source floods, falls silent, or is lied about.
#![cfg(test)]

mod rig;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvcache_core::Tier;
use kvfabric_indexer::client::SourceKind;
use kvfabric_indexer::index::ORPHAN_BLOCKS_MAX;
use kvfabric_indexer::publisher::Publisher;
use kvfabric_proto::v1;
use kvfabric_proto::v1::index_client::IndexClient as Grpc;
use kvfabric_proto::v1::snapshot_piece::Piece;
use prost::Message;
use rig::*;
use tokio::io::{AsyncReadExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::Endpoint;

/// Blocks of a large index, as events of some thousand blocks each.
const MANY: u64 = 100_000;

fn publish_many(engine: &Publisher) {
    for first in (0..MANY).step_by(4000) {
        let hashes: Vec<u64> = (1000 + first..1000 + first + 4000).collect();
        let tokens: Vec<u32> = (0..4000 * BLOCK)
            .map(|token| token + first as u32 * 7)
            .collect();
        engine.publish_engine(vec![stored(&hashes, None, &tokens, Tier::Device)]);
    }
}

/// One engine publishes without a pause for as long as the test lasts; on a runtime of one thread the other engine's events
/// are applied and lookups answered all the same.
#[tokio::test]
async fn a_flood_of_one_source_holds_up_neither_the_others_nor_lookups() {
    let server = start(config()).await;
    let client = client(&server);
    let (flood, calm) = (Arc::new(engine("flood")), engine("calm"));
    let mut kept = Vec::new();
    for (name, engine) in [("flood", flood.as_ref()), ("calm", &calm)] {
        let registered = join_engine(&client, name, engine).await;
        kept.push(registered);
    }
    let is_over = Arc::new(AtomicBool::new(false));
    let flooding = std::thread::spawn({
        let (flood, is_over) = (flood.clone(), is_over.clone());
        move || {
            let hashes: Vec<u64> = (1000..5000).collect();
            let tokens: Vec<u32> = (0..4000 * BLOCK).collect();
            while !is_over.load(Ordering::Relaxed) {
                flood.publish_engine(vec![
                    stored(&hashes, None, &tokens, Tier::Device),
                    removed(&hashes, Tier::Device),
                ]);
            }
        }
    });
    let applied = |status: &v1::StatusResponse| status.events_applied;
    let mut last = 0;
    for round in 0..10 {
        calm.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
        assert_eq!(depth_at(&client, "calm", &calm).await, 1, "round {round}");
        calm.publish_engine(vec![removed(&[1], Tier::Device)]);
        assert_eq!(depth_at(&client, "calm", &calm).await, 0, "round {round}");
        let before = last;
        wait_until(&client, |status| applied(status) > before + 2).await;
        last = applied(&client.status().await.unwrap());
    }
    is_over.store(true, Ordering::Relaxed);
    flooding.join().unwrap();
    // What the flood lost on its way has been asked for again, or begun anew: it ends where its publisher is.
    depth_at(&client, "flood", &flood).await;
    assert_eq!(client.status().await.unwrap().entries, 0);
}

/// More blocks than may wait say that they follow one that nobody has seen; then it comes.
#[tokio::test]
async fn blocks_without_their_parent_wait_within_a_bound_and_the_rest_are_counted() {
    const TOO_MANY: u64 = 1000;
    let mut config = config();
    config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
    let server = start(config).await;
    let client = client(&server);
    let engine = engine("pod-0");
    let _registered = join_engine(&client, "pod-0", &engine).await;
    // The prompt's second block first, then others.
    engine.publish_engine(vec![stored(&[2], Some(1), &TOKENS[4..], Tier::Device)]);
    let most = ORPHAN_BLOCKS_MAX as u64;
    for first in (1..most + TOO_MANY).step_by(500) {
        let last = (first + 500).min(most + TOO_MANY);
        let orphan = |number| {
            stored(
                &[1_000_000 + number],
                Some(1),
                &[number as u32; 4],
                Tier::Device,
            )
        };
        engine.publish_engine((first..last).map(orphan).collect());
    }
    assert_eq!(depth_at(&client, "pod-0", &engine).await, 0);
    let status = client.status().await.unwrap();
    assert_eq!(status.pods[0].sources[0].orphans, most);
    assert_eq!(
        metric(&server, "kvfabric_indexer_orphans_refused_total").await,
        TOO_MANY
    );
    engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    assert_eq!(depth_at(&client, "pod-0", &engine).await, 2);
    let status = client.status().await.unwrap();
    assert_eq!(
        (status.pods[0].sources[0].orphans, status.entries),
        (0, most + 1)
    );
}

/// Engines die one after the other, each until its time to live is over; one that is connected says nothing all the while.
#[tokio::test]
async fn idle_is_not_gone() {
    let mut config = config();
    config.source_ttl_ms = 200;
    let server = start(config).await;
    let client = client(&server);
    let idle = engine("idle");
    let join = async |name: &str, engine: &Publisher| {
        engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
        join_engine(&client, name, engine).await
    };
    let _kept = join("idle", &idle).await;
    for name in ["first", "second", "third", "fourth"] {
        let dead = engine(name);
        let registered = join(name, &dead).await;
        assert_eq!(client.status().await.unwrap().entries, 2);
        drop(dead);
        wait_until(&client, |status| {
            let pod = status.pods.iter().find(|pod| pod.pod == name);
            pod.is_some_and(|pod| pod.entries == 0)
        })
        .await;
        drop(registered);
        wait_until(&client, |status| status.pods.len() == 1).await;
    }
    assert_eq!(depth_at(&client, "idle", &idle).await, 1);
    let status = client.status().await.unwrap();
    let idle = &status.pods[0].sources[0];
    assert_eq!((idle.connected, idle.resyncs), (true, 0));
}

/// As many readers as there may be take one piece of a snapshot and no more: the next one is refused, until they are cut
/// off.
#[tokio::test]
async fn readers_of_snapshots_that_stop_are_cut_off() {
    let mut config = config();
    config.reader_timeout_ms = 200;
    let server = start(config).await;
    let client = client(&server);
    let engine = engine("pod-0");
    publish_many(&engine);
    let _registered = join_engine(&client, "pod-0", &engine).await;
    assert_eq!(client.status().await.unwrap().entries, MANY);
    let request = v1::SnapshotRequest {
        protocol_version: kvfabric_proto::PROTOCOL_VERSION,
        format: 2,
    };
    // Small windows, so that the pieces wait at the server.
    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc_address())).unwrap();
    let channel = endpoint.initial_stream_window_size(1 << 16);
    let mut raw = Grpc::new(channel.connect().await.unwrap());
    let mut stopped = Vec::new();
    for _ in 0..2 {
        stopped.push(raw.snapshot(request).await.unwrap().into_inner());
    }
    let reading = async {
        loop {
            let mut stream = match raw.snapshot(request).await {
                Ok(answer) => answer.into_inner(),
                Err(status) => {
                    assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{status}");
                    tokio::task::yield_now().await;
                    continue;
                }
            };
            let mut last = None;
            while let Some(piece) = stream.message().await.unwrap() {
                last = piece.piece;
            }
            return last;
        }
    };
    let last = tokio::time::timeout(PATIENCE, reading)
        .await
        .expect("no room is ever free again");
    assert!(matches!(last, Some(Piece::End(_))), "{last:?}");
    for mut stream in stopped {
        let mut is_whole = false;
        while let Ok(Some(piece)) = stream.message().await {
            is_whole = matches!(piece.piece, Some(Piece::End(_)));
        }
        assert!(
            !is_whole,
            "a stopped reader had everything in its windows: publish more"
        );
    }
}

/// The pieces of a snapshot file, and a file of pieces.
fn read_pieces(path: &Path) -> Vec<v1::SnapshotPiece> {
    let bytes = std::fs::read(path).unwrap();
    let (mut rest, mut pieces) = (&bytes[8..], Vec::new());
    while !rest.is_empty() {
        let length = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
        pieces.push(v1::SnapshotPiece::decode(&rest[8..8 + length]).unwrap());
        rest = &rest[8 + length..];
    }
    pieces
}

fn write_pieces(path: &Path, pieces: &[v1::SnapshotPiece]) {
    let mut bytes = b"KVFINDEX".to_vec();
    for piece in pieces {
        let payload = piece.encode_to_vec();
        let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &payload) as u32;
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(sum.to_le_bytes());
        bytes.extend(payload);
    }
    std::fs::write(path, bytes).unwrap();
}

type Change = fn(&mut Vec<v1::SnapshotPiece>);

fn each(pieces: &mut [v1::SnapshotPiece], change: impl Fn(&mut Piece)) {
    for piece in pieces {
        change(piece.piece.as_mut().unwrap());
    }
}

/// Snapshots that say something that is not so, by what that is.
fn lies() -> [(&'static str, Change); 9] {
    [
        ("another last batch", |pieces| {
            each(pieces, |piece| {
                if let Piece::Source(source) = piece {
                    source.last_batch = vec![7; 16].into();
                }
            });
        }),
        ("further than the publisher is", |pieces| {
            each(pieces, |piece| {
                if let Piece::Source(source) = piece {
                    source.next_sequence += 5;
                }
            });
        }),
        (
            "less far than it is, with blocks that were removed",
            |pieces| {
                each(pieces, |piece| {
                    if let Piece::Source(source) = piece {
                        source.next_sequence -= 1;
                    }
                });
            },
        ),
        ("another format", |pieces| {
            each(pieces, |piece| {
                if let Piece::Start(start) = piece {
                    start.format = 77;
                }
            });
        }),
        ("another block size", |pieces| {
            each(pieces, |piece| {
                if let Piece::Start(start) = piece {
                    start.block_size = 8;
                }
            });
        }),
        ("an image is missing", |pieces| {
            pieces.retain(|piece| !matches!(piece.piece, Some(Piece::Image(_))));
        }),
        ("the end is missing", |pieces| {
            pieces.pop();
        }),
        ("a pod twice", |pieces| {
            let at = pieces
                .iter()
                .position(|piece| matches!(piece.piece, Some(Piece::Pod(_))));
            let pod = pieces[at.unwrap()].clone();
            pieces.insert(at.unwrap(), pod);
        }),
        ("columns of different lengths", |pieces| {
            each(pieces, |piece| {
                if let Piece::Image(image) = piece {
                    image.copies.pop();
                }
            });
        }),
    ]
}

/// Each file is whole by its checksums and says something that is not so; what is answered then is what the publisher says.
#[tokio::test]
async fn a_snapshot_that_lies_is_found_out_before_anything_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.snapshot");
    let engine = engine("pod-0");
    let registration = registration("pod-0", [engine.source("engine", SourceKind::Vllm)]);
    let first = start(with_file(&path)).await;
    let asking = client(&first);
    wait_until(&asking, |status| status.serving).await;
    let registered = asking.register(registration.clone());
    registered.ready(PATIENCE).await.unwrap();
    engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
    engine.publish_engine(vec![stored(&[9], None, &[9; 4], Tier::Device)]);
    assert_eq!(depth_at(&asking, "pod-0", &engine).await, 2);
    first.shutdown(PATIENCE).await.unwrap();
    drop(registered);
    // What the publisher says meanwhile: the second block is gone.
    engine.publish_engine(vec![removed(&[2], Tier::Device)]);
    let truth = read_pieces(&path);
    for (name, lie) in lies() {
        let mut pieces = truth.clone();
        lie(&mut pieces);
        let path = folder.path().join("lie.snapshot");
        write_pieces(&path, &pieces);
        let server = start(with_file(&path)).await;
        let asking = client(&server);
        wait_until(&asking, |status| status.serving).await;
        let registered = asking.register(registration.clone());
        registered.ready(PATIENCE).await.unwrap();
        assert_eq!(depth_at(&asking, "pod-0", &engine).await, 1, "{name}");
        let status = asking.status().await.unwrap();
        assert_eq!((status.pods.len(), status.entries), (1, 2), "{name}");
        server.shutdown(PATIENCE).await.unwrap();
    }
}

/// A relay before a peer that lets so many bytes of its answer through and then closes, or stops.
async fn relay(to: std::net::SocketAddr, bytes: u64, stops: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut here, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut there = TcpStream::connect(to).await.unwrap();
                let (mut from_there, mut to_there) = there.split();
                let (mut from_here, mut to_here) = here.split();
                let answering = async {
                    let mut some = (&mut from_there).take(bytes);
                    let _ = copy(&mut some, &mut to_here).await;
                    if stops {
                        std::future::pending::<()>().await;
                    }
                };
                tokio::select! {
                    () = answering => {}
                    _ = copy(&mut from_here, &mut to_there) => {}
                }
            });
        }
    });
    address
}

/// The peer's answer is cut at several places, once without a close; the replica begins without it, or from the next peer.
#[tokio::test]
async fn a_peer_whose_snapshot_is_cut_short_is_passed_over() {
    let first = start(config()).await;
    let asking = client(&first);
    let engine = engine("pod-0");
    engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
    publish_many(&engine);
    let registration = registration("pod-0", [engine.source("engine", SourceKind::Vllm)]);
    let registered = asking.register(registration);
    registered.ready(PATIENCE).await.unwrap();
    assert_eq!(depth_at(&asking, "pod-0", &engine).await, 2);
    for (bytes, stops) in [
        (0, false),
        (100, false),
        (20_000, false),
        (200_000, false),
        (20_000, true),
    ] {
        let mut other = config();
        if stops {
            // Nothing more comes, so the deadline decides.
            other.bootstrap_deadline_ms = 300;
        }
        other.bootstrap_peers = vec![relay(first.grpc_address(), bytes, stops).await];
        let second = start(other).await;
        let replica = client(&second);
        wait_until(&replica, |status| status.serving).await;
        let status = replica.status().await.unwrap();
        assert_eq!(
            (status.pods.len(), status.entries),
            (0, 0),
            "cut at {bytes}"
        );
    }
    let mut other = config();
    other.bootstrap_peers = vec![
        relay(first.grpc_address(), 20_000, false).await,
        first.grpc_address().to_string(),
    ];
    let second = start(other).await;
    let replica = client(&second);
    wait_until(&replica, |status| status.serving).await;
    assert_eq!(replica.status().await.unwrap().entries, MANY + 2);
}
