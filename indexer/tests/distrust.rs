//! Snapshots that are damaged, old, of other settings or confirmed by nobody: what they say wrongly is never answered.
#![cfg(test)]

mod rig;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::event::NodeEvent;
use kvcache_core::ports::EventSink;
use kvcache_core::{ErrorKind, IndexKey, Tier};
use kvfabric_indexer::adapter::encode_engine_batch;
use kvfabric_indexer::client::{IndexClient, Prompt, SourceKind, SourceSpec};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use kvfabric_indexer::server::{ServerConfig, serve};
use kvfabric_proto::v1;
use rig::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use zeromq::{PubSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

/// A relay before a publisher's socket. Each connection has a gate: while it is shut, nothing that the publisher says gets
/// through, and nobody can tell that from silence.
struct Relay {
    endpoint: String,
    gates: Arc<Mutex<Vec<watch::Sender<bool>>>>,
    /// Whether the gates of connections to come are open.
    opens: Arc<AtomicBool>,
}

impl Relay {
    async fn before(endpoint: &str) -> Self {
        let to: SocketAddr = endpoint.strip_prefix("tcp://").unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("tcp://{}", listener.local_addr().unwrap());
        let gates = Arc::new(Mutex::new(Vec::new()));
        let opens = Arc::new(AtomicBool::new(true));
        tokio::spawn({
            let (gates, opens) = (gates.clone(), opens.clone());
            async move {
                while let Ok((mut here, _)) = listener.accept().await {
                    let gate = watch::Sender::new(opens.load(Ordering::SeqCst));
                    let told = gate.subscribe();
                    gates.lock().unwrap().push(gate);
                    tokio::spawn(async move {
                        let mut there = TcpStream::connect(to).await.unwrap();
                        let (from_there, mut to_there) = there.split();
                        let (mut from_here, to_here) = here.split();
                        tokio::select! {
                            () = pass(from_there, to_here, told) => {}
                            _ = copy(&mut from_here, &mut to_there) => {}
                        }
                    });
                }
            }
        });
        Self {
            endpoint,
            gates,
            opens,
        }
    }

    /// Shuts the gates that are there, and those to come too.
    fn shut(&self) {
        self.opens.store(false, Ordering::SeqCst);
        for gate in &*self.gates.lock().unwrap() {
            gate.send_replace(false);
        }
    }

    /// Opens the gates of all connections that came after the first so many, and of those to come.
    fn open_but(&self, first: usize) {
        self.opens.store(true, Ordering::SeqCst);
        for gate in &self.gates.lock().unwrap()[first..] {
            gate.send_replace(true);
        }
    }

    fn connections(&self) -> usize {
        self.gates.lock().unwrap().len()
    }
}

async fn pass(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, mut gate: watch::Receiver<bool>) {
    let mut bytes = [0; 4096];
    loop {
        let Ok(read) = from.read(&mut bytes).await else {
            return;
        };
        let is_open = gate.wait_for(|is_open| *is_open).await.is_ok();
        if read == 0 || !is_open || to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}

/// An engine behind relays, of which a first index knows two blocks of [`LONG`]; then that index hears nothing more, and the
/// engine goes on.
struct Aged {
    engine: Publisher,
    events: Relay,
    replay: Relay,
}

/// An engine that keeps some batches for replay, as many as it has published while it is heard.
fn soon_forgetful() -> Publisher {
    let mut config = PublisherConfig::new(pod("pod-0"), "m", Stream::Engine);
    config.replay_bytes_max = 1000;
    Publisher::bind(config).unwrap()
}

/// Another prompt, of one block.
const OTHER: [u32; 4] = [71, 72, 73, 74];

impl Aged {
    async fn new(engine: Publisher) -> Self {
        Self {
            events: Relay::before(engine.endpoint()).await,
            replay: Relay::before(engine.replay_endpoint()).await,
            engine,
        }
    }

    fn source(&self) -> SourceSpec {
        by_hand(self.events.endpoint.clone(), self.replay.endpoint.clone())
    }

    /// Teaches the index two blocks.
    async fn teach(&self, client: &IndexClient) -> kvfabric_indexer::client::Registered {
        let registered = join(client, "pod-0", [self.source()]).await;
        publish_block(&self.engine, 1);
        assert_eq!(depth_of_long(client, at(&self.engine)).await, 1);
        publish_block(&self.engine, 2);
        assert_eq!(depth_of_long(client, at(&self.engine)).await, 2);
        registered
    }

    /// From here on nobody hears of anything; returns how many connections for replays there were.
    fn go_on_unheard(&self) -> usize {
        self.events.shut();
        self.replay.shut();
        let removed = vec![removed(&[2], Tier::Device)];
        self.engine.publish_engine(removed);
        // More than the forgetful one keeps.
        for filler in 100..120 {
            let there = stored(&[filler], None, &[filler as u32; 4], Tier::Device);
            let gone = rig::removed(&[filler], Tier::Device);
            self.engine.publish_engine(vec![there, gone]);
        }
        let stored = stored(&[7], None, &OTHER, Tier::Device);
        self.engine.publish_engine(vec![stored]);
        self.replay.connections()
    }

    /// The index has taken up what was so before, and answers nothing until the publisher was asked; then it answers
    /// `depth` blocks of [`LONG`] and the other prompt.
    async fn is_asked_first(&self, replica: &IndexClient, before: usize, depth: u32) {
        wait_until(replica, |status| {
            status.not_serving_reason.contains("0 of 1 sources") && status.entries == 2
        })
        .await;
        for _ in 0..10 {
            let asked = question(Prompt::Tokens(LONG.to_vec()));
            let error = replica.lookup(asked).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PeerLost, "{error}");
        }
        self.events.open_but(before);
        self.replay.open_but(before);
        wait_until_serving(replica).await;
        // At once, without waiting for any position.
        assert_eq!(depth_of_long(replica, Vec::new()).await, depth);
        let asked = question(Prompt::Tokens(OTHER.to_vec()));
        let answer = replica.lookup(asked).await.unwrap();
        assert_eq!(answer.pods.len(), 1, "what was added is replayed");
        let status = replica.status().await.unwrap();
        assert_eq!(status.entries, u64::from(depth) + 1);
    }
}

/// The peer has not heard that a block was removed and another stored, and does not know that; the replica that begins from
/// it answers neither before nor after it has asked what the peer would.
#[tokio::test]
async fn a_stale_peer_is_gone_beyond_before_anything_is_answered() {
    let aged = Aged::new(engine("pod-0")).await;
    let first = start(config()).await;
    let stale = client(&first);
    let _registered = aged.teach(&stale).await;
    let before = aged.go_on_unheard();
    assert_eq!(depth_of_long(&stale, Vec::new()).await, 2, "it is stale");
    let second = start(with_peer(&first)).await;
    aged.is_asked_first(&client(&second), before, 1).await;
    assert_eq!(depth_of_long(&stale, Vec::new()).await, 2, "it still is");
}

/// The same, and the engine has forgotten what happened in between: what the peer said of it is worth nothing.
#[tokio::test]
async fn a_stale_peer_of_a_publisher_that_has_forgotten_is_not_believed() {
    let aged = Aged::new(soon_forgetful()).await;
    let first = start(config()).await;
    let stale = client(&first);
    let _registered = aged.teach(&stale).await;
    let before = aged.go_on_unheard();
    let second = start(with_peer(&first)).await;
    aged.is_asked_first(&client(&second), before, 0).await;
}

/// An index is away while a block is removed and another stored; what it answers then of its old file.
async fn come_back_with_an_old_file(engine: Publisher, depth: u32) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.snapshot");
    let aged = Aged::new(engine).await;
    let first = start(with_file(&path)).await;
    let asking = client(&first);
    wait_until_serving(&asking).await;
    let registered = aged.teach(&asking).await;
    first.shutdown(PATIENCE).await.unwrap();
    drop(registered);
    let before = aged.go_on_unheard();
    let second = start(with_file(&path)).await;
    aged.is_asked_first(&client(&second), before, depth).await;
}

