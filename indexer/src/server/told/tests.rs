//! What is written beside what the generated message writes.

use std::collections::BTreeMap;
use std::time::Duration;

use kvcache_core::ports::Position;
use kvcache_core::{Epoch, PodName, Sequence};
use proptest::prelude::*;
use prost::Message;
use tokio::time::Instant;

use super::*;
use crate::adapter::GroupRule;
use crate::config::ServerConfig;
use crate::index::PoolDepth;
use crate::score::MediumWeight;
use crate::server::access::Access;
use crate::server::hub::Hub;
use crate::server::lookup::answered;
use crate::wire::{Registration, SourceKind, SourceSpec};

/// Pods that may be known and answered.
const PODS: usize = 12;

/// A pod as it may register, and how its sources stand.
#[derive(Clone, Debug)]
struct Known {
    address: Option<String>,
    sources: Vec<Standing>,
}

#[derive(Clone, Debug)]
struct Standing {
    name: String,
    position: (u64, u64),
    lag_us: u64,
    heard_us: Option<u64>,
    connected: bool,
    current: bool,
}

fn name(number: usize) -> PodName {
    // One is so long that its message's length takes two bytes.
    let rest = if number == 3 { 200 } else { number };
    PodName::new(&format!("pod-{number}-{}", "x".repeat(rest))).unwrap()
}

/// Small numbers mostly: nothing, one byte, several.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 1..300_u64, any::<u64>()]
}

fn standing() -> impl Strategy<Value = Standing> {
    let told = (
        (number(), number()),
        0..5_000_000_u64,
        prop::option::of(0..5_000_000_u64),
    );
    (told, any::<bool>(), any::<bool>()).prop_map(
        |((position, lag_us, heard_us), connected, current)| Standing {
            name: String::new(),
            position,
            lag_us,
            heard_us,
            connected,
            current,
        },
    )
}

fn known() -> impl Strategy<Value = Option<Known>> {
    let sources = prop::collection::vec(standing(), 1..4);
    let address = prop::option::of("[a-z]{0,90}:[0-9]{1,5}");
    prop::option::weighted(0.9, (address, sources)).prop_map(|known| {
        known.map(|(address, mut sources)| {
            for (at, source) in sources.iter_mut().enumerate() {
                source.name = format!("engine-{at}");
            }
            Known { address, sources }
        })
    })
}

fn by_tier() -> impl Strategy<Value = [u32; TIERS]> {
    prop::array::uniform4(prop_oneof![2 => Just(0), 2 => 1..400_u32])
}

fn part() -> impl Strategy<Value = PartDepth> {
    let rule = prop_oneof![
        Just(GroupRule::Full),
        (1..5000_u32).prop_map(|tokens| GroupRule::Window { tokens }),
        Just(GroupRule::State),
        Just(GroupRule::Nothing),
    ];
    let group = (0..9_u32, rule, 0..900_u32);
    let group = group.prop_map(|(group, rule, depth)| GroupDepth { group, rule, depth });
    let groups = prop::collection::vec(group, 0..3);
    (prop::option::of(0..70_u32), by_tier(), groups).prop_map(|(rank, by_tier, groups)| PartDepth {
        rank,
        depth: by_tier.iter().sum(),
        by_tier,
        groups,
    })
}

fn pod_depth() -> impl Strategy<Value = PodDepth> {
    let own = MediumWeight {
        medium: "CXL".to_owned(),
        tier: Tier::Host,
        weight: 0.7,
    };
    let own = PodWeights::of([&own].into_iter(), &TierWeights::default()).map(std::sync::Arc::new);
    let parts = prop::collection::vec(part(), 0..3);
    let rest = (any::<bool>(), any::<bool>(), 0..9_u32);
    (0..PODS, by_tier(), parts, rest).prop_map(move |(pod, by_tier, parts, rest)| {
        let (has_own, is_approximate, expected) = rest;
        let weights = own.clone().filter(|_| has_own);
        let score = weights
            .as_deref()
            .map_or(TierWeights::default(), |own| *own.weights())
            .score(&by_tier);
        PodDepth {
            pod: name(pod),
            depth: by_tier.iter().sum(),
            by_tier,
            score,
            weights,
            parts,
            expected_depth: expected * 100,
            is_approximate,
        }
    })
}

