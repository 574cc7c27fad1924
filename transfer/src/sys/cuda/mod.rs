//! CUDA, by the driver of the system, found when it is asked for: devices, their memory, and work that they do in order,
//! behind safe functions.
//!
//! Copies are queued over memory that is checked to be there and kept until an event says that they are done. Nothing waits for
//! a whole device, and no default stream is used.

mod calls;
mod desk;
mod direct;
mod driver;
mod engine;
mod event;
#[cfg(any(test, feature = "test-util"))]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#[cfg_attr(not(test), allow(dead_code, reason = "our own tests use all of it"))]
pub(crate) mod fake;
mod filled;
mod gather;
mod gpu;
mod ipc;
mod kernels;
mod memory;
mod pinned;
mod plain;
mod sharing;
#[cfg(feature = "test-util")]
mod stand_in;
mod stream;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use desk::{Desk, Groups, SUMS_MAX};
pub use direct::{CudaDirect, RemoteWrites};
pub(crate) use driver::Cuda;
pub use driver::{CudaDevice, CudaReport, cuda_probe};
pub use engine::CudaStream;
pub use event::CudaPoint;
pub(crate) use gpu::Gpu;
pub(crate) use ipc::{Form, Offer, PIECES_MAX};
pub(crate) use kernels::Kernels;
pub use memory::DeviceMemory;
pub(crate) use pinned::Pinned;
pub use plain::{CudaCopies, CudaSide};
#[cfg(feature = "test-util")]
pub use stand_in::CudaStandIn;
pub(crate) use stream::{Batch, Flight, Keep, Place, Stream, Unsent};
