//! Engines that connect to the index by themselves, as with llm-d: sockets of libzmq, known by their topics.
#![cfg(test)]

mod rig;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use kvcache_core::Tier;
use kvfabric_indexer::adapter::encode_engine_batch;
use kvfabric_indexer::client::{IndexClient, Prompt, SourcePosition};
use kvfabric_indexer::config::{ListenerConfig, StaticSource};
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use kvfabric_indexer::server::{Running, ServerConfig, serve};
use kvfabric_proto::v1;
use rig::*;

/// Opens publishers, sends and closes as told. XPUB is PUB that shows when a subscription has arrived.
const ENGINES: &str = r#"
import sys, zmq
context = zmq.Context()
sockets = {}
for line in sys.stdin:
    word = line.split()
    if word[0] == "open":
        socket = context.socket(zmq.XPUB)
        socket.setsockopt(zmq.RCVTIMEO, 60000)
        socket.connect(word[2] if len(word) > 2 else sys.argv[1])
        print("open", socket.recv().decode(), flush=True)
        sockets[word[1]] = socket
    elif word[0] == "start":
        sockets[word[1]] = context.socket(zmq.XPUB)
        sockets[word[1]].connect(sys.argv[1])
    elif word[0] == "send":
        sockets[word[1]].send_multipart([word[2].encode(), int(word[3]).to_bytes(8, "big"), bytes.fromhex(word[4])])
    elif word[0] == "close":
        sockets.pop(word[1]).close(0)
"#;

