//! Memory of devices and what no device reaches: bytes go in pieces through pinned host memory, over two backends at once.
//!
//! Each piece has a chunk of a window. It is read from a file while the one before goes to the device, or the other way round.
//! Both legs are jobs of the backends that also do this alone, so what they check and how they end is theirs. A job is settled
//! when all of its legs are over.

mod cut;
mod object;
mod peer;
mod stage;
#[cfg(test)]
mod tests;
mod window;

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use kvcache_core::{Error, ErrorKind, Result};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;

use super::gds::{self, GdsBackend};
use super::leg::{self, Control};
use super::{Backend, Capabilities, Job, Operation, Refusal, abandoned, cuda};
use crate::agent::{Agent, AgentCore};
use crate::descriptor::Target;
use crate::plan::Plan;
use crate::region::MemoryKind;
use crate::request::Priority;

use cut::{Cut, Piece};
pub(crate) use object::{Filling, Near};
use peer::Far;
pub(crate) use peer::fabric;
pub(crate) use stage::Stage;

/// The name in reports and statistics.
pub(crate) const NAME: &str = "staged";

/// Pieces of one job that have a chunk or wait for one, so that jobs take turns.
const PIECES_MAX: usize = 16;

/// Moves bytes through windows on a thread of its own; ends with its last handle.
pub(crate) struct StagedBackend {
    capabilities: Capabilities,
    stage: Arc<Stage>,
    /// What goes before it for files, if the agent has that.
    gds: Option<Arc<GdsBackend>>,
    /// Taken when dropped: a runtime may not be dropped where somebody else's runtime drives us.
    runtime: Option<Runtime>,
    handle: Handle,
    /// Changes whenever a caller gave up on some job.
    reaped: watch::Sender<u64>,
}

impl StagedBackend {
    fn start(cuda: &Arc<cuda::CudaBackend>, gds: Option<Arc<GdsBackend>>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("kvf-staged")
            .build()
            .map_err(|error| Error::io("start the thread of staged requests", error))?;
        Ok(Self {
            capabilities: Capabilities {
                local: &[MemoryKind::ANY_DEVICE],
                remote: &[MemoryKind::File, MemoryKind::Object],
                notifications: false,
                checksums: false,
            },
            stage: Arc::new(Stage::new(cuda)),
            gds,
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
            reaped: watch::Sender::new(0),
        })
    }
}

impl Drop for StagedBackend {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Who moves bytes to and from a plan's other side.
fn engine(plan: &Plan) -> Result<Arc<dyn Backend>> {
    let region = plan.remote.iter().find_map(|target| match target {
        Target::Local(region) => region.external(),
        Target::Remote(_) => None,
    });
    region.map(|external| external.backend()).ok_or_else(|| {
        let text = "staged requests reach files and objects of the agent";
        Error::new(ErrorKind::Unsupported, text)
    })
}

impl Backend for StagedBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn refusal(&self, plan: &Plan) -> Option<String> {
        cuda::refusal(plan, NAME)
    }

    fn prepare(&self, plan: &Plan) -> Result<()> {
        engine(plan)?.prepare(plan)?;
        self.stage.prepare(plan)
    }

    fn how(&self, plan: &Plan) -> String {
        let other = engine(plan).map_or("nothing", |engine| engine.name());
        self.stage.detail(plan, other)
    }

    fn passed_over(&self, plan: &Plan) -> Vec<(&'static str, String)> {
        let declined = self.gds.as_ref().and_then(|gds| gds.declines(plan));
        declined
            .map(|reason| (gds::NAME, reason))
            .into_iter()
            .collect()
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        match engine(job.plan()) {
            Ok(engine) => self.begin(job, Other::Own(engine)),
            Err(error) => Err(job.refuse(error)),
        }
    }

