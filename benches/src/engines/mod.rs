//! `kv-bench engines`: what an engine pays to be on kvfabric, and what it gains, beside NIXL.
//!
//! Three parts: what a call costs from Rust, C and Python (`overhead`); what a process costs that only is attached
//! (`idle`); and how long a decode engine waits for a prompt that a prefill engine computed (`pd`). The engines are
//! driven by the programs in `benches/engines`.

mod external;
mod overhead;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use kvcache_core::{Error, ErrorKind, Result};

use crate::recorder::{OutputArgs, Recorder};
use crate::report::{Case, OURS, Row};
use crate::statistics::Samples;
use external::{Conversation, External, Figure};
pub(crate) use overhead::answer_questions;

/// How long one measurement of calls or of an idle process may take.
const PROBE_PATIENCE: Duration = Duration::from_secs(120);
/// How often the callers take turns in a round.
const TURNS: u32 = 40;
/// How long two engines may take to start, answer and end.
const ENGINES_PATIENCE: Duration = Duration::from_secs(900);

/// Measures what an engine pays for kvfabric, beside NIXL.
#[derive(Args, Clone, Debug)]
pub(crate) struct EnginesArgs {
    /// A Python that has kvfabric, numpy and vLLM: `scripts/engines` makes one.
    #[arg(long, value_name = "PROGRAM")]
    python: PathBuf,
    /// The compiled benches/engines/overhead.c.
    #[arg(long, value_name = "PROGRAM")]
    c: Option<PathBuf>,
    /// The folder of the Python programs.
    #[arg(long, value_name = "FOLDER", default_value = "benches/engines")]
    programs: PathBuf,
    /// A folder with the real NIXL, put before everything else on Python's path; left out if it is not named.
    #[arg(long, value_name = "FOLDER")]
    nixl: Option<PathBuf>,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Part::Overhead, Part::Idle, Part::Pd])]
    only: Vec<Part>,
    /// How often each measurement is made.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Time of a call from Rust, C and Python.
    Overhead,
    /// CPU of an attached process that does nothing.
    Idle,
    /// Prefill in one engine, decode in another.
    Pd,
}

/// Runs the parts that were asked for.
///
/// # Errors
/// `NotFound` for a program that is not there, and whatever the parts meet.
pub(crate) fn run(args: &EnginesArgs, recorder: &mut Recorder) -> Result<()> {
    let programs = [Some(&args.python), args.c.as_ref()];
    for program in programs.into_iter().flatten() {
        if !program.is_file() {
            let context = format!("{} is not there", program.display());
            return Err(Error::new(ErrorKind::NotFound, context));
        }
    }
    if args.only.contains(&Part::Overhead) {
        overhead(args, recorder)?;
    }
    if args.only.contains(&Part::Idle) {
        idle(args, recorder)?;
    }
    if args.only.contains(&Part::Pd) {
        prefill_and_decode(args, recorder)?;
    }
    Ok(())
}

/// In each round all callers are started anew, each as a process, and take many short turns, so that what disturbs the machine
/// disturbs all of them alike. A round's figure is the median of its turns, and a difference the median of the differences turn
/// by turn.
fn overhead(args: &EnginesArgs, recorder: &mut Recorder) -> Result<()> {
    recorder.expect_steps(u64::from(args.rounds));
    let base_of_python = if args.c.is_some() { "c" } else { "rust" };
    let mut rounds = Table::default();
    for _ in 0..args.rounds {
        recorder.say("calls from Rust, C and Python");
        let turns = turns(args, recorder)?;
        rounds.extend(turns.medians());
        for (subject, base) in [("c", "rust"), ("python", base_of_python)] {
            rounds.extend(turns.differences(subject, base).medians());
        }
        recorder.step();
    }
    recorder.extend(rounds.rows());
    Ok(())
}

/// The callers' figures, turn by turn.
fn turns(args: &EnginesArgs, recorder: &Recorder) -> Result<Table> {
    let own = std::env::current_exe().map_err(|error| Error::io("find this program", error))?;
    let mut programs =
        vec![External::new(&own, PROBE_PATIENCE, recorder.stop()).arg("engine-calls")];
    if let Some(c) = &args.c {
        programs.push(External::new(c, PROBE_PATIENCE, recorder.stop()));
    }
    programs.push(python(args, "overhead.py", PROBE_PATIENCE, recorder));
    let callers = programs.into_iter().map(External::converse);
    let mut callers: Vec<Conversation<'_>> = callers.collect::<Result<_>>()?;
    let mut table = Table::default();
    for _ in 0..TURNS {
        for caller in &mut callers {
            table.extend(caller.ask()?);
        }
        // Whoever comes first finds the caches of the one that came last: each in its turn.
        callers.rotate_left(1);
    }
    for caller in callers {
        caller.end()?;
    }
    Ok(table)
}

fn idle(args: &EnginesArgs, recorder: &mut Recorder) -> Result<()> {
    recorder.expect_steps(2);
    let mut table = Table::default();
    recorder.say("an idle process");
    table.extend(python(args, "idle.py", PROBE_PATIENCE, recorder).run()?);
    recorder.step();
    if let Some(nixl) = &args.nixl {
        recorder.say("an idle process with NIXL");
        let program = python(args, "idle.py", PROBE_PATIENCE, recorder);
        let program = program.arg("--real-nixl").env("PYTHONPATH", nixl);
        table.extend(program.run()?);
    }
    recorder.step();
    recorder.extend(table.rows());
    Ok(())
}

