//! The global index as a process of its own.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    kvfabric_indexer::cli::run(std::env::args_os())
}
