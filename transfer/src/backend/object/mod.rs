//! Objects as regions, by way of the `object_store` crate on a private runtime.
//!
//! An object is written whole and read in ranges. A cancelled or failed write may still appear in the store: the fate
//! of a transfer speaks of local memory only.

mod connect;
mod get;
mod http;
mod options;
mod put;
mod store;
mod transfer;
mod turns;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};
use object_store::path::Path;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{Semaphore, watch};

use super::file::Answer;
use super::leg::Control;
use super::staged::Near;
use super::{Backend, Capabilities, Job, Refusal, abandoned};
use crate::agent::{Agent, AgentBuilder};
use crate::plan::Plan;
use crate::region::{External, MemoryKind, Region, RegionCore};
use crate::request::Priority;

use store::Store;

pub use options::{ObjectChecksum, ObjectOptions, Secret};
pub use store::{LISTING_PAGE_MAX, OBJECT_KEY_BYTES_MAX, ObjectInfo, ObjectListing};
pub use transfer::OBJECT_BYTES_MAX;

/// The name in reports and statistics.
const NAME: &str = "object";
/// Threads that drive the stores' connections. Bytes move at the speed of a network, so two are plenty.
const RUNTIME_THREADS: usize = 2;

/// What happens when an object that is written exists already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ObjectWrite {
    /// It is replaced, at once and whole.
    #[default]
    Replace,
    /// The write fails with `Denied` and the object stays. A write whose answer was lost and that is repeated finds its own
    /// object: it fails, too.
    Create,
    /// An object of the same size stays, and the write is done without sending its bytes: for names that stand for what is
    /// in the object. One of another size is replaced.
    Keep,
}

/// The object stores of one agent, made with the first.
struct Stores {
    backend: Arc<ObjectBackend>,
    known: Mutex<BTreeMap<String, Arc<Store>>>,
}

impl Stores {
    fn start() -> Result<Self> {
        Ok(Self {
            backend: Arc::new(ObjectBackend::start()?),
            known: Mutex::default(),
        })
    }

    fn open(&self, name: &str, url: &str, options: ObjectOptions) -> Result<()> {
        let store = Store::open(self.backend.handle.clone(), name, url, options)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.insert(name.to_owned(), store).is_some() {
            let text = format!("object store {name:?} is configured twice");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Result<Arc<Store>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(name).cloned().ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("object store {name:?} is not configured"),
            )
        })
    }
}

/// Moves bytes to and from stores on a private runtime; ends with its last handle.
pub(crate) struct ObjectBackend {
    capabilities: Capabilities,
    /// Taken when dropped: a runtime may not be dropped where somebody else's runtime drives us.
    runtime: Option<Runtime>,
    handle: Handle,
    shared: Arc<Shared>,
}

struct Shared {
    buffers: Semaphore,
    /// Changes whenever a caller gave up on some job.
    reaped: watch::Sender<u64>,
}

impl ObjectBackend {
    fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("kvf-object")
            .enable_all()
            .build()
            .map_err(|error| Error::io("start the object stores' runtime", error))?;
        let shared = Shared {
            buffers: Semaphore::new(transfer::BUFFER_UNITS_MAX),
            reaped: watch::Sender::new(0),
        };
        Ok(Self {
            capabilities: Capabilities {
                local: Capabilities::HOST,
                remote: &[MemoryKind::Object],
                notifications: false,
                checksums: false,
            },
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
            shared: Arc::new(shared),
        })
    }

    /// What drives its connections.
    pub(crate) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Moves a plan whose local side is `near`, for whoever settles the job; on the runtime of [`ObjectBackend::handle`].
    pub(crate) async fn run(
        &self,
        plan: &Arc<Plan>,
        priority: Priority,
        control: &Control,
        near: &Near,
    ) -> Result<()> {
        let buffers = &self.shared.buffers;
        transfer::run(plan, priority, control, (buffers, Some(near))).await
    }
}

/// The backend of a region that is an object; none for another one.
pub(crate) fn backend_of(region: &RegionCore) -> Option<&Arc<ObjectBackend>> {
    let any: &dyn std::any::Any = &**region.external()?;
    any.downcast_ref::<ObjectTarget>()
        .map(|target| &target.backend)
}

