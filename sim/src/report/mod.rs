//! The result of a run: what the demo prints as a table and writes with `--json`.
//!
//! The JSON is stable: a key keeps its name, unit and meaning as long as [`SCHEMA`] does not change; new keys may appear.
//! Figures that a run cannot have are `null`, never 0.

mod tally;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use kvcache_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

pub use tally::{Hits, Samples, Source, Tally};

/// The version of the JSON's schema.
pub const SCHEMA: u32 = 1;

/// How far a ratio may be from the counts it is made of: the rounding of a division.
const RATIO_TOLERANCE: f64 = 1e-9;

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Of kvfabric.
    pub version: String,
    /// What determined the workload and every random choice.
    pub seed: u64,
    /// What was asked for.
    pub config: RunConfig,
    /// Requests that ended.
    pub requests: u64,
    /// Entries of all prompts' block lists, each counted once, at the prefill pod.
    pub block_accesses: u64,
    /// Hits from anywhere, per access.
    pub cluster_hit_ratio: f64,
    /// Hits in the prefill pod's own HBM and DRAM, per access.
    pub local_hit_ratio: f64,
    /// What a cache without limits, shared by all pods, would have hit, per access.
    pub infinite_hit_ratio: f64,
    /// The same workload under round-robin, in a run of its own; null if there was none.
    pub round_robin_cluster_hit_ratio: Option<f64>,
    /// Likewise for the prefill pod's own HBM and DRAM.
    pub round_robin_local_hit_ratio: Option<f64>,
    /// Hits by where the bytes were when the lookup answered.
    pub hits: Hits,
    /// Accesses that were computed.
    pub misses: u64,
    /// Blocks whose every byte was compared with what it must be.
    pub verified_blocks: u64,
    /// Blocks among them with a wrong byte; anything but 0 is a bug.
    pub verify_failures: u64,
    /// Bytes that any backend carried.
    pub bytes_moved: u64,
    /// The same, backend by backend.
    pub backends: BTreeMap<String, BackendReport>,
    /// How long one lookup took, in microseconds, as the router saw it.
    pub lookup_us: Percentiles,
    /// Lookups in all.
    pub lookups: u64,
    /// Lookups a second of the run.
    pub lookups_per_s: f64,
    /// KV events and their way into the index.
    pub events: EventReport,
    /// Time to the first token, in milliseconds.
    pub ttft_ms: FirstToken,
    /// Pods in the order of their names.
    pub pods: Vec<PodReport>,
    /// Pods that were killed on purpose.
    pub kills: Vec<KillReport>,
    /// How long the run took, in seconds.
    pub elapsed_s: f64,
}

/// What was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunConfig {
    /// `chat`, `agent`, `rag`, or the trace's file name.
    pub workload: String,
    /// The router's policy.
    pub router: String,
    /// `auto`, `shm` or `tcp`.
    pub transport: String,
    /// Pods that work on prompts.
    pub prefill_pods: u32,
    /// Pods that write answers.
    pub decode_pods: u32,
    /// Tokens a block.
    pub block_tokens: u32,
    /// Bytes a block.
    pub block_bytes: u64,
    /// Bytes of the engine's pool, each pod.
    pub hbm_bytes: u64,
    /// Bytes of the DRAM tier, each pod.
    pub dram_bytes: u64,
    /// Bytes of the NVMe tier, each pod.
    pub nvme_bytes: u64,
    /// The object tier's URL; null without one.
    pub object: Option<String>,
    /// Requests served at the same time.
    pub concurrency: u32,
    /// Whether no tier evicts.
    pub unbounded: bool,
}

/// What one backend carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BackendReport {
    /// Bytes carried.
    pub bytes: u64,
    /// Requests that ended well.
    pub requests: u64,
    /// Requests that failed.
    pub failures: u64,
    /// Time with at least one request in flight, summed over the pods, in seconds.
    pub busy_s: f64,
    /// Bytes per busy second, in 10⁹ bytes a second; null if it was never busy.
    pub gb_per_s: Option<f64>,
}

/// Two quantiles of a duration; null without a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Half of the samples are not above it.
    pub p50: Option<f64>,
    /// Of a hundred samples, ninety-nine are not above it.
    pub p99: Option<f64>,
}

/// KV events and their way into the index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EventReport {
    /// Events that the index took in.
    pub applied: u64,
    /// Events that it could not use.
    pub rejected: u64,
    /// Applied events a second of the run.
    pub per_s: f64,
    /// From publication to application, in milliseconds.
    pub lag_ms: Percentiles,
}

