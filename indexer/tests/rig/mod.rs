//! What the tests over real sockets share.
// Each test binary uses a part of it.
#![allow(dead_code)]

use std::path::Path;
use std::time::Duration;

use kvcache_core::event::EngineEvent;
use kvcache_core::prefix::{IndexScheme, Namespace};
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{EngineHash, Epoch, IndexKey, PodName, Tier};
use kvfabric_indexer::client::{
    ClientConfig, IndexClient, LookupRequest, Prompt, Registered, Registration, SourceKind,
    SourcePosition, SourceSpec,
};
use kvfabric_indexer::config::TokenizerConfig;
use kvfabric_indexer::publisher::{Publisher, PublisherConfig, Stream};
use kvfabric_indexer::server::{Running, ServerConfig, serve};
use kvfabric_proto::indexer_v1::GetPodScoresRequest;
use kvfabric_proto::indexer_v1::indexer_service_client::IndexerServiceClient;
use kvfabric_proto::v1;
use kvfabric_proto::v1::index_client::IndexClient as Grpc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Channel;

/// Only bounds a failing test; no test measures time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Tokens a block in these tests.
pub(crate) const BLOCK: u32 = 4;
/// Two blocks.
pub(crate) const TOKENS: [u32; 8] = [10, 11, 12, 13, 20, 21, 22, 23];

pub(crate) fn pod(name: &str) -> PodName {
    PodName::new(name).unwrap()
}

/// Free ports on loopback.
pub(crate) fn config() -> ServerConfig {
    ServerConfig {
        grpc_listen: "127.0.0.1:0".parse().unwrap(),
        block_size: BLOCK,
        lookup_deadline_ms: 60_000,
        ..ServerConfig::default()
    }
}

pub(crate) async fn start(config: ServerConfig) -> Running {
    serve(config).await.unwrap()
}

pub(crate) fn client(server: &Running) -> IndexClient {
    let mut config = ClientConfig::new(server.grpc_address().to_string());
    config.deadline = PATIENCE;
    IndexClient::new(config).unwrap()
}

pub(crate) async fn raw(server: &Running) -> Grpc<Channel> {
    Grpc::connect(format!("http://{}", server.grpc_address()))
        .await
        .unwrap()
}

pub(crate) fn engine(name: &str) -> Publisher {
    Publisher::bind(PublisherConfig::new(pod(name), "m", Stream::Engine)).unwrap()
}

pub(crate) fn node(name: &str, epoch: u64) -> Publisher {
    let stream = Stream::Node {
        epoch: Epoch(epoch),
    };
    Publisher::bind(PublisherConfig::new(pod(name), "m", stream)).unwrap()
}

pub(crate) fn registration<const N: usize>(name: &str, sources: [SourceSpec; N]) -> Registration {
    Registration {
        pod: pod(name),
        model: "m".to_owned(),
        block_size: BLOCK,
        key_scheme: "xxh3:1337".to_owned(),
        sources: sources.to_vec(),
        peer_address: Some("127.0.0.1:9".to_owned()),
        pool_for: Vec::new(),
    }
}

/// Registers a pod and waits until its sources are connected and replayed.
pub(crate) async fn join<const N: usize>(
    client: &IndexClient,
    name: &str,
    sources: [SourceSpec; N],
) -> Registered {
    let registered = client.register(registration(name, sources));
    registered.ready(PATIENCE).await.unwrap();
    registered
}

/// The same of a pod that has nothing but this engine.
pub(crate) async fn join_engine(
    client: &IndexClient,
    name: &str,
    engine: &Publisher,
) -> Registered {
    join(client, name, [engine.source("engine", SourceKind::Vllm)]).await
}

