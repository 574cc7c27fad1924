//! Memory of a device.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::PointerFacts;
use super::driver::Cuda;
use super::gpu::Gpu;
use super::ipc::{self, Form, Mapped, Offer, Opened, Piece};

/// The most mappings that one range may be made of: 512 GiB in the smallest pieces that drivers map.
const MAPPINGS_MAX: usize = 1 << 18;

/// Memory of a GPU to register with an agent ([`Agent::register_device`](crate::Agent::register_device)).
pub struct DeviceMemory {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: u64,
    /// Which allocation it is, by the driver's count, at its start.
    buffer: u64,
    owner: Owner,
    /// What other processes are told of it, once they are.
    offered: OnceLock<(Offer, Vec<Piece>)>,
}

/// Whose memory it is.
enum Owner {
    /// Ours, freed with this.
    Own,
    /// Lent to us, by somebody in this process.
    Lent,
    /// A part of another process's allocation, closed with the last that has it open.
    Opened(#[expect(dead_code, reason = "kept open")] Arc<Opened>),
    /// Another process's, mapped in pieces for this alone.
    Mapped(#[expect(dead_code, reason = "kept mapped")] Mapped),
}

impl DeviceMemory {
    /// Memory of our own, of unspecified content, on the device with this number. To free it makes the driver wait until the
    /// device has done all it was asked for, by anybody: keep it for as long as the device is busy.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without CUDA, with the reason ([`cuda_probe`](crate::cuda_probe)); [`ErrorKind::Invalid`] for
    /// no bytes, or a device that there is not; [`ErrorKind::Busy`] when the device has no memory left.
    pub fn allocate(ordinal: u32, bytes: u64) -> Result<Self> {
        Self::allocate_on(&Cuda::get()?, ordinal, bytes)
    }

    pub(crate) fn allocate_on(cuda: &Cuda, ordinal: u32, bytes: u64) -> Result<Self> {
        checked(bytes)?;
        Self::allocate_in(cuda.gpu(ordinal)?, bytes)
    }

    pub(crate) fn allocate_in(gpu: Arc<Gpu>, bytes: u64) -> Result<Self> {
        let len = checked(bytes)?;
        let address = gpu.enter().and_then(|_entered| {
            // SAFETY: the context is current; freed by `drop`.
            unsafe { gpu.calls.allocate(len) }
        });
        let address =
            address.map_err(|code| gpu.fault(&format!("allocate {bytes} bytes"), code))?;
        let mut memory = Self {
            gpu,
            address,
            bytes,
            buffer: 0,
            owner: Owner::Own,
            offered: OnceLock::new(),
        };
        memory.buffer = memory.gpu.pointer_facts(address)?.buffer;
        Ok(memory)
    }

    /// Memory that someone else owns, such as an engine's cache pool: its address on the device, in this process. What the
    /// driver knows of it is compared with what is said here.
    ///
    /// # Safety
    /// All of it must stay allocated and mapped, as it is now, until the region made of it has been deregistered and
    /// [`crate::Deregistration`] has completed (not merely until it was dropped).
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without CUDA, with the reason, and for managed memory, which moves;
    /// [`ErrorKind::Invalid`] for no bytes, a device that there is not, memory of the host or of another device, an address
    /// that the driver does not know, and a range that goes past its allocation.
    pub unsafe fn from_raw(ordinal: u32, address: u64, bytes: u64) -> Result<Self> {
        // SAFETY: passed on to the caller, word for word.
        unsafe { Self::lent(&Cuda::get()?, ordinal, address, bytes) }
    }

    /// # Safety
    /// As [`DeviceMemory::from_raw`].
    pub(super) unsafe fn lent(cuda: &Cuda, ordinal: u32, address: u64, bytes: u64) -> Result<Self> {
        checked(bytes)?;
        let gpu = cuda.gpu(ordinal)?;
        let buffer = check(&gpu, address, bytes).map_err(|error| {
            error.at(format!(
                "{bytes} bytes at {address:#x} of cuda device {ordinal}"
            ))
        })?;
        Ok(Self {
            gpu,
            address,
            bytes,
            buffer,
            owner: Owner::Lent,
            offered: OnceLock::new(),
        })
    }

    /// Memory of another process, as that has offered it; `piece` asks for a descriptor of one of its pieces. The other process has to
    /// keep it until it is told that this was dropped. If it does not, what is copied is unspecified, and the device's context may
    /// break; memory of this process is not touched by that.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when this process does not see the device, or the driver does not open it here, with the reason;
    /// [`ErrorKind::Corrupt`] when it is not what was said; otherwise what the driver or `piece` says.
    pub(crate) fn open(
        cuda: &Cuda,
        offer: &Offer,
        bytes: u64,
        piece: &mut dyn FnMut(u32) -> Result<(OwnedFd, u64)>,
    ) -> Result<Self> {
        let gpu = cuda.gpu_named(&offer.device)?;
        let whole = match &offer.form {
            Form::Allocation { bytes, .. } | Form::Pieces { bytes, .. } => *bytes,
        };
        let end = offer.offset.checked_add(bytes);
        if bytes == 0 || end.is_none_or(|end| end > whole) {
            let text = format!("{bytes} bytes at {} of {whole}", offer.offset);
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let (start, owner) = match &offer.form {
            Form::Allocation { name, bytes } => {
                let opened = Opened::get(&gpu, name, *bytes)?;
                (opened.start(), Owner::Opened(opened))
            }
            Form::Pieces { count, bytes } => {
                let mapped = Mapped::new(&gpu, (*count, *bytes), piece)?;
                (mapped.start(), Owner::Mapped(mapped))
            }
        };
        let address = start.saturating_add(offer.offset);
        let buffer = check(&gpu, address, bytes)
            .map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()))?;
        Ok(Self {
            gpu,
            address,
            bytes,
            buffer,
            owner,
            offered: OnceLock::new(),
        })
    }

    /// What another process of this machine is told, so that it can open it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the reason when the driver gives nothing for that, and for memory of another process, which
    /// that one alone can offer; [`ErrorKind::Invalid`] when it was freed; otherwise what the driver says.
    pub(crate) fn offer(&self) -> Result<&Offer> {
        if let Owner::Opened(_) | Owner::Mapped(_) = self.owner {
            let text = "memory of another process is offered by that one alone";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        self.check_there()?;
        if let Some((offer, _)) = self.offered.get() {
            return Ok(offer);
        }
        let made = ipc::offer(&self.gpu, self.address, self.bytes)?;
        Ok(&self.offered.get_or_init(|| made).0)
    }

    /// A descriptor of one of the pieces that were offered, and its bytes.
    ///
    /// # Errors
    /// As [`DeviceMemory::offer`]; [`ErrorKind::Invalid`] for a piece that there is not.
    pub(crate) fn piece(&self, number: u32) -> Result<(OwnedFd, u64)> {
        self.check_there()?;
        let pieces = self.offered.get().map_or(&[][..], |(_, pieces)| pieces);
        let Some(&piece) = pieces.get(number as usize) else {
            return Err(Error::invalid("piece", number, 0..pieces.len()));
        };
        Ok((ipc::export(&self.gpu, piece)?, piece.1))
    }

    /// The device's number in this process.
    #[must_use]
    pub fn ordinal(&self) -> u32 {
        self.gpu.ordinal()
    }

    /// Where it begins, on the device.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size in bytes, never zero.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Which allocation it is, by the driver's count.
    pub(crate) fn buffer(&self) -> u64 {
        self.buffer
    }

    /// The address of `offset`, after checking that `len` bytes lie there.
    pub(crate) fn at(&self, offset: u64, len: u64) -> Result<u64> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes => Ok(self.address + offset),
            _ => Err(outside(offset, len, self.bytes)),
        }
    }