/// Time to the first token, its measured and its modelled part kept apart; means over the requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FirstToken {
    /// Measured: looking up, fetching hits, pulling blocks to the decode pod.
    pub moving: f64,
    /// Modelled: computing the missing tokens.
    pub computing: f64,
    /// What the model assumes, in tokens a second.
    pub computing_tokens_per_s: f64,
    /// The slowest hundredth of the measured part starts here.
    pub moving_p99: Option<f64>,
}

/// One pod's share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodReport {
    /// Its name in lookups and events.
    pub name: String,
    /// `prefill` or `decode`.
    pub role: String,
    /// Whether it lived to the end.
    pub alive: bool,
    /// Requests it served.
    pub requests: u64,
    /// Its accesses by source; only prefill pods have any.
    pub hits: Hits,
    /// Its accesses without a source.
    pub misses: u64,
    /// Blocks that its engine pool dropped to make room.
    pub hbm_evictions: u64,
    /// Blocks that its DRAM tier gave up.
    pub dram_evictions: u64,
    /// Blocks that its NVMe tier gave up.
    pub nvme_evictions: u64,
}

/// A pod killed on purpose.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KillReport {
    /// Its name.
    pub pod: String,
    /// When, in seconds from the start.
    pub at_s: f64,
    /// Requests that another pod had to start again.
    pub requests_retried: u64,
    /// Until the index named it no more, in seconds; null if it still did at the end.
    pub left_index_after_s: Option<f64>,
}

impl Report {
    /// Takes over counts and the ratios that follow from them.
    pub fn set_tally(&mut self, tally: &Tally) {
        self.block_accesses = tally.accesses;
        self.hits = tally.hits;
        self.misses = tally.misses;
        self.cluster_hit_ratio = tally.cluster_hit_ratio();
        self.local_hit_ratio = tally.local_hit_ratio();
    }

    /// Checks what must hold in every report: the sums, the ratios, and that no wrong byte was served.
    ///
    /// # Errors
    /// `Internal` naming the figures that do not fit.
    pub fn check(&self) -> Result<()> {
        self.tally().check()?;
        let bytes: u64 = self.backends.values().map(|backend| backend.bytes).sum();
        if bytes != self.bytes_moved {
            let moved = self.bytes_moved;
            return Err(broken(format!(
                "the backends carried {bytes} bytes, bytes_moved is {moved}"
            )));
        }
        let tally = self.tally();
        check_ratio(
            "cluster_hit_ratio",
            self.cluster_hit_ratio,
            tally.cluster_hit_ratio(),
        )?;
        check_ratio(
            "local_hit_ratio",
            self.local_hit_ratio,
            tally.local_hit_ratio(),
        )?;
        if !self.pods.is_empty() {
            let mut pods = Tally::default();
            for pod in &self.pods {
                let accesses = pod.hits.total() + pod.misses;
                pods.merge(&Tally {
                    accesses,
                    hits: pod.hits,
                    misses: pod.misses,
                });
            }
            if pods != tally {
                return Err(broken(format!(
                    "the pods add up to {pods:?}, the run to {tally:?}"
                )));
            }
        }
        if self.verify_failures > 0 {
            let (failures, blocks) = (self.verify_failures, self.verified_blocks);
            return Err(broken(format!(
                "{failures} of {blocks} verified blocks have a wrong byte"
            )));
        }
        Ok(())
    }

    /// The report as indented JSON, with a line end.
    ///
    /// # Errors
    /// `Internal` if a figure is not a number; no run gives that.
    pub fn to_json(&self) -> Result<String> {
        let mut text = serde_json::to_string_pretty(self).map_err(|error| {
            Error::new(ErrorKind::Internal, "write the report").with_source(error)
        })?;
        text.push('\n');
        Ok(text)
    }

    fn tally(&self) -> Tally {
        Tally {
            accesses: self.block_accesses,
            hits: self.hits,
            misses: self.misses,
        }
    }
}

fn check_ratio(name: &str, reported: f64, counted: f64) -> Result<()> {
    // Not the other way round: a ratio that is not a number fits nothing.
    let fits = (reported - counted).abs() <= RATIO_TOLERANCE;
    if !fits {
        return Err(broken(format!(
            "{name} is {reported}, but the counts give {counted}"
        )));
    }
    Ok(())
}

fn broken(what: String) -> Error {
    Error::new(ErrorKind::Internal, what)
}