pub(crate) fn wire_registration(name: &str, engine: &Publisher) -> v1::RegisterRequest {
    let source = engine.source("engine", SourceKind::Vllm);
    v1::RegisterRequest {
        protocol_version: kvfabric_proto::PROTOCOL_VERSION,
        pod: name.to_owned(),
        model: "m".to_owned(),
        block_size: BLOCK,
        key_scheme: "xxh3:1337".to_owned(),
        sources: vec![v1::Source {
            name: source.name,
            kind: v1::SourceKind::Vllm.into(),
            endpoint: source.endpoint,
            replay_endpoint: source.replay_endpoint.unwrap(),
            ..v1::Source::default()
        }],
        peer_address: String::new(),
        pool_for: Vec::new(),
    }
}

/// An engine that a test plays by hand at these endpoints.
pub(crate) fn by_hand(endpoint: String, replay_endpoint: String) -> SourceSpec {
    SourceSpec {
        name: "engine".to_owned(),
        kind: SourceKind::Vllm,
        endpoint,
        replay_endpoint: Some(replay_endpoint),
        data_parallel_rank: None,
        groups: Vec::new(),
    }
}

/// How much of [`TOKENS`] a pod's engine holds once all that it has published is known.
pub(crate) async fn depth_at(client: &IndexClient, name: &str, engine: &Publisher) -> u32 {
    let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
    asked.min_position = vec![SourcePosition::new(&pod(name), "engine", engine.position())];
    asked.deadline = Some(PATIENCE);
    let answer = client.lookup(asked).await.unwrap();
    let pod = answer.pods.iter().find(|pod| pod.pod.as_str() == name);
    pod.map_or(0, |pod| pod.depth)
}

/// Opens a registration stream; it lasts as long as the sender.
pub(crate) async fn register_raw(
    raw: &mut Grpc<Channel>,
    request: v1::RegisterRequest,
) -> Result<
    (
        tokio::sync::mpsc::Sender<v1::RegisterRequest>,
        tonic::Streaming<v1::RegisterResponse>,
    ),
    tonic::Status,
> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    sender.send(request).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let answers = raw.register(stream).await?.into_inner();
    Ok((sender, answers))
}

pub(crate) fn question(prompt: Prompt) -> LookupRequest {
    LookupRequest::new("m", prompt)
}

pub(crate) fn keys_of(tokens: &[u32]) -> Vec<IndexKey> {
    let namespace = Namespace {
        model: IndexScheme::default().model_in_root("m"),
        ..Namespace::default()
    };
    let root = IndexScheme::default().root(&namespace);
    root.chain(tokens, TokensPerBlock::try_from(BLOCK).unwrap())
        .collect()
}

pub(crate) fn stored(
    hashes: &[u64],
    parent: Option<u64>,
    tokens: &[u32],
    tier: Tier,
) -> EngineEvent {
    EngineEvent::Stored {
        hashes: hashes.iter().map(|hash| EngineHash(*hash)).collect(),
        parent: parent.map(EngineHash),
        tokens: tokens.to_vec(),
        block_size: BLOCK,
        tier,
    }
}

pub(crate) fn removed(hashes: &[u64], tier: Tier) -> EngineEvent {
    EngineEvent::Removed {
        hashes: hashes.iter().map(|hash| EngineHash(*hash)).collect(),
        tier,
    }
}