    fn reap(&self) {
        self.reaped
            .send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl StagedBackend {
    /// The one of an agent, started with the first request for it.
    pub(super) fn of(agent: &AgentCore) -> Result<Arc<Self>> {
        let cuda = cuda::CudaBackend::of(agent)?;
        let gds = GdsBackend::of(agent).ok();
        agent.extension(|| Self::start(&cuda, gds))
    }

    fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Starts a job between devices and something else.
    fn begin(&self, job: Job, other: Other) -> Result<(), Refusal> {
        if let Err(error) = self.stage.check(job.plan()) {
            return Err(job.refuse(error));
        }
        let task = Task {
            plan: job.plan().clone(),
            priority: job.priority(),
            control: Control::default(),
            stage: self.stage.clone(),
            notice: job.notification().cloned(),
            other,
        };
        let reaped = self.reaped.subscribe();
        match object::handle(job.plan()) {
            // Its connections belong to the runtime of the object stores.
            Some(handle) => handle.spawn(serve(task, job, reaped)),
            None => self.handle.spawn(serve(task, job, reaped)),
        };
        Ok(())
    }
}

/// Who moves bytes between windows and a plan's other side.
enum Other {
    /// An engine of the agent.
    Own(Arc<dyn Backend>),
    /// Requests to a peer.
    Peer(Far),
}

/// What moves a job's bytes.
struct Task {
    plan: Arc<Plan>,
    priority: Priority,
    control: Control,
    stage: Arc<Stage>,
    other: Other,
    /// Delivered to the peer when all is in place.
    notice: Option<Bytes>,
}

/// Runs a job to its end, or until nobody waits for it.
async fn serve(task: Task, job: Job, mut reaped: watch::Receiver<u64>) {
    let outcome = {
        let mut work = Box::pin(task.run());
        loop {
            if job.is_abandoned() {
                break Err(abandoned());
            }
            tokio::select! {
                outcome = &mut work => break outcome,
                told = reaped.changed() => if told.is_err() {
                    break Err(Error::new(ErrorKind::Internal, "a backend ended before its jobs"));
                },
            }
        }
    };
    // The work is dropped, so only its legs can still touch the job's memory.
    task.control.stop();
    if let Err(error) = &outcome
        && !task.control.is_drained()
    {
        task.stage.reap();
        if let Other::Own(engine) = &task.other {
            engine.reap();
        }
        // If a leg is lost nothing is settled any more; the caller hears of that now.
        job.report(Error::new(error.kind(), error.to_string()));
    }
    task.control.drain().await;
    job.settle(outcome);
}

impl Task {
    async fn run(&self) -> Result<()> {
        if let Some(moved) = self.run_objects().await {
            return moved;
        }
        stream::iter(Cut::new(&self.plan))
            .map(|piece| self.carry(piece))
            .buffer_unordered(PIECES_MAX)
            .try_for_each(|()| std::future::ready(Ok(())))
            .await?;
        match (&self.other, &self.notice) {
            (Other::Peer(far), Some(notice)) => {
                let told = far.notify(notice.clone(), &self.control)?;
                told.wait().await.map_err(staged)
            }
            _ => Ok(()),
        }
    }

    /// Has a piece go through a chunk.
    async fn carry(&self, piece: Piece) -> Result<()> {
        let window = self.stage.window(piece.ordinal)?;
        let chunk = Arc::new(window.take(self.priority).await?);
        let (region, start) = (chunk.region(), chunk.start());
        let other = || {
            let plan = piece.of_other(&self.plan, region, start);
            let leg = (plan, self.priority);
            match &self.other {
                Other::Own(engine) => leg::post(&**engine, leg, &self.control, chunk.clone()),
                Other::Peer(far) => far.post(leg, &self.control, chunk.clone()),
            }
        };
        let device = || {
            let plan = piece.of_device(&self.plan, region, start);
            self.stage
                .post((plan, self.priority), &self.control, chunk.clone())
        };
        match self.plan.operation {
            Operation::Read => {
                other()?.wait().await.map_err(staged)?;
                device()?.wait().await.map_err(staged)
            }
            Operation::Write => {
                device()?.wait().await.map_err(staged)?;
                other()?.wait().await.map_err(staged)
            }
        }
    }
}

/// As seen from outside of a leg.
fn staged(error: Error) -> Error {
    error.at(NAME)
}

impl Agent {
    /// What moves bytes between devices and what they do not reach, started with the first request for it.
    pub(crate) fn staged_backend(&self) -> Result<Arc<StagedBackend>> {
        StagedBackend::of(self.core())
    }
}
