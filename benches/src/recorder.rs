//! What every command does around its measurements: progress, Ctrl-C, the table, the files.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvcache_core::{Error, ErrorKind, Result};

use crate::compare::{Comparison, Verdict};
use crate::html;
use crate::report::{Report, Row, folder_of, write_text};
use crate::stop::Stop;

/// How often the progress line shows that the program lives.
const TICK: Duration = Duration::from_millis(200);

/// Where the figures go.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct OutputArgs {
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the figures to this file as comma-separated values.
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    /// Write the figures to this file as a page with plots, which needs nothing beside it.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Print the ratio of each figure to that of a run that was saved with --json.
    #[arg(long, value_name = "FILE")]
    pub(crate) compare: Option<PathBuf>,
    /// End with 3 when one of our figures is worse than the saved one by more than so many percent.
    #[arg(long, value_name = "PERCENT", requires = "compare")]
    pub(crate) worse_by: Option<f64>,
    /// Compare only these metrics, like gb_per_s,p50_us.
    #[arg(
        long,
        value_name = "METRIC",
        value_delimiter = ',',
        requires = "compare"
    )]
    pub(crate) compare_only: Vec<String>,
    /// Show no progress.
    #[arg(long)]
    pub(crate) quiet: bool,
}

/// # Errors
/// `Invalid` if there can be no such file.
pub(crate) fn check_json(path: &Path) -> Result<()> {
    check_file("--json", path)
}

fn check_file(option: &str, path: &Path) -> Result<()> {
    if path.is_dir() || !folder_of(path).is_dir() {
        let context = format!(
            "{option} {}: not a file in an existing folder",
            path.display()
        );
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    Ok(())
}

/// Collects the rows of a run.
pub(crate) struct Recorder {
    report: Report,
    json: Option<PathBuf>,
    csv: Option<PathBuf>,
    html: Option<PathBuf>,
    comparison: Option<Comparison>,
    /// Printed after the table.
    conclusion: String,
    stop: Stop,
    progress: ProgressBar,
}

impl Recorder {
    /// Starts a run.
    ///
    /// # Errors
    /// `Invalid` if a file could not be written at the end, or what to compare with not be read: better to know before
    /// the run.
    pub(crate) fn start(command: &str, output: &OutputArgs) -> Result<Self> {
        for (option, path) in [
            ("--json", &output.json),
            ("--csv", &output.csv),
            ("--html", &output.html),
        ] {
            if let Some(path) = path {
                check_file(option, path)?;
            }
        }
        let compare = output.compare.as_ref().map(|path| {
            let worse_by = output.worse_by.map(|percent| percent / 100.0);
            Comparison::open(path, worse_by, output.compare_only.clone())
        });
        let target = if output.quiet {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let progress = ProgressBar::with_draw_target(Some(0), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {wide_msg}")
        {
            progress.set_style(style);
        }
        if !output.quiet {
            progress.enable_steady_tick(TICK);
        }
        Ok(Self {
            report: Report::new(command),
            json: output.json.clone(),
            csv: output.csv.clone(),
            html: output.html.clone(),
            comparison: compare.transpose()?,
            conclusion: String::new(),
            stop: Stop::listen()?,
            progress,
        })
    }

    /// Whether to end early.
    pub(crate) fn stop(&self) -> &Stop {
        &self.stop
    }

    /// So many steps are to come, beside those announced before.
    pub(crate) fn expect_steps(&self, steps: u64) {
        self.progress.inc_length(steps);
    }

    /// What happens now.
    pub(crate) fn say(&self, what: impl Into<String>) {
        self.progress.set_message(what.into());
    }

    /// A line that stays, beside the progress: what the figures do not tell.
    pub(crate) fn remark(&self, what: &str) {
        self.progress.suspend(|| remark(what));
    }

    /// One step is done.
    pub(crate) fn step(&self) {
        self.progress.inc(1);
    }

    /// What the figures depend on, for the head of the report.
    pub(crate) fn state(&mut self, facts: Vec<String>) {
        self.report.facts = facts;
    }

    /// Keeps rows.
    pub(crate) fn extend(&mut self, rows: impl IntoIterator<Item = Row>) {
        self.report.rows.extend(rows);
    }

    /// The figures so far.
    pub(crate) fn rows(&self) -> &[Row] {
        &self.report.rows
    }

    /// What is to be printed after all figures.
    pub(crate) fn conclude(&mut self, text: String) {
        self.conclusion = text;
    }

    /// Ends the run: prints what there is and, if the run is good, writes the files and compares.
    ///
    /// # Errors
    /// `Io` when a file cannot be written.
    pub(crate) fn finish(self, is_good: bool) -> Result<Verdict> {
        self.progress.finish_and_clear();
        if !self.report.facts.is_empty() {
            print(&self.report.facts.join("\n"));
        }
        if !self.report.rows.is_empty() {
            print(&self.report.table());
        }
        if !self.conclusion.is_empty() {
            print(&self.conclusion);
        }
        if !is_good {
            return Ok(Verdict::default());
        }
        if let Some(path) = &self.json {
            self.report.write(path)?;
        }
        if let Some(path) = &self.csv {
            write_text(path, &self.report.csv())?;
        }
        if let Some(path) = &self.html {
            write_text(path, &html::page(&self.report))?;
        }
        let Some(comparison) = &self.comparison else {
            return Ok(Verdict::default());
        };
        let (text, verdict) = comparison.with(&self.report);
        print(&text);
        Ok(verdict)
    }
}

#[expect(clippy::print_stdout, reason = "it is what was asked for")]
fn print(text: &str) {
    println!("{text}");
}

#[expect(clippy::print_stderr, reason = "standard output has the figures")]
fn remark(text: &str) {
    eprintln!("kv-bench: {text}");
}
