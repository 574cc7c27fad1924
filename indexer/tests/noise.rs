//! Noise: calls whose messages are mutations of real ones, and configurations that are mutations of the documented one.
#![cfg(test)]

mod rig;

use bytes::{Buf, BufMut, Bytes};
use kvcache_core::{ErrorKind, Tier};
use kvfabric_indexer::client::SourceKind;
use kvfabric_indexer::server::{Running, ServerConfig};
use kvfabric_proto::v1::lookup_request::Prompt;
use kvfabric_proto::v1::record_routing_request::Prompt as RoutedPrompt;
use kvfabric_proto::{PROTOCOL_VERSION, indexer_v1, v1};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::TestRunner;
use prost::Message;
use rig::*;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// What the server may hold more after all calls.
const GROWTH_MAX: u64 = 96 << 20;

/// How long a message or a configuration may become.
const BYTES_MAX: usize = 64 << 10;

/// Messages as they are on the wire.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// A method with a message that it answers.
struct Call {
    path: &'static str,
    message: Vec<u8>,
}

fn call(path: &'static str, message: &impl Message) -> Call {
    let message = message.encode_to_vec();
    Call { path, message }
}

fn tokens() -> Vec<u8> {
    TOKENS
        .iter()
        .flat_map(|token| token.to_le_bytes())
        .collect()
}

fn lookup(prompt: Prompt) -> v1::LookupRequest {
    v1::LookupRequest {
        model: "m".to_owned(),
        prompt: Some(prompt),
        pods_max: 3,
        pods: vec!["pod-0".to_owned()],
        ranking: v1::Ranking::Score.into(),
        explain: true,
        min_position: vec![v1::SourcePosition {
            source: "pod-0/engine".to_owned(),
            epoch: 0,
            next_sequence: 1,
        }],
        ..v1::LookupRequest::default()
    }
}

fn registering(folder: &str) -> v1::RegisterRequest {
    // Nothing that a mutation of it could name is anybody's.
    let source = |name: &str, kind: v1::SourceKind| v1::Source {
        name: name.to_owned(),
        kind: kind.into(),
        endpoint: format!("ipc://{folder}/events"),
        replay_endpoint: format!("ipc://{folder}/replay"),
        data_parallel_rank: Some(1),
        groups: vec![v1::CacheGroup {
            number: 1,
            rule: v1::GroupRule::Window.into(),
            window_tokens: 8,
            block_size: 4,
        }],
    };
    v1::RegisterRequest {
        protocol_version: PROTOCOL_VERSION,
        pod: "guest".to_owned(),
        model: "m".to_owned(),
        block_size: BLOCK,
        key_scheme: "xxh3:1337".to_owned(),
        sources: vec![
            source("engine", v1::SourceKind::Vllm),
            source("node", v1::SourceKind::Node),
        ],
        peer_address: "127.0.0.1:9".to_owned(),
        pool_for: vec!["pod".to_owned()],
    }
}

fn calls(folder: &str) -> Vec<Call> {
    let by_tokens = lookup(Prompt::Tokens(tokens().into()));
    let keys = keys_of(&TOKENS).iter().map(|key| key.0).collect();
    let by_keys = lookup(Prompt::Keys(v1::BlockKeys { keys }));
    let routing = v1::RecordRoutingRequest {
        model: "m".to_owned(),
        prompt: Some(RoutedPrompt::Tokens(tokens().into())),
        pod: "pod-0".to_owned(),
        ttl_ms: 50,
        ..v1::RecordRoutingRequest::default()
    };
    let snapshot = v1::SnapshotRequest {
        protocol_version: PROTOCOL_VERSION,
        format: 2,
    };
    let scores = indexer_v1::GetPodScoresRequest {
        prompt: "a prompt".to_owned(),
        model_name: "m".to_owned(),
        pod_identifiers: vec!["pod-0".to_owned()],
    };
    let batch = v1::LookupBatchRequest {
        questions: vec![by_tokens.clone(), by_keys.clone()],
    };
    vec![
        call("/kvfabric.v1.Index/Lookup", &by_tokens),
        call("/kvfabric.v1.Index/Lookup", &by_keys),
        call("/kvfabric.v1.Index/LookupBatch", &batch),
        call("/kvfabric.v1.Index/LookupStream", &by_keys),
        call("/kvfabric.v1.Index/RecordRouting", &routing),
        call("/kvfabric.v1.Index/Register", &registering(folder)),
        call("/kvfabric.v1.Index/Status", &v1::StatusRequest {}),
        call("/kvfabric.v1.Index/Snapshot", &snapshot),
        call("/indexer.v1.IndexerService/GetPodScores", &scores),
    ]
}