/// The engine tells what happened in between.
#[tokio::test]
async fn an_old_file_is_gone_beyond_before_anything_is_answered() {
    come_back_with_an_old_file(engine("pod-0"), 1).await;
}

/// The engine has forgotten it.
#[tokio::test]
async fn an_old_file_of_a_publisher_that_has_forgotten_is_not_believed() {
    come_back_with_an_old_file(soon_forgetful(), 0).await;
}

/// Nobody is left whom the index could ask.
#[tokio::test]
async fn what_nobody_confirms_in_time_is_dropped_before_anything_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.snapshot");
    let engine = engine("pod-0");
    let first = start(with_file(&path)).await;
    let client = client(&first);
    wait_until_serving(&client).await;
    let registered = join_engine(&client, "pod-0", &engine).await;
    publish_block(&engine, 1);
    assert_eq!(depth_of_long(&client, at(&engine)).await, 1);
    first.shutdown(PATIENCE).await.unwrap();
    drop((registered, engine));

    let mut config = with_file(&path);
    config.bootstrap_deadline_ms = 50;
    // It is not for this that anything is dropped.
    config.source_ttl_ms = 600_000;
    let second = start(config).await;
    let replica = rig::client(&second);
    wait_until_serving(&replica).await;
    let status = replica.status().await.unwrap();
    assert_eq!(status.entries, 0);
    // No registration tells that the pod is gone: its sources do.
    wait_until(&replica, |status| status.pods.is_empty()).await;
}