fn prefill_and_decode(args: &EnginesArgs, recorder: &mut Recorder) -> Result<()> {
    recorder.expect_steps(1);
    recorder.say("engines that hand over a prompt of 4,096 tokens");
    let rounds = args.rounds.to_string();
    let mut program = python(args, "handover.py", ENGINES_PATIENCE, recorder)
        .arg("--rounds")
        .arg(rounds);
    if let Some(nixl) = &args.nixl {
        program = program.arg("--nixl").arg(nixl);
    }
    let mut table = Table::default();
    table.extend(program.run()?);
    recorder.step();
    recorder.extend(table.rows());
    recorder.extend(table.ratios(OURS, "nixl"));
    recorder.extend(table.ratios("kvfabric-nixl", "nixl"));
    Ok(())
}

fn python<'a>(
    args: &EnginesArgs,
    name: &str,
    patience: Duration,
    recorder: &'a Recorder,
) -> External<'a> {
    let script: &Path = &args.programs;
    External::new(&args.python, patience, recorder.stop()).arg(script.join(name))
}

/// Figures of several rounds, joined by what they are of.
#[derive(Default)]
struct Table(Vec<Figure>);

impl Table {
    /// Adds the samples of one more round.
    fn extend(&mut self, figures: Vec<Figure>) {
        for figure in figures {
            let known = self.0.iter_mut().find(|known| {
                (&known.subject, &known.case, &known.metric)
                    == (&figure.subject, &figure.case, &figure.metric)
            });
            match known {
                Some(known) => known.samples.extend(figure.samples),
                None => self.0.push(figure),
            }
        }
    }

    fn rows(&self) -> Vec<Row> {
        let row = |figure: &Figure| {
            let case = Case {
                subject: &figure.subject,
                name: &figure.case,
            };
            case.row(&figure.metric, &figure.unit, &samples(&figure.samples))
        };
        self.0.iter().filter_map(row).collect()
    }

    /// The same figures, each with the median of its samples as the only one.
    fn medians(&self) -> Vec<Figure> {
        let median = |figure: &Figure| {
            let summary = samples(&figure.samples).summary()?;
            Some(Figure {
                samples: vec![summary.median],
                ..figure.clone()
            })
        };
        self.0.iter().filter_map(median).collect()
    }

    /// By how much each sample of `subject` is more than the sample of `base` that was measured beside it.
    fn differences(&self, subject: &str, base: &str) -> Self {
        let metric = |metric: &str| format!("{metric}_over_{base}");
        self.beside(subject, base, metric, "µs", |own, base| own - base)
    }

    /// Each sample of `subject` over that of `base`.
    fn ratios(&self, subject: &str, base: &str) -> Vec<Row> {
        let metric = |_: &str| format!("ratio_to_{base}");
        let ratios = self.beside(subject, base, metric, "", |own, base| own / base);
        ratios.rows()
    }

    fn beside(
        &self,
        subject: &str,
        base: &str,
        metric: impl Fn(&str) -> String,
        unit: &str,
        join: impl Fn(f64, f64) -> f64,
    ) -> Self {
        let of = |subject: &str| -> Vec<&Figure> {
            let own = self.0.iter().filter(|figure| figure.subject == subject);
            own.collect()
        };
        let bases = of(base);
        let pair = |own: &Figure| {
            let base = bases
                .iter()
                .find(|base| (&base.case, &base.metric) == (&own.case, &own.metric))?;
            let pairs = own.samples.iter().zip(&base.samples);
            Some(Figure {
                subject: subject.to_owned(),
                case: own.case.clone(),
                metric: metric(&own.metric),
                unit: unit.to_owned(),
                samples: pairs.map(|(own, base)| join(*own, *base)).collect(),
            })
        };
        Self(of(subject).into_iter().filter_map(pair).collect())
    }
}

fn samples(values: &[f64]) -> Samples {
    let mut samples = Samples::default();
    values.iter().for_each(|value| samples.push(*value));
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(subject: &str, samples: &[f64]) -> Figure {
        Figure {
            subject: subject.to_owned(),
            case: "fetch-1".to_owned(),
            metric: "us_per_call".to_owned(),
            unit: "µs".to_owned(),
            samples: samples.to_vec(),
        }
    }

    /// Two callers in three turns; the differences and ratios are those of turns, not of medians.
    #[test]
    fn callers_are_compared_turn_by_turn() {
        let mut table = Table::default();
        for (rust, c) in [(1.0, 3.0), (10.0, 11.0), (2.0, 8.0)] {
            table.extend(vec![figure("rust", &[rust]), figure("c", &[c])]);
        }
        let rows = table.rows();
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[1].median, rows[1].n), (8.0, 3));
        let over = table.differences("c", "rust");
        let row = &over.rows()[0];
        assert_eq!((row.median, row.min, row.max), (2.0, 1.0, 6.0));
        assert_eq!(
            (row.metric.as_str(), row.unit.as_str()),
            ("us_per_call_over_rust", "µs")
        );
        let medians = over.medians();
        assert_eq!((medians.len(), &medians[0].samples[..]), (1, &[2.0][..]));
        assert_eq!(table.ratios("c", "rust")[0].median, 3.0);
        assert!(table.ratios("c", "nobody").is_empty());
    }
}
