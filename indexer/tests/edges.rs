//! Everything around the lookups: llm-d's service, health, reflection, metrics, the program, and other makes of ZMQ.
#![cfg(test)]

mod rig;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use kvcache_core::{ErrorKind, Tier};
use kvfabric_indexer::client::{Prompt, SourceKind, SourcePosition};
use kvfabric_indexer::publisher::Publisher;
use kvfabric_indexer::server::{Running, serve};
use kvfabric_proto::indexer_v1::GetPodScoresRequest;
use kvfabric_proto::indexer_v1::indexer_service_client::IndexerServiceClient;
use rig::*;

use tokio_stream::StreamExt;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

fn url(server: &Running) -> String {
    format!("http://{}", server.grpc_address())
}

async fn channel(server: &Running) -> Channel {
    Endpoint::from_shared(url(server))
        .unwrap()
        .connect()
        .await
        .unwrap()
}

fn scores_request(prompt: &str, model: &str, pods: &[&str]) -> GetPodScoresRequest {
    GetPodScoresRequest {
        prompt: prompt.to_owned(),
        model_name: model.to_owned(),
        pod_identifiers: pods.iter().map(|pod| (*pod).to_owned()).collect(),
    }
}

/// Two pods, one with the second block in DRAM; weights 1.0 and 0.8.
#[tokio::test]
async fn llm_d_scores_text_prompts_with_the_configured_tokenizer() {
    let file = tokenizer_file();
    let mut config = config();
    config.tokenizers.push(tokenizer(&file));
    let server = start(config).await;
    let client = client(&server);
    let (first, second) = (engine("pod-0"), engine("pod-1"));
    first.publish_engine(vec![
        stored(&[1, 2], None, &TOKENS, Tier::Device),
        stored(&[2], Some(1), &TOKENS[4..], Tier::Host),
        removed(&[2], Tier::Device),
    ]);
    second.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    let mut kept = Vec::new();
    for (name, engine) in [("pod-0", &first), ("pod-1", &second)] {
        let registered = join_engine(&client, name, engine).await;
        kept.push(registered);
    }
    let mut scorer = IndexerServiceClient::connect(url(&server)).await.unwrap();
    let prompt = TOKENS.map(|token| format!("t{token}")).join(" ");
    // Twice: the second answer comes from remembered tokens.
    for _ in 0..2 {
        let request = scores_request(&prompt, "m", &[]);
        let scores = scorer
            .get_pod_scores(request)
            .await
            .unwrap()
            .into_inner()
            .scores;
        let scores: Vec<_> = scores
            .iter()
            .map(|score| (score.pod.as_str(), score.score))
            .collect();
        assert_eq!(scores, [("pod-0", 1.8), ("pod-1", 1.0)]);
    }
    let only = scores_request(&prompt, "m", &["pod-1", "elsewhere"]);
    let scores = scorer
        .get_pod_scores(only)
        .await
        .unwrap()
        .into_inner()
        .scores;
    assert_eq!(scores.len(), 1);
    let other = scores_request("not in the vocabulary at all", "m", &[]);
    assert!(
        scorer
            .get_pod_scores(other)
            .await
            .unwrap()
            .into_inner()
            .scores
            .is_empty()
    );
}

/// The default configuration has no tokenizer.
#[tokio::test]
async fn llm_d_scoring_without_a_tokenizer_names_the_configuration_key() {
    let server = start(config()).await;
    let mut scorer = IndexerServiceClient::connect(url(&server)).await.unwrap();
    let status = scorer
        .get_pod_scores(scores_request("hello", "m", &[]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    assert!(status.message().contains("`tokenizers`"), "{status}");
    assert!(status.message().contains("\"m\""), "{status}");
}

/// A file that is no tokenizer stops the start, not the first request.
#[tokio::test]
async fn a_tokenizer_that_cannot_be_read_is_named_at_the_start() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut config = config();
    config.tokenizers.push(tokenizer(&file));
    let error = serve(config).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&file.path().display().to_string()),
        "{error}"
    );
    assert!(error.to_string().contains("tokenizers[0]"), "{error}");
}

