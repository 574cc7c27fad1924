//! The Python package `kvfabric`: the agent, the node and the index client, as Python objects.
//!
//! Every wait releases the GIL and looks for signals now and then. Objects keep alive what they were made from; the
//! memory behind a `Region` is let go only once nothing moves bytes to or from it. Errors are one exception
//! class per kind.
//!
//! This crate does not decide or move anything: it is a skin of the `kvfabric` crate and of the index client.

use pyo3::prelude::*;

mod agent;
mod agent_options;
mod asked;
mod blocks;
mod buffer;
mod core;
mod device;
mod errors;
mod fabric;
mod hints;
mod index;
mod life;
mod names;
mod node;
mod operation;
mod peer;
mod peer_service;
mod place;
mod prepared;
mod region;
mod reports;
mod settings;
mod stream;
mod transfer;

/// The native part of the package; `kvfabric/__init__.py` says what is public.
#[pymodule]
fn _kvfabric(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<agent::Agent>()?;
    module.add_class::<peer::Peer>()?;
    module.add_class::<region::Region>()?;
    module.add_class::<prepared::Prepared>()?;
    module.add_class::<transfer::Transfer>()?;
    module.add_class::<node::Node>()?;
    module.add_class::<blocks::Pages>()?;
    module.add_class::<blocks::Prefix>()?;
    module.add_class::<operation::Operation>()?;
    module.add_class::<reports::FetchReport>()?;
    module.add_class::<names::NameChain>()?;
    module.add_class::<peer_service::PeerService>()?;
    module.add_function(wrap_pyfunction!(names::pack_hashes, module)?)?;
    module.add_function(wrap_pyfunction!(names::model_identity, module)?)?;
    module.add_function(wrap_pyfunction!(device::cuda_facts, module)?)?;
    module.add_class::<index::Index>()?;
    module.add_class::<index::PodDepth>()?;
    errors::add(module)
}
