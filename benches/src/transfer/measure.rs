//! Runs the subjects of one case in turns and makes rows of it.

use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_sim::seed::Random;

use crate::recorder::Recorder;
use crate::report::{Case, Row};
use crate::statistics::{Percentiles, Samples, gb_per_s};
use crate::stop::Stop;

use super::plan::Plan;
use super::subject::{Cpu, Subject};

/// Rounds of single blocks, each giving one sample of each percentile.
const LATENCY_ROUNDS: u32 = 5;
/// A round ends early after this: large blocks on slow ways would take for ever.
const LATENCY_ROUND_MAX: Duration = Duration::from_millis(250);

/// How often and how long is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    /// Iterations before the measured ones.
    pub(super) warm_up: u32,
    /// Measured iterations.
    pub(super) iterations: u32,
    /// Single blocks in each round of latencies.
    pub(super) latency_samples: u32,
}

/// What was measured of one subject.
#[derive(Default)]
struct Figures {
    gb_per_s: Samples,
    cpu_s_per_gb: Samples,
    initiator_cpu: Samples,
    target_cpu: Samples,
    first_done_us: Samples,
    latency: Percentiles,
    bytes: u64,
}

/// Somebody who is measured.
struct Entry {
    subject: Box<dyn Subject>,
    figures: Figures,
    /// Its place among all in reports.
    place: usize,
}

/// Warms all subjects up, lets them move everything in turns, verifies what arrived last, then measures single blocks.
///
/// # Errors
/// `Corrupt` when bytes are wrong or missing; what a subject says, unless it is a rival's program.
pub(super) fn measure(
    effort: &Effort,
    plan: &Plan,
    subjects: Vec<Box<dyn Subject>>,
    recorder: &mut Recorder,
) -> Result<()> {
    let stop = recorder.stop().clone();
    let entry = |(place, subject)| Entry {
        subject,
        figures: Figures::default(),
        place,
    };
    let mut entries: Vec<Entry> = subjects.into_iter().enumerate().map(entry).collect();
    keep_able(&mut entries, plan, recorder, |entry| {
        for _ in 0..effort.warm_up {
            if !stop.is_set() {
                move_all(entry.subject.as_mut(), plan)?;
            }
        }
        Ok(())
    })?;
    let mut is_complete = false;
    for iteration in 1..=effort.iterations {
        if stop.is_set() {
            break;
        }
        recorder.say(format!("{} {iteration}/{}", plan.case, effort.iterations));
        is_complete = iteration == effort.iterations;
        // Nobody always comes after the same one, whatever state that leaves the machine in.
        Random::stream(plan.shape.seed, iteration.into()).shuffle(&mut entries);
        keep_able(&mut entries, plan, recorder, |entry| {
            if is_complete {
                entry.subject.poison()?;
            }
            let (time, cpu) = move_all(entry.subject.as_mut(), plan)?;
            entry.figures.push(plan, entry.subject.as_ref(), time, cpu);
            // At once: others may move to the same place.
            match is_complete {
                true => entry.subject.verify(),
                false => Ok(()),
            }
        })?;
    }
    entries.sort_by_key(|entry| entry.place);
    for _ in 0..LATENCY_ROUNDS {
        if !stop.is_set() {
            keep_able(&mut entries, plan, recorder, |entry| {
                measure_latency(effort, plan, entry, &stop)
            })?;
        }
    }
    record(plan, &entries, is_complete, recorder);
    Ok(())
}

/// Does something with each; a rival that cannot is left out, which is said aloud.
fn keep_able(
    entries: &mut Vec<Entry>,
    plan: &Plan,
    recorder: &Recorder,
    mut body: impl FnMut(&mut Entry) -> Result<()>,
) -> Result<()> {
    let mut failed = None;
    entries.retain_mut(|entry| {
        let Err(error) = body(entry) else {
            return true;
        };
        let name = entry.subject.name();
        if entry.subject.is_rival() {
            recorder.remark(&format!("{}: {name} IS LEFT OUT: {error}", plan.case));
            return false;
        }
        failed = failed.take().or(Some(error.at(name).at(plan.case.clone())));
        true
    });
    failed.map_or(Ok(()), Err)
}

fn move_all(subject: &mut dyn Subject, plan: &Plan) -> Result<(Duration, Cpu)> {
    let cpu = subject.cpu()?;
    let start = Instant::now();
    let moved = subject.move_all()?;
    let time = start.elapsed();
    let time = subject.own_time().unwrap_or(time);
    let cpu = subject.cpu()?.since(cpu);
    check_bytes(moved, plan.shape.total_bytes)?;
    Ok((time, cpu))
}

