//! Many questions in one call, answers in another order, and what an answer is worth.
#![cfg(test)]

mod rig;

use kvcache_core::Tier;
use kvcache_core::event::NodeEvent;
use kvcache_core::ports::EventSink;
use kvfabric_indexer::client::{
    IndexClient, LookupOptions, Prompt, Ranking, Registered, SourceKind, SourcePosition,
};
use kvfabric_indexer::publisher::Publisher;
use kvfabric_indexer::server::Running;
use kvfabric_proto::v1;
use kvfabric_proto::v1::lookup_reply::Outcome;
use rig::*;
use tokio_stream::wrappers::ReceiverStream;

/// `deep` has two blocks on disk (score 1.0), `fast` one in HBM and another nobody asks for (score 1.0 with one block),
/// `best` both in DRAM (score 1.6).
async fn three_pods(server: &Running) -> (IndexClient, Vec<(Publisher, Registered)>) {
    let client = client(server);
    let mut kept = Vec::new();
    for (name, blocks, tier) in [
        ("deep", 2, Tier::Disk),
        ("fast", 1, Tier::Device),
        ("best", 2, Tier::Host),
    ] {
        let node = node(name, 1);
        let held = keys_of(&TOKENS).into_iter().take(blocks);
        let parent = None;
        node.publish(
            held.map(|key| NodeEvent::Stored { key, parent, tier })
                .collect(),
        );
        let registered = join(&client, name, [node.source("node", SourceKind::Node)]).await;
        kept.push((node, registered));
    }
    (client, kept)
}

fn wire_question(tokens: &[u32]) -> v1::LookupRequest {
    let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    v1::LookupRequest {
        model: "m".to_owned(),
        prompt: Some(v1::lookup_request::Prompt::Tokens(bytes.into())),
        ..Default::default()
    }
}

fn depths(reply: &v1::LookupReply) -> Vec<(&str, u32)> {
    match &reply.outcome {
        Some(Outcome::Answer(answer)) => {
            let pods = answer.pods.iter();
            pods.map(|pod| (pod.pod.as_str(), pod.depth)).collect()
        }
        other => panic!("{other:?}"),
    }
}

/// The best by depth and the best by score are others; the terms add up to the score.
#[tokio::test]
async fn pods_are_ranked_as_asked_and_scores_explained() {
    let server = start(config()).await;
    let (client, _kept) = three_pods(&server).await;
    let names = async |ranking, pods_max| {
        let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
        asked.pods_max = pods_max;
        let explain = true;
        let options = LookupOptions { ranking, explain };
        let answer = client.lookup_with(asked, options).await.unwrap();
        for pod in &answer.pods {
            let sum: f64 = pod
                .terms
                .iter()
                .map(|term| f64::from(term.blocks) * term.weight)
                .sum();
            assert_eq!((sum, pod.terms.len()), (pod.score, 1));
        }
        let names = answer.pods.iter().map(|pod| pod.pod.as_str().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(Ranking::Depth, 0).await, ["best", "deep", "fast"]);
    assert_eq!(names(Ranking::Score, 0).await, ["best", "deep", "fast"]);
    assert_eq!(names(Ranking::Score, 1).await, ["best"]);
    let plain = question(Prompt::Tokens(TOKENS.to_vec()));
    let answer = client.lookup(plain).await.unwrap();
    assert!(answer.pods.iter().all(|pod| pod.terms.is_empty()));
    // One block only: now the one in HBM is the best, and depth alone cannot tell them apart.
    let mut asked = question(Prompt::Tokens(TOKENS[..4].to_vec()));
    asked.pods_max = 1;
    let options = LookupOptions {
        ranking: Ranking::Score,
        explain: false,
    };
    let answer = client.lookup_with(asked, options).await.unwrap();
    assert_eq!(answer.pods[0].pod, pod("fast"));
}

/// Two good questions around one that makes no sense.
#[tokio::test]
async fn a_batch_answers_each_question_by_itself() {
    let server = start(config()).await;
    let (_client, _kept) = three_pods(&server).await;
    let mut odd = wire_question(&TOKENS);
    odd.prompt = Some(v1::lookup_request::Prompt::Tokens(vec![1, 2, 3].into()));
    let mut narrow = wire_question(&TOKENS[..4]);
    narrow.pods = vec!["fast".to_owned()];
    let batch = v1::LookupBatchRequest {
        questions: vec![wire_question(&TOKENS), odd, narrow],
    };
    let mut raw = raw(&server).await;
    let replies = raw.lookup_batch(batch).await.unwrap().into_inner().replies;
    assert_eq!(replies.len(), 3);
    assert_eq!(depths(&replies[0]), [("best", 2), ("deep", 2), ("fast", 1)]);
    let Some(Outcome::Failure(failure)) = &replies[1].outcome else {
        panic!("{:?}", replies[1]);
    };
    assert_eq!(failure.code, tonic::Code::InvalidArgument as u32);
    assert_eq!(failure.kind, "invalid");
    assert!(failure.message.contains("3 bytes"), "{failure:?}");
    assert_eq!(depths(&replies[2]), [("fast", 1)]);

    let batch = v1::LookupBatchRequest {
        questions: vec![v1::LookupRequest::default(); 1025],
    };
    let status = raw.lookup_batch(batch).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("1025"), "{status}");
}

