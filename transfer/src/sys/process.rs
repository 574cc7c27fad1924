//! Who is at the other end of a Unix socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The process that connected a Unix socket, or listened on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// As this process numbers it; none when it lives in a process namespace that cannot be seen from here.
    pub(crate) pid: Option<i32>,
    /// Its effective user at that time.
    pub(crate) uid: u32,
}

/// What the kernel says of the other end of a connected Unix socket.
pub(crate) fn credentials(socket: BorrowedFd<'_>) -> io::Result<Credentials> {
    let mut found = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `found` is writable for the `len` bytes that are told, and plain numbers, so that any bytes written are
    // valid; the descriptor is borrowed, so it is open.
    let status = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut len,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Credentials {
        pid: (found.pid > 0).then_some(found.pid),
        uid: found.uid,
    })
}
