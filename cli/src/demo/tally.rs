//! What the router counts while a workload runs, and the report it becomes.

use std::collections::BTreeMap;
use std::time::Duration;

use kvfabric_sim::report::{self, FirstToken, Hits, PodReport, Report, SCHEMA, Samples};

use super::cluster::{Cluster, Role};
use super::plan::Plan;
use super::protocol::{BackendCounters, PodCounters, Served};

/// Counts of one run.
#[derive(Default)]
pub(crate) struct Tally {
    requests: u64,
    sources: report::Tally,
    verified: u64,
    verify_failures: u64,
    lookups: u64,
    lookup_us: Samples,
    moving_ms: Samples,
    computing_ms: Samples,
    pods: Vec<PodTally>,
    /// Times that a request had to be started anew because a pod died.
    pub(crate) retried: u64,
    /// From the first request to the last.
    pub(crate) elapsed: Duration,
}

#[derive(Clone, Default)]
struct PodTally {
    requests: u64,
    sources: report::Tally,
}

/// The index's own counters over the run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IndexCounters {
    pub(crate) applied: u64,
    pub(crate) rejected: u64,
    pub(crate) lag_p50_us: u64,
    pub(crate) lag_p99_us: u64,
}

impl Tally {
    pub(crate) fn new(pods: usize) -> Self {
        Self {
            pods: vec![PodTally::default(); pods],
            ..Self::default()
        }
    }

    /// One lookup, as the router saw it.
    pub(crate) fn lookup(&mut self, took: Duration) {
        self.lookups += 1;
        self.lookup_us.push(took.as_secs_f64() * 1e6);
    }

    /// A pod served a part of a request that has no accesses of its own.
    pub(crate) fn served_by(&mut self, pod: usize) {
        self.pods[pod].requests += 1;
    }

    /// Blocks that a pod compared.
    pub(crate) fn count_verified(&mut self, served: &Served) {
        self.verified += served.verified;
        self.verify_failures += served.verify_failures;
    }

    /// One request's accesses, at its prefill pod; `moving` is all that was measured of its way to the first token.
    pub(crate) fn count_prefill(&mut self, pod: usize, served: &Served, moving: Duration) {
        self.requests += 1;
        self.count_verified(served);
        let of = |name: &str| served.hits.get(name).copied().unwrap_or(0);
        let counted = report::Tally {
            accesses: served.accesses,
            hits: Hits {
                hbm: of("hbm"),
                dram: of("dram"),
                nvme: of("nvme"),
                peer: of("peer"),
                object: of("object"),
            },
            misses: served.misses,
        };
        self.sources.merge(&counted);
        self.pods[pod].sources.merge(&counted);
        self.served_by(pod);
        self.moving_ms.push(moving.as_secs_f64() * 1e3);
        self.computing_ms.push(served.computing_us as f64 / 1e3);
    }

    /// The report of the run, without what a second run would add.
    pub(crate) fn report(
        &self,
        plan: &Plan,
        cluster: &Cluster,
        counters: &[Option<PodCounters>],
        index: IndexCounters,
    ) -> Report {
        let seconds = self.elapsed.as_secs_f64().max(1e-9);
        let backends = backends(counters);
        let mut report = Report {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            config: plan.config.clone(),
            requests: self.requests,
            infinite_hit_ratio: plan.infinite.ratio(),
            verified_blocks: self.verified,
            verify_failures: self.verify_failures,
            bytes_moved: backends.values().map(|backend| backend.bytes).sum(),
            backends,
            lookup_us: self.lookup_us.percentiles(),
            lookups: self.lookups,
            lookups_per_s: self.lookups as f64 / seconds,
            events: report::EventReport {
                applied: index.applied,
                rejected: index.rejected,
                per_s: index.applied as f64 / seconds,
                lag_ms: report::Percentiles {
                    p50: (index.applied > 0).then_some(index.lag_p50_us as f64 / 1e3),
                    p99: (index.applied > 0).then_some(index.lag_p99_us as f64 / 1e3),
                },
            },
            ttft_ms: FirstToken {
                moving: self.moving_ms.mean(),
                computing: self.computing_ms.mean(),
                computing_tokens_per_s: cluster.prefill_tokens_per_second(),
                moving_p99: self.moving_ms.percentiles().p99,
            },
            pods: self.pods(cluster, counters),
            elapsed_s: seconds,
            ..Report::default()
        };
        report.set_tally(&self.sources);
        report
    }

    fn pods(&self, cluster: &Cluster, counters: &[Option<PodCounters>]) -> Vec<PodReport> {
        let mut pods: Vec<PodReport> = cluster
            .pods()
            .iter()
            .zip(&self.pods)
            .zip(counters)
            .map(|((pod, tally), counters)| {
                let counted = |name: &str| {
                    counters
                        .as_ref()
                        .and_then(|c| c.tiers.get(name))
                        .copied()
                        .unwrap_or(0)
                };
                PodReport {
                    name: pod.process().name().to_owned(),
                    role: match pod.role() {
                        Role::Prefill => "prefill".to_owned(),
                        Role::Decode => "decode".to_owned(),
                    },
                    alive: pod.process().is_alive(),
                    requests: tally.requests,
                    hits: tally.sources.hits,
                    misses: tally.sources.misses,
                    hbm_evictions: counted("hbm_evictions"),
                    dram_evictions: [
                        "demoted_disk",
                        "demoted_object",
                        "evicted_clean",
                        "evicted_lost",
                    ]
                    .map(counted)
                    .iter()
                    .sum(),
                    nvme_evictions: counted("disk_evicted"),
                }
            })
            .collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        pods
    }
}

/// The pods' backends added up.
fn backends(counters: &[Option<PodCounters>]) -> BTreeMap<String, report::BackendReport> {
    let mut sums: BTreeMap<String, BackendCounters> = BTreeMap::new();
    for (name, counted) in counters.iter().flatten().flat_map(|c| &c.backends) {
        let sum = sums.entry(name.clone()).or_default();
        sum.bytes += counted.bytes;
        sum.requests += counted.requests;
        sum.failures += counted.failures;
        sum.busy_ns += counted.busy_ns;
    }
    sums.into_iter()
        .map(|(name, sum)| {
            let busy_s = sum.busy_ns as f64 / 1e9;
            let report = report::BackendReport {
                bytes: sum.bytes,
                requests: sum.requests,
                failures: sum.failures,
                busy_s,
                gb_per_s: (sum.busy_ns > 0).then(|| sum.bytes as f64 / sum.busy_ns as f64),
            };
            (name, report)
        })
        .collect()
}