/// Answers the first index as publishers do, and any later one with the first batch over and over: that is older than what
/// it was asked for, and no end of a replay.
async fn answer_slowly(mut replay: RouterSocket, batches: [Bytes; 2]) {
    let (mut first, mut later) = (None, None);
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    loop {
        let request = tokio::select! {
            request = replay.recv() => request.unwrap().into_vec(),
            _ = ticks.tick() => {
                if let Some(peer) = &later {
                    reply(&mut replay, peer, 0, batches[0].clone()).await;
                }
                continue;
            }
        };
        let peer = request[0].clone();
        if *first.get_or_insert_with(|| peer.clone()) != peer {
            later = Some(peer);
            continue;
        }
        let from = u64::from_be_bytes(request[2].as_ref().try_into().unwrap());
        for number in from..2 {
            let payload = batches[number as usize].clone();
            reply(&mut replay, &peer, number, payload).await;
        }
        reply(&mut replay, &peer, u64::MAX, Bytes::new()).await;
    }
}

async fn reply(replay: &mut RouterSocket, peer: &Bytes, number: u64, payload: Bytes) {
    let mut message = ZmqMessage::from(peer.clone());
    let number = Bytes::copy_from_slice(&number.to_be_bytes());
    for frame in [Bytes::new(), number, payload] {
        message.push_back(frame);
    }
    // A reader may be gone.
    let _ = replay.send(message).await;
}

/// The publisher is there and says something all the time, but never what would confirm the snapshot: it has as long as
/// one that says nothing.
#[tokio::test]
async fn what_a_publisher_does_not_get_round_to_confirming_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.snapshot");
    let mut events = PubSocket::new();
    let endpoint = events.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let mut replay = RouterSocket::new();
    let replay_endpoint = replay.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let batch = |hash, tokens| {
        let event = stored(&[hash], None, tokens, Tier::Device);
        Bytes::from(encode_engine_batch(1.0, &[event]))
    };
    let batches = [batch(9, &OTHER[..]), batch(1, &LONG[..4])];
    let answering = tokio::spawn(answer_slowly(replay, batches));
    let first = start(with_file(&path)).await;
    let asking = client(&first);
    wait_until_serving(&asking).await;
    let registered = join(&asking, "pod-0", [by_hand(endpoint, replay_endpoint)]).await;
    assert_eq!(depth_of_long(&asking, Vec::new()).await, 1);
    first.shutdown(PATIENCE).await.unwrap();
    drop(registered);

    let mut config = with_file(&path);
    config.bootstrap_deadline_ms = 300;
    config.source_ttl_ms = 600_000;
    let second = start(config).await;
    let replica = client(&second);
    wait_until_serving(&replica).await;
    assert_eq!(depth_of_long(&replica, Vec::new()).await, 0);
    answering.abort();
}

/// Where the pieces of a snapshot file begin, and the middle of each.
fn places(file: &[u8]) -> Vec<usize> {
    let (mut begin, mut places) = (8, vec![0, 4]);
    while begin < file.len() {
        let length: [u8; 4] = file[begin..begin + 4].try_into().unwrap();
        let end = begin + 8 + u32::from_le_bytes(length) as usize;
        places.extend([begin, begin.midpoint(end), end - 1]);
        begin = end;
    }
    assert_eq!(begin, file.len());
    places
}

async fn takes_up_nothing(path: &Path, what: &str) {
    let server = start(with_file(path)).await;
    let replica = client(&server);
    wait_until_serving(&replica).await;
    let status = replica.status().await.unwrap();
    assert_eq!((status.pods.len(), status.blocks), (0, 0), "{what}");
    server.shutdown(PATIENCE).await.unwrap();
    let written = std::fs::read(path).unwrap();
    assert!(written.len() > 16, "{what}: a whole one did not replace it");
}

