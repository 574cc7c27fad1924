//! The index: which pods hold a prompt's blocks.

use std::sync::Arc;

use kvfabric::Error;
use kvfabric_indexer::client::{ClientConfig, IndexClient, LookupRequest, Prompt};
use pyo3::prelude::*;
use tokio::runtime::{Builder, Runtime};

use crate::errors::to_python;
use crate::life::{Life, parse_timeout};

/// The connection lives on one thread of its own: it is I/O, and callers wait in their own threads.
const RUNTIME_THREADS: usize = 1;

/// A connection to an index.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Index {
    life: Arc<Life>,
    client: IndexClient,
    /// Always there, except while it is dropped.
    runtime: Option<Runtime>,
}

/// What one pod holds of a prompt.
#[pyclass(frozen, get_all, module = "kvfabric")]
pub(crate) struct PodDepth {
    /// The pod's name.
    pod: String,
    /// Blocks from the first, without a hole, in tiers that the pod reaches by itself.
    depth: u32,
    /// For how many of those each tier is the fastest: accelerator, host memory, local disk, object store.
    by_tier: (u32, u32, u32, u32),
    /// The sum of weight times `by_tier`, with the index's weights.
    score: f64,
    /// Where its peer service listens, if it has one.
    peer_address: Option<String>,
}

#[pymethods]
impl PodDepth {
    fn __repr__(&self) -> String {
        let Self {
            pod,
            depth,
            by_tier,
            score,
            ..
        } = self;
        format!("<kvfabric.PodDepth {pod} depth={depth} by_tier={by_tier:?} score={score}>")
    }
}

#[pymethods]
impl Index {
    /// Connects to the index at "host:port". `deadline` seconds bound this, and each lookup that names none.
    #[new]
    #[pyo3(signature = (address, *, deadline = 2.0))]
    fn new(py: Python<'_>, address: &str, deadline: f64) -> PyResult<Self> {
        let deadline = parse_timeout(deadline)?;
        let config = ClientConfig {
            deadline,
            connect_timeout: deadline,
            ..ClientConfig::new(address)
        };
        let client = IndexClient::new(config).map_err(to_python)?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("kvf-index")
            .enable_all()
            .build()
            .map_err(|e| to_python(Error::io("start the thread of the index connection", e)))?;
        py.detach(|| runtime.block_on(client.status()))
            .map_err(to_python)?;
        Ok(Self {
            life: Life::begin(),
            client,
            runtime: Some(runtime),
        })
    }

    /// Asks who holds the blocks of a prompt, deepest first; a tail that does not fill a block is ignored.
    #[pyo3(signature = (tokens, *, model = "", lora = "", cache_salt = "", pods_max = 0, deadline = None))]
    #[expect(
        clippy::too_many_arguments,
        reason = "Python passes all but one by name"
    )]
    fn lookup(
        &self,
        py: Python<'_>,
        tokens: Vec<u32>,
        model: &str,
        lora: &str,
        cache_salt: &str,
        pods_max: u32,
        deadline: Option<f64>,
    ) -> PyResult<Vec<PodDepth>> {
        let _call = self.life.enter()?;
        let mut request = LookupRequest::new(model, Prompt::Tokens(tokens));
        lora.clone_into(&mut request.lora);
        cache_salt.clone_into(&mut request.cache_salt);
        request.pods_max = pods_max;
        request.deadline = deadline.map(parse_timeout).transpose()?;
        let Some(runtime) = &self.runtime else {
            return Ok(Vec::new());
        };
        let answer = py
            .detach(|| runtime.block_on(self.client.lookup(request)))
            .map_err(to_python)?;
        Ok(answer.pods.into_iter().map(PodDepth::from).collect())
    }
}

impl From<kvfabric::PodDepth> for PodDepth {
    fn from(found: kvfabric::PodDepth) -> Self {
        Self {
            pod: found.pod.as_str().to_owned(),
            depth: found.depth,
            by_tier: found.by_tier.into(),
            score: found.score,
            peer_address: found.peer_address,
        }
    }
}

impl Drop for Index {
    #[expect(
        clippy::mem_forget,
        reason = "a forked child has no thread to wait for"
    )]
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else {
            return;
        };
        if self.life.enter().is_ok() {
            runtime.shutdown_background();
        } else {
            std::mem::forget(runtime);
        }
    }
}
