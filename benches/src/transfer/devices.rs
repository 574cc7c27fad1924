//! Memory of a GPU: how it is filled, overwritten and checked, and the plainest copies of the driver beside ours.

use std::time::Duration;

use kvcache_core::{Error, Result};
use kvfabric_transfer::{
    Agent, CudaCopies, CudaReport, CudaSide, DeviceMemory, HostMemory, Operation, Region,
    RegionOptions, RequestOptions, Side, TransferError, cuda_probe,
};

use super::contents::{self, POISON};
use super::plan::{BackendKind, Plan, Way};
use super::remote::Contents;
use super::subject::Subject;
use crate::goals::{self, Goal};
use crate::machine::{Gpus, Pci};

/// How long it may take to fill or read back all of it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is promised of scattered copies.
const GOALS: &str = include_str!("../../transfer/cuda_goals.json");

/// Memory of a GPU, which blocks reach in one contiguous copy of a buffer of the host.
pub(super) struct OnDevice {
    agent: Agent,
    pub(super) memory: Region,
    buffer: Region,
}

impl OnDevice {
    /// # Errors
    /// `Unsupported` with the reason, where there is no CUDA.
    pub(super) fn new(agent: &Agent, memory: DeviceMemory) -> Result<Self> {
        Self::exported(agent, memory, RegionOptions::default())
    }

    /// As [`OnDevice::new`], with what peers may do with it.
    pub(super) fn exported(
        agent: &Agent,
        memory: DeviceMemory,
        options: RegionOptions,
    ) -> Result<Self> {
        let buffer = HostMemory::anonymous(memory.bytes())?;
        let own = Self {
            memory: agent.register_device_with(memory, options)?,
            buffer: agent.register(buffer, RegionOptions::default())?,
            agent: agent.clone(),
        };
        own.write_poison()?;
        Ok(own)
    }

    fn write_poison(&self) -> Result<()> {
        self.buffer.fill_at(0, self.buffer.bytes(), POISON)?;
        self.move_all(Operation::Write)
    }

    fn move_all(&self, operation: Operation) -> Result<()> {
        let len = self.buffer.bytes();
        let pair = (
            self.buffer.descriptor(0, len),
            self.memory.descriptor(0, len),
        );
        let options = RequestOptions {
            deadline: Some(PATIENCE),
            ..RequestOptions::default()
        };
        let request = self
            .agent
            .transfer(operation, &[pair], Side::Local, options)?;
        let failed = |error: TransferError| Error::new(error.kind(), error.to_string());
        request.wait(PATIENCE).map(drop).map_err(failed)
    }

    /// Writes every block's bytes.
    pub(super) fn write(&self, plan: &Plan, contents: Contents) -> Result<()> {
        match contents {
            Contents::Poison => self.write_poison(),
            Contents::Source => {
                contents::write_source(plan, |offset, block| self.buffer.write_at(offset, block))?;
                self.move_all(Operation::Write)
            }
        }
    }

    /// Reads all of it back and compares every block with what writes must have left.
    pub(super) fn verify(&self, plan: &Plan) -> Result<()> {
        self.buffer.fill_at(0, self.buffer.bytes(), POISON)?;
        self.move_all(Operation::Read)?;
        contents::verify(plan, |offset, block| self.buffer.read_at(offset, block))
    }
}

/// `cuMemcpyAsync` of all bytes in one piece, from or to pinned memory or within the GPU: what the bus and the GPU's memory give.
pub(super) struct CuMemcpy {
    plan: Plan,
    copies: CudaCopies,
    from: CudaSide,
    to: CudaSide,
}

impl CuMemcpy {
    /// # Errors
    /// As [`OnDevice::new`].
    pub(super) fn new(plan: &Plan, copies: CudaCopies) -> Result<Self> {
        let (from, to) = match (plan.shape.backend, plan.shape.way) {
            (BackendKind::CudaWithin, _) => (CudaSide::Device, CudaSide::Other),
            (_, Way::Read) => (CudaSide::Device, CudaSide::Host),
            (_, Way::Write) => (CudaSide::Host, CudaSide::Device),
        };
        let mut own = Self {
            plan: plan.in_order(),
            copies,
            from,
            to,
        };
        own.fill_source()?;
        Ok(own)
    }

