//! Questions to a full index, one by one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kvcache_core::{IndexKey, Result};
use kvfabric_indexer::index::Depths;

use crate::recorder::Recorder;
use crate::report::{Case, OURS};
use crate::statistics::{Percentiles, Samples};
use crate::stop::Stop;

use super::fill::{Calls, Filled, Meter};
use super::workload::Workload;
use super::wrong;

/// Blocks of a question; half of them match.
pub(super) const LENGTHS: [usize; 3] = [128, 512, 2048];
/// Rounds of lookups, each giving one sample of both percentiles.
pub(super) const ROUNDS: u32 = 5;
/// Steps of progress that this takes.
pub(super) const STEPS: u64 = LENGTHS.len() as u64 + 1;
/// Different questions of one length, asked in turns.
const QUESTIONS_MAX: u32 = 1000;
/// The length that is asked beside a writer.
const LENGTH_BESIDE_WRITER: usize = 512;

/// Asks questions of every length, then those of one length while another thread stores more.
///
/// # Errors
/// `Internal` when an answer has another depth than is stored.
pub(super) fn measure(
    workload: &Workload,
    filled: &Filled,
    lookups: u32,
    recorder: &mut Recorder,
) -> Result<()> {
    let stop = recorder.stop().clone();
    for length in LENGTHS {
        let name = format!("lookup-{length}");
        recorder.say(name.as_str());
        let questions = questions(workload, filled, length, lookups);
        let mut percentiles = Percentiles::default();
        for _ in 0..ROUNDS {
            let round = round(filled, &questions, lookups, length / 2, &stop)?;
            percentiles.push_round(&round);
        }
        record(&name, &percentiles, recorder);
    }
    recorder.say("lookup-512-beside-writer");
    beside_writer(workload, filled, lookups, recorder)
}

type Question = Vec<IndexKey>;

fn questions(workload: &Workload, filled: &Filled, length: usize, lookups: u32) -> Vec<Question> {
    (0..lookups.min(QUESTIONS_MAX))
        .map(|number| {
            let mut keys = Vec::with_capacity(length);
            filled.hash(
                &workload.query(number.into(), length, length / 2),
                &mut keys,
            );
            keys
        })
        .collect()
}

fn record(name: &str, percentiles: &Percentiles, recorder: &mut Recorder) {
    let case = Case {
        subject: OURS,
        name,
    };
    recorder.extend(case.row("p50_us", "µs", &percentiles.p50));
    recorder.extend(case.row("p99_us", "µs", &percentiles.p99));
    recorder.step();
}

fn round(
    filled: &Filled,
    questions: &[Question],
    lookups: u32,
    depth: usize,
    stop: &Stop,
) -> Result<Samples> {
    let mut answer = Depths::default();
    let mut samples = Samples::default();
    for question in questions.iter().cycle().take(lookups as usize) {
        if stop.is_set() {
            break;
        }
        let start = Instant::now();
        filled.ask(question, &mut answer);
        samples.push_us(start.elapsed());
        let found = answer.pods.first().map_or(0, |pod| pod.depth) as usize;
        if found != depth {
            return Err(wrong(format!(
                "a lookup found {found} blocks instead of {depth}"
            )));
        }
    }
    Ok(samples)
}

fn beside_writer(
    workload: &Workload,
    filled: &Filled,
    lookups: u32,
    recorder: &mut Recorder,
) -> Result<()> {
    let stop = recorder.stop().clone();
    let questions = questions(workload, filled, LENGTH_BESIDE_WRITER, lookups);
    let is_written = AtomicBool::new(false);
    let (mut percentiles, mut meter) = (Percentiles::default(), Meter::default());
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let ended = filled.ingest(workload.extra_events(), Calls::Together, &mut meter, &stop);
            is_written.store(true, Ordering::Release);
            ended
        });
        // A round that was begun while the writer worked counts; at least one always is.
        loop {
            let round = round(filled, &questions, lookups, LENGTH_BESIDE_WRITER / 2, &stop)?;
            percentiles.push_round(&round);
            if is_written.load(Ordering::Acquire) || stop.is_set() {
                break;
            }
        }
        writer
            .join()
            .map_err(|_| wrong("the writer panicked".to_owned()))?
    })?;
    let case = Case {
        subject: OURS,
        name: "lookup-512-beside-writer",
    };
    record(case.name, &percentiles, recorder);
    let rate = meter.blocks as f64 / meter.time.as_secs_f64();
    recorder.extend(case.single("blocks_per_s", "blocks/s", rate));
    Ok(())
}
