//! Two tenants in one server beside two servers of one tenant each.

use kvcache_core::{EngineHash, PodName, Tier};
use proptest::prelude::*;
use tokio::time::Instant;

use crate::adapter::{RemovedBlocks, SourceEvent, SourceKind, StoredBlocks};
use crate::config::{ServerConfig, TenantConfig};
use crate::index::{Answer, KvIndex, Query, SourceId, SourceSpec, Usage};
use crate::server::access::Access;
use crate::server::hub::Hub;
use crate::server::models::EmptySince;
use crate::wire::Registration;

/// Tokens a block.
const BLOCK: u32 = 4;
/// Blocks of one prompt: with so many, some dozens of prompts are more than the least bound has room for.
const BLOCKS: u32 = 8192;
const TENANTS: [&str; 2] = ["acme", "beta"];

/// A server that has these tenants, with the least bound each.
fn hub(tenants: &[&str]) -> Hub {
    let mut config = ServerConfig {
        block_size: BLOCK,
        max_bytes: Some(format!("{}MiB", 16 * (tenants.len() + 1))),
        ..ServerConfig::default()
    };
    for name in tenants {
        let rules = TenantConfig {
            max_bytes: Some("16MiB".to_owned()),
            pods: vec![format!("{name}-")],
            models: Vec::new(),
            ..TenantConfig::default()
        };
        config.tenants.insert((*name).to_owned(), rules);
    }
    Hub::new(config).unwrap()
}

fn source(hub: &Hub, tenant: &str) -> (std::sync::Arc<KvIndex>, SourceId) {
    let registration = Registration {
        pod: PodName::new(&format!("{tenant}-0")).unwrap(),
        model: "m".to_owned(),
        block_size: BLOCK,
        key_scheme: hub.scheme_name(),
        sources: Vec::new(),
        peer_address: None,
        pool_for: Vec::new(),
    };
    let index = hub.index_for_pod(&registration).unwrap();
    let spec = SourceSpec {
        pod: registration.pod,
        name: "engine".to_owned(),
        kind: SourceKind::Vllm,
        block_size: BLOCK,
    };
    let id = index.add_source(spec).unwrap();
    (index, id)
}

/// Both tenants tell of the same prompts, under the same names.
fn tokens(prompt: u32, blocks: u32) -> Vec<u32> {
    (0..blocks)
        .flat_map(|block| [prompt, block, 7, 7])
        .collect()
}

fn name(prompt: u32, block: u32) -> EngineHash {
    EngineHash(u64::from(prompt) << 32 | u64::from(block) | 1 << 62)
}

fn stored(prompt: u32, blocks: u32) -> SourceEvent {
    SourceEvent::Stored(StoredBlocks {
        hashes: (0..blocks).map(|block| name(prompt, block)).collect(),
        parent: None,
        tokens: tokens(prompt, blocks),
        block_size: BLOCK,
        tier: Tier::Device,
        group: None,
        lora: None,
        cache_salt: None,
        identifiers: vec![],
    })
}

#[derive(Clone, Debug)]
enum Step {
    Store { prompt: u32, blocks: u32 },
    Remove { prompt: u32, from: u32 },
    Clear,
    Ask { prompt: u32 },
}

fn step() -> impl Strategy<Value = (usize, Step)> {
    let prompt = 0..70_u32;
    let step = prop_oneof![
        12 => (prompt.clone(), BLOCKS / 2..BLOCKS)
            .prop_map(|(prompt, blocks)| Step::Store { prompt, blocks }),
        3 => (prompt.clone(), 0..BLOCKS).prop_map(|(prompt, from)| Step::Remove { prompt, from }),
        6 => prompt.prop_map(|prompt| Step::Ask { prompt }),
    ];
    // One of them is much busier, so that it is the one whose entries are given up.
    let tenant = prop_oneof![5 => Just(0_usize), 1 => Just(1)];
    let step = prop_oneof![60 => step, 1 => Just(Step::Clear)];
    (tenant, step)
}

fn depth(hub: &Hub, tenant: &str, prompt: u32) -> Vec<(String, u32)> {
    let index = hub.index_for(tenant, "m").unwrap().unwrap();
    let (mut keys, mut answer) = (Vec::new(), Answer::default());
    index.keys_of(None, None, &tokens(prompt, BLOCKS), &mut keys);
    index.lookup(&keys, &Query::default(), &mut answer);
    let pods = answer.pods.iter();
    pods.map(|pod| (pod.pod.to_string(), pod.depth)).collect()
}

