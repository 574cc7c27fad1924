//! A file descriptor that is readable while something waits to be looked at.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use kvcache_core::{Error, Result};
use rustix::event::{EventfdFlags, eventfd};

/// An eventfd that is made when somebody asks for it; until then raising it costs nothing.
///
/// Whoever owns it calls everything but [`Signal::fd`] under the lock of the state that it tells of: then a state that
/// changes between a look at it and the making of the descriptor is not missed.
#[derive(Default)]
pub(crate) struct Signal {
    fd: OnceLock<OwnedFd>,
    /// What it was made last, so that the kernel is told of changes only.
    raised: AtomicBool,
}

impl Signal {
    /// Makes the descriptor if there is none. Whether it was made now, so that the state has to be raised.
    pub(crate) fn open(&self) -> Result<bool> {
        if self.fd.get().is_some() {
            return Ok(false);
        }
        let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("create an eventfd", e.into()))?;
        Ok(self.fd.set(made).is_ok())
    }

    /// The descriptor, if it was made.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.get().map(AsFd::as_fd)
    }

    /// Makes it readable.
    pub(crate) fn raise(&self) {
        if let Some(fd) = self.fd.get()
            && !self.raised.swap(true, Ordering::Relaxed)
        {
            // Only fails when the counter is full, and then it is readable anyway.
            let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
        }
    }

    /// Makes it unreadable.
    pub(crate) fn clear(&self) {
        if let Some(fd) = self.fd.get()
            && self.raised.swap(false, Ordering::Relaxed)
        {
            // One read takes the whole count; it fails when somebody took it before, which is as well.
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
    }
}
