//! Ctrl-C: the first one ends the run early with what it has, the second one at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvcache_core::{Error, Result};
use tokio::signal::unix::{SignalKind, signal};

use crate::EXIT_INTERRUPTED;

/// Whether the run should end. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Starts to listen for Ctrl-C.
    pub(crate) fn listen() -> Result<Self> {
        let stop = Self::default();
        let seen = stop.clone();
        let failed = |error| Error::io("listen for Ctrl-C", error);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        // From here on, not from when the thread first runs.
        let entered = runtime.enter();
        let mut pressed = signal(SignalKind::interrupt()).map_err(failed)?;
        drop(entered);
        let listening = move || {
            runtime.block_on(async {
                while pressed.recv().await.is_some() {
                    if seen.0.swap(true, Ordering::Relaxed) {
                        std::process::exit(i32::from(EXIT_INTERRUPTED));
                    }
                }
            });
        };
        std::thread::Builder::new()
            .name("ctrl-c".to_owned())
            .spawn(listening)
            .map_err(|error| Error::io("start a thread", error))?;
        Ok(stop)
    }

    /// Whether Ctrl-C was pressed.
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