/// A process with libzmq; none where there is no Python with pyzmq.
struct Engines {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Engines {
    fn new(endpoint: &str) -> Option<Self> {
        let python = std::env::var("KVFABRIC_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let found = Command::new(&python).args(["-c", "import zmq"]).output();
        if !found.is_ok_and(|output| output.status.success()) {
            eprintln!("SKIPPED: {python} has no pyzmq, so nothing is tested against libzmq");
            return None;
        }
        let mut process = Command::new(python)
            .args(["-c", ENGINES, endpoint])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Some(Self {
            input: process.stdin.take().unwrap(),
            output: BufReader::new(process.stdout.take().unwrap()),
            process,
        })
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// Completes when the index has subscribed.
    async fn open(&mut self, name: &str) {
        self.tell(&format!("open {name}"));
        let line = tokio::task::block_in_place(|| {
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            line
        });
        assert_eq!(line, "open \u{1}kv@\n");
    }

    fn send(&mut self, name: &str, topic: &str, sequence: u64, payload: &[u8]) {
        let hex: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
        self.tell(&format!("send {name} {topic} {sequence} {hex}"));
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn listening() -> ServerConfig {
    let mut config = config();
    let listener = ListenerConfig::new("tcp://127.0.0.1:0");
    config.listeners.push(listener);
    config
}

fn batch(hash: u64, parent: Option<u64>, tokens: &[u32]) -> Vec<u8> {
    encode_engine_batch(1.5, &[stored(&[hash], parent, tokens, Tier::Device)])
}

/// The same from a rank, whose number ends a batch.
fn batch_of(rank: u8, hash: u64, parent: Option<u64>, tokens: &[u32]) -> Vec<u8> {
    let mut batch = batch(hash, parent, tokens);
    assert_eq!(batch.pop(), Some(0));
    batch.push(rank);
    batch
}

async fn depths(client: &IndexClient) -> Vec<(String, u32)> {
    let answer = client
        .lookup(question(Prompt::Tokens(TOKENS.to_vec())))
        .await
        .unwrap();
    let pods = answer.pods.into_iter();
    let mut pods: Vec<_> = pods.map(|pod| (pod.pod.to_string(), pod.depth)).collect();
    pods.sort();
    pods
}

fn source<'a>(status: &'a v1::StatusResponse, name: &str) -> Option<&'a v1::SourceStatus> {
    let pod = status.pods.iter().find(|pod| pod.pod == name)?;
    pod.sources.first()
}

/// How far the pod's source is applied; 0 when it is not known.
fn next(status: &v1::StatusResponse, name: &str) -> u64 {
    source(status, name).map_or(0, |source| {
        source.position.as_ref().map_or(0, |at| at.next_sequence)
    })
}

/// Two engines; then the first one's socket is closed for good, and the second one is silent for as long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn engines_are_known_by_their_topics_and_forgotten_when_they_are_gone() {
    let mut config = listening();
    config.source_ttl_ms = 300;
    let server = start(config).await;
    let client = client(&server);
    let Some(mut engines) = Engines::new(&server.event_endpoints()[0]) else {
        return;
    };
    engines.open("a").await;
    engines.open("b").await;
    engines.send("a", "kv@10.0.0.8:8000@m", 0, &batch(1, None, &TOKENS[..4]));
    engines.send("b", "kv@10.0.0.9:8000@m", 7, &batch(1, None, &TOKENS[..4]));
    engines.send(
        "b",
        "kv@10.0.0.9:8000@m",
        8,
        &batch(2, Some(1), &TOKENS[4..]),
    );
    wait_until(&client, |status| {
        next(status, "10.0.0.8:8000") == 1 && next(status, "10.0.0.9:8000") == 9
    })
    .await;
    let both = [
        ("10.0.0.8:8000".to_owned(), 1),
        ("10.0.0.9:8000".to_owned(), 2),
    ];
    assert_eq!(depths(&client).await, both);

    engines.tell("close a");
    wait_until(&client, |status| status.pods.len() == 1).await;
    assert_eq!(depths(&client).await, both[1..], "idle is not gone");
    assert_eq!(client.status().await.unwrap().entries, 2);
    // Another engine under the name of the one that is gone.
    engines.open("c").await;
    engines.send("c", "kv@10.0.0.8:8000@m", 0, &batch(1, None, &TOKENS[..4]));
    wait_until(&client, |status| next(status, "10.0.0.8:8000") == 1).await;
    assert_eq!(depths(&client).await, both);
}

/// Batch 1 is never sent: what it said of the first block is not known, and there is nobody to ask.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_of_an_engine_that_cannot_be_asked_begins_it_anew() {
    let server = start(listening()).await;
    let client = client(&server);
    let Some(mut engines) = Engines::new(&server.event_endpoints()[0]) else {
        return;
    };
    engines.open("a").await;
    let topic = "kv@pod-0@m";
    engines.send("a", topic, 0, &batch(1, None, &TOKENS[..4]));
    wait_until(&client, |status| next(status, "pod-0") == 1).await;
    assert_eq!(depths(&client).await, [("pod-0".to_owned(), 1)]);
    engines.send("a", topic, 2, &batch(9, None, &[9; 4]));
    wait_until(&client, |status| next(status, "pod-0") == 3).await;
    assert_eq!(depths(&client).await, []);
    let status = client.status().await.unwrap();
    let source = source(&status, "pod-0").unwrap();
    assert_eq!((status.entries, source.resyncs), (1, 1));
}

/// Two connections say to be the same pod: the later one is, and what the earlier one still says is late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_connection_takes_over_and_the_old_one_is_fenced() {
    let server = start(listening()).await;
    let client = client(&server);
    let Some(mut engines) = Engines::new(&server.event_endpoints()[0]) else {
        return;
    };
    let topic = "kv@pod-0@m";
    engines.open("a").await;
    engines.send("a", topic, 0, &batch(1, None, &TOKENS[..4]));
    wait_until(&client, |status| next(status, "pod-0") == 1).await;
    engines.open("b").await;
    engines.send("b", topic, 4, &batch(9, None, &[9; 4]));
    wait_until(&client, |status| next(status, "pod-0") == 5).await;
    // The next one of the old connection, and one that would follow on from the new one.
    engines.send("a", topic, 1, &batch(2, Some(1), &TOKENS[4..]));
    engines.send("a", topic, 5, &batch(1, None, &TOKENS[..4]));
    let rejected = |status: &v1::StatusResponse| status.events_rejected >= 2;
    wait_until(&client, rejected).await;
    let status = client.status().await.unwrap();
    assert_eq!((status.entries, next(&status, "pod-0")), (1, 5));
    assert_eq!(depths(&client).await, []);
}

/// The third pod is turned away, and the two others are followed on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_are_never_more_pods_than_configured() {
    let mut config = listening();
    config.pods_max = 2;
    let server = start(config).await;
    let client = client(&server);
    let Some(mut engines) = Engines::new(&server.event_endpoints()[0]) else {
        return;
    };
    for name in ["a", "b"] {
        engines.open(name).await;
        engines.send(
            name,
            &format!("kv@{name}@m"),
            0,
            &batch(1, None, &TOKENS[..4]),
        );
        wait_until(&client, |status| next(status, name) == 1).await;
    }
    engines.tell("start c");
    // One connection may speak for several pods, but not for more than there may be.
    engines.send("b", "kv@d@m", 0, &batch(1, None, &TOKENS[..4]));
    engines.send("a", "kv@a@m", 1, &batch(2, Some(1), &TOKENS[4..]));
    wait_until(&client, |status| next(status, "a") == 2).await;
    let status = client.status().await.unwrap();
    assert_eq!(status.pods.len(), 2);
}

