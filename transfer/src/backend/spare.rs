//! Accepting connections when the process has no file descriptors left.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

/// A file descriptor kept back. Without it, a connection that can't be accepted stays in the queue, and the reactor is
/// told of it again and again.
#[derive(Default)]
pub(crate) struct Spare(Mutex<Option<OwnedFd>>);

impl Spare {
    /// Keeps one back, if there is one.
    pub(crate) fn keep(&self) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.is_none() {
            *spare = File::open("/dev/null").ok().map(OwnedFd::from);
        }
    }

    /// Lets `accept` have it, to take a connection off the queue and drop it. Whether that could be tried.
    pub(crate) fn shed(&self, accept: impl FnOnce()) -> bool {
        let spare = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if spare.is_none() {
            return false;
        }
        drop(spare);
        accept();
        self.keep();
        true
    }
}
