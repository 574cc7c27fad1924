//! Reading and writing the memory of another process by system calls, between checked bounds.
//!
//! The kernel names the process by its number, which may be given to another one, and a process may put another
//! program in its place. So the peer keeps a random word in its memory and says where: every call that reads takes the
//! word along, from the very address space that the data comes from, and is believed only if the word is right. A call
//! that writes cannot do that; the word is read just before each, and once more after the last.

use std::io;
use std::marker::PhantomData;

use kvcache_core::{Error, ErrorKind, Result};

use super::memory::{Mapping, Sink, Span};
use crate::backend::Operation;

/// Bytes of the word by which a process is recognised.
pub(crate) const NONCE_BYTES: usize = 16;

/// Ranges that one call carries, besides the word: the kernel's own limit is 1024.
const RANGES_MAX: usize = 512;

/// Another process that showed where its word is.
pub(crate) struct PeerProcess {
    pid: libc::pid_t,
    nonce: [u8; NONCE_BYTES],
    nonce_at: u64,
}

/// Memory that a process handed out for use in place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    pub(crate) writable: bool,
}

impl Window {
    /// # Errors
    /// [`ErrorKind::Invalid`] outside of it.
    fn range(&self, offset: u64, len: u64) -> Result<libc::iovec> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.bytes) {
            let text = format!(
                "bytes {offset}+{len} lie outside the {} bytes of the peer's region",
                self.bytes
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        match self.address.checked_add(offset) {
            Some(address) if address.checked_add(len).is_some() => Ok(range(address, len as usize)),
            _ => Err(Error::invalid(
                "address of the peer's region",
                self.address,
                "not past the address space",
            )),
        }
    }
}

/// An address of another process, in the form of the kernel's vectored calls. Never followed here.
fn range(address: u64, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address as usize),
        iov_len: len,
    }
}

/// Bytes to move one way between pairs of local and remote places, in one call.
pub(crate) struct Batch<'a> {
    operation: Operation,
    /// The first of each side is left free for the word.
    own: Vec<libc::iovec>,
    other: Vec<libc::iovec>,
    bytes: u64,
    memory: PhantomData<&'a Mapping>,
}

impl<'a> Batch<'a> {
    /// For up to `ranges` ranges; more than fit one call are left for the next.
    pub(crate) fn new(operation: Operation, ranges: usize) -> Self {
        let capacity = ranges.min(RANGES_MAX) + 1;
        let mut batch = Self {
            operation,
            own: Vec::with_capacity(capacity),
            other: Vec::with_capacity(capacity),
            bytes: 0,
            memory: PhantomData,
        };
        batch.clear();
        batch
    }

    pub(crate) fn clear(&mut self) {
        self.own.clear();
        self.other.clear();
        self.own.push(range(0, 0));
        self.other.push(range(0, 0));
        self.bytes = 0;
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the call carries no further range.
    pub(crate) fn is_full(&self) -> bool {
        self.own.len() > RANGES_MAX
    }

    /// Adds `len` bytes at `offset` of the peer's window, to be moved from or to `own` at `own_offset`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] outside either, [`ErrorKind::Denied`] where it is not to be written.
    pub(crate) fn push(
        &mut self,
        own: &'a Mapping,
        own_offset: u64,
        window: &Window,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        assert!(!self.is_full(), "at most {RANGES_MAX} ranges in one call");
        let other = window.range(offset, len)?;
        let own = match self.operation {
            Operation::Read => {
                let sink: Sink<'a> = own.sink(own_offset, len)?;
                sink.raw()
            }
            Operation::Write if !window.writable => {
                let text = "the peer's region was not handed out for writing";
                return Err(Error::new(ErrorKind::Denied, text));
            }
            Operation::Write => {
                let span: Span<'a> = own.span(own_offset, len)?;
                span.raw()
            }
        };
        self.own.push(own);
        self.other.push(other);
        self.bytes += len;
        Ok(())
    }
}

impl PeerProcess {
    /// The process `pid`, if it has this word at this address.
    ///
    /// # Errors
    /// As the kernel says, `EPERM` foremost; [`io::ErrorKind::InvalidData`] when another word is there.
    pub(crate) fn meet(pid: i32, nonce_at: u64, nonce: [u8; NONCE_BYTES]) -> io::Result<Self> {
        let process = Self {
            pid,
            nonce,
            nonce_at,
        };
        process.recognise()?;
        Ok(process)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it is still the process that was met.
    pub(crate) fn recognise(&self) -> io::Result<()> {
        self.read(&mut Batch::new(Operation::Read, 0)).map(drop)
    }

    /// Moves the batch's bytes, in order. How many; fewer than it has if the next ones, here or there, cannot be
    /// reached.
    pub(crate) fn run(&self, batch: &mut Batch<'_>) -> io::Result<u64> {
        match batch.operation {
            Operation::Read => self.read(batch),
            Operation::Write => self.write(batch),
        }
    }

    fn read(&self, batch: &mut Batch<'_>) -> io::Result<u64> {
        let mut found = [0; NONCE_BYTES];
        batch.own[0] = libc::iovec {
            iov_base: found.as_mut_ptr().cast(),
            iov_len: NONCE_BYTES,
        };
        batch.other[0] = range(self.nonce_at, NONCE_BYTES);
        // SAFETY: the local ranges are `found` and writable memory that outlives the batch (`Sink`) and that nobody holds
        // a reference into; the remote ones are only read, in an address space that is the kernel's to check.
        let moved = unsafe {
            libc::process_vm_readv(
                self.pid,
                batch.own.as_ptr(),
                batch.own.len() as libc::c_ulong,
                batch.other.as_ptr(),
                batch.other.len() as libc::c_ulong,
                0,
            )
        };
        batch.own[0] = range(0, 0);
        let moved = checked(moved)?;
        if moved < NONCE_BYTES || found != self.nonce {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok((moved - NONCE_BYTES) as u64)
    }

    fn write(&self, batch: &Batch<'_>) -> io::Result<u64> {
        self.recognise()?;
        let (own, other) = (&batch.own[1..], &batch.other[1..]);
        // SAFETY: the local ranges are readable memory that outlives the batch (`Span`). The remote ones lie in memory
        // that the process itself handed out for writing and keeps until it hears that this use has ended; it was
        // recognised just now. If it is this very process, they are one of its own registered regions.
        let moved = unsafe {
            libc::process_vm_writev(
                self.pid,
                own.as_ptr(),
                own.len() as libc::c_ulong,
                other.as_ptr(),
                other.len() as libc::c_ulong,
                0,
            )
        };
        Ok(checked(moved)? as u64)
    }
}

/// How many bytes a call moved; none if the first of its ranges could not be reached.
fn checked(moved: isize) -> io::Result<usize> {
    usize::try_from(moved).or_else(|_| {
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EFAULT) => Ok(0),
            _ => Err(error),
        }
    })
}

#[cfg(test)]
mod tests;
