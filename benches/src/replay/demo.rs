//! The demo's report as rows.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_sim::report::Report;

use crate::EXIT_INVALID;
use crate::recorder::Recorder;
use crate::report::{Case, OURS, Row};

use super::ReplayArgs;

/// Runs the demo and takes its figures.
///
/// # Errors
/// `NotFound` when the `kvfabric` program is not beside this one, `Invalid` when it refuses an option, `Internal` when it failed or its report is not as it
/// must be.
pub(super) fn run(args: &ReplayArgs, pods: &str, recorder: &mut Recorder) -> Result<()> {
    let program = program()?;
    let folder =
        tempfile::tempdir().map_err(|error| Error::io("make a temporary folder", error))?;
    let json = folder.path().join("demo.json");
    recorder.say(format!("{} demo", program.display()));
    let mut command = Command::new(&program);
    command.args(["demo", "--pods", pods, "--seed", &args.seed.to_string()]);
    command.arg("--json").arg(&json);
    match &args.trace {
        Some(trace) => command.arg("--trace").arg(trace),
        None => command.args(["--workload", args.workload.kind().name()]),
    };
    if let Some(count) = args.max_requests {
        command.args(["--max-requests", &count.to_string()]);
    }
    // Its progress and its complaints are worth seeing; its table is in our rows.
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|error| Error::io(program.display().to_string(), error))?;
    if !status.success() {
        let context = format!("{} demo ended with {status}", program.display());
        let is_invalid = status.code() == Some(i32::from(EXIT_INVALID));
        let kind = if is_invalid {
            ErrorKind::Invalid
        } else {
            ErrorKind::Internal
        };
        return Err(Error::new(kind, context));
    }
    let report = read(&json)?;
    recorder.extend(rows(&format!("demo-{}", args.subject_matter()), &report));
    Ok(())
}

/// The `kvfabric` program of the same build.
fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(|error| Error::io("find this program", error))?;
    let program = own.with_file_name("kvfabric");
    if program.is_file() {
        return Ok(program);
    }
    let context = format!(
        "--demo needs {}, which is not there: build it with `cargo build --bin kvfabric`",
        program.display()
    );
    Err(Error::new(ErrorKind::NotFound, context))
}

fn read(path: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io(format!("the demo's report {}", path.display()), error))?;
    let report: Report = serde_json::from_str(&text)
        .map_err(|error| Error::new(ErrorKind::Internal, "the demo's report").with_source(error))?;
    report
        .check()
        .map_err(|error| error.at("the demo's report"))?;
    Ok(report)
}

fn rows(name: &str, report: &Report) -> Vec<Row> {
    let case = Case {
        subject: OURS,
        name,
    };
    let figures = [
        ("requests", "requests", Some(report.requests as f64)),
        (
            "block_accesses",
            "blocks",
            Some(report.block_accesses as f64),
        ),
        ("cluster_hit_ratio", "ratio", Some(report.cluster_hit_ratio)),
        ("local_hit_ratio", "ratio", Some(report.local_hit_ratio)),
        (
            "infinite_hit_ratio",
            "ratio",
            Some(report.infinite_hit_ratio),
        ),
        (
            "round_robin_cluster_hit_ratio",
            "ratio",
            report.round_robin_cluster_hit_ratio,
        ),
        (
            "round_robin_local_hit_ratio",
            "ratio",
            report.round_robin_local_hit_ratio,
        ),
        (
            "verified_blocks",
            "blocks",
            Some(report.verified_blocks as f64),
        ),
        (
            "verify_failures",
            "blocks",
            Some(report.verify_failures as f64),
        ),
        ("bytes_moved", "bytes", Some(report.bytes_moved as f64)),
        ("lookups_per_s", "lookups/s", Some(report.lookups_per_s)),
        ("p50_us", "µs", report.lookup_us.p50),
        ("p99_us", "µs", report.lookup_us.p99),
        ("events_per_s", "events/s", Some(report.events.per_s)),
        ("lag_p50_ms", "ms", report.events.lag_ms.p50),
        ("lag_p99_ms", "ms", report.events.lag_ms.p99),
        ("ttft_moving_ms", "ms", Some(report.ttft_ms.moving)),
        ("ttft_computing_ms", "ms", Some(report.ttft_ms.computing)),
        ("elapsed_s", "s", Some(report.elapsed_s)),
    ];
    let mut rows: Vec<Row> = figures
        .into_iter()
        .filter_map(|(metric, unit, value)| case.single(metric, unit, value?))
        .collect();
    for (backend, carried) in &report.backends {
        let name = format!("{name}-{backend}");
        let case = Case {
            subject: OURS,
            name: &name,
        };
        rows.extend(case.single("bytes", "bytes", carried.bytes as f64));
        rows.extend(
            carried
                .gb_per_s
                .and_then(|rate| case.single("gb_per_s", "GB/s", rate)),
        );
    }
    rows
}

#[cfg(test)]
mod tests {
    use kvfabric_sim::report::{BackendReport, SCHEMA};

    use super::*;

    /// Builds a report with some figures missing, writes and reads it, and looks for each figure that is there.
    #[test]
    fn figures_that_the_demo_has_become_rows() {
        let mut report = Report {
            schema: SCHEMA,
            requests: 7,
            bytes_moved: 9,
            ..Report::default()
        };
        let carried = BackendReport {
            bytes: 9,
            gb_per_s: Some(1.5),
            ..BackendReport::default()
        };
        report.backends.insert("shm".to_owned(), carried);
        report.round_robin_local_hit_ratio = Some(0.25);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("demo.json");
        std::fs::write(&path, report.to_json().unwrap()).unwrap();
        let rows = rows("demo-chat", &read(&path).unwrap());
        let value = |case: &str, metric: &str| {
            let row = rows
                .iter()
                .find(|row| row.case == case && row.metric == metric)?;
            Some(row.median)
        };
        assert_eq!(value("demo-chat", "requests"), Some(7.0));
        assert_eq!(
            value("demo-chat", "round_robin_local_hit_ratio"),
            Some(0.25)
        );
        assert_eq!(value("demo-chat", "round_robin_cluster_hit_ratio"), None);
        assert_eq!(value("demo-chat-shm", "gb_per_s"), Some(1.5));
    }

    /// A report with a wrong byte in it is refused, not turned into rows.
    #[test]
    fn a_demo_that_served_a_wrong_byte_is_an_error() {
        let report = Report {
            verified_blocks: 2,
            verify_failures: 1,
            ..Report::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("demo.json");
        std::fs::write(&path, report.to_json().unwrap()).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("wrong byte"));
    }
}
