//! Whether handles may still be used: not after a panic, and not in a forked child.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvfabric::{Error, ErrorKind, Result};

/// Shared by all handles of one agent, or of one index connection.
#[derive(Debug)]
pub(crate) struct Life {
    /// The process in which the handles were made. Asking for it is a system call, which is small beside any
    /// call that uses it, and unlike a fork handler it also sees a bare `clone`.
    process: u32,
    poisoned: AtomicBool,
}

impl Life {
    pub(crate) fn begin() -> Arc<Self> {
        Arc::new(Self {
            process: std::process::id(),
            poisoned: AtomicBool::new(false),
        })
    }

    /// Begins a call. A panic before the result is dropped poisons all handles.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] after a panic, [`ErrorKind::Forked`] in a forked child.
    pub(crate) fn enter(&self) -> Result<Call<'_>> {
        if self.process != std::process::id() {
            let text = "the handle was made before this process was forked";
            return Err(Error::new(ErrorKind::Forked, text));
        }
        if self.poisoned.load(Ordering::Acquire) {
            let text = "an earlier panic left this handle unusable";
            return Err(Error::new(ErrorKind::Internal, text));
        }
        Ok(Call {
            life: self,
            unwinding: std::thread::panicking(),
        })
    }
}

/// A call in progress.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    life: &'a Life,
    /// Whether the thread was unwinding when it began, which then says nothing about this call.
    unwinding: bool,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.unwinding {
            self.life.poisoned.store(true, Ordering::Release);
        }
    }
}