/// As probes of Kubernetes and tools like grpcurl ask.
#[tokio::test]
async fn health_and_reflection_answer_for_both_services() {
    let server = start(config()).await;
    let mut health = HealthClient::new(channel(&server).await);
    let services = ["kvfabric.v1.Index", "indexer.v1.IndexerService"];
    for service in ["", services[0], services[1]] {
        let request = tonic_health::pb::HealthCheckRequest {
            service: service.to_owned(),
        };
        let status = health.check(request).await.unwrap().into_inner().status;
        assert_eq!(status, 1, "{service:?} is not serving");
    }
    let mut reflection = ServerReflectionClient::new(channel(&server).await);
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = reflection
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap();
    let answer = answers
        .into_inner()
        .next()
        .await
        .unwrap()
        .unwrap()
        .message_response;
    let Some(MessageResponse::ListServicesResponse(listed)) = answer else {
        panic!("{answer:?}");
    };
    let names: Vec<_> = listed
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    for service in services {
        assert!(names.iter().any(|name| name == service), "{names:?}");
    }
}

/// Every metric that the page documents is exported, and the other way round; the counts are those of what was done.
#[tokio::test]
async fn metrics_are_exported_under_their_documented_names() {
    let file = tokenizer_file();
    let mut config = config();
    config.metrics_listen = Some("127.0.0.1:0".parse().unwrap());
    config.tokenizers.push(tokenizer(&file));
    let server = start(config).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
    let _registered = join_engine(&client, "pod-0", &engine).await;
    client
        .lookup(question(Prompt::Tokens(TOKENS.to_vec())))
        .await
        .unwrap();
    let text = metrics_page(&server).await;
    for line in [
        "kvcache_index_admissions_total 2",
        "kvcache_index_evictions_total 0",
        "kvcache_index_lookup_requests_total 1",
        "kvcache_index_lookup_hits_total 1",
        "kvcache_index_max_pod_hit_count_total 2",
        "kvcache_index_lookup_latency_seconds_count 1",
        "kvfabric_indexer_blocks 2",
        "kvfabric_indexer_sources_connected 1",
        "kvfabric_indexer_events_applied_total 1",
    ] {
        assert!(
            text.lines().any(|have| have == line),
            "{line} is missing in\n{text}"
        );
    }
    let page = include_str!("../../docs/metrics.md");
    let documented = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let documented: std::collections::BTreeSet<_> = documented
        .filter(|name| name.starts_with("kvcache_") || name.starts_with("kvfabric_indexer_"))
        .collect();
    let exported: std::collections::BTreeSet<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    assert_eq!(documented, exported);
}

/// The address is somebody else's.
#[tokio::test]
async fn a_port_in_use_is_an_error_that_names_the_address() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let mut grpc = config();
    grpc.grpc_listen = address;
    let mut metrics = config();
    metrics.metrics_listen = Some(address);
    for (config, key) in [(grpc, "grpc_listen"), (metrics, "metrics_listen")] {
        let error = serve(config).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        let said = error.to_string();
        assert!(
            said.contains(&address.to_string()) && said.contains("in use"),
            "{said}"
        );
        assert!(said.contains(key), "{said}");
    }
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kv-indexer"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Starts the program on free ports, asks it with its own commands, and ends it as an operator does.
#[test]
fn the_program_says_where_it_listens_answers_and_ends_on_sigterm() {
    let serve = [
        "serve",
        "--grpc-listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
    ];
    let mut running = program().args(serve).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(running.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let listening: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(listening["event"], "listening");
    assert!(listening["metrics"].is_string());
    let address = listening["grpc"].as_str().unwrap();

    let tokens: Vec<String> = (0..32).map(|token| token.to_string()).collect();
    let query = [
        "query",
        "--address",
        address,
        "--json",
        "--tokens",
        &tokens.join(","),
    ];
    let output = program().args(query).output().unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&answer["blocks"], &answer["block_size"]),
        (&2.into(), &16.into())
    );
    let output = program()
        .args(["pods", "--address", address])
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&output.stdout).starts_with("0 pods"),
        "{output:?}"
    );

    let pid = running.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert!(running.wait().unwrap().success());
}