/// One question of a batch waits for what never comes: the others are answered, and the deadline is kept.
#[tokio::test]
async fn a_batch_keeps_its_deadline() {
    let mut config = config();
    config.lookup_deadline_ms = 50;
    let server = start(config).await;
    let (_client, _kept) = three_pods(&server).await;
    let mut late = wire_question(&TOKENS);
    late.min_position = vec![v1::SourcePosition {
        source: "nobody/engine".to_owned(),
        epoch: 0,
        next_sequence: 1,
    }];
    let batch = v1::LookupBatchRequest {
        questions: vec![wire_question(&TOKENS), late, wire_question(&TOKENS)],
    };
    let replies = raw(&server).await.lookup_batch(batch).await.unwrap();
    let replies = replies.into_inner().replies;
    assert_eq!(depths(&replies[0]).len(), 3);
    let Some(Outcome::Failure(failure)) = &replies[1].outcome else {
        panic!("{:?}", replies[1]);
    };
    assert_eq!(failure.kind, "timeout");
    // What needs no waiting needs no time.
    assert_eq!(depths(&replies[2]).len(), 3);
}

/// Replies come in the order of the questions, one for each; a bad one does not end the stream.
#[tokio::test]
async fn a_stream_answers_in_order_as_long_as_it_is_asked() {
    let server = start(config()).await;
    let (_client, _kept) = three_pods(&server).await;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut raw = raw(&server).await;
    let stream = ReceiverStream::new(receiver);
    let mut replies = raw.lookup_stream(stream).await.unwrap().into_inner();
    for round in 0..50 {
        let (tokens, expected): (&[u32], usize) = match round % 2 {
            0 => (&TOKENS, 3),
            _ => (&[9, 9, 9, 9], 0),
        };
        sender.send(wire_question(tokens)).await.unwrap();
        let reply = replies.message().await.unwrap().unwrap();
        assert_eq!(depths(&reply).len(), expected);
    }
    sender.send(v1::LookupRequest::default()).await.unwrap();
    let reply = replies.message().await.unwrap().unwrap();
    assert!(matches!(reply.outcome, Some(Outcome::Failure(_))));
    drop(sender);
    assert!(replies.message().await.unwrap().is_none());
}

/// A client that asks on and never reads: the server stops reading its questions instead of keeping replies.
#[tokio::test]
async fn a_reader_that_stops_holds_up_its_own_questions_only() {
    let server = start(config()).await;
    let (client, _kept) = three_pods(&server).await;
    let (asked, replies) = ask_without_reading(&server).await;
    assert!(asked.is_taken, "the server ended the stream");
    // The others do not notice.
    let answer = client
        .lookup(question(Prompt::Tokens(TOKENS.to_vec())))
        .await;
    assert_eq!(answer.unwrap().pods.len(), 3);
    drop((asked, replies));
}