fn answer() -> impl Strategy<Value = Answer> {
    let pods = prop::collection::vec(pod_depth(), 0..PODS);
    let shared = prop::collection::vec((0..200_u32, 1..200_u32), 0..3);
    let pools = prop::collection::vec(0..PODS, 0..3);
    (pods, shared, 0..300_u32, pools).prop_map(|(mut pods, shared, shared_depth, pools)| {
        pods.sort_by(|one, other| one.pod.cmp(&other.pod));
        pods.dedup_by(|one, other| one.pod == other.pod);
        let mut answer = Answer::default();
        answer.pods = pods;
        answer.shared_depth = shared_depth;
        answer.shared = shared
            .into_iter()
            .map(|(start, count)| start..start + count)
            .collect();
        answer.pools = pools
            .into_iter()
            .map(|pool| PoolDepth {
                pool: name(pool),
                depth: 1,
                held: vec![0..1, 5..300],
                by_tier: [0, 1, 0, 0],
            })
            .collect();
        answer
    })
}

/// A hub with these pods; nothing is connected to.
async fn hub(known: &[Option<Known>], now: Instant) -> Hub {
    let hub = Hub::new(ServerConfig::default()).unwrap();
    for (number, known) in known.iter().enumerate() {
        let Some(known) = known else { continue };
        // Several sources would have to be followed: these are given to the pod by hand.
        let spec = |source: &Standing| SourceSpec {
            name: source.name.clone(),
            kind: SourceKind::Vllm,
            endpoint: "ipc:///nowhere".to_owned(),
            replay_endpoint: None,
            data_parallel_rank: None,
            groups: Vec::new(),
        };
        let registration = Registration {
            pod: name(number),
            model: "m".to_owned(),
            block_size: hub.config.block_size,
            key_scheme: hub.scheme_name(),
            sources: known.sources.iter().map(spec).collect(),
            peer_address: known.address.clone(),
            pool_for: Vec::new(),
        };
        let pod = hub.join(&registration, Access::Any).await.unwrap();
        for (source, standing) in pod.sources.iter().zip(&known.sources) {
            source.state.change(|progress| {
                progress.position = Position {
                    epoch: Epoch(standing.position.0),
                    next: Sequence(standing.position.1),
                };
                progress.lag = Duration::from_micros(standing.lag_us);
                progress.heard_at = standing
                    .heard_us
                    .map(|ago| now.into_std() - Duration::from_micros(ago));
                progress.is_connected = standing.connected;
                progress.is_current = standing.current;
                true
            });
        }
    }
    hub
}

fn tiers_plainly(by_tier: &[u32; TIERS]) -> Vec<v1::TierDepth> {
    let wire = [
        v1::Tier::Hbm,
        v1::Tier::Dram,
        v1::Tier::Nvme,
        v1::Tier::Object,
    ];
    let held = wire.into_iter().zip(*by_tier);
    let held = held.filter(|(_, blocks)| *blocks > 0);
    held.map(|(tier, blocks)| v1::TierDepth {
        tier: tier.into(),
        blocks,
    })
    .collect()
}

