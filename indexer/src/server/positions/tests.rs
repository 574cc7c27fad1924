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
const BLOCKS: u32 = 16;
/// Pods, of which the best one is asked for.
const PODS: u32 = 3;

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
fn join(hub: &Hub, name: &str) -> (SourceId, PodName) {
    let pod = PodName::new(name).unwrap();
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

/// After so many asks of the index within the lookup, a batch of one block is applied as a source's task does, of another pod
/// each time, which is then the deepest: the answer has all blocks of the batches that it says are applied. So it is whether
/// the pods stay the same or change until all are read of.
#[test]
fn an_answer_has_all_that_it_says_is_applied() {
    for batches in 0..=BLOCKS {
        let hub = Hub::new(ServerConfig {
            block_size: BLOCK,
            ..ServerConfig::default()
        })
        .unwrap();
        let pods: Vec<(SourceId, PodName)> = (0..PODS)
            .map(|number| join(&hub, &format!("pod-{number}")))
            .collect();
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
            pods_max: 1,
            pods: Vec::new(),
            ranking: v1::Ranking::Depth,
            explain: false,
        };
        let apply = |pod: u32, number: u32| {
            let (id, name) = &pods[pod as usize];
            index.apply(*id, &block(number)).unwrap();
            hub.steps.take();
            let state = hub.pods()[name].sources[0].state.clone();
            state.change(|progress| {
                progress.position.next = Sequence(u64::from(number) + 1);
                true
            });
        };
        apply(0, 0);
        let mut applied = 0;
        let encoded = hub.answer_amid(
            &question,
            |told, fields| told.encode(fields),
            || {
                if applied < batches {
                    // One block more than the pods before it have.
                    let pod = (applied + 1) % PODS;
                    (0..=applied + 1).for_each(|number| apply(pod, number));
                    applied += 1;
                }
            },
        );
        let answer = v1::LookupResponse::decode(&*encoded.unwrap().encode_to_vec()).unwrap();
        let (best, position) = (&answer.pods[0], &answer.positions[0]);
        assert!(
            u64::from(best.depth) >= position.next_sequence,
            "after {batches}: {} blocks of {} batches of {}",
            best.depth,
            position.next_sequence,
            best.pod,
        );
        assert!(best.depth >= 1);
    }
}