/// The same client, which is too late when it reads after all: there is an end to what it reads, though it would ask on.
#[tokio::test]
async fn a_reader_that_stops_is_cut_off() {
    let mut config = config();
    config.reader_timeout_ms = 200;
    let server = start(config).await;
    let (_client, _kept) = three_pods(&server).await;
    let (asked, mut replies) = ask_without_reading(&server).await;
    let reading = async {
        let mut read = 0;
        while let Ok(Some(_)) = replies.message().await {
            read += 1;
        }
        read
    };
    let read = tokio::time::timeout(PATIENCE, reading).await;
    let read = read.expect("the stream goes on as if nothing had been");
    assert!(read < asked.sent, "all {read} questions were answered");
}

/// A stream of questions that stays open.
struct Asked {
    _sender: tokio::sync::mpsc::Sender<v1::LookupRequest>,
    sent: u32,
    /// The server has not ended the stream as far as sending tells.
    is_taken: bool,
}

/// Asks on a stream, without reading replies, until sending comes to a halt.
async fn ask_without_reading(server: &Running) -> (Asked, tonic::Streaming<v1::LookupReply>) {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut raw = raw(server).await;
    let stream = ReceiverStream::new(receiver);
    let replies = raw.lookup_stream(stream).await.unwrap().into_inner();
    // Small messages that nobody reads are a flood to the HTTP/2 library, which ends the connection; these are not.
    let mut long = TOKENS.to_vec();
    long.resize(1024, 7);
    let mut question = wire_question(&long);
    question.explain = true;
    // Windows and queues of both sides hold some megabytes of replies and questions; then sending must come to a halt.
    // The bound only ends a failing test: nothing that is sent at all takes a second.
    let halt = std::time::Duration::from_secs(1);
    let mut asked = Asked {
        _sender: sender.clone(),
        sent: 0,
        is_taken: true,
    };
    while let Ok(taken) = tokio::time::timeout(halt, sender.send(question.clone())).await {
        if taken.is_err() {
            asked.is_taken = false;
            break;
        }
        asked.sent += 1;
        assert!(asked.sent < 200_000, "the server reads on without end");
    }
    (asked, replies)
}

/// Connected and heard of, then gone.
#[tokio::test]
async fn an_answer_says_how_fresh_each_source_is() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_engine(vec![stored(&[1], None, &TOKENS[..4], Tier::Device)]);
    let _registered = join_engine(&client, "pod-0", &engine).await;
    let mut asked = question(Prompt::Tokens(TOKENS.to_vec()));
    asked.min_position = vec![SourcePosition::new(
        &pod("pod-0"),
        "engine",
        engine.position(),
    )];
    let answer = client.lookup(asked.clone()).await.unwrap();
    assert_eq!(answer.freshness.len(), answer.positions.len());
    let fresh = answer.freshness[0];
    assert!(fresh.is_connected && fresh.heard.is_some(), "{fresh:?}");
    drop(engine);
    wait_until(&client, |status| !status.pods[0].sources[0].connected).await;
    let answer = client.lookup(asked).await.unwrap();
    let fresh = answer.freshness[0];
    assert!(!fresh.is_connected && !fresh.is_current, "{fresh:?}");
    assert!(fresh.heard.is_some());
    assert_eq!(answer.pods.len(), 1, "the TTL has not passed");
}

/// Longer than a message may be: refused with the sizes, and the connection goes on.
#[tokio::test]
async fn a_question_that_is_too_long_is_refused_with_its_size() {
    let server = start(config()).await;
    let mut raw = raw(&server).await;
    let long = vec![0; 5 << 20];
    let status = raw.lookup(wire_question(&long)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::OutOfRange);
    assert!(status.message().contains("20971"), "{status}");
    let answer = raw.lookup(wire_question(&TOKENS)).await.unwrap();
    assert_eq!(answer.into_inner().blocks, 2);
}
