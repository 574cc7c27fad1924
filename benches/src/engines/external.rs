//! Figures that other programs measure: a caller in C or Python, or an engine.
//!
//! Such a program writes one JSON object a line on its standard output: `subject`, `case`, `metric`, `unit` and
//! `samples`. What it has to say to people goes to its standard error.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::stop::Stop;

/// Lines read and not yet looked at.
const LINES_MAX: usize = 64;
/// How often a silent program's run is interrupted to look for Ctrl-C.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// One figure of another program.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
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
        command.stdout(Stdio::piped()).stderr(Stdio::inherit());
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
        self.command.stdin(Stdio::null());
        let running = self.start()?;
        let mut figures = Vec::new();
        while let Some(line) = running.next_line()? {
            figures.push(running.parse(&line)?);
        }
        running.finish()?;
        Ok(figures)
    }

    /// Starts a program that measures each time it is asked.
    ///
    /// # Errors
    /// `Io` when it cannot be started, with its name.
    pub(super) fn converse(mut self) -> Result<Conversation<'a>> {
        self.command.stdin(Stdio::piped());
        let mut running = self.start()?;
        let questions = running.child.stdin.take();
        let questions = questions
            .ok_or_else(|| running.at(Error::new(ErrorKind::Internal, "no standard input")))?;
        Ok(Conversation { running, questions })
    }

    fn start(mut self) -> Result<Running<'a>> {
        let started = self.command.spawn();
        let mut child = started.map_err(|error| Error::io(self.name.clone(), error))?;
        let (lines, read) = sync_channel(LINES_MAX);
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || forward(BufReader::new(output), &lines));
        }
        Ok(Running {
            child,
            read,
            until: Instant::now() + self.patience,
            name: self.name,
            stop: self.stop,
        })
    }
}

/// A program that measures when it is asked to: an empty line in, figures and an empty line out. It ends when its input does.
pub(super) struct Conversation<'a> {
    running: Running<'a>,
    questions: ChildStdin,
}

impl Conversation<'_> {
    /// Has it measure once.
    ///
    /// # Errors
    /// As [`External::run`]; `Internal` also when it ends.
    pub(super) fn ask(&mut self) -> Result<Vec<Figure>> {
        let asked = self.questions.write_all(b"\n");
        asked.map_err(|error| Error::io(self.running.name.clone(), error))?;
        let mut figures = Vec::new();
        loop {
            match self.running.next_line()? {
                Some(line) if line.is_empty() => return Ok(figures),
                Some(line) => figures.push(self.running.parse(&line)?),
                None => {
                    let error = Error::new(ErrorKind::Internal, "ended without an answer");
                    return Err(self.running.at(error));
                }
            }
        }
    }

    /// Lets it end.
    ///
    /// # Errors
    /// As [`External::run`].
    pub(super) fn end(self) -> Result<()> {
        drop(self.questions);
        let running = self.running;
        match running.next_line()? {
            None => running.finish(),
            Some(line) => {
                let error = Error::new(ErrorKind::Internal, format!("{line:?} was not asked for"));
                Err(running.at(error))
            }
        }
    }
}

/// A program in progress; it is killed if it is let go of before its end.
struct Running<'a> {
    child: Child,
    read: Receiver<std::io::Result<String>>,
    until: Instant,
    name: String,
    stop: &'a Stop,
}

impl Running<'_> {
    fn at(&self, error: Error) -> Error {
        error.at(self.name.clone())
    }

    fn parse(&self, line: &str) -> Result<Figure> {
        parse(line).map_err(|error| self.at(error))
    }

    /// None at the end of its output.
    fn next_line(&self) -> Result<Option<String>> {
        let error = loop {
            match self.read.recv_timeout(LOOK_EVERY) {
                Ok(Ok(line)) => return Ok(Some(line)),
                Ok(Err(error)) => break Error::io("read", error),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if self.stop.is_set() => {
                    break Error::new(ErrorKind::Cancelled, "interrupted");
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() >= self.until => {
                    let context = "not finished in the time that it has";
                    break Error::new(ErrorKind::Timeout, context);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        Err(self.at(error))
    }

    /// After the end of its output it is about to end.
    fn finish(mut self) -> Result<()> {
        let status = self.child.wait();
        let status = status.map_err(|error| Error::io(self.name.clone(), error))?;
        if status.success() {
            return Ok(());
        }
        let context = format!("{} ended with {status}", self.name);
        Err(Error::new(ErrorKind::Internal, context))
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        // One that has ended is not there to be killed, or to be waited for a second time.
        let _ = self.child.kill();
        let _ = self.child.wait();
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

    /// A program in shell that counts its questions, and one that ends at the second.
    #[test]
    fn a_program_is_asked_as_often_as_one_likes() {
        let line =
            r#"{"subject": "c", "case": "x", "metric": "us", "unit": "µs", "samples": [$n]}"#;
        let line = line.replace('"', "\\\"");
        let script = format!("n=0; while read -r _; do n=$((n+1)); echo \"{line}\"; echo; done");
        let converse = |script: &str, stop| {
            let program = External::new(Path::new("sh"), PATIENCE, stop);
            program.arg("-c").arg(script).converse().unwrap()
        };
        let stop = Stop::default();
        let mut program = converse(&script, &stop);
        for count in 1..=3 {
            let figures = program.ask().unwrap();
            assert_eq!(figures.len(), 1);
            assert_eq!(figures[0].samples, [f64::from(count)]);
        }
        program.end().unwrap();
        let mut program = converse("read -r _; echo; read -r _; exit 3", &stop);
        assert!(program.ask().unwrap().is_empty());
        let error = program.ask().unwrap_err();
        assert!(error.to_string().contains("without an answer"), "{error}");
        let error = converse("exit 3", &stop).end().unwrap_err();
        assert!(error.to_string().contains("exit status: 3"), "{error}");
        let error = converse("echo more", &stop).end().unwrap_err();
        assert!(error.to_string().contains("more"), "{error}");
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
