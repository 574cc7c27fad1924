//! Names of blocks as engines hash them, and the identity of their model.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kvfabric::identity::{Model, of_model, to_hex};
use kvfabric::{Error, IndexScheme, TokensPerBlock, names};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffer::integers;
use crate::errors::to_python;

/// Names the blocks of one sequence as an engine hashes them, in a form that any node understands. Needs no node.
#[pyclass(module = "kvfabric")]
pub(crate) struct NameChain {
    chain: names::NameChain,
}

/// The 32 bytes that stand for an adapter's weights.
pub(crate) fn adapter(identity: Option<&[u8]>) -> PyResult<Option<[u8; 32]>> {
    let parse = |bytes: &[u8]| {
        bytes.try_into().map_err(|_| {
            let found = format!("{} bytes", bytes.len());
            to_python(Error::invalid("adapter_identity", found, "32 bytes"))
        })
    };
    identity.map(parse).transpose()
}

#[pymethods]
impl NameChain {
    /// `scheme` is the indexer's key scheme, such as "xxh3:1337"; `model` the name that the index knows the model by.
    #[new]
    #[pyo3(signature = (scheme, model, block_tokens, *, lora = "", cache_salt = "", adapter_identity = None))]
    fn new(
        scheme: &str,
        model: &str,
        block_tokens: u32,
        lora: &str,
        cache_salt: &str,
        adapter_identity: Option<&[u8]>,
    ) -> PyResult<Self> {
        let scheme = IndexScheme::parse(scheme).map_err(|e| to_python(e.at("scheme")))?;
        let block_tokens = TokensPerBlock::try_from(block_tokens).map_err(to_python)?;
        let chain = names::NameChain::new(&scheme, model, block_tokens, lora, cache_salt);
        let chain = match adapter(adapter_identity)? {
            Some(identity) => chain.with_adapter(identity),
            None => chain,
        };
        Ok(Self { chain })
    }

    /// Appends full blocks: exactly their tokens, and the engine's hash of each; returns how many blocks there are.
    fn extend(
        &mut self,
        tokens: &Bound<'_, PyAny>,
        hashes: Vec<Bound<'_, PyBytes>>,
    ) -> PyResult<usize> {
        let tokens = integers(tokens, "tokens")?;
        let hashes: Vec<&[u8]> = hashes.iter().map(|hash| hash.as_bytes()).collect();
        self.chain.extend(&tokens, &hashes).map_err(to_python)?;
        Ok(self.chain.len())
    }

    /// The names of the blocks at positions [start, stop): what `Node.prefix_of` and `PeerService.locate` take.
    fn pack<'py>(
        &self,
        py: Python<'py>,
        start: usize,
        stop: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let packed = self.chain.pack(start..stop).map_err(to_python)?;
        Ok(PyBytes::new(py, &packed))
    }

    fn __len__(&self) -> usize {
        self.chain.len()
    }

    fn __repr__(&self) -> String {
        format!("<kvfabric.NameChain of {} blocks>", self.chain.len())
    }
}

/// Names blocks of which only the engine's hashes are known, each by itself.
#[pyfunction]
pub(crate) fn pack_hashes<'py>(
    py: Python<'py>,
    root: &[u8],
    hashes: Vec<Bound<'py, PyBytes>>,
) -> PyResult<Bound<'py, PyBytes>> {
    let hashes: Vec<&[u8]> = hashes.iter().map(|hash| hash.as_bytes()).collect();
    let packed = names::pack_hashes(root, &hashes).map_err(to_python)?;
    Ok(PyBytes::new(py, &packed))
}

/// What stands for all that shapes the bytes of a model's blocks, as 64 hexadecimal digits: a node's `model_identity`.
#[pyfunction]
#[pyo3(signature = (path, *, element, layout, quantisation = "", attributes = None, name = None))]
pub(crate) fn model_identity(
    py: Python<'_>,
    path: Option<PathBuf>,
    element: &str,
    layout: &str,
    quantisation: &str,
    attributes: Option<BTreeMap<String, String>>,
    name: Option<&str>,
) -> PyResult<String> {
    let attributes = attributes.unwrap_or_default();
    let attributes: Vec<(&str, &str)> = attributes
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    let model = Model {
        path: path.as_deref(),
        name,
        element,
        quantisation,
        layout,
        attributes: &attributes,
    };
    // Without the GIL: this may read all of the weights.
    let identity = py.detach(|| of_model(&model)).map_err(to_python)?;
    Ok(to_hex(&identity))
}
