//! What an answer promises while events are applied.

use kvcache_core::{EngineHash, IndexKey, PodName, Sequence, Tier};
use kvfabric_proto::v1;
use prost::Message;

use crate::adapter::{SourceEvent, SourceKind, StoredBlocks};
use crate::config::ServerConfig;
use crate::index::SourceId;
use crate::server::access::Access;
use crate::server::hub::Hub;
use crate::server::lookup::{Prompt, Question};
use crate::wire::{Registration, SourceSpec};

/// Tokens a block.
const BLOCK: u32 = 4;
/// Blocks of the one chain.
const BLOCKS: u32 = 3000;

fn block(number: u32) -> SourceEvent {
    SourceEvent::Stored(StoredBlocks {
        hashes: vec![EngineHash(number.into())],
        parent: number
            .checked_sub(1)
            .map(|before| EngineHash(before.into())),
        tokens: vec![number; BLOCK as usize],
        block_size: BLOCK,
        tier: Tier::Device,
        group: None,
        lora: None,
        cache_salt: None,
        identifiers: Vec::new(),
    })
}

/// A pod's only source, whose task never runs.
fn join(hub: &Hub) -> (SourceId, PodName) {
    let pod = PodName::new("pod-0").unwrap();
    let registration = Registration {
        pod: pod.clone(),
        model: "m".to_owned(),
        block_size: BLOCK,
        key_scheme: hub.scheme_name(),
        sources: vec![SourceSpec {
            name: "engine".to_owned(),
            kind: SourceKind::Vllm,
            endpoint: "ipc:///nowhere".to_owned(),
            replay_endpoint: None,
            data_parallel_rank: None,
            groups: Vec::new(),
        }],
        peer_address: None,
        pool_for: Vec::new(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let joined = runtime.block_on(hub.join(&registration, Access::Any));
    (joined.unwrap().sources[0].id, pod)
}

/// Blocks that an answer has, and how many batches it says are applied.
fn answer(hub: &Hub, question: &Question<'_>) -> (u32, u64) {
    let encoded = hub.answer_encoded(question).unwrap().encode_to_vec();
    let answer = v1::LookupResponse::decode(&*encoded).unwrap();
    let depth = answer.pods.first().map_or(0, |pod| pod.depth);
    let position = answer.positions.first();
    (depth, position.map_or(0, |position| position.next_sequence))
}

/// One thread applies a block a batch as a source's task does, the other asks: each answer has at least the blocks of the
/// batches that it says are applied.
#[test]
fn an_answer_has_all_that_it_says_is_applied() {
    let hub = Hub::new(ServerConfig {
        block_size: BLOCK,
        ..ServerConfig::default()
    })
    .unwrap();
    let (id, pod) = join(&hub);
    let index = hub.index_for("", "m").unwrap().unwrap();
    let tokens: Vec<u32> = (0..BLOCKS)
        .flat_map(|number| [number; BLOCK as usize])
        .collect();
    let mut keys = Vec::new();
    index.keys_of(None, None, &tokens, &mut keys);
    let keys: Vec<u64> = keys.into_iter().map(|IndexKey(key)| key).collect();
    let question = Question {
        tenant: "",
        model: "m",
        lora: None,
        cache_salt: None,
        prompt: Prompt::Keys(&keys),
        pods_max: 0,
        pods: Vec::new(),
        ranking: v1::Ranking::Depth,
        explain: false,
    };
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let state = hub.pods()[&pod].sources[0].state.clone();
            for number in 0..BLOCKS {
                index.apply(id, &block(number)).unwrap();
                hub.steps.take();
                state.change(|progress| {
                    progress.position.next = Sequence(u64::from(number) + 1);
                    true
                });
            }
        });
        while !writer.is_finished() {
            let (depth, applied) = answer(&hub, &question);
            assert!(
                u64::from(depth) >= applied,
                "{depth} blocks of {applied} batches"
            );
        }
    });
    assert_eq!(answer(&hub, &question), (BLOCKS, BLOCKS.into()));
}