fn pod_plainly(found: &PodDepth, address: Option<&String>, explain: bool) -> v1::PodDepth {
    let own = found.weights.as_deref();
    let weights = own.map_or(TierWeights::default(), |own| *own.weights());
    let terms = tiers_plainly(&found.by_tier).into_iter().map(|held| {
        let tier = Tier::ALL[held.tier as usize - 1];
        let medium = own.and_then(|own| own.medium(tier));
        v1::ScoreTerm {
            tier: held.tier,
            blocks: held.blocks,
            weight: weights.of(tier),
            medium: medium.unwrap_or("").to_owned(),
        }
    });
    let parts = found.parts.iter().map(|part| v1::PartDepth {
        data_parallel_rank: part.rank,
        depth: part.depth,
        by_tier: tiers_plainly(&part.by_tier),
        score: weights.score(&part.by_tier),
        groups: if explain {
            part.groups.iter().map(group_depth_to_wire).collect()
        } else {
            Vec::new()
        },
    });
    v1::PodDepth {
        pod: found.pod.as_str().to_owned(),
        depth: found.depth,
        by_tier: tiers_plainly(&found.by_tier),
        score: found.score,
        peer_address: address.cloned().unwrap_or_default(),
        terms: terms.filter(|_| explain).collect(),
        parts: parts.collect(),
        expected_depth: found.expected_depth,
        approximate: found.is_approximate,
    }
}

/// The answer as the generated message has it.
fn plainly(
    answer: &Answer,
    known: &BTreeMap<PodName, &Known>,
    told: &Told<'_>,
) -> v1::LookupResponse {
    let pods = answer.pods.iter().map(|found| {
        let address = known
            .get(&found.pod)
            .and_then(|known| known.address.as_ref());
        pod_plainly(found, address, told.explain)
    });
    let sources: Vec<_> = answered(answer)
        .filter_map(|name| Some((name, known.get(name)?)))
        .flat_map(|(name, known)| known.sources.iter().map(move |source| (name, source)))
        .collect();
    let positions = sources.iter().map(|(pod, source)| v1::SourcePosition {
        source: format!("{pod}/{}", source.name),
        epoch: source.position.0,
        next_sequence: source.position.1,
    });
    let freshness = sources.iter().map(|(_, source)| v1::SourceFreshness {
        lag_us: source.lag_us,
        heard_us: source.heard_us,
        connected: source.connected,
        current: source.current,
        evicted: 0,
    });
    let shared = answer.shared.iter().map(|range| v1::BlockRange {
        start: range.start,
        end: range.end,
    });
    v1::LookupResponse {
        pods: pods.collect(),
        shared_depth: answer.shared_depth,
        blocks: told.blocks,
        block_size: told.block_size,
        positions: positions.collect(),
        shared: shared.collect(),
        freshness: freshness.collect(),
        pools: told.pools.clone(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Pods of all kinds, known and unknown, with and without addresses, one with a name that makes its message long; the
    /// positions read of the answered ones, or of all and kept.
    #[test]
    fn answers_are_written_as_the_generated_message_writes_them(
        known in prop::collection::vec(known(), PODS),
        answer in answer(),
        (blocks, explain, of_all) in (0..400_u32, any::<bool>(), any::<bool>()),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let now = Instant::now() + Duration::from_secs(10);
        let _entered = runtime.enter();
        let hub = runtime.block_on(hub(&known, now));
        let pods = hub.pods();
        let mut positions = Positions::default();
        if of_all {
            positions.read(&pods, pods.keys(), now);
            positions.remember(pods.keys());
            positions.keep(&answer);
        } else {
            positions.read(&pods, answered(&answer), now);
        }
        let told = Told {
            answer: &answer,
            positions: &positions,
            pools: hub.pools_to_wire(&pods, &answer.pools, &[]),
            weights: &hub.weights,
            blocks,
            block_size: 16,
            explain,
        };
        let known: BTreeMap<_, _> = known
            .iter()
            .enumerate()
            .filter_map(|(number, known)| Some((name(number), known.as_ref()?)))
            .collect();
        let plain = plainly(&answer, &known, &told);
        let mut fields = Fields::default();
        let written = told.encode(&mut fields).encode_to_vec();
        prop_assert_eq!(&written, &plain.encode_to_vec());
        // What was written before is not in it.
        prop_assert_eq!(told.encode(&mut fields).encode_to_vec(), written);
    }
}
