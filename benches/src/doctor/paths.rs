//! The ways to another process of this host, each tried.

use kvcache_core::{ErrorKind, Result};

use super::{Finding, State};
use crate::transfer::{PathKind, try_path};

/// What each way is for, where it is not there.
const WAYS: [(PathKind, &str); 4] = [
    (
        PathKind::Shm,
        "other processes of this host are reached over slower ways",
    ),
    (
        PathKind::Ucx,
        "needed for InfiniBand and RoCE only: libucx0 in Debian",
    ),
    (
        PathKind::Verbs,
        "needs an RDMA device, and libibverbs1 with ibverbs-providers in Debian",
    ),
    (PathKind::Tcp, "nothing else reaches other hosts here"),
];

/// A finding for each way.
pub(super) fn look() -> Vec<Finding> {
    let mut findings = Vec::new();
    for (kind, otherwise) in WAYS {
        let what = format!("path: {}", kind.name());
        findings.push(match try_path(kind) {
            Ok(told) => Finding::ok(&what, told),
            Err(error) => Finding::new(&what, State::Absent, error.to_string(), otherwise),
        });
    }
    findings.push(files());
    findings
}

fn files() -> Finding {
    let what = "files: engine";
    let started = || -> Result<String> {
        let agent = kvfabric_transfer::Agent::builder("doctor").build()?;
        agent.start_file_engine(kvfabric_transfer::FileEngineMode::Uring)
    };
    match started() {
        Ok(told) => Finding::ok(what, told),
        Err(error) if error.kind() == ErrorKind::Unsupported => Finding::new(
            what,
            State::Hint,
            error.to_string(),
            "files are read and written by threads; allow io_uring (kernel.io_uring_disabled, seccomp)",
        ),
        Err(error) => Finding::new(what, State::Absent, error.to_string(), ""),
    }
}
