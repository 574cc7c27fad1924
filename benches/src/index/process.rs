//! Processes that measure one thing each and print rows: their memory is then that thing's alone.

use std::process::{Command, Stdio};

use kvcache_core::{Error, Result};

use crate::report::Row;
use crate::stop::Stop;

use super::wrong;

/// This program again.
///
/// # Errors
/// `Io` when it is not known where that is.
pub(super) fn own() -> Result<Command> {
    let program = std::env::current_exe();
    Ok(Command::new(
        program.map_err(|error| Error::io("find this program", error))?,
    ))
}

/// Runs a program and takes the rows that it prints; none when Ctrl-C has ended it.
///
/// # Errors
/// `Io` when it cannot be started, `Internal` with how it ended when that was not well; what it said is on standard error.
pub(super) fn rows_of(mut command: Command, stop: &Stop) -> Result<Vec<Row>> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Error::io(format!("start {}", command.get_program().display()), error))?;
    match serde_json::from_slice(&output.stdout) {
        Ok(rows) if output.status.success() => Ok(rows),
        _ if stop.is_set() => Ok(Vec::new()),
        _ => Err(wrong(format!("{command:?} ended with {}", output.status))),
    }
}

/// Prints rows for the program that started this one.
///
/// # Errors
/// `Internal` when they cannot be written as JSON.
pub(super) fn print_rows(rows: &[Row]) -> Result<()> {
    print(&serde_json::to_string(rows).map_err(|error| wrong(error.to_string()))?);
    Ok(())
}

#[expect(
    clippy::print_stdout,
    reason = "the process that started this one reads it"
)]
fn print(text: &str) {
    println!("{text}");
}
