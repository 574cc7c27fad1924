//! What this machine offers to transfers, and what could be set better.

mod devices;
mod gpus;
mod nvlink;
mod paths;
mod storage;
mod system;

use std::path::PathBuf;

use clap::Args;
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use kvcache_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::host::Host;
use crate::machine::Machine;
use crate::recorder::check_json;
use crate::report::write_json;

/// `kv-bench doctor`
#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// Folder whose disk is looked at; the system's folder for temporary files by default.
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// Read the devices from `sys` and `proc` below this folder: those of another machine, or a copy.
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    root: PathBuf,
    /// Write the findings to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) use devices::Topology;

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// Usable as it is.
    Ok,
    /// Usable, and could be better.
    Hint,
    /// Not here.
    Absent,
}

impl State {
    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Hint => "hint",
            Self::Absent => "absent",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What.
    what: String,
    state: State,
    /// What was found.
    found: String,
    /// What to do, or why it is not there; empty when nothing is to be said.
    advice: String,
}

impl Finding {
    fn ok(what: &str, found: impl Into<String>) -> Self {
        Self::new(what, State::Ok, found, "")
    }

    fn new(what: &str, state: State, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            state,
            found: found.into(),
            advice: advice.into(),
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    tool: &'static str,
    version: &'static str,
    command: &'static str,
    host: Host,
    findings: &'a [Finding],
    topology: &'a Topology,
}

/// Looks at everything, and says it.
///
/// # Errors
/// `Invalid` naming an option, `Io` when the JSON cannot be written. What is missing on the machine is a finding, never
/// an error.
pub(crate) fn run(args: &DoctorArgs) -> Result<()> {
    let folder = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    if !folder.is_dir() {
        let text = format!("--dir {}: no such folder", folder.display());
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    if let Some(path) = &args.json {
        check_json(path)?;
    }
    let mut findings = paths::look();
    findings.extend(system::look(&folder));
    let topology = Topology::new(Machine::read_with_driver(&args.root));
    findings.extend(topology.findings());
    print(&findings, topology.matrix());
    if let Some(path) = &args.json {
        let report = Report {
            tool: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            command: "doctor",
            host: Host::read(),
            findings: &findings,
            topology: &topology,
        };
        write_json(path, &report)?;
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "what the command is for")]
fn print(findings: &[Finding], matrix: Option<String>) {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY);
    table.set_header(["what", "", "found", "advice"]);
    for finding in findings {
        table.add_row([
            &finding.what,
            finding.state.name(),
            &finding.found,
            &finding.advice,
        ]);
    }
    println!("{table}");
    if let Some(matrix) = matrix {
        println!("{matrix}");
    }
}
