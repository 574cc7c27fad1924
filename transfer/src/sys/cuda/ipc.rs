//! Memory of a device in several processes of a machine: what its owner tells of it, and how another one opens it.
//!
//! What one call has allocated has a name that the driver gives. What was mapped in pieces goes piece by piece, as descriptors. The
//! driver keeps neither from being freed while others have it open: the owner has to wait for them.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::Code;
use super::gpu::Gpu;
use super::sharing::IPC_NAME_BYTES;

/// How long somebody may take to close memory that another thread opens again.
const CLOSING_MAX: Duration = Duration::from_secs(5);

/// The most pieces that are offered.
pub(crate) const PIECES_MAX: u32 = 1 << 16;

/// What the owner of a range tells another process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    /// The device, as it is called in every process.
    pub(crate) device: [u8; 16],
    /// Where the range begins in what is opened.
    pub(crate) offset: u64,
    pub(crate) form: Form,
}

/// How it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// All of an allocation, of so many bytes, by the driver's name.
    Allocation {
        name: [u8; IPC_NAME_BYTES],
        bytes: u64,
    },
    /// So many pieces, side by side, of so many bytes together: each comes as a descriptor.
    Pieces { count: u32, bytes: u64 },
}

/// A piece of memory that was mapped: where it begins, and its bytes.
pub(super) type Piece = (u64, u64);

/// What can be told of a range, and the pieces that it is made of.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when the driver gives nothing by which others could open it; otherwise what it says.
pub(super) fn offer(gpu: &Gpu, address: u64, bytes: u64) -> Result<(Offer, Vec<Piece>)> {
    let device = gpu
        .uuid()
        .map_err(|code| gpu.fault("tell the device's name", code))?;
    let facts = gpu.pointer_facts(address)?;
    if !facts.is_legacy {
        return offer_pieces(gpu, device, address, bytes);
    }
    let named = gpu.enter().and_then(|_entered| {
        // SAFETY: the start of an allocation, by what the driver itself says of it; the context is current.
        unsafe { gpu.calls.name_memory(facts.start) }
    });
    let name =
        named.map_err(|code| not_shared(gpu, "name an allocation for other processes", code))?;
    let form = Form::Allocation {
        name,
        bytes: facts.bytes,
    };
    let offset = address - facts.start;
    Ok((
        Offer {
            device,
            offset,
            form,
        },
        Vec::new(),
    ))
}