/// What is done to a message's bytes.
#[derive(Clone, Debug)]
enum Change {
    Replace(Index, u8),
    Remove(Index),
    Insert(Index, u8),
    Cut(Index),
    /// A piece of it is there many times.
    Repeat(Index, Index, u16),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Replace(at, byte)),
        2 => any::<Index>().prop_map(Change::Remove),
        2 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Insert(at, byte)),
        1 => any::<Index>().prop_map(Change::Cut),
        2 => (any::<Index>(), any::<Index>(), 1..300_u16)
            .prop_map(|(from, to, times)| Change::Repeat(from, to, times)),
    ]
}

fn changed(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        if bytes.is_empty() {
            return vec![0xff];
        }
        match change {
            Change::Replace(at, byte) => *at.get_mut(&mut bytes) = *byte,
            Change::Remove(at) => drop(bytes.remove(at.index(bytes.len()))),
            Change::Insert(at, byte) => bytes.insert(at.index(bytes.len()), *byte),
            Change::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Change::Repeat(from, to, times) => {
                let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
                let piece = bytes[from.min(to)..=from.max(to)].to_vec();
                let most = BYTES_MAX.saturating_sub(bytes.len()) / piece.len();
                let many = piece.repeat(most.min(usize::from(*times)));
                bytes.splice(from.min(to)..from.min(to), many);
            }
        }
    }
    bytes
}

/// Calls with this message and reads the answer to its end, or to its first message where that has none by itself.
async fn answer(channel: &Channel, path: &'static str, message: Vec<u8>) -> Result<usize, Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let path_and_query = PathAndQuery::from_static(path);
    let messages = tokio_stream::once(Bytes::from(message));
    let request = tonic::Request::new(messages);
    let answer = grpc.streaming(request, path_and_query, Raw).await?;
    let mut stream = answer.into_inner();
    let mut read = 0;
    while let Some(message) = stream.message().await? {
        read += message.len();
        if path.ends_with("/Register") {
            break;
        }
    }
    Ok(read)
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

async fn server_with_two_blocks() -> (Running, impl Drop, impl Drop) {
    let config = ServerConfig {
        // A position that a mutation names never comes.
        lookup_deadline_ms: 20,
        ..config()
    };
    let server = start(config).await;
    let engine = engine("pod-0");
    engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
    let source = engine.source("engine", SourceKind::Vllm);
    let registered = client(&server).register(registration("pod-0", [source]));
    registered.ready(PATIENCE).await.unwrap();
    (server, engine, registered)
}

/// Each method of both services: an answer, or a status that says why; never one that says that something broke. The server
/// answers what it answered before, and holds hardly more.
#[test]
fn mutated_messages_are_answered_or_refused_with_the_reason() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let calls = calls(folder.path().to_str().unwrap());
    let (server, _engine, _registered) = runtime.block_on(server_with_two_blocks());
    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc_address())).unwrap();
    let channel = runtime.block_on(endpoint.connect()).unwrap();
    for Call { path, message } in &calls {
        let answered = runtime.block_on(answer(&channel, path, message.clone()));
        // There is no tokenizer here.
        let is_known = !path.ends_with("GetPodScores");
        assert_eq!(answered.is_ok(), is_known, "{path}: {answered:?}");
    }
    let before = resident_bytes();
    let strategy = (any::<Index>(), prop::collection::vec(change(), 1..6));
    let mut runner = TestRunner::new(ProptestConfig::with_cases(3000));
    runner
        .run(&strategy, |(which, changes)| {
            let Call { path, message } = which.get(&calls);
            let message = changed(message.clone(), &changes);
            let answered = runtime.block_on(async {
                tokio::time::timeout(PATIENCE, answer(&channel, path, message)).await
            });
            let answered = answered.expect("no answer");
            if let Err(status) = answered {
                prop_assert!(is_reasoned(&status), "{path}: {status:?}");
            }
            Ok(())
        })
        .unwrap();
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < GROWTH_MAX, "{grown} bytes more");
    runtime.block_on(async {
        let client = client(&server);
        wait_until(&client, |status| status.pods.len() == 1).await;
        let asked = question(kvfabric_indexer::client::Prompt::Tokens(TOKENS.to_vec()));
        let answer = client.lookup(asked).await.unwrap();
        assert_eq!((answer.pods.len(), answer.pods[0].depth), (1, 2));
    });
}

