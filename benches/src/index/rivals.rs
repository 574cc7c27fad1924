//! Other indexes under the same workload, in the same run: the program of `benches/compare`, one process for each.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kvcache_core::{Error, Result};

use crate::recorder::Recorder;
use crate::report::Row;

use super::memory::REPLICAS;
use super::wrong;

/// Dynamo's default, SMG's, and Dynamo's single-threaded one.
const SUBJECTS: [&str; 3] = ["crtc", "chain", "radix"];
/// Steps of progress that this takes.
pub(super) const STEPS: u64 = SUBJECTS.len() as u64 * (1 + REPLICAS.len() as u64);

/// The program: the one that was named, or the one that is built beside this.
pub(super) fn find(named: Option<&Path>) -> Option<PathBuf> {
    let program = named.map_or_else(beside, |path| Some(path.to_owned()));
    let found = program.filter(|program| program.is_file());
    if found.is_none() {
        warn_of_absence();
    }
    found
}

/// `target/release/kv-bench` has `target/compare/release/kv-compare` beside it.
fn beside() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let target = program.parent()?.parent()?;
    Some(target.join("compare/release/kv-compare"))
}

#[expect(
    clippy::print_stderr,
    reason = "a comparison without its other side must not pass unnoticed"
)]
fn warn_of_absence() {
    eprintln!(
        "RIVALS LEFT OUT: there is no kv-compare; build it with \
         `cargo build --release --manifest-path benches/compare/Cargo.toml --target-dir target/compare`"
    );
}

/// Runs every rival; one that fails ends the run, as a comparison without it would say something else.
///
/// # Errors
/// `Io` when the program cannot be started, `Internal` with the rival that failed; what it said is on standard error.
pub(super) fn measure(
    program: &Path,
    sequences: u32,
    lookups: u32,
    recorder: &mut Recorder,
) -> Result<()> {
    for subject in SUBJECTS {
        let (sequences, lookups) = (sequences.to_string(), lookups.to_string());
        let mut runs = vec![vec![subject.to_owned(), sequences.clone(), lookups]];
        runs.extend(REPLICAS.map(|replicas| {
            let memory = ["memory".to_owned(), replicas.to_string()];
            [subject.to_owned(), sequences.clone()]
                .into_iter()
                .chain(memory)
                .collect()
        }));
        for arguments in runs {
            if recorder.stop().is_set() {
                return Ok(());
            }
            recorder.say(arguments.join(" "));
            let rows = run(program, &arguments)?;
            recorder.extend(rows);
            recorder.step();
        }
    }
    Ok(())
}

fn run(program: &Path, arguments: &[String]) -> Result<Vec<Row>> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Error::io("start kv-compare", error))?;
    match serde_json::from_slice(&output.stdout) {
        Ok(rows) if output.status.success() => Ok(rows),
        _ => Err(wrong(format!(
            "kv-compare {} ended with {}",
            arguments.join(" "),
            output.status
        ))),
    }
}