fn offer_pieces(
    gpu: &Gpu,
    device: [u8; 16],
    address: u64,
    bytes: u64,
) -> Result<(Offer, Vec<Piece>)> {
    let (end, mut at, mut pieces) = (address.saturating_add(bytes), address, Vec::new());
    while at < end {
        let facts = gpu
            .enter()
            .and_then(|_entered| gpu.calls.mapping_facts(at))
            .map_err(|code| not_shared(gpu, "ask how memory is mapped", code))?;
        let until = facts.start.saturating_add(facts.bytes);
        if facts.start > at || until <= at || pieces.len() >= PIECES_MAX as usize {
            let text = format!("the driver does not tell which pieces {at:#x} is mapped in");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        if !facts.is_shareable {
            let text = "the memory was made without handles for other processes: it is of a pool of the driver's \
                (cudaMallocAsync), or of an allocator that did not ask for file descriptors";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        pieces.push((facts.start, facts.bytes));
        at = until;
    }
    let first = pieces.first().map_or(address, |piece| piece.0);
    let form = Form::Pieces {
        count: pieces.len() as u32,
        bytes: pieces.iter().map(|piece| piece.1).sum(),
    };
    let offset = address - first;
    Ok((
        Offer {
            device,
            offset,
            form,
        },
        pieces,
    ))
}

/// A descriptor of a piece, for another process.
pub(super) fn export(gpu: &Gpu, (start, _bytes): Piece) -> Result<OwnedFd> {
    let exported = gpu.enter().and_then(|_entered| {
        // SAFETY: mapped there, by what the driver itself says; the context is current. Released below.
        let piece = unsafe { gpu.calls.retain_piece(start) }?;
        // SAFETY: retained above.
        let file = unsafe { gpu.calls.export_piece(piece) };
        // SAFETY: retained above, and used no more; the mapping keeps the memory.
        unsafe { gpu.calls.release_piece(piece) }?;
        file
    });
    exported.map_err(|code| not_shared(gpu, "make a descriptor of mapped memory", code))
}

/// An error of what cannot be had for this memory, whatever the driver calls it.
fn not_shared(gpu: &Gpu, doing: &str, code: Code) -> Error {
    Error::new(ErrorKind::Unsupported, gpu.fault(doing, code).to_string())
}

/// An error of opening: another way may do.
fn not_opened(gpu: &Gpu, doing: &str, code: Code) -> Error {
    let error = gpu.fault(doing, code);
    let advice = match code {
        Code::INVALID_HANDLE | Code::MAP_FAILED | Code::INVALID_VALUE => {
            "its owner has ended or freed it, or the driver may not reach it from here (containers that share neither IPC nor \
             process namespaces)"
        }
        Code::NOT_SUPPORTED | Code::NOT_PERMITTED => {
            "this system does not let processes share memory of devices"
        }
        _ => return Error::new(ErrorKind::Io, error.to_string()),
    };
    Error::new(ErrorKind::Unsupported, format!("{error}; {advice}"))
}

/// What is open of other processes' allocations, by the driver's name. Locked while something is opened or closed.
pub(super) type Openings = Mutex<HashMap<[u8; IPC_NAME_BYTES], Weak<Opened>>>;

/// An allocation of another process, open in this one: once, however many ranges of it are used.
pub(super) struct Opened {
    gpu: Arc<Gpu>,
    name: [u8; IPC_NAME_BYTES],
    start: u64,
    bytes: u64,
}

impl Opened {
    pub(super) fn get(
        gpu: &Arc<Gpu>,
        name: &[u8; IPC_NAME_BYTES],
        bytes: u64,
    ) -> Result<Arc<Self>> {
        let started = Instant::now();
        let mut all = loop {
            let all = gpu.opened.lock().unwrap_or_else(PoisonError::into_inner);
            match all.get(name).map(Weak::upgrade) {
                None => break all,
                Some(Some(opened)) if opened.bytes == bytes => return Ok(opened),
                Some(Some(_)) => {
                    let text = "two regions of one allocation do not agree about its size";
                    return Err(Error::new(ErrorKind::Corrupt, text));
                }
                // Its last user is about to close it, and takes the lock for that.
                Some(None) if started.elapsed() < CLOSING_MAX => drop(all),
                Some(None) => {
                    let text = "memory of another process is being closed";
                    return Err(Error::new(ErrorKind::Timeout, text));
                }
            }
            std::thread::yield_now();
        };
        let opened = gpu.enter().and_then(|_entered| {
            // SAFETY: the context is current; closed by `drop`. No byte of it is touched by this process's processor: the device
            // copies, and an owner that frees the memory all the same breaks the device's context, not this process.
            unsafe { gpu.calls.open_memory(name) }
        });
        let start =
            opened.map_err(|code| not_opened(gpu, "open memory of another process", code))?;
        let made = Arc::new(Self {
            gpu: gpu.clone(),
            name: *name,
            start,
            bytes,
        });
        all.insert(*name, Arc::downgrade(&made));
        Ok(made)
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if !self.gpu.process.is_current() {
            return;
        }
        let mut all = self
            .gpu
            .opened
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Nobody has opened it again since: that waits until it is not there any more.
        all.remove(&self.name);
        let closed = self.gpu.enter().and_then(|_entered| {
            // SAFETY: opened by `get`, closed only here; work that names it holds this until it is over.
            unsafe { self.gpu.calls.close_memory(self.start) }
        });
        drop(all);
        if let Err(code) = closed {
            tracing::warn!(code = code.0, "close memory of another process");
        }
    }
}

/// Pieces of another process's memory, mapped side by side in this one.
pub(super) struct Mapped {
    gpu: Arc<Gpu>,
    start: u64,
    /// Reserved for them.
    bytes: u64,
    pieces: Vec<Piece>,
}

impl Mapped {
    /// Maps the pieces that `next` gives, each with its bytes.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        (count, bytes): (u32, u64),
        next: &mut dyn FnMut(u32) -> Result<(OwnedFd, u64)>,
    ) -> Result<Self> {
        let reserved = gpu.enter().and_then(|_entered| {
            // SAFETY: the context is current; given back by `drop`.
            unsafe { gpu.calls.reserve(bytes) }
        });
        let start = reserved.map_err(|code| not_opened(gpu, "reserve addresses", code))?;
        let mut mapped = Self {
            gpu: gpu.clone(),
            start,
            bytes,
            pieces: Vec::with_capacity(count as usize),
        };
        let mut at = start;
        for number in 0..count {
            let (file, len) = next(number)?;
            let until = at
                .checked_add(len)
                .filter(|&until| until <= start + bytes && len > 0);
            let Some(until) = until else {
                let text = format!("piece {number} has {len} bytes, more than there is room for");
                return Err(Error::new(ErrorKind::Corrupt, text));
            };
            mapped.map(&file, (at, len))?;
            at = until;
        }
        if at != start + bytes {
            let text = format!("{count} pieces have {} bytes, not {bytes}", at - start);
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let allowed = gpu.enter().and_then(|_entered| {
            // SAFETY: all of it is mapped, by the loop above.
            unsafe { gpu.calls.allow_access(start, bytes, gpu.ordinal() as i32) }
        });
        allowed.map_err(|code| not_opened(gpu, "use mapped memory of another process", code))?;
        Ok(mapped)
    }

    fn map(&mut self, file: &OwnedFd, (at, len): Piece) -> Result<()> {
        let calls = &self.gpu.calls;
        let made = self.gpu.enter().and_then(|_entered| {
            // SAFETY: the context is current; released below. Whatever the descriptor is, the driver looks.
            let piece = unsafe { calls.import_piece(file.as_fd()) }?;
            // SAFETY: imported above; the range is reserved, and nothing is mapped there yet.
            let mapped = unsafe { calls.map_piece(at, len, piece) };
            // SAFETY: imported above, and used no more; the mapping keeps the memory.
            unsafe { calls.release_piece(piece) }?;
            mapped
        });
        made.map_err(|code| not_opened(&self.gpu, "map memory of another process", code))?;
        self.pieces.push((at, len));
        Ok(())
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if !self.gpu.process.is_current() {
            return;
        }
        let calls = &self.gpu.calls;
        let ended = self.gpu.enter().and_then(|_entered| {
            for &(start, bytes) in &self.pieces {
                // SAFETY: mapped by `map`, unmapped only here; work that names it holds this until it is over.
                unsafe { calls.unmap(start, bytes) }?;
            }
            // SAFETY: reserved by `new`; nothing is mapped there any more.
            unsafe { calls.unreserve(self.start, self.bytes) }
        });
        if let Err(code) = ended {
            tracing::warn!(code = code.0, "unmap memory of another process");
        }
    }
}
