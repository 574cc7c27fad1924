//! What a virtual cluster is made of, what it does, and what goes wrong in it.

use std::time::Duration;

use kvcache_core::manager::Limits;
use kvfabric_transfer::backend::sim::{Chance, ExchangeConfig, LinkProfile};

use crate::engine::ComputeModel;
use crate::router::Policy;
use crate::seed::Random;
use crate::workload::{AgentOptions, ChatOptions, RagOptions, Span, Workload, WorkloadKind};

/// Chances are in millionths.
type Millionths = u32;

/// One run of a virtual cluster; all of it follows from these settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Determines every random choice.
    pub seed: u64,
    /// Pods that work on prompts.
    pub prefill_pods: usize,
    /// Pods that write answers; 0: whoever works on the prompt does both.
    pub decode_pods: usize,
    /// What is asked of the cluster.
    pub workload: Workload,
    /// How pods are chosen.
    pub policy: Policy,
    /// Tokens a block.
    pub block_tokens: u32,
    /// Bytes a block, really kept and really compared.
    pub block_bytes: usize,
    /// Layers a block; they divide its bytes.
    pub layers: u32,
    /// Blocks in each engine's pool.
    pub engine_slots: u32,
    /// The managers' sizes and bounds.
    pub limits: Limits,
    /// Requests served at the same time.
    pub concurrency: usize,
    /// How long a store or a fetch may take.
    pub operation_wait: Duration,
    /// How long computing takes.
    pub compute: ComputeModel,
    /// The network between the pods.
    pub fabric: ExchangeConfig,
    /// What goes wrong.
    pub faults: Faults,
    /// The mean time between two other things that somebody wants of a pod: that it keeps blocks, forgets them, waits for
    /// its disk, or ends. None: never.
    pub upkeep_gap: Option<Duration>,
    /// Every block that was ever computed must be found again: checked request by request.
    pub exact: bool,
    /// What is broken on purpose, so that a test can see it being found.
    pub sabotage: Sabotage,
}

/// What goes wrong, beside what the network does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Events reach the index after up to this long.
    pub index_lag_max: Duration,
    /// The mean time between two disturbances: a pod killed, or two pods cut off from each other. None: never.
    pub disturbance_gap: Option<Duration>,
    /// A read from disk finds a wrong bit, which stays.
    pub disk_flip: Millionths,
    /// A write to disk finds it full.
    pub disk_full: Millionths,
    /// A call of the object store fails.
    pub object_failure: Millionths,
    /// An object is gone when it is asked for.
    pub object_loss: Millionths,
    /// A local copy is given up at its deadline, and ends only later.
    pub stall: Millionths,
}

/// A bug planted in the driver, for tests of the tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sabotage {
    /// None.
    #[default]
    Nothing,
    /// Copied bytes are taken without comparing their checksum or their slot's generation.
    TrustBytes,
    /// Engine slots are used again while a transfer may still write to them.
    ReuseUnsettledSlots,
    /// The index never hears that a block left DRAM.
    SwallowRemovals,
}

impl Config {
    /// No faults, no limits, one request after the other: every block that was ever computed must be found again.
    #[must_use]
    pub fn calm(seed: u64, kind: WorkloadKind, policy: Policy) -> Self {
        let limits = Limits {
            host_slots: 1 << 15,
            ..Limits::default()
        };
        Self {
            seed,
            prefill_pods: 3,
            decode_pods: 2,
            workload: small(kind, seed, 120),
            policy,
            block_tokens: 16,
            block_bytes: 96,
            layers: 2,
            engine_slots: 1 << 13,
            limits,
            concurrency: 1,
            operation_wait: Duration::from_millis(500),
            compute: ComputeModel {
                tokens_per_s: 100_000,
            },
            fabric: ExchangeConfig {
                chunk_bytes: 48,
                ..ExchangeConfig::over(LinkProfile::perfect())
            },
            faults: Faults::default(),
            upkeep_gap: None,
            exact: true,
            sabotage: Sabotage::Nothing,
        }
    }