/// Whether a status is of the caller's doing and says why.
fn is_reasoned(status: &Status) -> bool {
    let is_broken = matches!(
        status.code(),
        Code::Internal | Code::Unknown | Code::Cancelled | Code::Unavailable
    );
    let is_undecodable =
        status.code() == Code::Internal && status.message().contains("decode Protobuf message");
    is_undecodable || (!is_broken && !status.message().is_empty())
}

fn any_lookup() -> impl Strategy<Value = v1::LookupRequest> {
    let keys = prop::collection::vec(any::<u64>(), 0..9);
    let prompt = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| Some(Prompt::Tokens(bytes.into()))),
        2 => keys.prop_map(|keys| Some(Prompt::Keys(v1::BlockKeys { keys }))),
        1 => Just(None),
    ];
    let name = || prop_oneof![Just(String::new()), Just("m".to_owned()), any::<String>()];
    let position =
        (any::<String>(), any::<u64>(), any::<u64>()).prop_map(|(source, epoch, next)| {
            v1::SourcePosition {
                source,
                epoch,
                next_sequence: next,
            }
        });
    let pods = prop::collection::vec(prop_oneof![Just("pod-0".to_owned()), any::<String>()], 0..3);
    let positions = prop_oneof![9 => Just(Vec::new()), 1 => prop::collection::vec(position, 1..3)];
    let ranking = prop_oneof![3 => 0..3_i32, 1 => any::<i32>()];
    let rest = (any::<u32>(), pods, positions, ranking, any::<bool>());
    (name(), name(), name(), prompt, rest).prop_map(|(model, lora, tenant, prompt, rest)| {
        let (pods_max, pods, min_position, ranking, explain) = rest;
        v1::LookupRequest {
            model,
            lora,
            tenant,
            prompt,
            pods_max,
            pods,
            min_position,
            ranking,
            explain,
            ..v1::LookupRequest::default()
        }
    })
}

/// Questions with anything in each field, one by one and as routing decisions: answers and refusals of each kind are reached.
#[test]
fn fields_of_any_value_are_answered_or_refused_with_the_reason() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (server, _engine, _registered) = runtime.block_on(server_with_two_blocks());
    let endpoint = Endpoint::from_shared(format!("http://{}", server.grpc_address())).unwrap();
    let channel = runtime.block_on(endpoint.connect()).unwrap();
    let reached = std::cell::RefCell::new(std::collections::BTreeMap::new());
    let mut runner = TestRunner::new(ProptestConfig::with_cases(1500));
    let strategy = (any_lookup(), any::<u32>(), any::<bool>());
    runner
        .run(&strategy, |(asked, ttl_ms, is_routing)| {
            let (path, message) = if is_routing {
                let prompt = asked.prompt.map(|prompt| match prompt {
                    Prompt::Tokens(tokens) => RoutedPrompt::Tokens(tokens),
                    Prompt::Keys(keys) => RoutedPrompt::Keys(keys),
                });
                let routing = v1::RecordRoutingRequest {
                    model: asked.model,
                    lora: asked.lora,
                    tenant: asked.tenant,
                    pod: asked.pods.into_iter().next().unwrap_or_default(),
                    prompt,
                    ttl_ms,
                    ..v1::RecordRoutingRequest::default()
                };
                ("/kvfabric.v1.Index/RecordRouting", routing.encode_to_vec())
            } else {
                ("/kvfabric.v1.Index/Lookup", asked.encode_to_vec())
            };
            let answered = runtime.block_on(async {
                tokio::time::timeout(PATIENCE, answer(&channel, path, message)).await
            });
            let code = match answered.expect("no answer") {
                Ok(_) => Code::Ok,
                Err(status) => {
                    prop_assert!(is_reasoned(&status), "{path}: {status:?}");
                    status.code()
                }
            };
            *reached.borrow_mut().entry((path, code as i32)).or_insert(0) += 1;
            Ok(())
        })
        .unwrap();
    let reached = reached.into_inner();
    for path in [
        "/kvfabric.v1.Index/RecordRouting",
        "/kvfabric.v1.Index/Lookup",
    ] {
        for code in [Code::Ok, Code::InvalidArgument] {
            assert!(reached.contains_key(&(path, code as i32)), "{reached:?}");
        }
    }
}

