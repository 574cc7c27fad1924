//! Measures other KV-cache indexes under kv-bench's workload KVI-1 and prints rows as kv-bench has them, as JSON.
//!
//! `kv-compare SUBJECT SEQUENCES fill BLOCKS` measures ingestion of events of so many blocks, `… speed LOOKUPS` lookups and
//! removal, `… memory REPLICAS` memory; the subjects are `crtc`, `radix` and `chain`. kv-bench starts it; one process
//! measures one subject.

mod rivals;
#[path = "../../src/index/warm.rs"]
mod warm;
#[path = "../../src/index/workload.rs"]
mod workload;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dynamo_kv_router::protocols::{LocalBlockHash, RouterEvent, compute_next_seq_hash};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::rivals::{Failure, Rival, event, rival};
use crate::workload::{EVENT_BLOCKS, WORKERS, Workload, chain};

/// Blocks of a question; half of them match.
const LENGTHS: [usize; 3] = [128, 512, 2048];
const ROUNDS: usize = 5;
const QUESTIONS_MAX: usize = 1000;
/// Workers whose removal is timed one by one.
const WORKERS_TIMED: u32 = 8;
/// Events that are made before the clock runs, then applied.
const EVENTS_PER_BATCH: usize = 4096;

const USAGE: &str = "kv-compare SUBJECT SEQUENCES (fill BLOCKS | speed LOOKUPS | memory REPLICAS)";

/// Of x86-64, where the rivals run.
const PAGE_BYTES: f64 = 4096.0;

/// One figure, as kv-bench has it.
#[derive(Serialize)]
struct Row {
    subject: String,
    case: String,
    metric: &'static str,
    unit: &'static str,
    median: f64,
    min: f64,
    max: f64,
    n: usize,
}

struct Rows {
    subject: String,
    rows: Vec<Row>,
}

impl Rows {
    fn push(
        &mut self,
        case: &str,
        metric: &'static str,
        unit: &'static str,
        mut samples: Vec<f64>,
    ) {
        samples.sort_unstable_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (samples.first(), samples.last()) else {
            return;
        };
        self.rows.push(Row {
            subject: self.subject.clone(),
            case: case.to_owned(),
            metric,
            unit,
            median: samples[samples.len() / 2],
            min,
            max,
            n: samples.len(),
        });
    }
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [subject, sequences, rest @ ..] = arguments.as_slice() else {
        return Err(USAGE.into());
    };
    let mut rows = Rows {
        subject: subject.clone(),
        rows: Vec::new(),
    };
    let sequences = sequences.parse()?;
    // The workload's chain must be the one that the rivals compute.
    assert_eq!(
        chain(Some(7), 9),
        compute_next_seq_hash(7, LocalBlockHash(9))
    );
    let [what, number] = rest else {
        return Err(USAGE.into());
    };
    match what.as_str() {
        "fill" => measure_fill(sequences, number.parse()?, &mut rows)?,
        "speed" => measure_speed(sequences, number.parse()?, &mut rows)?,
        "memory" => measure_memory(sequences, number.parse()?, &mut rows)?,
        _ => return Err(USAGE.into()),
    }
    println!("{}", serde_json::to_string(&rows.rows)?);
    // The writer threads have nothing to finish.
    std::process::exit(0);
}

fn process_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn resident_bytes() -> Result<f64, Failure> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = statm
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .parse()?;
    Ok(pages * PAGE_BYTES)
}

#[derive(Default)]
struct Meter {
    blocks: usize,
    time: Duration,
    cpu: Duration,
}

fn ingest(
    rival: &mut dyn Rival,
    mut events: impl Iterator<Item = workload::Stored>,
    meter: &mut Meter,
) -> Result<(), Failure> {
    let mut number = 0;
    loop {
        let batch: Vec<RouterEvent> = events
            .by_ref()
            .take(EVENTS_PER_BATCH)
            .map(|stored| {
                number += 1;
                meter.blocks += stored.blocks.len();
                event(&stored, number)
            })
            .collect();
        if batch.is_empty() {
            return Ok(());
        }
        rival.take(batch);
        let (cpu, start) = (process_cpu(), Instant::now());
        rival.apply()?;
        meter.time += start.elapsed();
        meter.cpu += process_cpu().saturating_sub(cpu);
    }
}

fn filled(
    subject: &str,
    workload: &Workload,
    meter: &mut Meter,
) -> Result<Box<dyn Rival>, Failure> {
    let mut index = rival(subject)?;
    ingest(index.as_mut(), workload.events(), meter)?;
    let (pairs, expected) = (index.pairs()? as u64, workload.pairs());
    if pairs != expected {
        return Err(format!("{subject} has {pairs} pairs instead of {expected}").into());
    }
    Ok(index)
}

/// One fill: a process of its own each, so that memory is as fresh for every one.
fn measure_fill(sequences: u32, event_blocks: usize, rows: &mut Rows) -> Result<(), Failure> {
    let workload = Workload::new(sequences, 1, event_blocks);
    warm::warm(workload.pairs())?;
    let mut meter = Meter::default();
    filled(&rows.subject.clone(), &workload, &mut meter)?;
    let case = format!("ingest-{event_blocks}");
    let blocks = meter.blocks as f64;
    for (metric, time) in [
        ("blocks_per_s", meter.time),
        ("blocks_per_cpu_s", meter.cpu),
    ] {
        rows.push(&case, metric, "blocks/s", vec![blocks / time.as_secs_f64()]);
    }
    Ok(())
}

