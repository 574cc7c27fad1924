//! What every command does around its measurements: progress, Ctrl-C, the table, the JSON.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvcache_core::{Error, ErrorKind, Result};

use crate::report::{Report, Row, folder_of};
use crate::stop::Stop;

/// How often the progress line shows that the program lives.
const TICK: Duration = Duration::from_millis(200);

/// Where the figures go.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct OutputArgs {
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Show no progress.
    #[arg(long)]
    pub(crate) quiet: bool,
}

/// # Errors
/// `Invalid` if there can be no such file.
pub(crate) fn check_json(path: &Path) -> Result<()> {
    if path.is_dir() || !folder_of(path).is_dir() {
        let context = format!(
            "--json {}: not a file in an existing folder",
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
    stop: Stop,
    progress: ProgressBar,
}

impl Recorder {
    /// Starts a run.
    ///
    /// # Errors
    /// `Invalid` if the JSON file could not be written at the end: better to know before the run.
    pub(crate) fn start(command: &str, output: &OutputArgs) -> Result<Self> {
        if let Some(path) = &output.json {
            check_json(path)?;
        }
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

    /// One step is done.
    pub(crate) fn step(&self) {
        self.progress.inc(1);
    }

    /// Keeps rows.
    pub(crate) fn extend(&mut self, rows: impl IntoIterator<Item = Row>) {
        self.report.rows.extend(rows);
    }

    /// Ends the run: prints what there is and, if the run is good, writes the JSON.
    ///
    /// # Errors
    /// `Io` when it cannot be written.
    pub(crate) fn finish(self, is_good: bool) -> Result<()> {
        self.progress.finish_and_clear();
        if !self.report.rows.is_empty() {
            print(&self.report.table());
        }
        match self.json {
            Some(path) if is_good => self.report.write(&path),
            _ => Ok(()),
        }
    }
}

#[expect(clippy::print_stdout, reason = "it is what was asked for")]
fn print(text: &str) {
    println!("{text}");
}
