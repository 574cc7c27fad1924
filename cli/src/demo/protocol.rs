//! What the router and its pods say to each other: JSON lines on the pod's standard input and output.
//!
//! This is the demo's stand-in for an inference API; block bytes and events take their real ways, never this one.

use std::collections::BTreeMap;
use std::ops::Range;

use kvfabric::NodeConfig;
use kvfabric_sim::workload::{Output, Prompt, Request};
use serde::{Deserialize, Serialize};

/// The first line a pod reads: who it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PodSetup {
    /// The node under the engine.
    pub(crate) node: NodeConfig,
    /// Bytes of the engine's HBM tier.
    pub(crate) hbm_bytes: u64,
    /// Layers of a block.
    pub(crate) layers: u32,
    /// Modelled speed of prefill.
    pub(crate) prefill_tokens_per_second: f64,
    /// How long a fetch may take before the missing blocks are computed instead.
    pub(crate) fetch_deadline_ms: u64,
    /// Whether every block must be stored before a request ends, whatever it takes.
    pub(crate) lossless: bool,
}

/// A line to a pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Call {
    /// Answers carry it.
    pub(crate) id: u64,
    /// What to do.
    pub(crate) work: Work,
}

/// What a pod is asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Work {
    /// Bring or compute the prompt's blocks.
    Prefill(Task),
    /// Pull the prompt's blocks, then write the answer's.
    Decode(Task),
    /// Say what has been counted so far.
    Stats,
    /// Shut down.
    Stop,
}

/// One request, and what the router knows about where its blocks are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) request: u64,
    pub(crate) prompt: PromptText,
    pub(crate) output: OutputText,
    /// Pods that hold the first blocks, and how many; deepest first.
    pub(crate) holders: Vec<HolderHint>,
    /// Which blocks, by position, are in the shared tier.
    pub(crate) shared: Vec<Range<u32>>,
}

/// One pod that holds some of the prompt.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct HolderHint {
    pub(crate) pod: String,
    pub(crate) depth: u32,
    pub(crate) peer_address: String,
}

/// A prompt: tokens, or a trace's ids.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum PromptText {
    Tokens(Vec<u32>),
    Ids(Vec<u64>),
}

/// An answer: tokens, or so many blocks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum OutputText {
    Tokens(Vec<u32>),
    Blocks(u32),
}

/// A line from a pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The pod is up: its sources are connected to the indexer.
    Ready { peer_address: String },
    /// Work is done.
    Done { id: u64, done: Done },
    /// Work could not be done; the pod goes on.
    Failed { id: u64, reason: String },
    /// The pod cannot start.
    Broken { reason: String },
}

/// What came of a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Done {
    Served(Served),
    Stats(PodCounters),
    Stopped,
}

/// What came of a prefill or a decode.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Served {
    /// Blocks of the prompt's block list.
    pub(crate) accesses: u64,
    /// Of those, by where their bytes were: hbm, dram, nvme, peer, object.
    pub(crate) hits: BTreeMap<String, u64>,
    /// Of those, computed.
    pub(crate) misses: u64,
    /// Microseconds spent bringing blocks in.
    pub(crate) moving_us: u64,
    /// Microseconds that computing would take.
    pub(crate) computing_us: u64,
    /// Blocks compared byte for byte, and those that differed.
    pub(crate) verified: u64,
    pub(crate) verify_failures: u64,
    /// Up to where this pod's sources have told the index, by source name.
    pub(crate) positions: Vec<PositionText>,
}

/// A source's position, as the index's lookups take it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PositionText {
    pub(crate) source: String,
    pub(crate) epoch: u64,
    pub(crate) next: u64,
}

/// What a pod counted over its life.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct PodCounters {
    /// Bytes, requests, failures and busy time by backend.
    pub(crate) backends: BTreeMap<String, BackendCounters>,
    /// The tiers' counters, by name.
    pub(crate) tiers: BTreeMap<String, u64>,
    /// Events published.
    pub(crate) events: u64,
}

/// One backend's counters.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct BackendCounters {
    pub(crate) bytes: u64,
    pub(crate) requests: u64,
    pub(crate) failures: u64,
    pub(crate) busy_ns: u64,
}

impl Task {
    /// The request as the workload had it.
    pub(crate) fn to_request(&self) -> Request {
        Request {
            id: self.request,
            at_ms: 0,
            after: None,
            prompt: match &self.prompt {
                PromptText::Tokens(tokens) => Prompt::Tokens(tokens.clone()),
                PromptText::Ids(ids) => Prompt::Ids(ids.clone()),
            },
            output: match &self.output {
                OutputText::Tokens(tokens) => Output::Tokens(tokens.clone()),
                OutputText::Blocks(count) => Output::Blocks(*count),
            },
        }
    }

    /// A task for a request, with nothing known about its blocks.
    pub(crate) fn new(request: &Request) -> Self {
        Self {
            request: request.id,
            prompt: match &request.prompt {
                Prompt::Tokens(tokens) => PromptText::Tokens(tokens.clone()),
                Prompt::Ids(ids) => PromptText::Ids(ids.clone()),
            },
            output: match &request.output {
                Output::Tokens(tokens) => OutputText::Tokens(tokens.clone()),
                Output::Blocks(count) => OutputText::Blocks(*count),
            },
            holders: Vec::new(),
            shared: Vec::new(),
        }
    }
}