fn check_bytes(moved: u64, expected: u64) -> Result<()> {
    if moved == expected {
        return Ok(());
    }
    let context = format!("{moved} bytes moved instead of {expected}");
    Err(Error::new(ErrorKind::Corrupt, context))
}

/// One round.
fn measure_latency(effort: &Effort, plan: &Plan, entry: &mut Entry, stop: &Stop) -> Result<()> {
    let subject = entry.subject.as_mut();
    let mut round = Samples::default();
    let until = Instant::now() + LATENCY_ROUND_MAX;
    for sample in 0..effort.latency_samples {
        let start = Instant::now();
        let moved = subject.move_block(sample % plan.shape.blocks())?;
        let now = Instant::now();
        round.push_us(subject.own_time().unwrap_or(now - start));
        check_bytes(moved, plan.shape.block_bytes)?;
        if now > until || stop.is_set() {
            break;
        }
    }
    entry.figures.latency.push_round(&round);
    Ok(())
}

impl Figures {
    fn push(&mut self, plan: &Plan, subject: &dyn Subject, time: Duration, cpu: Cpu) {
        let bytes = plan.shape.total_bytes;
        let per_gb = |time: Duration| time.as_secs_f64() / (bytes as f64 / 1e9);
        self.bytes += bytes;
        self.gb_per_s.push(gb_per_s(bytes, time));
        self.cpu_s_per_gb.push(per_gb(cpu.total()));
        if let Some(target) = cpu.target {
            self.initiator_cpu.push(per_gb(cpu.initiator));
            self.target_cpu.push(per_gb(target));
        }
        if let Some(first) = subject.first_done() {
            self.first_done_us.push_us(first);
        }
    }

    fn rows(&self, plan: &Plan, case: &Case<'_>, verified: u32) -> impl Iterator<Item = Row> {
        let Percentiles {
            p50,
            p90,
            p99,
            p99_9,
        } = &self.latency;
        let first_layer = plan.shape.layers.map(|_| &self.first_done_us);
        [
            case.row("gb_per_s", "GB/s", &self.gb_per_s),
            case.row("cpu_s_per_gb", "s/GB", &self.cpu_s_per_gb),
            case.detail("cpu_initiator_s_per_gb", "s/GB", &self.initiator_cpu),
            case.detail("cpu_target_s_per_gb", "s/GB", &self.target_cpu),
            first_layer.and_then(|first| case.row("first_layer_us", "µs", first)),
            case.row("p50_us", "µs", p50),
            case.detail("p90_us", "µs", p90),
            case.row("p99_us", "µs", p99),
            case.row("p99_9_us", "µs", p99_9),
            case.single("bytes", "bytes", self.bytes as f64),
            case.single("verified_blocks", "blocks", f64::from(verified)),
        ]
        .into_iter()
        .flatten()
    }
}

fn record(plan: &Plan, entries: &[Entry], is_complete: bool, recorder: &mut Recorder) {
    let verified = if is_complete { plan.shape.blocks() } else { 0 };
    for Entry {
        subject, figures, ..
    } in entries
    {
        let case = Case {
            subject: subject.name(),
            name: &plan.case,
        };
        recorder.extend(figures.rows(plan, &case, verified));
    }
    // Pairs of one iteration stand side by side in time, so their ratio outlives a change of the machine's mood.
    let Some((
        Entry {
            subject, figures, ..
        },
        references,
    )) = entries.split_first()
    else {
        return;
    };
    let case = Case {
        subject: subject.name(),
        name: &plan.case,
    };
    for reference in references {
        let other = &reference.figures;
        let suffix = format!("ratio_to_{}", reference.subject.name().replace('-', "_"));
        let ratio = figures.gb_per_s.ratio_to(&other.gb_per_s);
        recorder.extend(case.row(&suffix, "ratio", &ratio));
        let cpu = figures.cpu_s_per_gb.ratio_to(&other.cpu_s_per_gb);
        recorder.extend(case.detail(&format!("cpu_{suffix}"), "ratio of cost", &cpu));
        let p50 = figures.latency.p50.ratio_to(&other.latency.p50);
        recorder.extend(case.detail(&format!("p50_{suffix}"), "ratio of cost", &p50));
    }
}
