//! Other indexes under the same workload, in the same run: the program of `benches/compare`, a process for each figure.

use std::path::{Path, PathBuf};
use std::process::Command;

use kvcache_core::Result;

use crate::recorder::Recorder;

use super::memory::REPLICAS;
use super::process::rows_of;

/// Dynamo's default, SMG's, and Dynamo's single-threaded one.
pub(super) const SUBJECTS: [&str; 3] = ["crtc", "chain", "radix"];
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

/// Runs every rival, but for ingestion; one that fails ends the run, as a comparison without it would say something else.
///
/// # Errors
/// As [`rows_of`].
pub(super) fn measure(
    program: &Path,
    sequences: u32,
    lookups: u32,
    recorder: &mut Recorder,
) -> Result<()> {
    for subject in SUBJECTS {
        let (sequences, lookups) = (sequences.to_string(), lookups.to_string());
        let mut runs = vec![("speed", lookups)];
        runs.extend(REPLICAS.map(|replicas| ("memory", replicas.to_string())));
        for (what, number) in runs {
            if recorder.stop().is_set() {
                return Ok(());
            }
            recorder.say(format!("{subject} {what} {number}"));
            let mut command = Command::new(program);
            command.args([subject, &sequences, what, &number]);
            let rows = rows_of(command, recorder.stop())?;
            recorder.extend(rows);
            recorder.step();
        }
    }
    Ok(())
}