fn apply((index, id): &(std::sync::Arc<KvIndex>, SourceId), step: &Step) {
    let event = match step {
        Step::Store { prompt, blocks } => stored(*prompt, *blocks),
        Step::Remove { prompt, from } => SourceEvent::Removed(RemovedBlocks {
            hashes: (*from..BLOCKS)
                .rev()
                .map(|block| name(*prompt, block))
                .collect(),
            tier: Tier::Device,
            group: None,
        }),
        Step::Clear => SourceEvent::Cleared,
        Step::Ask { .. } => return,
    };
    index.apply(*id, &event).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2, ..ProptestConfig::default() })]

    /// Random histories, in which the busier tenant exceeds its bound again and again: each tenant is answered, and gives up,
    /// exactly what it would by itself.
    #[test]
    fn a_tenant_is_as_if_it_were_alone(
        steps in prop::collection::vec(step(), 40..60)
    ) {
        let together = hub(&TENANTS);
        let apart = TENANTS.map(|tenant| hub(&[tenant]));
        let sources: Vec<_> = (0..2)
            .map(|at| (source(&together, TENANTS[at]), source(&apart[at], TENANTS[at])))
            .collect();
        let filling = (0..60).map(|prompt| (0, Step::Store { prompt, blocks: BLOCKS }));
        for (tenant, step) in filling.chain(steps) {
            let (one, other) = &sources[tenant];
            apply(one, &step);
            apply(other, &step);
            let Step::Ask { prompt } = step else {
                continue;
            };
            for tenant in 0..2 {
                let found = depth(&together, TENANTS[tenant], prompt);
                prop_assert_eq!(&found, &depth(&apart[tenant], TENANTS[tenant], prompt));
                let own = format!("{}-0", TENANTS[tenant]);
                prop_assert!(found.iter().all(|(pod, _)| *pod == own), "{:?}", found);
            }
        }
        for (one, other) in &sources {
            // Hash tables of equal content may differ in what they have allocated.
            let counted = |index: &KvIndex| Usage {
                bytes: 0,
                ..index.usage()
            };
            prop_assert_eq!(counted(&one.0), counted(&other.0));
        }
        prop_assert!(sources[0].0.0.usage().evicted_blocks > 0, "nothing was given up");
    }
}

/// A model is ended when it has had no pod and held nothing for the time to live, not before; what it gave up stays counted,
/// and its bytes are the other models'.
#[test]
fn a_model_ends_when_it_has_held_nothing_for_the_time_to_live() {
    let hub = hub(&["acme"]);
    let (index, id) = source(&hub, "acme");
    for prompt in 0..70 {
        apply(
            &(index.clone(), id),
            &Step::Store {
                prompt,
                blocks: BLOCKS,
            },
        );
    }
    let given_up = index.usage().evicted_blocks;
    assert!(given_up > 0, "nothing was given up");
    let tenant = hub.tenants.by_name("acme").unwrap();
    let counted = || {
        let tenants = hub.holdings(Access::Any).tenants;
        tenants
            .iter()
            .map(|held| held.usage.evicted_blocks)
            .sum::<u64>()
    };
    let (begun, ttl) = (Instant::now(), hub.config.source_ttl());
    let mut empty_since = EmptySince::new();
    hub.end_models(&mut empty_since, begun);
    hub.end_models(&mut empty_since, begun + 10 * ttl);
    assert_eq!(hub.holdings(Access::Any).models, 1, "it holds something");

    index.remove_source(id);
    let left = begun + 11 * ttl;
    hub.end_models(&mut empty_since, left);
    hub.end_models(&mut empty_since, left + ttl / 2);
    assert_eq!(
        hub.holdings(Access::Any).models,
        1,
        "it was there a moment ago"
    );
    let other = hub.index_of(tenant, "other");
    assert!(
        other.is_err(),
        "a second model has no room: {:?}",
        other.err()
    );
    assert_eq!(counted(), given_up);
    hub.end_models(&mut empty_since, left + ttl);
    assert_eq!(hub.holdings(Access::Any).models, 0);
    assert_eq!(counted(), given_up, "what it gave up is forgotten");
    let other = hub.index_of(tenant, "other").unwrap();
    assert_eq!(other.usage().bytes_max, Some(16 << 20));
}