impl Drop for ObjectBackend {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Backend for ObjectBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        self.handle.spawn(serve(Arc::clone(&self.shared), job));
        Ok(())
    }

    fn reap(&self) {
        self.shared
            .reaped
            .send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// Runs a job to its end, or until nobody waits for it.
async fn serve(shared: Arc<Shared>, job: Job) {
    let plan = Arc::clone(job.plan());
    let control = Control::default();
    let mut reaped = shared.reaped.subscribe();
    let outcome = {
        let mut work = Box::pin(transfer::run(
            &plan,
            job.priority(),
            &control,
            (&shared.buffers, None),
        ));
        loop {
            if job.is_abandoned() {
                break Err(abandoned());
            }
            tokio::select! {
                outcome = &mut work => break outcome,
                // The sender lives as long as `shared`.
                _ = reaped.changed() => {}
            }
        }
    };
    // The work is dropped, so only its blocking threads can still touch the job's memory.
    control.drain().await;
    job.settle(outcome);
}

/// An object's name as a region.
pub(crate) struct ObjectTarget {
    store: Arc<Store>,
    path: Path,
    write: ObjectWrite,
    backend: Arc<ObjectBackend>,
}

impl External for ObjectTarget {
    fn kind(&self) -> MemoryKind {
        MemoryKind::Object
    }

    fn bytes(&self) -> u64 {
        // Only the store can tell.
        u64::MAX
    }

    fn backend(&self) -> Arc<dyn Backend> {
        self.backend.clone()
    }
}

impl Agent {
    /// An object as a region, for the remote side of requests; it need not exist. A write puts the whole object: its
    /// descriptors must cover it from 0 on without a gap, at most [`OBJECT_BYTES_MAX`]. A read gets ranges.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for an unknown store, [`ErrorKind::Invalid`] for a bad key, [`ErrorKind::Busy`] when too
    /// many regions are registered.
    pub fn object(&self, store: &str, key: &str) -> Result<Region> {
        self.object_for(store, key, ObjectWrite::Replace)
    }

    /// As [`Agent::object`], with a choice of what a write does when the object exists.
    ///
    /// # Errors
    /// As [`Agent::object`].
    pub fn object_for(&self, store: &str, key: &str, write: ObjectWrite) -> Result<Region> {
        let stores = self.stores()?;
        let store = stores.find(store)?;
        let path = store.path(key)?;
        let backend = Arc::clone(&stores.backend);
        self.register_external(Arc::new(ObjectTarget {
            store,
            path,
            write,
            backend,
        }))
    }

    /// What a store knows of an object; none if there is no such object.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for an unknown store, [`ErrorKind::Invalid`] for a bad key; what the store says comes from
    /// the answer.
    pub fn object_head(&self, store: &str, key: &str) -> Result<Answer<Option<ObjectInfo>>> {
        self.stores()?.find(store)?.head(key)
    }

    /// Removes an object; that there is none is fine.
    ///
    /// # Errors
    /// As [`Agent::object_head`].
    pub fn object_delete(&self, store: &str, key: &str) -> Result<Answer<()>> {
        self.stores()?.find(store)?.delete(key)
    }

    /// Lists the objects below `prefix` (whole path parts; empty for all), in no particular order.
    ///
    /// # Errors
    /// As [`Agent::object_head`].
    pub fn object_list(&self, store: &str, prefix: &str) -> Result<ObjectListing> {
        self.stores()?.find(store)?.list(prefix)
    }

    fn stores(&self) -> Result<Arc<Stores>> {
        self.core().check()?;
        self.core().extension(Stores::start)
    }
}

impl AgentBuilder {
    /// Makes an object store known by `name`: `file:///directory` (made when missing), `s3://bucket/prefix`,
    /// `gs://bucket/prefix` or `az://container/prefix`. An error in it is an error of [`AgentBuilder::build`].
    #[must_use]
    pub fn object_store(self, name: &str, url: &str, options: ObjectOptions) -> Self {
        let (name, url) = (name.to_owned(), url.to_owned());
        self.on_build(move |agent| agent.stores()?.open(&name, &url, options))
    }
}
