//! Tells whether this process is a forked child, without a system call each time.

use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// A word that reads as zero in every new process, however it was forked. None where the kernel has no such memory.
static MARK: OnceLock<Option<&'static AtomicU32>> = OnceLock::new();

/// The last number that a process has got; a child goes on from its parent's.
static NUMBERS: AtomicU32 = AtomicU32::new(0);

/// The process in which something was made.
///
/// Also sees what a fork handler does not: a bare `clone` and `_Fork`. Where the kernel does not wipe memory at a fork (before
/// Linux 4.14) each question is a system call.
#[derive(Clone, Copy, Debug)]
pub struct Process(u32);

impl Process {
    /// This process.
    #[must_use]
    pub fn current() -> Self {
        let Some(mark) = mark() else {
            return Self(std::process::id());
        };
        let known = mark.load(Ordering::Relaxed);
        if known != 0 {
            return Self(known);
        }
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed) + 1;
        match mark.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => Self(number),
            // Another thread was faster.
            Err(known) => Self(known),
        }
    }

    /// Whether that process is this one, and not one that this one was forked from.
    #[must_use]
    pub fn is_current(self) -> bool {
        match mark() {
            Some(mark) => mark.load(Ordering::Relaxed) == self.0,
            None => std::process::id() == self.0,
        }
    }

    /// # Errors
    /// [`ErrorKind::Forked`] when called in a child of that process.
    pub(crate) fn check(self) -> Result<()> {
        if self.is_current() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Forked,
            "the transfer agent was made before this process was forked",
        ))
    }
}

fn mark() -> Option<&'static AtomicU32> {
    *MARK.get_or_init(|| {
        let word = wiped_word();
        if let Err(error) = &word {
            tracing::debug!(%error, "no memory that is wiped at a fork: processes are told apart by their numbers");
        }
        word.ok()
    })
}

/// A page of its own, for ever, that the kernel empties in a forked child.
fn wiped_word() -> rustix::io::Result<&'static AtomicU32> {
    // The kernel rounds it up to a page.
    let len = size_of::<AtomicU32>();
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let anywhere = std::ptr::null_mut();
    // SAFETY: a new private mapping at an address of the kernel's choice; it replaces none.
    let page = unsafe { rustix::mm::mmap_anonymous(anywhere, len, protection, MapFlags::PRIVATE) }?;
    // SAFETY: the mapping above, all of it; nobody else knows of it yet.
    let advised = unsafe { rustix::mm::madvise(page, len, Advice::LinuxWipeOnFork) };
    if let Err(error) = advised {
        // SAFETY: the mapping above, all of it; nobody else knows of it.
        unsafe { rustix::mm::munmap(page, len) }?;
        return Err(error);
    }
    let word = NonNull::new(page.cast::<AtomicU32>()).ok_or(rustix::io::Errno::NOMEM)?;
    // SAFETY: the first word of a zeroed page, which is aligned for it, a valid atomic, and never unmapped; everybody
    // reaches it through this type. Wiping it happens in a new process before that runs.
    Ok(unsafe { word.as_ref() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a child does with its exit status: each bit is something that should hold there.
    fn in_a_child(fork: impl FnOnce() -> libc::pid_t, look: impl FnOnce() -> [bool; 3]) -> i32 {
        let child = fork();
        assert!(child >= 0, "{}", std::io::Error::last_os_error());
        if child == 0 {
            let [first, second, third] = look().map(i32::from);
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(first | second << 1 | third << 2) };
        }
        let mut status = 0;
        // SAFETY: `status` is writable, and the child is ours and not waited for by anyone else.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(waited, child);
        assert!(libc::WIFEXITED(status), "{status:#x}");
        libc::WEXITSTATUS(status)
    }

    /// A real fork, and a bare one that runs no handlers: the child asks about its parent and itself, and answers with its exit
    /// status; the parent goes on as before.
    #[test]
    fn a_forked_child_is_told_so() {
        let process = Process::current();
        process.check().unwrap();
        assert!(Process::current().is_current());
        let look = || {
            let told = process
                .check()
                .is_err_and(|error| error.kind() == ErrorKind::Forked);
            let own = Process::current();
            [told, own.is_current(), !process.is_current()]
        };
        // SAFETY: the child only touches atomics, allocates an error (glibc keeps its allocator usable after a fork) and
        // leaves with `_exit`.
        let forked = || unsafe { libc::fork() };
        assert_eq!(in_a_child(forked, look), 0b111);
        let bare = || {
            // SAFETY: a new process with a copy of this memory, as by `fork`; other arguments are zero, so nothing is
            // written. The child only touches atomics and leaves with `_exit`.
            let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
            child as libc::pid_t
        };
        // Without an allocation: another thread may hold the allocator's lock.
        let look = || [!process.is_current(), Process::current().is_current(), true];
        assert_eq!(in_a_child(bare, look), 0b111);
        process.check().unwrap();
        assert!(process.is_current() && Process::current().is_current());
    }
}
