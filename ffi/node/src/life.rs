//! Whether handles may still be used: not after a panic, and not in a forked child.
//!
//! Both language bindings hand out handles that outlive any one call. All handles that share fate (an agent's, a node's)
//! share one [`Life`], and every call on one of them begins with [`Life::enter`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::Process;

/// Shared by all handles that live and fail together.
#[derive(Debug)]
pub struct Life {
    /// The process in which the handles were made. Not its number: each call asks several times, and that would be as many
    /// system calls.
    process: Process,
    poisoned: AtomicBool,
}

impl Life {
    /// A life that begins in this process. With the first one, the library begins to write what it has to say on standard
    /// error, as the variable `KVFABRIC_LOG` wants it.
    #[must_use]
    pub fn begin() -> Arc<Self> {
        crate::logs::start();
        Arc::new(Self {
            process: Process::current(),
            poisoned: AtomicBool::new(false),
        })
    }

    /// Begins a call. A panic before the result is dropped poisons all handles.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] after a panic, [`ErrorKind::Forked`] in a forked child.
    pub fn enter(&self) -> Result<Call<'_>> {
        if self.is_forked() {
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

    /// As [`Life::enter`], for a call that must not borrow: its end is told by [`Life::end_call`].
    ///
    /// # Errors
    /// As [`Life::enter`].
    pub fn begin_call(&self) -> Result<Began> {
        // Ends here; what it has checked still holds.
        let unwinding = self.enter()?.unwinding;
        Ok(Began { unwinding })
    }

    /// The end of a call: after a panic since its beginning, all handles are poisoned.
    pub fn end_call(&self, began: Began) {
        if std::thread::panicking() && !began.unwinding {
            self.poison();
        }
    }

    /// Makes every later call answer [`ErrorKind::Internal`].
    pub fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    /// Whether this is not the process in which the handles were made: its threads do not exist here.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        !self.process.is_current()
    }
}

/// A call in progress.
#[derive(Debug)]
#[must_use = "it stands for the call: a panic after it is dropped poisons nothing"]
pub struct Call<'a> {
    life: &'a Life,
    /// Whether the thread was unwinding when it began, which then says nothing about this call.
    unwinding: bool,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let unwinding = self.unwinding;
        self.life.end_call(Began { unwinding });
    }
}

/// The beginning of a call whose end is told by [`Life::end_call`].
#[derive(Clone, Copy, Debug)]
#[must_use = "the call's end must be told, or a panic poisons nothing"]
pub struct Began {
    unwinding: bool,
}
