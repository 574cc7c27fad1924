//! The program as people run it, and the figures that it writes.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

/// Only bounds a failing test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn bench(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kv-bench"));
    command
        .args(arguments.split_whitespace())
        .stdin(Stdio::null());
    command
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn read(json: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap()
}

/// Runs it with `--json`; the rows, after a look at everything around them.
pub(crate) fn rows(arguments: &str) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.json");
    let output = bench(arguments).arg("--json").arg(&json).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = read(&json);
    assert_eq!(report["tool"], "kv-bench");
    // A command of a command is named by both.
    let command = report["command"].as_str().unwrap();
    let first = arguments.split(' ').next();
    assert_eq!(command.split(' ').next(), first, "{arguments}");
    assert!(arguments.starts_with(command), "{command}: {arguments}");
    let rows = report["rows"].as_array().unwrap().clone();
    let table = String::from_utf8(output.stdout).unwrap();
    for row in &rows {
        assert!(
            table.contains(row["case"].as_str().unwrap()),
            "{row} is not in\n{table}"
        );
    }
    rows
}

pub(crate) fn find<'a>(
    rows: &'a [Value],
    subject: &str,
    case: &str,
    metric: &str,
) -> Option<&'a Value> {
    let wanted = [("subject", subject), ("case", case), ("metric", metric)];
    rows.iter()
        .find(|row| wanted.iter().all(|(key, value)| row[*key] == *value))
}

pub(crate) fn median(rows: &[Value], subject: &str, case: &str, metric: &str) -> f64 {
    let row = find(rows, subject, case, metric);
    row.unwrap_or_else(|| panic!("no {subject} {case} {metric} in {rows:#?}"))["median"]
        .as_f64()
        .unwrap()
}
