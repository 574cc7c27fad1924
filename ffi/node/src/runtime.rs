//! The threads on which a node or a connection lives when its user has no asynchronous runtime.

use std::future::Future;
use std::sync::Arc;

use kvcache_core::{Error, Result};
use tokio::runtime::{Builder, Handle};

use crate::life::Life;
use crate::operation::Operation;

/// A runtime for callers that are not asynchronous, and the life that all handles on what runs there share.
///
/// Dropping it stops its threads without waiting for what runs there. In a forked child it is leaked: its threads do not
/// exist there, and must not be waited for.
#[derive(Debug)]
pub struct Runtime {
    life: Arc<Life>,
    handle: Handle,
    /// Taken out once, by the drop.
    owner: Option<tokio::runtime::Runtime>,
}

impl Runtime {
    /// Starts so many threads, named so (the system shows 15 bytes of it).
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Io`] when the system has no threads or descriptors left.
    pub fn start(name: &str, threads: usize) -> Result<Self> {
        let tokio = Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name(name)
            .enable_all()
            .build()
            .map_err(|error| Error::io(format!("start the threads {name:?}"), error))?;
        Ok(Self {
            life: Life::begin(),
            handle: tokio.handle().clone(),
            owner: Some(tokio),
        })
    }

    /// Whether what runs here may still be used.
    #[must_use]
    pub fn life(&self) -> &Arc<Life> {
        &self.life
    }

    /// Runs to the end, and blocks this thread until then: not for asynchronous code.
    ///
    /// # Panics
    /// Within another runtime.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.handle.block_on(future)
    }

    /// Begins, and returns at once.
    pub fn spawn<T, F>(&self, future: F) -> Operation<T>
    where
        T: Send + Sync + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let (operation, decider) = Operation::begin(self.life.clone());
        self.handle
            .spawn(async move { decider.decide(future.await) });
        operation
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let Some(owner) = self.owner.take() else {
            return;
        };
        if !self.life.is_forked() {
            owner.shutdown_background();
            return;
        }
        #[expect(
            clippy::mem_forget,
            reason = "joining the parent's threads would wait for ever"
        )]
        std::mem::forget(owner);
    }
}