/// A file of two pods that ends before, within and after each of its pieces but the last: taken as if there were none.
#[tokio::test]
async fn a_damaged_file_is_not_taken_up_in_part() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.snapshot");
    let engines = [engine("pod-0"), engine("pod-1")];
    let first = start(with_file(&path)).await;
    let asking = client(&first);
    wait_until_serving(&asking).await;
    let mut kept = Vec::new();
    for (number, engine) in engines.iter().enumerate() {
        publish_block(engine, 1);
        let registered = join_engine(&asking, &format!("pod-{number}"), engine).await;
        kept.push(registered);
    }
    assert_eq!(asking.status().await.unwrap().entries, 2);
    first.shutdown(PATIENCE).await.unwrap();
    drop(kept);

    let whole = std::fs::read(&path).unwrap();
    for place in places(&whole) {
        std::fs::write(&path, &whole[..place]).unwrap();
        takes_up_nothing(&path, &format!("cut at {place} of {}", whole.len())).await;
    }
}

/// A path that was mistyped: a server that kept its snapshot there would lose somebody that file.
#[tokio::test]
async fn what_is_no_snapshot_is_not_replaced_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notes");
    for content in [&b"KV"[..], b"KVFINDEX, and what follows is nothing", b""] {
        std::fs::write(&path, content).unwrap();
        takes_up_nothing(&path, "the beginning of a snapshot").await;
    }
    for content in [&b"x"[..], b"KVFINDEY", b"no snapshot"] {
        std::fs::write(&path, content).unwrap();
        assert_refused(&path, "is another file than a snapshot").await;
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
    assert_refused(folder.path(), "is no regular file").await;
    let missing = folder.path().join("missing/index.snapshot");
    assert_refused(&missing, "lies in a folder that does not exist").await;
}

/// A file that came there after the start: what would have been written is lost, and not the file.
#[tokio::test]
async fn a_file_that_took_the_snapshots_place_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.snapshot");
    let server = start(with_file(&path)).await;
    wait_until_serving(&client(&server)).await;
    std::fs::write(&path, b"somebody's").unwrap();
    server.shutdown(PATIENCE).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"somebody's");
}

async fn assert_refused(path: &Path, why: &str) {
    let error = serve(with_file(path)).await.map(drop).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
    let place = path.display().to_string();
    for part in ["snapshot_path", &place, why] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// Another scheme, another block size, another protocol: each refused with both named, and the replica begins empty.
#[tokio::test]
async fn a_snapshot_of_other_settings_is_refused() {
    let first = start(config()).await;
    let engine = engine("pod-0");
    publish_block(&engine, 1);
    // Of what is shared no pod could tell that it does not fit.
    let node = node("pod-0", 1);
    node.publish(vec![NodeEvent::Stored {
        key: IndexKey(7),
        parent: None,
        tier: Tier::Object,
    }]);
    let client = client(&first);
    let sources = [
        engine.source("engine", SourceKind::Vllm),
        node.source("node", SourceKind::Node),
    ];
    let _registered = join(&client, "pod-0", sources).await;
    assert_eq!(client.status().await.unwrap().blocks, 2);
    for change in [
        |config: &mut ServerConfig| config.block_size = 8,
        |config: &mut ServerConfig| config.key_scheme = "xxh3:1".to_owned(),
    ] {
        let mut other = with_peer(&first);
        change(&mut other);
        let second = start(other).await;
        let replica = rig::client(&second);
        wait_until_serving(&replica).await;
        let status = replica.status().await.unwrap();
        assert_eq!((status.pods.len(), status.blocks), (0, 0));
    }
    let request = v1::SnapshotRequest {
        protocol_version: 77,
        format: 2,
    };
    let status = raw(&first).await.snapshot(request).await.unwrap_err();
    assert!(status.message().contains("77"), "{status}");
}

/// Nobody listens at the first address; the second has what is asked for.
#[tokio::test]
async fn a_peer_that_is_not_there_is_passed_over() {
    let first = start(config()).await;
    let engine = node("pod-0", 1);
    let client = client(&first);
    let _registered = join(&client, "pod-0", [engine.source("node", SourceKind::Node)]).await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = free.local_addr().unwrap().to_string();
    drop(free);
    let mut config = with_peer(&first);
    config.bootstrap_peers.insert(0, nobody);
    let second = start(config).await;
    let replica = rig::client(&second);
    wait_until_serving(&replica).await;
    assert_eq!(replica.status().await.unwrap().pods.len(), 1);
}