/// One connection speaks for more models than may come to be known by themselves, another for more pods: the rest is
/// refused, and a pod that registers finds its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_use_up_neither_the_models_nor_the_pods_of_others() {
    let mut config = listening();
    config.pods_max = 4;
    config.listeners[0].models_max = 2;
    config.listeners[0].pods_max = Some(3);
    config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
    let server = start(config).await;
    let client = client(&server);
    let Some(mut engines) = Engines::new(&server.event_endpoints()[0]) else {
        return;
    };
    engines.open("a").await;
    for (number, model) in ["m1", "m2"].into_iter().enumerate() {
        let topic = format!("kv@pod-{number}@{model}");
        engines.send("a", &topic, 0, &batch(1, None, &TOKENS[..4]));
    }
    wait_until(&client, |status| status.pods.len() == 2).await;
    engines.send("a", "kv@pod-2@m3", 0, &batch(1, None, &TOKENS[..4]));
    refused(&server, 1).await;
    engines.open("b").await;
    for number in 2..5 {
        let topic = format!("kv@pod-{number}@m1");
        engines.send("b", &topic, 0, &batch(1, None, &TOKENS[..4]));
    }
    wait_until(&client, |status| status.pods.len() == 3).await;
    refused(&server, 2).await;
    let own = engine("own");
    let _registered = join_engine(&client, "own", &own).await;
    let status = client.status().await.unwrap();
    let names: Vec<_> = status.pods.iter().map(|pod| pod.pod.as_str()).collect();
    assert_eq!(names, ["own", "pod-0", "pod-1", "pod-2"]);
}

/// Waits until so many publishers were refused.
async fn refused(server: &Running, most: u64) {
    let counting = async {
        while metric(server, "kvfabric_indexer_publishers_refused_total").await < most {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, counting)
        .await
        .expect("nobody was refused");
}

/// A server with one listener for each of two ranks, at ports that follow on.
async fn with_two_ranks(mut config: ServerConfig) -> Running {
    loop {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let mut listener = ListenerConfig::new(format!("tcp://127.0.0.1:{port}"));
        listener.data_parallel_size = Some(2);
        config.listeners = vec![listener];
        // The next port may be somebody's.
        if let Ok(server) = serve(config.clone()).await {
            return server;
        }
    }
}

/// Both ranks of one pod connect, each to its own port; then the deeper one is gone, and what it held with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_rank_of_an_engine_is_known_by_the_port_it_connects_to() {
    let mut config = config();
    config.source_ttl_ms = 300;
    let server = with_two_ranks(config).await;
    let client = client(&server);
    let endpoints = server.event_endpoints().to_vec();
    let Some(mut engines) = Engines::new(&endpoints[0]) else {
        return;
    };
    engines.open(&format!("zero {}", endpoints[0])).await;
    engines.open(&format!("one {}", endpoints[1])).await;
    engines.send("zero", "kv@pod-0@m", 0, &batch(1, None, &TOKENS[..4]));
    let (first, second) = (&TOKENS[..4], &TOKENS[4..]);
    engines.send("one", "kv@pod-0@m", 0, &batch_of(1, 1, None, first));
    engines.send("one", "kv@pod-0@m", 1, &batch_of(1, 2, Some(1), second));
    wait_until(&client, |status| status.entries == 3).await;
    let status = client.status().await.unwrap();
    assert_eq!(status.pods.len(), 1);
    let sources = status.pods[0].sources.iter();
    let sources: Vec<_> = sources
        .map(|source| source.position.as_ref().unwrap().source.as_str())
        .collect();
    assert_eq!(sources, ["pod-0/engine-0", "pod-0/engine-1"]);
    let ranks = async || {
        let asked = question(Prompt::Tokens(TOKENS.to_vec()));
        let answer = client.lookup(asked).await.unwrap();
        let pod = &answer.pods[0];
        let parts = pod.parts.iter().map(|part| (part.rank, part.depth));
        (pod.depth, parts.collect::<Vec<_>>())
    };
    assert_eq!(ranks().await, (2, vec![(Some(0), 1), (Some(1), 2)]));
    engines.tell("close one");
    wait_until(&client, |status| status.entries == 1).await;
    assert_eq!(ranks().await, (1, vec![(Some(0), 1)]));
}