/// The indexer's part of the documentation.
fn documented() -> String {
    let page = include_str!("../../docs/configuration.md");
    let blocks = page.split("```toml\n").skip(1);
    let mut blocks = blocks.map(|block| block.split("```").next().unwrap());
    let block = blocks.find(|block| block.contains("grpc_listen"));
    block.expect("an example of the indexer's").to_owned()
}

fn load(text: &[u8]) -> (kvcache_core::Result<ServerConfig>, String) {
    let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let place = file.path().display().to_string();
    (ServerConfig::load(Some(file.path()), &[]), place)
}

/// Values of all kinds that TOML has, by what an error must say of them: the value, or the number that it was taken for.
const VALUES: [(&str, [&str; 2]); 15] = [
    ("0", ["0"; 2]),
    ("-1", ["-1"; 2]),
    ("9223372036854775807", ["9223372036854775807"; 2]),
    ("1.5", ["1.5", " 2"]),
    ("nan", ["nan", " 0"]),
    ("-inf", ["-inf", " 0"]),
    ("true", ["true", " 1"]),
    ("\"\"", ["\"\""; 2]),
    ("\"x y\"", ["x y"; 2]),
    ("\"tcp://h:99999\"", ["tcp://h:99999"; 2]),
    ("\"\\u0007\"", ["u{7}", "\u{7}"]),
    ("[]", [""; 2]),
    ("[[1]]", [""; 2]),
    ("{ a = 1 }", [""; 2]),
    ("1979-05-27", ["1979-05-27"; 2]),
];

/// The example, each line of it with a value of another kind, out of range or of no sense: accepted, or an error that names
/// the key and the value.
#[test]
fn each_key_with_a_value_of_no_sense_is_accepted_or_named_with_it() {
    let example = documented();
    load(example.as_bytes()).0.unwrap();
    let lines: Vec<_> = example.lines().collect();
    let (mut refused, mut wrong) = (0, Vec::new());
    for (at, line) in lines.iter().enumerate() {
        let Some((key, _)) = line.split_once(" = ") else {
            continue;
        };
        for (value, told) in VALUES {
            let mut lines = lines.clone();
            let line = format!("{key} = {value}");
            lines[at] = &line;
            let (loaded, _) = load(lines.join("\n").as_bytes());
            let Err(error) = loaded else { continue };
            refused += 1;
            let said = error.to_string().to_lowercase();
            let is_told = told.iter().any(|told| said.contains(told));
            let names = said.contains(&key.to_lowercase()) && is_told;
            if error.kind() != ErrorKind::Invalid || !names {
                wrong.push(format!("{line}: {error}"));
            }
        }
        let renamed = format!("{key}_x = 1");
        let mut others = lines.clone();
        others[at] = &renamed;
        let table = example[..example.find(line).unwrap()].rfind('[');
        let is_free = table.is_some_and(|table| example[table..].starts_with("[media]"));
        if let Err(error) = load(others.join("\n").as_bytes()).0 {
            assert!(error.to_string().contains(key), "{renamed}: {error}");
        } else {
            assert!(is_free, "{renamed} was taken");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(refused > lines.len() * 5, "{refused} refused");
}

proptest! {
    /// The example with some bytes changed, cut out or doubled: a configuration, or an error with the file's name.
    #[test]
    fn mutated_configurations_are_accepted_or_refused(
        changes in prop::collection::vec(change(), 1..5),
    ) {
        let text = changed(documented().into_bytes(), &changes);
        if let (Err(error), place) = load(&text) {
            prop_assert_eq!(error.kind(), ErrorKind::Invalid);
            prop_assert!(error.to_string().len() > place.len() / 2, "{}", error);
        }
    }
}
