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

/// Behind each of so many asks of the index within a lookup, batches of one block are applied as a source's task does: of
/// every pod, and one more of another pod each time, which is then the deepest. The answer has all blocks of the batches that
/// it says are applied, also when the best pod changes until all pods are read of.
#[test]
fn an_answer_has_all_that_it_says_is_applied() {
    for batches in 0..BLOCKS / 2 {
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
        let mut depths = [0; PODS as usize];
        let mut apply = |pod: u32, depth: u32| {
            let (id, name) = &pods[pod as usize];
            let applied = std::mem::replace(&mut depths[pod as usize], depth);
            for number in applied..depth {
                index.apply(*id, &block(number)).unwrap();
                hub.steps.take();
                let state = hub.pods()[name].sources[0].state.clone();
                state.change(|progress| {
                    progress.position.next = Sequence(u64::from(number) + 1);
                    true
                });
            }
        };
        apply(0, 1);
        let mut asks = 0;
        let amid = || {
            if asks < batches {
                asks += 1;
                (0..PODS).for_each(|pod| apply(pod, 2 * asks + u32::from(asks % PODS == pod)));
            }
        };
        let encoded = hub.answer_amid(&question, |told, fields| told.encode(fields), amid);
        let answer = v1::LookupResponse::decode(&*encoded.unwrap().encode_to_vec()).unwrap();
        let (best, position) = (&answer.pods[0], &answer.positions[0]);
        assert!(
            u64::from(best.depth) >= position.next_sequence,
            "{batches} times: {} blocks of {} batches of {}",
            best.depth,
            position.next_sequence,
            best.pod,
        );
        assert!(best.depth >= 1);
    }
}