/// A misspelt key, a missing file, an argument that is none, and an index that is not there.
#[test]
fn the_program_says_what_is_wrong_and_exits_with_the_right_status() {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    file.write_all(b"blok_size = 16\n").unwrap();
    let path = file.path().display().to_string();
    for (arguments, code, said) in [
        (vec!["serve", "--config", path.as_str()], 2, "blok_size"),
        (
            vec!["serve", "--config", "/nonexistent.toml"],
            2,
            "/nonexistent.toml",
        ),
        (vec!["serve", "--block-size", "0"], 2, "block_size"),
        (vec!["serve", "--blok-size", "16"], 2, "--blok-size"),
        (vec!["pods", "--address", "127.0.0.1:1"], 1, "127.0.0.1:1"),
        (
            vec!["query", "--address", "not an address", "--tokens", "1"],
            2,
            "not an address",
        ),
    ] {
        let output = program().args(&arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(said), "{arguments:?}: {error}");
        assert!(output.stdout.is_empty());
    }
}

/// A Python with pyzmq, if there is one: `KVFABRIC_PYTHON`, else `python3`.
fn python_with_zmq() -> Option<String> {
    let python = std::env::var("KVFABRIC_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let found = Command::new(&python).args(["-c", "import zmq"]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    eprintln!("SKIPPED: {python} has no pyzmq, so nothing is tested against libzmq");
    None
}

/// Subscribes, waits until a batch arrives, asks for a replay from 1, prints what came.
const SUBSCRIBER: &str = r#"
import sys, zmq
context = zmq.Context()
sub = context.socket(zmq.SUB); sub.setsockopt(zmq.SUBSCRIBE, b"kv@"); sub.connect(sys.argv[1])
dealer = context.socket(zmq.DEALER); dealer.connect(sys.argv[2])
sub.setsockopt(zmq.RCVTIMEO, 60000); dealer.setsockopt(zmq.RCVTIMEO, 60000)
print("ready", flush=True)
topic, sequence, payload = sub.recv_multipart()
print("live", topic.decode(), int.from_bytes(sequence, "big") >= 3, payload.hex(), flush=True)
dealer.send_multipart([b"", (1).to_bytes(8, "big")])
while True:
    empty, topic, sequence, payload = dealer.recv_multipart()
    assert empty == b""
    if sequence == b"\xff" * 8:
        assert topic == b"" and payload == b""
        break
    if int.from_bytes(sequence, "big") < 3:
        print("replay", topic.decode(), int.from_bytes(sequence, "big"), payload.hex(), flush=True)
"#;

/// libzmq's SUB and DEALER sockets, as vLLM's own subscribers use them, against our publisher.
#[test]
fn libzmq_reads_our_publisher_live_and_by_replay() {
    let Some(python) = python_with_zmq() else {
        return;
    };
    let engine = engine("pod-0");
    for byte in 1..=3_u8 {
        engine.publish_payload(vec![byte]);
    }
    let mut subscriber = Command::new(python)
        .args([
            "-c",
            SUBSCRIBER,
            engine.endpoint(),
            engine.replay_endpoint(),
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(subscriber.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "ready");
    // A subscription has no answer: publish until a batch has got through.
    let (seen, wait) = std::sync::mpsc::channel();
    let reading = std::thread::spawn(move || {
        let live = lines.next().unwrap();
        seen.send(()).unwrap();
        (live, lines.collect::<Vec<_>>())
    });
    publish_until(&engine, &wait);
    let (live, replayed) = reading.join().unwrap();
    assert_eq!(live, "live kv@pod-0@m True ff");
    assert_eq!(
        replayed,
        ["replay kv@pod-0@m 1 02", "replay kv@pod-0@m 2 03"]
    );
    assert!(subscriber.wait().unwrap().success());
}

fn publish_until(engine: &Publisher, seen: &std::sync::mpsc::Receiver<()>) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while seen
        .recv_timeout(std::time::Duration::from_millis(5))
        .is_err()
    {
        assert!(std::time::Instant::now() < deadline, "nothing arrived");
        engine.publish_payload(vec![0xff]);
    }
}

/// vLLM's publisher in miniature: libzmq's PUB and ROUTER, one batch before anybody listens and one when told to.
const PUBLISHER: &str = r#"
import sys, zmq, threading
context = zmq.Context()
pub = context.socket(zmq.PUB); live = pub.bind_to_random_port("tcp://127.0.0.1")
router = context.socket(zmq.ROUTER); replay = router.bind_to_random_port("tcp://127.0.0.1")
batches = [bytes.fromhex(sys.argv[1])]
def serve():
    while True:
        peer, empty, start = router.recv_multipart()
        for sequence in range(int.from_bytes(start, "big"), len(batches)):
            number = sequence.to_bytes(8, "big")
            router.send_multipart([peer, b"", b"kv@pod-0@m", number, batches[sequence]])
        router.send_multipart([peer, b"", b"", b"\xff" * 8, b""])
threading.Thread(target=serve, daemon=True).start()
print(live, replay, flush=True)
sys.stdin.readline()
batches.append(bytes.fromhex(sys.argv[2]))
pub.send_multipart([b"kv@pod-0@m", (1).to_bytes(8, "big"), batches[1]])
sys.stdin.readline()
"#;

/// libzmq's PUB and ROUTER sockets, as vLLM uses them, into our index.
#[tokio::test]
async fn the_index_follows_a_publisher_made_with_libzmq() {
    let Some(python) = python_with_zmq() else {
        return;
    };
    let encoded = |event| {
        let payload = kvfabric_indexer::adapter::encode_engine_batch(1.0, &[event]);
        payload
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let first = encoded(stored(&[1], None, &TOKENS[..4], Tier::Device));
    let second = encoded(stored(&[2], Some(1), &TOKENS[4..], Tier::Device));
    let mut publisher = Command::new(python)
        .args(["-c", PUBLISHER, &first, &second])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ports = String::new();
    BufReader::new(publisher.stdout.take().unwrap())
        .read_line(&mut ports)
        .unwrap();
    let ports: Vec<&str> = ports.split_whitespace().collect();
    let server = start(config()).await;
    let client = client(&server);
    let source = kvfabric_indexer::client::SourceSpec {
        name: "engine".to_owned(),
        kind: SourceKind::Vllm,
        endpoint: format!("tcp://127.0.0.1:{}", ports[0]),
        replay_endpoint: Some(format!("tcp://127.0.0.1:{}", ports[1])),
        data_parallel_rank: None,
        groups: Vec::new(),
    };
    let _registered = join(&client, "pod-0", [source]).await;
    let answer = client
        .lookup(question(Prompt::Tokens(TOKENS.to_vec())))
        .await
        .unwrap();
    assert_eq!(answer.pods[0].depth, 1);

    let mut input = publisher.stdin.take().unwrap();
    input.write_all(b"go\n").unwrap();
    let position = kvcache_core::ports::Position {
        epoch: kvcache_core::Epoch(0),
        next: kvcache_core::Sequence(2),
    };
    let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
    asked.min_position = vec![SourcePosition::new(&pod("pod-0"), "engine", position)];
    assert_eq!(client.lookup(asked).await.unwrap().pods[0].depth, 2);
    drop(input);
    assert!(publisher.wait().unwrap().success());
}
