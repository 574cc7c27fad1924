//! Between the router's words and the node's.

use std::collections::BTreeMap;

use kvcache_core::{PodName, Result};
use kvfabric::transfer::AgentStats;
use kvfabric::{Holder, Located, Source};

use crate::demo::protocol::{BackendCounters, Task};

/// What the router knows, seen from the first block that is fetched.
pub(super) fn hints(task: &Task, start: usize) -> Result<Located> {
    let start = u32::try_from(start).unwrap_or(u32::MAX);
    let holders = task
        .holders
        .iter()
        .filter(|holder| holder.depth > start)
        .map(|holder| {
            Ok(Holder {
                pod: PodName::new(&holder.pod)?,
                depth: holder.depth - start,
                peer_address: Some(holder.peer_address.clone()),
            })
        });
    let shared = task.shared.iter().filter(|range| range.end > start);
    Ok(Located {
        holders: holders.collect::<Result<_>>()?,
        shared: shared
            .map(|r| r.start.saturating_sub(start)..r.end - start)
            .collect(),
    })
}

pub(super) fn count_hits(hits: &mut BTreeMap<String, u64>, source: &str, blocks: u64) {
    *hits.entry(source.to_owned()).or_default() += blocks;
}

pub(super) fn source_name(source: &Source) -> &'static str {
    match source {
        Source::Device => "hbm",
        Source::Host => "dram",
        Source::Disk => "nvme",
        Source::Peer { .. } => "peer",
        Source::Object => "object",
        Source::Miss => "miss",
    }
}

/// What each backend has moved, by its name.
pub(super) fn backends(stats: AgentStats) -> BTreeMap<String, BackendCounters> {
    let counters = stats.backends.into_iter().map(|(name, stats)| {
        let counters = BackendCounters {
            bytes: stats.bytes_read + stats.bytes_written,
            requests: stats.requests,
            failures: stats.failures,
            busy_ns: stats.busy_ns,
        };
        (name.to_owned(), counters)
    });
    counters.collect()
}
