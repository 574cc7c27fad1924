//! What the index takes, in a process of its own: its resident size is then the index's alone.

use std::time::Instant;

use clap::Args;
use kvcache_core::Result;

use crate::clock::process_cpu;
use crate::host::resident_bytes;
use crate::report::{Case, OURS, Row};
use crate::statistics::Samples;
use crate::stop::Stop;

use super::bounded;
use super::fill::{Calls, Filled, Meter};
use super::process::{own, print_rows, rows_of};
use super::workload::{EVENT_BLOCKS, Workload};
use super::{Origin, wrong};

/// How many workers store the same sequences.
pub(super) const REPLICAS: [u32; 2] = [1, 4];
/// Steps of progress that this takes.
pub(super) const STEPS: u64 = REPLICAS.len() as u64;
/// Pods whose removal is timed one by one.
const PODS_TIMED: usize = 8;

/// What the process is told.
#[derive(Args, Clone, Debug)]
pub(crate) struct MemoryArgs {
    #[arg(long)]
    sequences: u32,
    #[arg(long)]
    replicas: u32,
    #[arg(long, value_enum)]
    origin: Origin,
    /// Measures eviction instead: the index takes at most so much.
    #[arg(long)]
    bytes_max: Option<u64>,
}

/// Runs the process and takes its rows.
///
/// # Errors
/// As [`rows_of`].
pub(super) fn run(
    sequences: u32,
    replicas: u32,
    origin: Origin,
    bytes_max: Option<u64>,
    stop: &Stop,
) -> Result<Vec<Row>> {
    let mut command = own()?;
    command
        .arg("index-memory")
        .args(["--sequences", &sequences.to_string()])
        .args(["--replicas", &replicas.to_string()])
        .args(["--origin", origin.name()])
        .args(bytes_max.map(|bytes| format!("--bytes-max={bytes}")));
    rows_of(command, stop)
}

/// Fills an index, removes its pods, and prints the rows as JSON.
///
/// # Errors
/// `Internal` when the index does not hold what it must, or holds anything at the end.
pub(crate) fn measure(args: &MemoryArgs) -> Result<()> {
    let workload = Workload::new(args.sequences, args.replicas, EVENT_BLOCKS);
    if let Some(bytes_max) = args.bytes_max {
        return print_rows(&bounded::measure(&workload, args.origin, bytes_max)?);
    }
    let pairs = workload.pairs() as f64;
    args.origin.rehearse(&workload);
    let base = resident_bytes();
    let filled = Filled::new(&workload, args.origin)?;
    let mut meter = Meter::default();
    filled.ingest(
        workload.events(),
        Calls::Together,
        &mut meter,
        &Stop::default(),
    )?;
    filled.check(&workload, &meter)?;
    let filling = resident_bytes();
    // What tables have for growing is given back when no more comes.
    filled.index.compact();
    let full = resident_bytes();
    let name = format!("memory-r{}", args.replicas);
    let case = Case {
        subject: OURS,
        name: &name,
    };
    let grown = full.saturating_sub(base) as f64;
    let mut rows: Vec<Row> = Vec::new();
    rows.extend(case.single("bytes_per_pair", "bytes", grown / pairs));
    let grown_filling = filling.saturating_sub(base) as f64;
    rows.extend(case.single("bytes_per_pair_filling", "bytes", grown_filling / pairs));
    let own = filled.index.bytes() as f64;
    rows.extend(case.single("index_bytes_per_pair", "bytes", own / pairs));
    for (part, bytes) in filled.index.parts().named() {
        let metric = format!("{part}_bytes_per_pair");
        rows.extend(case.single(&metric, "bytes", bytes as f64 / pairs));
    }
    rows.extend(case.single("pairs", "pairs", pairs));
    rows.extend(case.single("blocks", "blocks", filled.index.blocks() as f64));
    let removal = remove_all(&filled)?;
    if args.replicas == 1 {
        rows.extend(removal);
        // What is left of what the index took; the allocator is not asked to give anything back.
        let after = Case {
            subject: OURS,
            name: "after-removal",
        };
        let left = resident_bytes().saturating_sub(base) as f64;
        rows.extend(after.single("rss_ratio", "ratio", left / grown));
        rows.extend(after.single("index_bytes", "bytes", filled.index.bytes() as f64));
    }
    print_rows(&rows)
}

/// Removes one pod after the other.
///
/// # Errors
/// `Internal` when the index holds anything then.
fn remove_all(filled: &Filled) -> Result<Vec<Row>> {
    let (mut calls, mut all) = (Samples::default(), Samples::default());
    let before = process_cpu();
    for (position, pod) in filled.pods.iter().enumerate() {
        let start = Instant::now();
        filled.index.remove_pod(pod);
        let called = start.elapsed();
        // The call only hides the pod; here its memory is taken back too, which events that follow would do.
        filled.index.tidy();
        if position < PODS_TIMED {
            calls.push(called.as_secs_f64() * 1e3);
            all.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    // Names go together after several pods, so one pod's time alone does not say what it costs.
    let cpu = process_cpu().saturating_sub(before);
    if (filled.index.entries(), filled.index.blocks()) != (0, 0) {
        let left = (filled.index.entries(), filled.index.blocks());
        return Err(wrong(format!(
            "(entries, blocks) without pods are {left:?}"
        )));
    }
    let removal = Case {
        subject: OURS,
        name: "remove-pod",
    };
    let mut rows: Vec<Row> = Vec::new();
    rows.extend(removal.row("ms", "ms", &calls));
    rows.extend(removal.row("taken_out_ms", "ms", &all));
    let of_each = cpu.as_secs_f64() * 1e3 / filled.pods.len() as f64;
    rows.extend(removal.single("taken_out_cpu_ms", "ms", of_each));
    Ok(rows)
}