fn measure_speed(sequences: u32, lookups: usize, rows: &mut Rows) -> Result<(), Failure> {
    let workload = Workload::new(sequences, 1, EVENT_BLOCKS);
    let mut index = filled(&rows.subject.clone(), &workload, &mut Meter::default())?;
    for length in LENGTHS {
        let questions = questions(&workload, length, lookups);
        let (mut p50, mut p99) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let round = round(
                &|question| index.find(question),
                &questions,
                lookups,
                length / 2,
            )?;
            p50.push(percentile(&round, 0.5));
            p99.push(percentile(&round, 0.99));
        }
        rows.push(&format!("lookup-{length}"), "p50_us", "µs", p50);
        rows.push(&format!("lookup-{length}"), "p99_us", "µs", p99);
    }
    beside_writer(index.as_mut(), &workload, lookups, rows)?;
    let mut removals = Vec::new();
    for worker in 0..WORKERS_TIMED {
        let start = Instant::now();
        index.remove(worker)?;
        removals.push(start.elapsed().as_secs_f64() * 1e3);
    }
    rows.push("remove-pod", "ms", "ms", removals);
    Ok(())
}

fn questions(workload: &Workload, length: usize, lookups: usize) -> Vec<Vec<LocalBlockHash>> {
    (0..lookups.min(QUESTIONS_MAX) as u64)
        .map(|number| {
            let contents = workload.query(number, length, length / 2);
            contents.into_iter().map(LocalBlockHash).collect()
        })
        .collect()
}

fn round(
    find: &dyn Fn(&[LocalBlockHash]) -> (u32, usize),
    questions: &[Vec<LocalBlockHash>],
    lookups: usize,
    depth: usize,
) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::with_capacity(lookups);
    for question in questions.iter().cycle().take(lookups) {
        let start = Instant::now();
        let (found, _) = find(question);
        times.push(start.elapsed().as_secs_f64() * 1e6);
        if found as usize != depth {
            return Err(format!("a lookup found {found} blocks instead of {depth}").into());
        }
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok(times)
}

fn percentile(sorted: &[f64], part: f64) -> f64 {
    sorted[((sorted.len() as f64 * part) as usize).min(sorted.len() - 1)]
}

fn beside_writer(
    index: &mut dyn Rival,
    workload: &Workload,
    lookups: usize,
    rows: &mut Rows,
) -> Result<(), Failure> {
    let Some(find) = index.finder() else {
        return Ok(());
    };
    let questions = questions(workload, 512, lookups);
    let is_written = Arc::new(AtomicBool::new(false));
    let is_done = Arc::clone(&is_written);
    let reader = std::thread::spawn(move || -> Result<_, Failure> {
        let (mut p50, mut p99) = (Vec::new(), Vec::new());
        loop {
            let round = round(&|question| find(question), &questions, lookups, 256)?;
            p50.push(percentile(&round, 0.5));
            p99.push(percentile(&round, 0.99));
            if is_done.load(Ordering::Acquire) {
                return Ok((p50, p99));
            }
        }
    });
    let mut meter = Meter::default();
    ingest(index, workload.extra_events(), &mut meter)?;
    is_written.store(true, Ordering::Release);
    let (p50, p99) = reader.join().map_err(|_| "the reader panicked")??;
    let case = "lookup-512-beside-writer";
    rows.push(case, "p50_us", "µs", p50);
    rows.push(case, "p99_us", "µs", p99);
    let rate = meter.blocks as f64 / meter.time.as_secs_f64();
    rows.push(case, "blocks_per_s", "blocks/s", vec![rate]);
    Ok(())
}

/// Makes a batch of events and lets go of them, so that what the allocator keeps of that is not taken for the index's.
fn rehearse(workload: &Workload) {
    let events = workload.events().take(EVENTS_PER_BATCH);
    drop(events.map(|stored| event(&stored, 0)).collect::<Vec<_>>());
}

fn measure_memory(sequences: u32, replicas: u32, rows: &mut Rows) -> Result<(), Failure> {
    let workload = Workload::new(sequences, replicas, EVENT_BLOCKS);
    let pairs = workload.pairs() as f64;
    rehearse(&workload);
    let base = resident_bytes()?;
    let mut index = filled(&rows.subject.clone(), &workload, &mut Meter::default())?;
    let grown = resident_bytes()? - base;
    rows.push(
        &format!("memory-r{replicas}"),
        "bytes_per_pair",
        "bytes",
        vec![grown / pairs],
    );
    for worker in 0..WORKERS {
        index.remove(worker)?;
    }
    if index.pairs()? != 0 {
        return Err("the index holds blocks after all workers were removed".into());
    }
    if replicas == 1 {
        let left = (resident_bytes()? - base).max(0.0);
        rows.push("after-removal", "rss_ratio", "ratio", vec![left / grown]);
    }
    Ok(())
}
