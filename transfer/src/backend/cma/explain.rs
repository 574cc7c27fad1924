//! What a refused or failed system call means, in words that name the setting to look at.

use std::io;

use kvcache_core::{Error, ErrorKind};

use crate::plan::Extent;
use crate::sys::process_vm::PeerProcess;

const PTRACE_SCOPE: &str = "/proc/sys/kernel/yama/ptrace_scope";

/// Why the memory of a process could not be read at first.
pub(super) fn refusal(pid: i32, error: io::Error) -> Error {
    let (kind, text) = match error.raw_os_error() {
        Some(libc::EPERM) => (ErrorKind::Denied, denied()),
        Some(libc::ENOSYS) => (
            ErrorKind::Unsupported,
            "this kernel, or a seccomp filter, has no process_vm_readv".to_owned(),
        ),
        _ => return failure(pid, error),
    };
    let text = format!("the memory of process {pid} is closed: {text}");
    Error::new(kind, text).with_source(error)
}

/// Why a process that was reached before is not any more.
pub(super) fn failure(pid: i32, error: io::Error) -> Error {
    let (kind, text) = match error.raw_os_error() {
        Some(libc::ESRCH) => (ErrorKind::PeerLost, "it is dead"),
        // Connecting anew finds out why.
        Some(libc::EPERM) => (ErrorKind::PeerLost, "it has closed its memory to others"),
        None if error.kind() == io::ErrorKind::InvalidData => {
            (ErrorKind::PeerLost, "it is not the process that was asked")
        }
        _ => (ErrorKind::Io, "its memory cannot be reached"),
    };
    Error::new(kind, format!("process {pid}: {text}")).with_source(error)
}

/// No byte could be copied. Either the process has ended or become another program since it was recognised, or it is there
/// and the bytes are not: memory here or there that the kernel cannot copy.
pub(super) fn unreachable(peer: &PeerProcess, extent: &Extent) -> Error {
    let pid = peer.pid();
    if let Err(error) = peer.recognise() {
        return failure(pid, error);
    }
    let text = format!(
        "{} bytes at {} of a region of process {pid}, or at {} of one of this process: \
         the kernel cannot copy them",
        extent.len, extent.remote_offset, extent.local_offset
    );
    Error::new(ErrorKind::Io, text)
}

/// What is known to close the memory of one process to another of the same user.
fn denied() -> String {
    let scope = std::fs::read_to_string(PTRACE_SCOPE).unwrap_or_default();
    let scope = scope.trim();
    if matches!(scope, "1" | "2" | "3") {
        return format!(
            "{PTRACE_SCOPE} is {scope}, reading the memory of one's own processes needs 0"
        );
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if status
        .lines()
        .any(|line| line.starts_with("Seccomp:") && line.ends_with('2'))
    {
        return "a seccomp filter of this process may forbid it".to_owned();
    }
    "it is not dumpable, has more privileges, is in another user namespace, or a security module forbids it".to_owned()
}