    /// Whether the same allocation is still there: someone who freed memory that was lent is told so before it is used.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when it is not.
    pub(crate) fn check_there(&self) -> Result<()> {
        let facts = self.gpu.pointer_facts(self.address)?;
        if facts.memory_type == PointerFacts::DEVICE && facts.buffer == self.buffer {
            return Ok(());
        }
        let text = format!(
            "memory at {:#x} of cuda device {} was freed while it was registered",
            self.address,
            self.ordinal()
        );
        Err(Error::new(ErrorKind::Invalid, text))
    }
}

pub(super) fn outside(offset: u64, len: u64, bytes: u64) -> Error {
    let text = format!("bytes {offset}+{len} lie outside the {bytes} bytes of the memory");
    Error::new(ErrorKind::Invalid, text)
}

fn checked(bytes: u64) -> Result<usize> {
    match usize::try_from(bytes) {
        Ok(len) if len > 0 && len <= isize::MAX as usize => Ok(len),
        _ => Err(Error::invalid("memory length", bytes, 1..=isize::MAX)),
    }
}

/// Whether all of a range is what its lender says; which allocation it begins in.
fn check(gpu: &Gpu, address: u64, bytes: u64) -> Result<u64> {
    let wrong = |text: String| Err(Error::new(ErrorKind::Invalid, text));
    let Some(end) = address.checked_add(bytes) else {
        return wrong("goes past the address space".to_owned());
    };
    let (mut at, mut buffer) = (address, None);
    for _ in 0..MAPPINGS_MAX {
        let facts = gpu.pointer_facts(at)?;
        match facts.memory_type {
            PointerFacts::DEVICE => {}
            PointerFacts::HOST => return wrong(format!("{at:#x} is memory of the host")),
            _ => return wrong(format!("the driver does not know {at:#x}")),
        }
        if facts.is_managed {
            let text = format!("{at:#x} is managed memory, which moves between host and devices");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        if u32::try_from(facts.ordinal) != Ok(gpu.ordinal()) {
            return wrong(format!("{at:#x} belongs to device {}", facts.ordinal));
        }
        let until = facts.start.saturating_add(facts.bytes);
        if facts.start > at || until <= at {
            let (start, size) = (facts.start, facts.bytes);
            return wrong(format!(
                "the driver says that {at:#x} lies in {start:#x}+{size}"
            ));
        }
        let first = *buffer.get_or_insert(facts.buffer);
        if until >= end {
            return Ok(first);
        }
        // Memory that was mapped in pieces is one range of addresses; allocations that happen to touch are not.
        if facts.is_legacy {
            return wrong(format!(
                "its allocation ends after {} bytes",
                until - address
            ));
        }
        at = until;
    }
    wrong(format!("is made of more than {MAPPINGS_MAX} mappings"))
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if !matches!(self.owner, Owner::Own) || !self.gpu.process.is_current() {
            return;
        }
        let freed = self.gpu.enter().and_then(|_entered| {
            // SAFETY: allocated by `allocate_on`, freed only here; work that names it holds it until it is over.
            unsafe { self.gpu.calls.free(self.address) }
        });
        if let Err(code) = freed {
            tracing::warn!(code = code.0, device = self.ordinal(), "free device memory");
        }
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory")
            .field("device", &self.ordinal())
            .field("bytes", &self.bytes)
            .finish()
    }
}
