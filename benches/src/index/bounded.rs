//! An index that has room for a part of what it is told.

use kvcache_core::Result;
use kvfabric_indexer::index::BYTES_MIN;

use crate::host::resident_bytes;
use crate::report::{Case, OURS, Row};
use crate::stop::Stop;

use super::fill::{Calls, Filled, Meter};
use super::workload::Workload;
use super::{Origin, wrong};

/// What a pair takes about when nothing is evicted.
const PAIR_BYTES: u64 = 24;
/// Events between two looks at what the index takes.
const EVENTS_PER_LOOK: usize = 4096;

/// A bound for a quarter of the workload.
pub(super) fn quarter_of(workload: &Workload) -> u64 {
    (workload.pairs() * PAIR_BYTES / 4).max(BYTES_MIN)
}

/// Tells an index four times what it has room for.
///
/// # Errors
/// `Internal` when it takes more than the bound, or had to give nothing up.
pub(super) fn measure(workload: &Workload, origin: Origin, bytes_max: u64) -> Result<Vec<Row>> {
    let base = resident_bytes();
    let filled = Filled::bounded(workload, origin, Some(bytes_max))?;
    let (mut meter, mut most) = (Meter::default(), 0);
    let mut events = workload.events();
    loop {
        let before = meter.events;
        filled.ingest(
            events.by_ref().take(EVENTS_PER_LOOK),
            Calls::Together,
            &mut meter,
            &Stop::default(),
        )?;
        most = filled.index.bytes().max(most);
        if most > bytes_max {
            return Err(wrong(format!(
                "the index took {most} bytes, its bound is {bytes_max}"
            )));
        }
        if meter.events == before {
            break;
        }
    }
    let usage = filled.index.usage();
    if usage.evicted_blocks == 0 {
        return Err(wrong(format!("nothing was evicted: {usage:?}")));
    }
    let case = Case {
        subject: OURS,
        name: "memory-bounded",
    };
    let resident = resident_bytes().saturating_sub(base) as f64;
    let told = workload.pairs() as f64;
    let held: u64 = usage.entries.iter().sum();
    let rows = [
        case.single("bytes_max", "bytes", bytes_max as f64),
        case.single("index_bytes_most", "bytes", most as f64),
        case.single("rss_bytes", "bytes", resident),
        case.single("pairs_told", "pairs", told),
        case.single("pairs_held", "pairs", held as f64),
        case.single("blocks_evicted", "blocks", usage.evicted_blocks as f64),
        case.single(
            "blocks_per_cpu_s",
            "blocks/s",
            told / meter.cpu.as_secs_f64(),
        ),
    ];
    Ok(rows.into_iter().flatten().collect())
}