/// A port of the configuration and the one after it, each of another rank.
#[tokio::test]
async fn each_rank_of_a_configured_source_is_followed_at_its_port() {
    let ranks = loop {
        let zero = engine("pod-0");
        let mut config = PublisherConfig::new(pod("pod-0"), "m", Stream::Engine);
        config.endpoint = next_port(zero.endpoint());
        config.replay_endpoint = next_port(zero.replay_endpoint());
        // The next port may be somebody's.
        if let Ok(one) = Publisher::bind(config) {
            break [zero, one];
        }
    };
    let mut config = config();
    config.sources.push(StaticSource {
        pod: "pod-0".to_owned(),
        name: "engine".to_owned(),
        kind: "vllm".to_owned(),
        endpoint: ranks[0].endpoint().to_owned(),
        replay_endpoint: Some(ranks[0].replay_endpoint().to_owned()),
        model: "m".to_owned(),
        peer_address: None,
        data_parallel_rank: None,
        data_parallel_size: Some(2),
        pool_for: Vec::new(),
        engine_block_size: None,
        groups: Vec::new(),
    });
    ranks[0].publish_payload(batch(1, None, &TOKENS[..4]));
    ranks[1].publish_payload(batch_of(1, 1, None, &TOKENS[..4]));
    ranks[1].publish_payload(batch_of(1, 2, Some(1), &TOKENS[4..]));
    let server = start(config).await;
    let client = client(&server);
    let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
    asked.deadline = Some(PATIENCE);
    let position = |rank: usize| {
        let name = format!("engine-{rank}");
        SourcePosition::new(&pod("pod-0"), &name, ranks[rank].position())
    };
    asked.min_position = vec![position(0), position(1)];
    let answer = client.lookup(asked).await.unwrap();
    let parts = answer.pods[0].parts.iter();
    let parts: Vec<_> = parts.map(|part| (part.rank, part.depth)).collect();
    assert_eq!(parts, [(Some(0), 1), (Some(1), 2)]);
}

fn next_port(endpoint: &str) -> String {
    let (host, port) = endpoint.rsplit_once(':').unwrap();
    // No publisher binds port 0, where it would be any.
    format!("{host}:{}", port.parse::<u16>().unwrap().saturating_add(1))
}

/// As many models as may come to be known are there; the engine of one goes, and when it is forgotten another may come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_that_nobody_has_any_more_make_room_for_others() {
    let mut config = listening();
    config.source_ttl_ms = 300;
    config.listeners[0].models_max = 1;
    config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
    let server = start(config).await;
    let client = client(&server);
    let Some(mut engines) = Engines::new(&server.event_endpoints()[0]) else {
        return;
    };
    for (number, model) in ["m1", "m2", "m3"].into_iter().enumerate() {
        engines.open("a").await;
        let topic = format!("kv@pod-0@{model}");
        engines.send("a", &topic, 0, &batch(1, None, &TOKENS[..4]));
        wait_until(&client, |status| next(status, "pod-0") == 1).await;
        assert_eq!(metric(&server, "kvfabric_indexer_models").await, 1);
        // It is one too many for now.
        engines.send("a", "kv@pod-1@other", 0, &batch(1, None, &TOKENS[..4]));
        refused(&server, number as u64 + 1).await;
        engines.tell("close a");
        let ended = async {
            let name = "kvfabric_indexer_models_ended_total";
            while metric(&server, name).await < number as u64 + 1 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, ended)
            .await
            .expect("the model never ended");
        assert_eq!(metric(&server, "kvfabric_indexer_models").await, 0);
    }
}

/// A topic of a model that is not served, and one of a model that is, on the same connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_that_are_not_served_at_a_listener_are_left_out() {
    let mut config = listening();
    config.listeners[0].models = vec!["m".to_owned()];
    let server = start(config).await;
    let client = client(&server);
    let Some(mut engines) = Engines::new(&server.event_endpoints()[0]) else {
        return;
    };
    engines.open("a").await;
    engines.send("a", "kv@pod-0@other", 0, &batch(1, None, &TOKENS[..4]));
    engines.send("a", "kv@pod-1@m", 0, &batch(1, None, &TOKENS[..4]));
    wait_until(&client, |status| next(status, "pod-1") == 1).await;
    let status = client.status().await.unwrap();
    assert_eq!((status.pods.len(), status.events_rejected), (1, 1));
}