    /// Everything at once, in amounts that the seed decides: small tiers, a lossy network that inverts bits, disks and
    /// stores that fail, pods that die and come back.
    #[must_use]
    pub fn stormy(seed: u64) -> Self {
        let mut random = Random::stream(seed, 0x5704);
        let kind = WorkloadKind::ALL[random.position(WorkloadKind::ALL.len())];
        let policy = Policy::ALL[random.position(Policy::ALL.len())];
        let link = LinkProfile {
            corruption: chance(&mut random, 20_000),
            ..LinkProfile::lossy()
        };
        let fabric = ExchangeConfig {
            chunk_bytes: [24, 96, 480][random.position(3)],
            window_chunks: 16,
            retransmit_after: Duration::from_micros(300 + random.below(2_000)),
            attempts_max: 3 + random.below(4) as u32,
            ..ExchangeConfig::over(link)
        };
        let mut some = |most: u32| {
            if random.below(2) == 0 {
                0
            } else {
                random.below(most.into()) as u32
            }
        };
        let faults = Faults {
            index_lag_max: Duration::from_micros(some(5_000).into()),
            disturbance_gap: Some(Duration::from_millis(20 + u64::from(some(200)))),
            disk_flip: some(60_000),
            disk_full: some(100_000),
            object_failure: some(100_000),
            object_loss: some(20_000),
            stall: some(100_000),
        };
        let mut upkeep = Random::stream(seed, 0x0b5e);
        let gap = Duration::from_millis(1 + upkeep.below(20));
        let upkeep_gap = (upkeep.below(4) > 0).then_some(gap);
        Self {
            prefill_pods: 2 + random.position(3),
            decode_pods: random.position(3),
            workload: small(kind, seed, 100),
            engine_slots: 32 + random.below(40) as u32,
            limits: small_limits(&mut random),
            concurrency: 1 + random.position(8),
            operation_wait: Duration::from_millis(4 + random.below(60)),
            fabric,
            faults,
            upkeep_gap,
            exact: false,
            ..Self::calm(seed, kind, policy)
        }
    }
}

fn chance(random: &mut Random, most: u32) -> Chance {
    Chance::from_millionths(random.below(most.into()) as u32).unwrap_or_default()
}

/// Prompts of some ten to thirty blocks.
fn small(kind: WorkloadKind, seed: u64, requests: u32) -> Workload {
    let requests_per_minute = 30_000;
    match kind {
        WorkloadKind::Chat => Workload::Chat(ChatOptions {
            seed,
            requests,
            requests_per_minute,
            conversations: 6,
            system_prompts: 2,
            system_tokens: 60,
            question_tokens: Span::new(5, 40),
            answer_tokens: Span::new(5, 40),
            turns: Span::new(2, 5),
        }),
        WorkloadKind::Agent => Workload::Agent(AgentOptions {
            seed,
            requests,
            requests_per_minute,
            loops: 5,
            tool_sets: 2,
            tool_set_tokens: 90,
            task_tokens: Span::new(10, 40),
            attempts: Span::new(1, 3),
            action_tokens: Span::new(5, 30),
            result_tokens: Span::new(5, 40),
            steps: Span::new(2, 5),
        }),
        WorkloadKind::Rag => Workload::Rag(RagOptions {
            seed,
            requests,
            requests_per_minute,
            system_tokens: 40,
            documents: 10,
            document_tokens: Span::new(30, 90),
            documents_per_request: Span::new(1, 4),
            shuffled_percent: 30,
            question_tokens: Span::new(5, 20),
            answer_tokens: Span::new(5, 30),
        }),
    }
}

fn small_limits(random: &mut Random) -> Limits {
    let mut up_to = |least: u32, most: u32| Span::new(least, most).draw(random);
    let millis = |count: u32| Duration::from_millis(count.into());
    Limits {
        block_bytes: 96,
        host_slots: up_to(24, 120),
        disk_segments: if up_to(0, 2) == 0 { 0 } else { up_to(2, 5) },
        disk_segment_slots: up_to(4, 24),
        object: up_to(0, 1) == 1,
        object_known_max: up_to(50, 500),
        operations_max: up_to(2, 32),
        operation_blocks_max: 256,
        commands_in_flight_max: up_to(6, 16),
        background_in_flight_max: up_to(1, 5),
        batch_blocks_max: up_to(1, 16),
        leases_max: up_to(1, 32),
        lease_blocks_max: up_to(4, 64),
        pins_max: up_to(1, 6),
        early_unpins_max: up_to(1, 8),
        early_unpin_wait: millis(up_to(1, 50)),
        lease_ttl: millis(up_to(3, 40)),
        lease_margin: Duration::from_micros(up_to(1, 1_000).into()),
        lease_wait: millis(up_to(1, 10)),
        stage_wait: millis(up_to(1, 8)),
        answer_margin: millis(up_to(0, 3)),
        background_wait: millis(up_to(5, 30)),
        retry_after: millis(up_to(1, 20)),
        rescue_blocks_max: up_to(1, 24),
        ..Limits::default()
    }
}
