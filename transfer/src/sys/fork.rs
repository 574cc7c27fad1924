//! Tells whether this process is a forked child, without a system call each time.

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use kvcache_core::{Error, ErrorKind, Result};

/// How many forks lie between the first process that asked and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);
static HANDLER: Once = Once::new();

extern "C" fn count_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// The process in which something was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process(u32);

impl Process {
    /// This process.
    pub(crate) fn current() -> Self {
        HANDLER.call_once(|| {
            // SAFETY: `count_fork` only touches an atomic, which is allowed between fork and exec; it
            // is a function of this library, so it stays loaded as long as it may be called.
            let status = unsafe { libc::pthread_atfork(None, None, Some(count_fork)) };
            if status != 0 {
                tracing::warn!(status, "no fork handler: a forked child is not recognised");
            }
        });
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// # Errors
    /// [`ErrorKind::Forked`] when called in a child of that process.
    pub(crate) fn check(self) -> Result<()> {
        if self.0 == FORKS.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Forked,
            "the transfer agent was made before this process was forked",
        ))
    }
}
