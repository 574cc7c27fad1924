//! The engine for kernels that refuse rings: a few threads that block in `preadv` and `pwritev`.
//!
//! A job that was given up is left between two system calls of at most 1 MiB.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvcache_core::{Error, ErrorKind, Result};

use super::inbox::Inbox;
use super::job::{FileJob, FileOperation};
use super::plan::{Call, calls};
use crate::backend::abandoned;

/// Threads, and so the most system calls at once.
const THREADS: usize = 4;

/// The threads.
pub(super) struct Blocking {
    inbox: Arc<Inbox>,
    threads: Vec<JoinHandle<()>>,
}

impl Blocking {
    /// Starts the threads.
    ///
    /// # Errors
    /// `Io` when the system gives no thread.
    pub(super) fn start(inbox: &Arc<Inbox>) -> Result<Self> {
        let mut blocking = Self {
            inbox: Arc::clone(inbox),
            threads: Vec::new(),
        };
        for _ in 0..THREADS {
            let inbox = Arc::clone(inbox);
            let thread = std::thread::Builder::new()
                .name("kvf-file-sync".to_owned())
                .spawn(move || {
                    while let Some(job) = inbox.wait() {
                        let outcome = run(&job, &inbox);
                        job.waiter.settle(outcome);
                    }
                })
                .map_err(|error| Error::io("start a thread of the file engine", error))?;
            blocking.threads.push(thread);
        }
        Ok(blocking)
    }

    /// Makes a thread look into the inbox.
    pub(super) fn wake(&self) {
        self.inbox.wake();
    }
}

impl Drop for Blocking {
    fn drop(&mut self) {
        self.inbox.close("closed");
        for thread in self.threads.drain(..) {
            // The last owner can be a waiter that runs on one of these threads.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread of the file engine panicked");
            }
        }
    }
}

fn run(job: &FileJob, inbox: &Inbox) -> Result<()> {
    for mut call in calls(job)? {
        call.begin();
        loop {
            if job.waiter.is_abandoned() {
                return Err(abandoned());
            }
            inbox.settle_given_up();
            if let Some(reason) = inbox.lock().closed {
                let text = format!("file engine: {reason}");
                return Err(Error::new(ErrorKind::Cancelled, text));
            }
            let answer = make(&call);
            if call.advance(answer)? {
                break;
            }
        }
    }
    Ok(())
}

/// Makes the call; answers as the kernel answers a ring: bytes, or a negated error number.
fn make(call: &Call) -> i32 {
    let (vectors, count) = (call.vectors.as_ptr(), call.vectors.len() as libc::c_int);
    let offset = call.offset as libc::off_t;
    let answer = match call.operation {
        FileOperation::Read => {
            // SAFETY: the vectors name memory that is lent, and writable, until the job is settled; the descriptor is
            // kept open by the call's file.
            unsafe { libc::preadv(call.descriptor, vectors, count, offset) }
        }
        FileOperation::Write => {
            // SAFETY: as above; the memory is only read.
            unsafe { libc::pwritev(call.descriptor, vectors, count, offset) }
        }
        FileOperation::Sync => {
            // SAFETY: no memory is involved; the descriptor is kept open by the call's file.
            unsafe { libc::fdatasync(call.descriptor) as isize }
        }
    };
    if answer < 0 {
        return -io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO);
    }
    // A call is at most 1 MiB, so its answer fits.
    answer as i32
}