    fn all(&self) -> u64 {
        self.plan.shape.total_bytes
    }

    fn fill_source(&mut self) -> Result<()> {
        contents::write_source(&self.plan, |offset, block| self.copies.write(offset, block))?;
        self.send(self.from)
    }

    /// Has a side hold what the host's side holds.
    fn send(&mut self, to: CudaSide) -> Result<()> {
        match to {
            CudaSide::Host => Ok(()),
            to => self.copies.copy(to, CudaSide::Host, 0, self.all()),
        }
    }

    fn poison_host(&mut self) -> Result<()> {
        let block = vec![POISON; self.plan.shape.block_bytes as usize];
        for place in 0..self.plan.shape.blocks() {
            self.copies.write(self.plan.offset(place), &block)?;
        }
        Ok(())
    }
}

impl Subject for CuMemcpy {
    fn name(&self) -> &'static str {
        "cu-memcpy-async"
    }

    fn poison(&mut self) -> Result<()> {
        self.poison_host()?;
        self.send(self.to)?;
        match self.from {
            // The poison went through the source.
            CudaSide::Host => self.fill_source(),
            _ => Ok(()),
        }
    }

    fn move_all(&mut self) -> Result<u64> {
        let all = self.all();
        self.copies.copy(self.to, self.from, 0, all).map(|()| all)
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        let len = self.plan.shape.block_bytes;
        let offset = self.plan.offset(position);
        let copied = self.copies.copy(self.to, self.from, offset, len);
        copied.map(|()| len)
    }

    fn verify(&mut self) -> Result<()> {
        if self.to != CudaSide::Host {
            self.poison_host()?;
            self.copies.copy(CudaSide::Host, self.to, 0, self.all())?;
        }
        let found = contents::verify(&self.plan, |offset, block| self.copies.read(offset, block));
        if self.from == CudaSide::Host {
            self.fill_source()?;
        }
        found
    }
}

/// What the figures of a GPU depend on, for the head of a report.
///
/// # Errors
/// `Unsupported` with the reason, where there is no CUDA; `Invalid` for a GPU that there is not.
pub(super) fn facts(ordinal: u32) -> Result<Vec<String>> {
    let module = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let pci = |address: &str| Pci::read(std::path::Path::new("/"), address);
    let report = cuda_probe()?;
    let mut lines = told(&report, ordinal, &module, pci)?;
    let address = report
        .devices
        .iter()
        .find(|one| one.ordinal == ordinal)
        .map_or("", |one| one.pci.as_str());
    lines.push(Gpus::line(&Gpus::read(), address));
    Ok(lines)
}

fn told(
    report: &CudaReport,
    ordinal: u32,
    module: &str,
    pci: impl Fn(&str) -> Pci,
) -> Result<Vec<String>> {
    let found = report.devices.iter().find(|one| one.ordinal == ordinal);
    let Some(device) = found else {
        let count = report.devices.len();
        return Err(Error::invalid("--gpu", ordinal, 0..count));
    };
    let (major, minor) = device.compute;
    let gib = device.bytes as f64 / f64::from(1 << 30);
    let (name, address) = (&device.name, &device.pci);
    let module = match module.lines().next() {
        Some(line) => line.trim(),
        None => "kernel module not told",
    };
    let batched = match report.has_batched_copies {
        true => "copies lists in one call",
        false => "copies lists one by one",
    };
    let (cuda_major, cuda_minor) = report.version;
    Ok(vec![
        format!("GPU {ordinal}: {name}, {gib:.1} GiB, compute capability {major}.{minor}"),
        format!("driver: CUDA {cuda_major}.{cuda_minor}, {batched}; {module}"),
        format!("PCI {address}: {}", pci(address)),
    ])
}

/// The promises.
pub(super) fn goals() -> Result<Vec<Goal>> {
    goals::read(GOALS)
}

#[cfg(test)]
mod tests;
