//! A request's calls of cuFile, and what one call says.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::ALIGNMENT;
use crate::backend::Operation;
use crate::plan::Plan;
use crate::region::RegionCore;
use crate::sys::cufile::{CufileFile, CufileMemory, Failure};

/// The most bytes of one call: how much has to end when a request is given up, and enough to keep a drive busy.
const CALL_BYTES_MAX: u64 = 4 << 20;

/// A file of a plan.
pub(super) struct Seat {
    pub(super) file: Arc<CufileFile>,
    /// What offsets and lengths are multiples of, in bytes.
    pub(super) alignment: u64,
}

/// What a plan names, in its order.
pub(super) struct Places {
    pub(super) memory: Vec<Arc<CufileMemory>>,
    pub(super) files: Vec<Seat>,
    /// The most bytes that cuFile moves in one piece; 0 if it does not tell.
    pub(super) call_bytes_max: u64,
}

/// # Errors
/// [`ErrorKind::Unsupported`] naming what is not aligned.
pub(super) fn check(plan: &Plan, locals: &[&Arc<RegionCore>], files: &[Seat]) -> Result<()> {
    for (number, extent) in plan.extents.iter().enumerate() {
        let alignment = files[extent.remote as usize].alignment;
        let address = locals[extent.local as usize].address()? + extent.local_offset;
        let (at, len) = (extent.remote_offset, extent.len);
        let is_aligned = at.is_multiple_of(alignment)
            && len.is_multiple_of(alignment)
            && address.is_multiple_of(ALIGNMENT);
        if !is_aligned {
            let text = format!(
                "extent {number}, {len} bytes at {at} of the file and {address:#x} of the GPU: offsets and lengths have to be multiples \
                 of {alignment} bytes, addresses of {ALIGNMENT}"
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
    }
    Ok(())
}

/// One call, or what is left of it.
pub(super) struct Call {
    file: Arc<CufileFile>,
    memory: Arc<CufileMemory>,
    /// Of the plan's remote side.
    pub(super) remote: u32,
    offset: u64,
    at: u64,
    len: u64,
}

/// What came of a call.
pub(super) enum Outcome {
    Done,
    /// So much is left.
    Rest(Call),
    /// Nothing more can be had of it; cuFile itself failed, if so it says.
    Failed(Error, bool),
}

/// Cuts a plan into calls.
pub(super) fn cut(plan: &Plan, places: &Places) -> Vec<Call> {
    let mut calls = Vec::new();
    for extent in &plan.extents {
        let seat = &places.files[extent.remote as usize];
        let step = match places.call_bytes_max {
            0 => CALL_BYTES_MAX,
            most => CALL_BYTES_MAX.min(most),
        };
        // Each begins at a multiple.
        let step = (step / seat.alignment * seat.alignment).max(seat.alignment);
        let mut done = 0;
        while done < extent.len {
            let len = step.min(extent.len - done);
            calls.push(Call {
                file: seat.file.clone(),
                memory: places.memory[extent.local as usize].clone(),
                remote: extent.remote,
                offset: extent.local_offset + done,
                at: extent.remote_offset + done,
                len,
            });
            done += len;
        }
    }
    calls
}

/// Whether the same call is made again.
fn is_passing(error: &std::io::Error) -> bool {
    let number = error.raw_os_error();
    number.is_some_and(|number| [libc::EINTR, libc::EAGAIN].contains(&number))
}

impl Call {
    /// Makes it. When this returns no more of it can land.
    pub(super) fn make(mut self, operation: Operation, path: &str) -> Outcome {
        let moved = self
            .file
            .move_bytes(operation, &self.memory, self.offset, self.len, self.at);
        let place = |call: &Self| {
            let verb = match operation {
                Operation::Read => "read",
                Operation::Write => "write",
            };
            format!("{verb} {path} at {}, {} bytes", call.at, call.len)
        };
        let moved = match moved {
            Err(error) => return Outcome::Failed(error, false),
            Ok(Err(Failure::System(error))) if is_passing(&error) => {
                std::thread::yield_now();
                return Outcome::Rest(self);
            }
            Ok(Err(failure)) => {
                let is_own = matches!(failure, Failure::Cufile(_));
                return Outcome::Failed(failure.fault(place(&self)), is_own);
            }
            Ok(Ok(moved)) if moved > self.len => {
                let text = format!("{}: cuFile says that it moved {moved}", place(&self));
                return Outcome::Failed(Error::new(ErrorKind::Internal, text), true);
            }
            Ok(Ok(moved)) if moved == self.len => return Outcome::Done,
            Ok(Ok(moved)) => {
                // What is left begins at a multiple again, so that a write touches no bytes beside its own.
                let whole = moved / ALIGNMENT * ALIGNMENT;
                if whole == 0 {
                    let (kind, what) = match operation {
                        Operation::Read => (ErrorKind::Corrupt, "the file ends there"),
                        Operation::Write => (ErrorKind::Io, "nothing was written"),
                    };
                    self.at += moved;
                    self.len -= moved;
                    let text = format!("{}: {what}", place(&self));
                    return Outcome::Failed(Error::new(kind, text), false);
                }
                whole
            }
        };
        self.at += moved;
        self.offset += moved;
        self.len -= moved;
        Outcome::Rest(self)
    }
}
