//! The index: which pods hold a prompt's blocks.

use std::time::Duration;

use kvfabric::{IndexConnection, LookupRequest, Prompt};
use pyo3::prelude::*;

use crate::buffer::integers;
use crate::errors::to_python;
use crate::life::{enter, parse_timeout, patiently};

/// How long one round of waiting for an answer is; there is another one after it.
const LOOKUP_SLICE: Duration = Duration::from_secs(1);

/// A connection to an index.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Index {
    connection: IndexConnection,
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
        let connection = py.detach(|| IndexConnection::connect(address, deadline));
        Ok(Self {
            connection: connection.map_err(to_python)?,
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
        tokens: &Bound<'_, PyAny>,
        model: &str,
        lora: &str,
        cache_salt: &str,
        pods_max: u32,
        deadline: Option<f64>,
    ) -> PyResult<Vec<PodDepth>> {
        let _call = enter(self.connection.life())?;
        let tokens = integers(tokens, "tokens")?;
        let mut request = LookupRequest::new(model, Prompt::Tokens(tokens));
        lora.clone_into(&mut request.lora);
        cache_salt.clone_into(&mut request.cache_salt);
        request.pods_max = pods_max;
        request.deadline = deadline.map(parse_timeout).transpose()?;
        let lookup = self.connection.lookup(request);
        // The lookup has a deadline of its own, so this ends.
        loop {
            let answer = patiently(py, LOOKUP_SLICE, |slice| {
                lookup.wait(slice).map(|answer| answer.cloned())
            })?;
            if let Some(answer) = answer {
                let pods = answer.map_err(to_python)?.pods.into_iter();
                return Ok(pods.map(PodDepth::from).collect());
            }
        }
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
