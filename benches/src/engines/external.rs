//! Figures that other programs measure: a caller in C or Python, or an engine.
//!
//! Such a program writes one JSON object a line on its standard output: `subject`, `case`, `metric`, `unit` and
//! `samples`. What it has to say to people goes to its standard error.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use serde::Deserialize;

use crate::stop::Stop;

/// Lines read and not yet looked at.
const LINES_MAX: usize = 64;
/// How often a silent program's run is interrupted to look for Ctrl-C.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// One figure of another program.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Figure {
    /// Who.
    pub(super) subject: String,
    /// At what.
    pub(super) case: String,
    /// Which figure.
    pub(super) metric: String,
    /// In what.
    pub(super) unit: String,
    /// Each measurement, in the order they were made.
    pub(super) samples: Vec<f64>,
}

/// A program to run, and how long it may take.
pub(super) struct External<'a> {
    command: Command,
    name: String,
    patience: Duration,
    stop: &'a Stop,
}

impl<'a> External<'a> {
    /// `program`, which must end within `patience`.
    pub(super) fn new(program: &Path, patience: Duration, stop: &'a Stop) -> Self {
        let mut command = Command::new(program);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        Self {
            command,
            name: program.display().to_string(),
            patience,
            stop,
        }
    }

    /// One more argument.
    pub(super) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.name.push(' ');
        self.name.push_str(&argument.as_ref().to_string_lossy());
        self.command.arg(argument);
        self
    }

    /// An environment variable for it.
    pub(super) fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.command.env(name, value.into());
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// `Io` when it cannot be started, `Timeout` when it takes too long (it is killed), `Cancelled` after Ctrl-C, and
    /// `Internal` when it fails or writes a line that is no figure: each with the program's name.
    pub(super) fn run(mut self) -> Result<Vec<Figure>> {
        let started = self.command.spawn();
        let mut child = started.map_err(|error| Error::io(self.name.clone(), error))?;
        let figures = self.listen(&mut child);
        if figures.is_err() {
            // It may have ended by itself meanwhile; then there is nothing to kill.
            let _ = child.kill();
        }
        let status = child
            .wait()
            .map_err(|error| Error::io(self.name.clone(), error))?;
        let figures = figures.map_err(|error| error.at(self.name.clone()))?;
        if !status.success() {
            let context = format!("{} ended with {status}", self.name);
            return Err(Error::new(ErrorKind::Internal, context));
        }
        Ok(figures)
    }

    fn listen(&self, child: &mut Child) -> Result<Vec<Figure>> {
        let output = child.stdout.take();
        let output = output.ok_or_else(|| Error::new(ErrorKind::Internal, "no standard output"))?;
        let (lines, read) = sync_channel(LINES_MAX);
        let reader = std::thread::spawn(move || forward(BufReader::new(output), &lines));
        let until = Instant::now() + self.patience;
        let mut figures = Vec::new();
        loop {
            match read.recv_timeout(LOOK_EVERY) {
                Ok(line) => figures.push(parse(&line.map_err(|e| Error::io("read", e))?)?),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if self.stop.is_set() => {
                    return Err(Error::new(ErrorKind::Cancelled, "interrupted"));
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() >= until => {
                    let context = format!("not finished after {:?}", self.patience);
                    return Err(Error::new(ErrorKind::Timeout, context));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        // It has told all it had, so it is about to end.
        let _ = reader.join();
        Ok(figures)
    }
}

fn forward(output: impl BufRead, lines: &SyncSender<std::io::Result<String>>) {
    for line in output.lines() {
        if lines.send(line).is_err() {
            return;
        }
    }
}

fn parse(line: &str) -> Result<Figure> {
    serde_json::from_str(line).map_err(|error| {
        let context = format!("{line:?} is no figure");
        Error::new(ErrorKind::Internal, context).with_source(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn shell(script: &str, patience: Duration) -> Result<Vec<Figure>> {
        let stop = Stop::default();
        External::new(Path::new("sh"), patience, &stop)
            .arg("-c")
            .arg(script)
            .env("VALUE", "1.5")
            .run()
    }

    /// A program in shell that writes one figure, with a value from its environment.
    #[test]
    fn a_figure_is_read_from_a_programs_output() {
        let line = r#"{"subject": "c", "case": "x", "metric": "us", "unit": "µs", "samples": [2, '$VALUE']}"#;
        let figures = shell(&format!("echo '{line}'"), PATIENCE).unwrap();
        assert_eq!(figures.len(), 1);
        assert_eq!(figures[0].subject, "c");
        assert_eq!(figures[0].samples, [2.0, 1.5]);
    }

    /// Each way in which a program can fail its caller, told with the program's name.
    #[test]
    fn a_program_that_fails_is_named() {
        let cases = [
            ("exit 3", PATIENCE, ErrorKind::Internal, "exit status: 3"),
            ("echo nonsense", PATIENCE, ErrorKind::Internal, "nonsense"),
            (
                "exec sleep 60",
                Duration::from_millis(1),
                ErrorKind::Timeout,
                "not finished",
            ),
        ];
        for (script, patience, kind, text) in cases {
            let error = shell(script, patience).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            let said = error.to_string();
            assert!(said.contains("sh -c") && said.contains(text), "{said}");
        }
        let stop = Stop::default();
        let error = External::new(Path::new("/nowhere/program"), PATIENCE, &stop).run();
        assert!(error.unwrap_err().to_string().contains("/nowhere/program"));
    }
}
