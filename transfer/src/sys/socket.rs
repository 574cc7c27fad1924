//! Vectored socket I/O straight from and to memory that others may change.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::memory::{Sink, Span};

/// Ranges that one call may carry: the kernel's own limit is 1024.
pub(crate) const SPANS_MAX: usize = 256;

/// Sends what fits now. Never blocks, never raises a signal.
pub(crate) fn send(socket: BorrowedFd<'_>, spans: &[Span<'_>]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let message = message(spans.as_ptr().cast::<libc::iovec>().cast_mut(), spans.len());
    // SAFETY: `Span` is a transparent `iovec` of readable memory that outlives the call, and the kernel
    // only reads the array and the memory; the descriptor is borrowed, so it is open.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    checked(sent)
}

/// Receives what is there, filling the sinks in order. Never blocks; 0 is the end of the stream.
pub(crate) fn receive(socket: BorrowedFd<'_>, sinks: &[Sink<'_>]) -> io::Result<usize> {
    let mut message = message(sinks.as_ptr().cast::<libc::iovec>().cast_mut(), sinks.len());
    // SAFETY: `Sink` is a transparent `iovec` of writable memory that outlives the call and that nobody
    // holds a reference into; the kernel writes the memory, not the array; the descriptor is open.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    checked(got)
}

fn message(spans: *mut libc::iovec, count: usize) -> libc::msghdr {
    assert!(
        count <= SPANS_MAX,
        "{count} ranges in one call, at most {SPANS_MAX}"
    );
    // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = spans;
    // A C library has it as `size_t`, another as `int`; it is at most `SPANS_MAX`.
    message.msg_iovlen = count as _;
    message
}

fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
