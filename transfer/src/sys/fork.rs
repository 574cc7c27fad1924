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

#[cfg(test)]
mod tests {
    use super::*;

    /// A real fork: the child asks, and answers with its exit status; the parent goes on as before.
    #[test]
    fn a_forked_child_is_told_so() {
        let process = Process::current();
        process.check().unwrap();
        // SAFETY: the child only reads an atomic, allocates an error (glibc keeps its allocator usable
        // after a fork) and leaves with `_exit`.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "{}", std::io::Error::last_os_error());
        if child == 0 {
            let told = process
                .check()
                .is_err_and(|error| error.kind() == ErrorKind::Forked);
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(if told { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: `status` is writable, and the child is ours and not waited for by anyone else.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!((waited, status), (child, 0));
        process.check().unwrap();
    }
}
