//! Pools that the pods of one host share: answered once, and told who may use them; over a real server and real sockets.
#![cfg(test)]

mod rig;

use kvcache_core::{PodName, Tier};
use kvfabric_indexer::client::{
    IndexClient, LookupAnswer, PoolDepth, Prompt, SourceKind, SourcePosition,
};
use kvfabric_indexer::publisher::Publisher;
use rig::*;

/// Four blocks.
const PROMPT: [u32; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

async fn ask(client: &IndexClient, only: &[&str], told: &[(&str, &Publisher)]) -> LookupAnswer {
    let mut asked = question(Prompt::Tokens(PROMPT.to_vec()));
    asked.pods = only.iter().map(|name| pod(name)).collect();
    let position = |(name, publisher): &(&str, &Publisher)| {
        SourcePosition::new(&pod(name), "engine", publisher.position())
    };
    asked.min_position = told.iter().map(position).collect();
    asked.deadline = Some(PATIENCE);
    client.lookup(asked).await.unwrap()
}

fn depths(answer: &LookupAnswer) -> Vec<(&str, u32)> {
    let pods = answer.pods.iter();
    pods.map(|pod| (pod.pod.as_str(), pod.depth)).collect()
}

fn users(pool: &PoolDepth) -> Vec<&str> {
    pool.pods.iter().map(PodName::as_str).collect()
}

/// A pool of one host with a hole in what it holds, two pods there, one elsewhere.
#[tokio::test]
async fn a_pool_is_answered_once_with_what_it_holds_and_who_may_use_it() {
    let server = start(config()).await;
    let client = client(&server);
    let names = ["10.0.0.7:1", "10.0.0.7:2", "10.0.0.8:1"];
    let (memory, engines) = (engine("host-7"), names.map(engine));
    let registered = [0, 1, 2].map(|at| {
        let source = engines[at].source("engine", SourceKind::Vllm);
        client.register(registration(names[at], [source]))
    });
    let mut pool = registration("host-7", [memory.source("engine", SourceKind::Sglang)]);
    pool.pool_for = vec!["10.0.0.7:".to_owned(), "10.0.0.9:".to_owned()];
    let of_pool = client.register(pool);
    for registered in registered.iter().chain([&of_pool]) {
        registered.ready(PATIENCE).await.unwrap();
    }
    engines[0].publish_engine(vec![stored(&[1, 2], None, &PROMPT[..8], Tier::Device)]);
    engines[2].publish_engine(vec![stored(&[1], None, &PROMPT[..4], Tier::Device)]);
    memory.publish_engine(vec![
        stored(&[11, 12, 13, 14], None, &PROMPT, Tier::Host),
        removed(&[12], Tier::Host),
    ]);
    let told = [
        (names[0], &engines[0]),
        (names[2], &engines[2]),
        ("host-7", &memory),
    ];
    let answer = ask(&client, &[], &told).await;
    assert_eq!(depths(&answer), [(names[0], 2), (names[2], 1)]);
    let [pool] = &answer.pools[..] else {
        panic!("{:?}", answer.pools);
    };
    assert_eq!((pool.pool.as_str(), pool.depth), ("host-7", 1));
    assert_eq!(pool.held, [0..1, 2..4]);
    assert_eq!(pool.by_tier, [0, 3, 0, 0]);
    assert_eq!(users(pool), names[..2]);
    assert_eq!(pool.peer_address.as_deref(), Some("127.0.0.1:9"));
    let sources = answer.positions.iter().map(|at| at.source.as_str());
    assert!(
        sources.clone().any(|source| source == "host-7/engine"),
        "{answer:?}"
    );
    assert_eq!(answer.shared_depth, 0, "it is not everybody's");

    // Asked about some pods, pools are told that one of them may use.
    let one = ask(&client, &[names[1]], &told).await;
    assert_eq!(
        (depths(&one), users(&one.pools[0])),
        (vec![], vec![names[1]])
    );
    assert!(one.positions.iter().any(|at| at.source == "host-7/engine"));
    let other = ask(&client, &[names[2]], &told).await;
    assert_eq!(
        (depths(&other), other.pools.len()),
        (vec![(names[2], 1)], 0)
    );

    memory.publish_engine(vec![removed(&[11, 13, 14], Tier::Host)]);
    let answer = ask(&client, &[], &told).await;
    assert_eq!((answer.pods.len(), answer.pools.len()), (2, 0));
    memory.publish_engine(vec![stored(&[11], None, &PROMPT[..4], Tier::Host)]);
    assert_eq!(ask(&client, &[], &told).await.pools.len(), 1);
    drop(of_pool);
    wait_until(&client, |status| status.pods.len() == 3).await;
    let answer = ask(&client, &[], &[]).await;
    assert_eq!((answer.pods.len(), answer.pools.len()), (2, 0));
    server.shutdown(PATIENCE).await.unwrap();
}

/// Two pools of other models and of nobody's pods, and beginnings that are none.
#[tokio::test]
async fn a_pool_is_for_pods_of_its_model_only_and_must_say_for_whom() {
    let server = start(config()).await;
    let client = client(&server);
    let (memory, user) = (engine("host-7"), engine("10.0.0.7:1"));
    let mut elsewhere = registration("10.0.0.7:1", [user.source("engine", SourceKind::Vllm)]);
    elsewhere.model = "other".to_owned();
    let elsewhere = client.register(elsewhere);
    let mut pool = registration("host-7", [memory.source("engine", SourceKind::Sglang)]);
    pool.pool_for = vec!["10.0.0.7:".to_owned()];
    let of_pool = client.register(pool.clone());
    elsewhere.ready(PATIENCE).await.unwrap();
    of_pool.ready(PATIENCE).await.unwrap();
    memory.publish_engine(vec![stored(&[11], None, &PROMPT[..4], Tier::Host)]);
    let answer = ask(&client, &[], &[("host-7", &memory)]).await;
    assert_eq!((answer.pods.len(), users(&answer.pools[0])), (0, vec![]));
    pool.pool_for.push(String::new());
    let refusal = client.register(pool).ready(PATIENCE).await.unwrap_err();
    assert!(refusal.to_string().contains("pool_for"), "{refusal}");
    server.shutdown(PATIENCE).await.unwrap();
}
