//! Filling indexes: ours and, beside each fill, those of others, every one in a process of its own.

use std::path::Path;
use std::process::Command;

use clap::Args;
use kvcache_core::{Error, Result};

use crate::recorder::Recorder;
use crate::report::{Case, OURS, Row};
use crate::statistics::Samples;
use crate::stop::Stop;

use super::fill::{Calls, Filled, Meter};
use super::process::{own, print_rows, rows_of};
use super::rivals::SUBJECTS;
use super::warm;
use super::workload::{EVENT_BLOCKS, Workload};
use super::{IndexArgs, Origin};

/// The figure that is compared: time alone says little on a machine that others use too.
const COMPARED: &str = "blocks_per_cpu_s";

/// How an index of ours is filled.
#[derive(Args, Clone, Debug)]
pub(crate) struct FillArgs {
    #[arg(long)]
    sequences: u32,
    #[arg(long)]
    event_blocks: usize,
    #[arg(long, value_enum)]
    origin: Origin,
    #[arg(long, value_enum)]
    calls: Calls,
}

/// What is filled in every round: the case, blocks an event, and how.
const CASES: [(&str, usize, Option<Origin>, Calls); 5] = [
    ("ingest-1", 1, None, Calls::Together),
    ("ingest-1-single", 1, None, Calls::Single),
    ("ingest-16", EVENT_BLOCKS, None, Calls::Together),
    ("ingest-16-single", EVENT_BLOCKS, None, Calls::Single),
    (
        "ingest-16-tokens",
        EVENT_BLOCKS,
        Some(Origin::Engine),
        Calls::Together,
    ),
];

/// Steps of progress that this takes.
pub(super) fn steps(args: &IndexArgs, has_rivals: bool) -> u64 {
    let rivals = if has_rivals { 2 * SUBJECTS.len() } else { 0 };
    u64::from(args.repeats) * (CASES.len() + rivals) as u64
}

/// Fills an index once and prints the rows as JSON.
///
/// # Errors
/// `Io` when there is not enough memory, `Internal` when the index does not hold what it must.
pub(crate) fn measure_fill(args: &FillArgs) -> Result<()> {
    let workload = Workload::new(args.sequences, 1, args.event_blocks);
    warm::warm(workload.pairs()).map_err(|error| Error::io("ask for memory", error))?;
    let filled = Filled::new(&workload, args.origin)?;
    let mut meter = Meter::default();
    filled.ingest(workload.events(), args.calls, &mut meter, &Stop::default())?;
    filled.check(&workload, &meter)?;
    let case = Case {
        subject: OURS,
        name: "",
    };
    let rows = [
        ("blocks_per_s", "blocks/s", meter.blocks, meter.time),
        (COMPARED, "blocks/s", meter.blocks, meter.cpu),
        ("events_per_s", "events/s", meter.events, meter.time),
    ];
    let rates = rows.into_iter().filter_map(|(metric, unit, count, time)| {
        case.single(metric, unit, count as f64 / time.as_secs_f64())
    });
    let counts = [("blocks", meter.blocks), ("events", meter.events)];
    let counts = counts
        .into_iter()
        .filter_map(|(what, count)| case.single(what, what, count as f64));
    print_rows(&rates.chain(counts).collect::<Vec<_>>())
}

/// The figures of one subject in one case, a sample a round.
struct Series {
    subject: &'static str,
    case: &'static str,
    figures: Vec<(Row, Samples)>,
}

impl Series {
    const fn new(subject: &'static str, case: &'static str) -> Self {
        Self {
            subject,
            case,
            figures: Vec::new(),
        }
    }

    fn push(&mut self, rows: Vec<Row>) {
        for row in rows {
            let known = self
                .figures
                .iter_mut()
                .find(|(known, _)| known.metric == row.metric);
            match known {
                Some((_, samples)) => samples.push(row.median),
                None => {
                    let mut samples = Samples::default();
                    samples.push(row.median);
                    self.figures.push((row, samples));
                }
            }
        }
    }

    fn compared(&self) -> Option<&Samples> {
        let (_, samples) = self
            .figures
            .iter()
            .find(|(row, _)| row.metric == COMPARED)?;
        Some(samples)
    }

    fn case(&self) -> Case<'_> {
        Case {
            subject: self.subject,
            name: self.case,
        }
    }

    fn rows(&self) -> impl Iterator<Item = Row> {
        let figures = self.figures.iter();
        figures.filter_map(|(row, samples)| self.case().row(&row.metric, &row.unit, samples))
    }
}

/// Fills all indexes in turns, as often as was asked for.
///
/// # Errors
/// As the processes that do it say.
pub(super) fn measure(
    args: &IndexArgs,
    rivals: Option<&Path>,
    recorder: &mut Recorder,
) -> Result<()> {
    let mut series: Vec<Series> = CASES.iter().map(|case| Series::new(OURS, case.0)).collect();
    let beside = |case: &'static str| SUBJECTS.map(|subject| Series::new(subject, case));
    if rivals.is_some() {
        series.extend(["ingest-1", "ingest-16"].into_iter().flat_map(beside));
    }
    for _ in 0..args.repeats {
        for series in &mut series {
            if recorder.stop().is_set() {
                break;
            }
            recorder.say(format!("{} {}", series.subject, series.case));
            let filled = process(series, args, rivals)?;
            series.push(rows_of(filled, recorder.stop())?);
            recorder.step();
        }
    }
    for one in &series {
        recorder.extend(one.rows());
        if one.subject == OURS {
            recorder.extend(ratio_to_best(one, &series));
        }
    }
    Ok(())
}

/// The process that fills what a series is about.
fn process(series: &Series, args: &IndexArgs, rivals: Option<&Path>) -> Result<Command> {
    let blocks = if series.case.starts_with("ingest-16") {
        EVENT_BLOCKS
    } else {
        1
    };
    let (sequences, blocks) = (args.sequences().to_string(), blocks.to_string());
    if let (Some(program), true) = (rivals, series.subject != OURS) {
        let mut command = Command::new(program);
        command.args([series.subject, &sequences, "fill", &blocks]);
        return Ok(command);
    }
    let case = CASES.iter().find(|case| case.0 == series.case);
    let (origin, calls) = case.map_or((args.origin, Calls::Together), |(_, _, origin, calls)| {
        (origin.unwrap_or(args.origin), *calls)
    });
    let mut command = own()?;
    command
        .args(["index-fill", "--sequences", &sequences])
        .args(["--event-blocks", &blocks])
        .args(["--origin", origin.name(), "--calls", calls.name()]);
    Ok(command)
}

/// Ours over the best of the others, round by round.
fn ratio_to_best(ours: &Series, all: &[Series]) -> Option<Row> {
    let others = all
        .iter()
        .filter(|other| other.subject != OURS && other.case == ours.case);
    let best = others
        .filter_map(Series::compared)
        .cloned()
        .reduce(|one, other| one.larger(&other))?;
    let ratio = ours.compared()?.ratio_to(&best);
    ours.case().row("ratio_to_best", "ratio", &ratio)
}
