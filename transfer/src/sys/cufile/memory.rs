//! Files and memory of GPUs as cuFile knows them, and what moves between them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, MutexGuard, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::{Code, Failure, Handle};
use super::report::Cufile;
use crate::backend::Operation;
use crate::sys::cuda::DeviceMemory;

/// Memory that is registered, once for everybody here who uses it.
pub(super) struct Registered {
    /// Which allocation it is, by the driver's count.
    buffer: u64,
    bytes: u64,
    users: u64,
}

impl Cufile {
    fn registered(&self) -> MutexGuard<'_, HashMap<u64, Registered>> {
        self.registered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A registered file.
pub(crate) struct CufileFile {
    cufile: Arc<Cufile>,
    handle: Handle,
    /// Of our own, so that it is closed after it is deregistered, whoever else has the file open.
    fd: OwnedFd,
}

impl CufileFile {
    /// `fd` is open with `O_DIRECT`, and nobody else's.
    ///
    /// # Errors
    /// What the library says.
    pub(crate) fn new(cufile: &Arc<Cufile>, fd: OwnedFd) -> Result<Self, Code> {
        // SAFETY: the descriptor is owned by what is returned, which deregisters the handle before it closes it.
        let handle = unsafe { cufile.calls.register_file(fd.as_raw_fd()) }?;
        Ok(Self {
            cufile: cufile.clone(),
            handle,
            fd,
        })
    }

    /// Moves bytes between the file from `at` on and memory from `offset` on; how many. Returns when no more of them can land. 0 at the
    /// end of the file.
    ///
    /// # Errors
    /// What the library says, or the system; of memory that is not there, that too. Some of the bytes may have been moved.
    pub(crate) fn move_bytes(
        &self,
        operation: Operation,
        memory: &CufileMemory,
        offset: u64,
        len: u64,
        at: u64,
    ) -> Result<Result<u64, Failure>> {
        let device = &memory.memory;
        device.at(offset, len)?;
        let (base, bytes) = (device.address(), len as usize);
        let calls = &self.cufile.calls;
        device.gpu().within(|| match operation {
            // SAFETY: the file is registered for as long as `self`; `at` has found the range within the memory, which `memory` keeps;
            // its context is current. Who asks for a read gives up what the range has.
            Operation::Read => unsafe { calls.read(self.handle, base, offset, bytes, at) },
            // SAFETY: as above.
            Operation::Write => unsafe { calls.write(self.handle, base, offset, bytes, at) },
        })
    }
}

impl Drop for CufileFile {
    fn drop(&mut self) {
        if !self.cufile.process.is_current() {
            return;
        }
        // SAFETY: registered by `new`, deregistered only here; a call borrows `self`, so none is under way.
        unsafe { self.cufile.calls.deregister_file(self.handle) }
        tracing::trace!(fd = self.fd.as_raw_fd(), "a file is not cuFile's any more");
    }
}

/// Memory of a GPU for cuFile: registered if that goes. Otherwise the library takes the bytes through buffers of its own on the GPU.
pub(crate) struct CufileMemory {
    cufile: Arc<Cufile>,
    memory: Arc<DeviceMemory>,
    refused: Option<Code>,
}

impl CufileMemory {
    /// # Errors
    /// What the driver says; [`ErrorKind::Invalid`] where other memory is registered that was freed since.
    pub(crate) fn new(cufile: &Arc<Cufile>, memory: &Arc<DeviceMemory>) -> Result<Self> {
        let (address, bytes, buffer) = (memory.address(), memory.bytes(), memory.buffer());
        let mut registered = cufile.registered();
        let refused = match registered.entry(address) {
            Entry::Occupied(known) if known.get().buffer != buffer => {
                let text = format!("memory at {address:#x} was freed while cuFile had it");
                return Err(Error::new(ErrorKind::Invalid, text));
            }
            Entry::Occupied(mut known) if known.get().bytes >= bytes => {
                known.get_mut().users += 1;
                None
            }
            // A shorter range from the same address on: this one goes without.
            Entry::Occupied(_) => Some(Code::MEMORY_ALREADY_REGISTERED),
            Entry::Vacant(place) => {
                // SAFETY: the context is current; whoever holds `memory` keeps it, which is this until it is deregistered.
                let answer = memory
                    .gpu()
                    .within(|| unsafe { cufile.calls.register_memory(address, bytes as usize) })?;
                if answer.is_ok() {
                    place.insert(Registered {
                        buffer,
                        bytes,
                        users: 1,
                    });
                }
                answer.err()
            }
        };
        drop(registered);
        if let Some(code) = refused {
            let (reason, device) = (code.words(), memory.ordinal());
            tracing::warn!(
                reason,
                device,
                bytes,
                "memory is not registered with cuFile, which copies once more within the GPU"
            );
        }
        Ok(Self {
            cufile: cufile.clone(),
            memory: memory.clone(),
            refused,
        })
    }

    /// Why it is not registered; none if it is.
    pub(crate) fn refused(&self) -> Option<Code> {
        self.refused
    }
}

impl Drop for CufileMemory {
    fn drop(&mut self) {
        if self.refused.is_some() || !self.cufile.process.is_current() {
            return;
        }
        let address = self.memory.address();
        // Locked until it is over, so that it is not registered again meanwhile.
        let mut registered = self.cufile.registered();
        let Some(known) = registered.get_mut(&address) else {
            return;
        };
        known.users -= 1;
        if known.users > 0 {
            return;
        }
        registered.remove(&address);
        let gone = self.memory.gpu().within(|| {
            // SAFETY: registered by `new`, and this was its last user; calls borrow theirs, so none is under way.
            unsafe { self.cufile.calls.deregister_memory(address) }
        });
        match gone {
            Ok(Ok(())) => {}
            Ok(Err(code)) => {
                tracing::warn!(reason = code.words(), "take memory back from cuFile");
            }
            Err(error) => tracing::warn!(%error, "take memory back from cuFile"),
        }
    }
}
