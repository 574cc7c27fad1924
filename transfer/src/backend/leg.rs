//! A part of a job that another backend moves: into memory of ours, or out of it.
//!
//! Whoever takes a job that goes in legs settles it when every leg is over. Each leg holds a lock for reading until then, so
//! that the wait for all of them is a lock for writing, whatever became of those who posted them.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvcache_core::{Error, ErrorKind, Result};
use tokio::sync::{Notify, OwnedRwLockReadGuard, RwLock, oneshot};

use super::job::Leg;
use super::{Backend, Job};
use crate::plan::Plan;
use crate::request::Priority;
use crate::sync::Mutex;

/// What ties a job to those who may touch its memory. Clones are the same one.
#[derive(Clone, Default)]
pub(crate) struct Control {
    /// Held for reading by everyone who may touch the job's memory.
    pub(crate) busy: Arc<RwLock<()>>,
    pub(crate) stop: Arc<AtomicBool>,
    told: Arc<Notify>,
}

/// What somebody holds of a job while they may touch its memory.
pub(crate) struct Holding {
    busy: OwnedRwLockReadGuard<()>,
    /// Only dropped; locked so that threads may share what holds this.
    keep: Mutex<Box<dyn Any + Send>>,
}

impl Control {
    /// Asks all of them to end.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.told.notify_waiters();
    }

    /// Resolves when all of them are to end.
    pub(crate) async fn stopped(&self) {
        loop {
            let told = self.told.notified();
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            told.await;
        }
    }

    /// Somebody begins to touch the job's memory, and keeps what they need for that.
    ///
    /// # Errors
    /// When the job is ending.
    pub(crate) fn begin(&self, keep: impl Any + Send) -> Result<Holding> {
        let busy = self.busy.clone().try_read_owned();
        Ok(Holding {
            busy: busy.map_err(|_| super::abandoned())?,
            keep: Mutex::new(Box::new(keep)),
        })
    }

    /// Whether nobody touches the job's memory now.
    pub(crate) fn is_drained(&self) -> bool {
        self.busy.try_write().is_ok()
    }

    /// Has them end, and returns when none of them touches the job's memory any more.
    pub(crate) async fn drain(&self) {
        self.stop();
        let _all = self.busy.write().await;
    }
}

/// What a backend holds of a leg. If it loses it, what the leg names is kept for ever.
struct Held {
    plan: Arc<Plan>,
    priority: Priority,
    stop: Arc<AtomicBool>,
    answer: Mutex<Option<oneshot::Sender<Result<()>>>>,
    /// Until it is over.
    held: Option<Holding>,
}

impl Leg for Held {
    fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    fn priority(&self) -> Priority {
        self.priority
    }

    fn is_abandoned(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn settle(mut self: Box<Self>, outcome: Result<()>) {
        drop(self.held.take());
        self.tell(outcome);
    }

    /// It has failed, and its memory may still be in use.
    fn report(&self, error: Error) {
        self.tell(Err(error));
    }

    /// Nothing was started.
    fn hand_back(mut self: Box<Self>) {
        drop(self.held.take());
    }
}

impl Held {
    fn tell(&self, outcome: Result<()>) {
        let mut answer = self.answer.lock().unwrap_or_else(|e| e.into_inner());
        // Whoever asked may have gone: the job was given up.
        let _ = answer.take().map(|answer| answer.send(outcome));
    }
}

impl Drop for Held {
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            let text = "a backend lost track of a part of a transfer";
            self.tell(Err(Error::new(ErrorKind::Internal, text)));
            std::mem::forget((held, self.plan.clone()));
        }
    }
}

impl Holding {
    /// Waits on the runtime of the caller until something is over that touches the job's memory.
    pub(crate) fn watch(self, ended: impl Future<Output = Result<()>> + Send + 'static) -> Answer {
        let (sender, receiver) = oneshot::channel();
        tokio::spawn(async move {
            let outcome = ended.await;
            drop((self.keep, self.busy));
            // Whoever asked may have gone: the job was given up.
            let _ = sender.send(outcome);
        });
        Answer(receiver)
    }
}

/// What comes of a leg. It goes on if this is dropped.
#[must_use]
pub(crate) struct Answer(oneshot::Receiver<Result<()>>);

impl Answer {
    /// Resolves when the leg is over, or has failed.
    pub(crate) async fn wait(self) -> Result<()> {
        let gone = |_| {
            let text = "a backend lost track of a part of a transfer";
            Err(Error::new(ErrorKind::Internal, text))
        };
        self.0.await.unwrap_or_else(gone)
    }
}

/// Has a backend move a plan as a leg of the job that `control` ties together; `keep` is kept until it is over.
///
/// # Errors
/// Why the backend refuses it; so that nothing was started.
pub(crate) fn post(
    backend: &dyn Backend,
    (plan, priority): (Plan, Priority),
    control: &Control,
    keep: impl Any + Send,
) -> Result<Answer> {
    let holding = control.begin(keep)?;
    let (sender, receiver) = oneshot::channel();
    let leg = Held {
        plan: Arc::new(plan),
        priority,
        stop: control.stop.clone(),
        answer: Mutex::new(Some(sender)),
        held: Some(holding),
    };
    let posted = backend.post(Job::of_leg(Box::new(leg)));
    posted.map_err(|refusal| refusal.into_error())?;
    Ok(Answer(receiver))
}
