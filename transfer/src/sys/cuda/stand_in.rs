//! The driver without a device, for tests of what stands on this crate.

use std::fmt;

use kvcache_core::Result;

use super::driver::Cuda;
use super::engine::CudaStream;
use super::fake::Fake;
use super::memory::DeviceMemory;
use super::plain::CudaCopies;
use crate::agent::Agent;
use crate::backend::cuda::CudaOptions;

/// A driver that does what the documentation of its calls says, over memory of the process: no GPU is needed, and none is used. What the
/// real one would punish is noted down.
pub struct CudaStandIn {
    fake: Fake,
    cuda: Cuda,
}

impl CudaStandIn {
    /// One with so many devices.
    #[must_use]
    pub fn new(devices: i32) -> Self {
        let fake = Fake::new(devices);
        let cuda = fake.start();
        Self { fake, cuda }
    }

    /// Has an agent use CUDA devices, which are those of this driver as far as their memory comes from it.
    ///
    /// # Errors
    /// As the builder's [`cuda`](crate::AgentBuilder::cuda).
    pub fn serve(&self, agent: &Agent, options: CudaOptions) -> Result<()> {
        agent.start_cuda(options, &self.cuda)
    }

    /// Memory that is allocated from now on lies in the process, where network cards, and what stands for them, reach it as the real
    /// ones reach that of a GPU.
    pub fn open_memory(&self) {
        self.fake.open_memory();
    }

    /// Cards' writes are visible to kernels by a call of the driver alone, or, otherwise, by themselves. To be said before memory is
    /// registered.
    pub fn set_flushed(&self, is_flushed: bool) {
        self.fake
            .set_remote_writes(1, if is_flushed { 0 } else { 100 });
    }

    /// How often cards' writes were made visible by a call of the driver.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.fake.count("cuFlushGPUDirectRDMAWrites")
    }

    /// The next time that cards' writes are to be made visible fails.
    pub fn fail_next_flush(&self) {
        self.fake.fail(
            "cuFlushGPUDirectRDMAWrites",
            0,
            super::fake::ILLEGAL_ADDRESS,
        );
    }

    /// As [`DeviceMemory::allocate`].
    ///
    /// # Errors
    /// As there.
    pub fn allocate(&self, ordinal: u32, bytes: u64) -> Result<DeviceMemory> {
        DeviceMemory::allocate_on(&self.cuda, ordinal, bytes)
    }

    /// Memory that an engine has allocated itself, and lends.
    ///
    /// # Errors
    /// As [`DeviceMemory::from_raw`].
    pub fn lend(&self, ordinal: u32, bytes: u64) -> Result<DeviceMemory> {
        let address = self.fake.engine_memory(ordinal as i32, bytes);
        self.fake.lend(&self.cuda, ordinal, address, bytes)
    }

    /// An engine frees what it has lent, whoever still uses it.
    pub fn free(&self, address: u64) {
        self.fake.engine_frees(address);
    }

    /// As [`CudaCopies::new`].
    ///
    /// # Errors
    /// As there.
    pub fn copies(&self, ordinal: u32, bytes: u64) -> Result<CudaCopies> {
        CudaCopies::on(&self.cuda, ordinal, bytes)
    }

    /// A stream of an engine on this device, which does nothing but what [`CudaStandIn::compute`] gives it.
    ///
    /// # Errors
    /// As [`CudaStream::from_raw`].
    pub fn stream(&self, ordinal: u32) -> Result<(CudaStream, u64)> {
        let raw = self.fake.engine_stream(ordinal as i32);
        Ok((Fake::stream_of(&self.cuda.gpu(ordinal)?, raw)?, raw))
    }

    /// Has an engine's stream write bytes to a device's address, when it comes to that.
    pub fn compute(&self, stream: u64, address: u64, bytes: &[u8]) {
        self.fake.engine_writes(stream, address, bytes);
    }

    /// The bytes at a device's address.
    #[must_use]
    pub fn read(&self, address: u64, bytes: u64) -> Vec<u8> {
        self.fake.read(address, bytes)
    }

    /// Changes bytes at a device's address.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.fake.write(address, bytes);
    }

    /// Whether work is done as soon as somebody asks for it, which it is at first, or not at all.
    pub fn set_running(&self, is_running: bool) {
        self.fake.set_running(is_running);
    }

    /// The next copy that is queued fails.
    pub fn fail_next_copy(&self) {
        for call in ["cuMemcpyAsync", "cuMemcpyBatchAsync"] {
            self.fake.fail(call, 0, super::fake::OUT_OF_MEMORY);
        }
    }

    /// The driver does not take the next kernels that are to be loaded, as one that is older than they are.
    pub fn fail_next_kernels(&self) {
        self.fake
            .fail("cuModuleLoadData", 0, super::fake::UNSUPPORTED_PTX);
    }

    /// The next kernel that is launched is refused.
    pub fn fail_next_launch(&self) {
        self.fake
            .fail("cuLaunchKernel", 0, super::fake::OUT_OF_MEMORY);
    }

    /// A byte of the range with this number, of those that a kernel is to sum next, changes just before it does.
    pub fn spoil_before_sum(&self, range: usize) {
        self.fake.spoil_before_sum(range);
    }

    /// Kernels sum wrongly from now on.
    pub fn spoil_sums(&self) {
        self.fake.spoil_kernels();
    }

    /// How often kernels were launched.
    #[must_use]
    pub fn launches(&self) -> u64 {
        self.fake.count("cuLaunchKernel")
    }

    /// # Panics
    /// When something was asked that the real driver would punish.
    pub fn check(&self) {
        self.fake.check();
    }
}

impl fmt::Debug for CudaStandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CudaStandIn")
    }
}