/// Asks for the status until it is as wanted: for what no position can tell.
pub(crate) async fn wait_until(client: &IndexClient, is_so: impl Fn(&v1::StatusResponse) -> bool) {
    let asking = async {
        while !is_so(&client.status().await.unwrap()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, asking)
        .await
        .expect("the index never got there");
}

/// Three blocks.
pub(crate) const LONG: [u32; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

/// An engine that keeps nothing but its two newest batches for replay: what came before is only in snapshots. With one batch
/// alone, whoever asks just when another one comes would find the last one that he knows gone, and take all for lost.
pub(crate) fn forgetful(name: &str) -> Publisher {
    let keeps = |bytes| {
        let mut config = PublisherConfig::new(pod(name), "m", Stream::Engine);
        config.replay_bytes_max = bytes;
        Publisher::bind(config).unwrap()
    };
    let two = keeps(usize::MAX);
    (0..2).for_each(|_| publish_block(&two, 2));
    let bytes = two.stats().replay_bytes;
    assert!(bytes > 0);
    keeps(bytes)
}

/// One block of [`LONG`] in a batch of its own.
pub(crate) fn publish_block(engine: &Publisher, number: usize) {
    let tokens = &LONG[(number - 1) * 4..number * 4];
    let parent = (number > 1).then(|| number as u64 - 1);
    engine.publish_engine(vec![stored(&[number as u64], parent, tokens, Tier::Device)]);
}

pub(crate) fn with_peer(peer: &Running) -> ServerConfig {
    ServerConfig {
        bootstrap_peers: vec![peer.grpc_address().to_string()],
        ..config()
    }
}

pub(crate) fn with_file(path: &Path) -> ServerConfig {
    ServerConfig {
        snapshot_path: Some(path.to_owned()),
        ..config()
    }
}

pub(crate) async fn wait_until_serving(client: &IndexClient) {
    wait_until(client, |status| status.serving).await;
}

pub(crate) async fn depth_of_long(client: &IndexClient, positions: Vec<SourcePosition>) -> u32 {
    let mut asked = question(Prompt::Tokens(LONG.to_vec()));
    asked.min_position = positions;
    asked.deadline = Some(PATIENCE);
    let answer = client.lookup(asked).await.unwrap();
    answer.pods.first().map_or(0, |pod| pod.depth)
}

/// Waits for a depth without a position: who waits for one has the publisher asked, and what a [`forgetful`] one has dropped
/// by the time it answers is taken for lost.
pub(crate) async fn until_depth_of_long(client: &IndexClient, depth: u32) {
    let asking = async {
        while depth_of_long(client, Vec::new()).await != depth {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, asking)
        .await
        .expect("the blocks never got there");
}

pub(crate) fn at(engine: &Publisher) -> Vec<SourcePosition> {
    vec![SourcePosition::new(
        &pod("pod-0"),
        "engine",
        engine.position(),
    )]
}

/// What a server says of itself to Prometheus.
pub(crate) async fn metrics_page(server: &Running) -> String {
    let address = server.metrics_address().unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    text
}

/// The value of a series that has no labels.
pub(crate) async fn metric(server: &Running, name: &str) -> u64 {
    let text = metrics_page(server).await;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no {name} in\n{text}"))
        .parse()
        .unwrap()
}

/// A vocabulary of the words `t10`, `t11`, … for the tokens of the tests.
pub(crate) fn tokenizer_file() -> tempfile::NamedTempFile {
    let words: Vec<String> = TOKENS
        .iter()
        .map(|token| format!("\"t{token}\":{token}"))
        .collect();
    let text = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{{"type":"Whitespace"}},"post_processor":null,"decoder":null,
        "model":{{"type":"WordLevel","vocab":{{"[UNK]":0,{}}},"unk_token":"[UNK]"}}}}"#,
        words.join(",")
    );
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    file
}

pub(crate) fn tokenizer(file: &tempfile::NamedTempFile) -> TokenizerConfig {
    let path = file.path().to_owned();
    TokenizerConfig {
        model: "m".to_owned(),
        path,
        add_special_tokens: false,
    }
}

/// The prompt of [`TOKENS`] in the words of [`tokenizer_file`].
pub(crate) fn prompt_text() -> String {
    TOKENS.map(|token| format!("t{token}")).join(" ")
}

/// What llm-d's service says of a prompt, by pod.
pub(crate) async fn scores_of(
    address: std::net::SocketAddr,
    prompt: String,
) -> Result<Vec<(String, f64)>, tonic::Status> {
    let mut scorer = IndexerServiceClient::connect(format!("http://{address}"))
        .await
        .unwrap();
    let request = GetPodScoresRequest {
        prompt,
        model_name: "m".to_owned(),
        pod_identifiers: Vec::new(),
    };
    let scores = scorer.get_pod_scores(request).await?.into_inner().scores;
    Ok(scores
        .into_iter()
        .map(|score| (score.pod, score.score))
        .collect())
}
