//! Runs the subjects of one case in turns and makes rows of it.

use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use crate::recorder::Recorder;
use crate::report::Case;
use crate::statistics::{Percentiles, Samples, gb_per_s};
use crate::stop::Stop;

use super::TransferArgs;
use super::plan::Plan;
use super::subject::Subject;

/// Rounds of single blocks, each giving one sample of both percentiles.
const LATENCY_ROUNDS: u32 = 5;

/// What was measured of one subject.
#[derive(Default)]
struct Figures {
    gb_per_s: Samples,
    cpu_s_per_gb: Samples,
    latency: Percentiles,
    bytes: u64,
}

/// Warms all subjects up, lets them move everything in turns, verifies what arrived, then measures single blocks.
///
/// # Errors
/// `Corrupt` when bytes are wrong or missing; what a subject says.
pub(super) fn measure(
    args: &TransferArgs,
    plan: &Plan,
    subjects: &mut [Box<dyn Subject>],
    recorder: &mut Recorder,
) -> Result<()> {
    let stop = recorder.stop().clone();
    let mut figures: Vec<Figures> = subjects.iter().map(|_| Figures::default()).collect();
    for subject in &mut *subjects {
        for _ in 0..args.warm_up {
            move_all(subject.as_mut(), plan)?;
        }
    }
    for iteration in 1..=args.iterations {
        if stop.is_set() {
            break;
        }
        for (subject, figures) in subjects.iter_mut().zip(&mut figures) {
            // So the last timed iteration is the one whose bytes are verified.
            if iteration == args.iterations {
                subject.poison()?;
            }
            let (time, cpu) = move_all(subject.as_mut(), plan)?;
            let bytes = plan.shape.total_bytes;
            figures.bytes += bytes;
            figures.gb_per_s.push(gb_per_s(bytes, time));
            figures
                .cpu_s_per_gb
                .push(cpu.as_secs_f64() / (bytes as f64 / 1e9));
        }
    }
    let is_complete = !stop.is_set();
    if is_complete {
        for subject in &mut *subjects {
            let name = subject.name();
            subject.verify().map_err(|error| error.at(name))?;
        }
        measure_latency(args, plan, subjects, &mut figures, &stop)?;
    }
    record(plan, subjects, &figures, is_complete, recorder);
    Ok(())
}

fn move_all(subject: &mut dyn Subject, plan: &Plan) -> Result<(Duration, Duration)> {
    let cpu = subject.cpu()?;
    let start = Instant::now();
    let moved = subject.move_all();
    let time = start.elapsed();
    let moved = moved.map_err(|error| error.at(subject.name()).at(plan.shape.name()))?;
    let cpu = subject.cpu()?.saturating_sub(cpu);
    check_bytes(subject.name(), plan, moved, plan.shape.total_bytes)?;
    Ok((time, cpu))
}

fn check_bytes(subject: &str, plan: &Plan, moved: u64, expected: u64) -> Result<()> {
    if moved == expected {
        return Ok(());
    }
    let name = plan.shape.name();
    let context = format!("{name}: {subject} moved {moved} bytes instead of {expected}");
    Err(Error::new(ErrorKind::Corrupt, context))
}

fn measure_latency(
    args: &TransferArgs,
    plan: &Plan,
    subjects: &mut [Box<dyn Subject>],
    figures: &mut [Figures],
    stop: &Stop,
) -> Result<()> {
    for _ in 0..LATENCY_ROUNDS {
        for (subject, figures) in subjects.iter_mut().zip(&mut *figures) {
            let mut round = Samples::default();
            for sample in 0..args.latency_samples {
                if stop.is_set() {
                    return Ok(());
                }
                let start = Instant::now();
                let moved = subject.move_block(sample % plan.shape.blocks())?;
                round.push_us(start.elapsed());
                check_bytes(subject.name(), plan, moved, plan.shape.block_bytes)?;
            }
            figures.latency.push_round(&round);
        }
    }
    Ok(())
}

fn record(
    plan: &Plan,
    subjects: &[Box<dyn Subject>],
    figures: &[Figures],
    is_complete: bool,
    recorder: &mut Recorder,
) {
    let name = plan.shape.name();
    for (subject, own) in subjects.iter().zip(figures) {
        let case = Case {
            subject: subject.name(),
            name: &name,
        };
        recorder.extend(case.row("gb_per_s", "GB/s", &own.gb_per_s));
        recorder.extend(case.row("cpu_s_per_gb", "s/GB", &own.cpu_s_per_gb));
        recorder.extend(case.row("p50_us", "µs", &own.latency.p50));
        recorder.extend(case.row("p99_us", "µs", &own.latency.p99));
        recorder.extend(case.single("bytes", "bytes", own.bytes as f64));
        let verified = if is_complete { plan.shape.blocks() } else { 0 };
        recorder.extend(case.single("verified_blocks", "blocks", f64::from(verified)));
    }
    // Pairs of one iteration stand side by side in time, so their ratio outlives a change of the machine's mood.
    let Some((ours, references)) = figures.split_first() else {
        return;
    };
    for (subject, reference) in subjects.iter().skip(1).zip(references) {
        let case = Case {
            subject: subjects[0].name(),
            name: &name,
        };
        let ratio = ours.gb_per_s.ratio_to(&reference.gb_per_s);
        let metric = format!("ratio_to_{}", subject.name().replace('-', "_"));
        recorder.extend(case.row(&metric, "ratio", &ratio));
    }
}
