//! Moves bytes between registered memory, files, objects and peers.
//!
//! An [`Agent`] registers places ([`Region`]), learns of peers from their metadata, and makes requests: pairs of byte
//! ranges to read or write, checked once ([`PreparedList`]), posted any number of times ([`Request`]). A request
//! keeps its regions until it is settled; a failed one says whether its memory is free ([`MemoryFate`]).
//!
//! This crate does not know what a block is, choose what to move, or speak gRPC.

pub mod agent;
pub mod backend;
pub mod convert;
mod descriptor;
mod estimate;
mod look;
mod metadata;
mod outcome;
mod plan;
mod reactor;
mod region;
mod request;
mod signal;
mod stats;
mod sync;
mod sys;
mod wire;

pub use agent::{
    Agent, AgentBuilder, CONNECT_WITHIN_DEFAULT, ConnectionReport, Notification, Notified,
    PathReport, PeerHandle, RegisteredRange, SLOW_AFTER_DEFAULT,
};
pub use backend::Operation;
pub use backend::copy::COPY_THREADS_MAX;
pub use backend::cuda::{
    CudaKernels, CudaOptions, DevicePath, Fragments, NumberGroups, RegionAt, Storage,
};
pub use backend::file::{Answer, DirectMode, FileEngineMode, FileOptions};
pub use backend::object::{
    ObjectChecksum, ObjectInfo, ObjectListing, ObjectOptions, ObjectWrite, Secret,
};
pub use backend::tcp::TlsOptions;
pub use backend::ucx::UcxOptions;
pub use backend::verbs::{RdmaPort, VerbsConnect, VerbsOptions, rdma_cm, rdma_ports};
pub use descriptor::{DESCRIPTORS_MAX, Descriptor, PreparedList, Side, Strided};
pub use estimate::{Estimate, PathCost};
pub use look::{LOOK_DEFAULT, LOOK_MAX};
pub use metadata::{AGENT_NAME_BYTES_MAX, EXPORTED_REGIONS_MAX, METADATA_VERSION};
pub use outcome::{Completion, MemoryFate, Status, Telemetry, TransferError};
pub use plan::PARTS_MAX;
pub use region::{Deregistration, MemoryKind, Region, RegionId, RegionOptions};
pub use request::{
    Completed, DEADLINE_DEFAULT, Drained, NOTIFICATION_BYTES_MAX, PartCompleted, Priority, Request,
    RequestOptions,
};
pub use stats::{AgentStats, BackendStats, PortStats};
#[cfg(feature = "test-util")]
pub use sys::cuda::CudaStandIn;
pub use sys::cuda::{
    CudaCopies, CudaDevice, CudaDirect, CudaPoint, CudaReport, CudaSide, CudaStream, DeviceMemory,
    RemoteWrites, cuda_probe,
};
pub use sys::cufile::{StorageBounce, StorageReport, storage_probe};
pub use sys::fork::Process;
pub use sys::memory::HostMemory;
