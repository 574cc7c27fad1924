//! A job's pieces cut into system calls: neighbours in the file become one vectored call, long runs several.

use std::ffi::c_void;
use std::os::fd::RawFd;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::job::{FileJob, FileOperation, Piece};
use super::open::{OpenFile, Route};

/// The most bytes of one system call: long runs are cut, so that the device works on several parts at once.
const CALL_BYTES_MAX: usize = 1 << 20;
/// The most memory ranges of one system call.
const CALL_VECTORS_MAX: usize = 256;

/// Aligned memory of ours, for callers' memory that is not aligned.
struct Bounce {
    buffer: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Bounce {
    fn new(len: usize, alignment: usize) -> Self {
        let buffer = vec![0; len + alignment];
        let skip = buffer.as_ptr().align_offset(alignment);
        Self { buffer, skip, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.buffer[self.skip..self.skip + self.len]
    }
}

/// One system call: a run of a file, and the memory it is gathered from or scattered into.
pub(super) struct Call {
    pub(super) operation: FileOperation,
    file: Arc<OpenFile>,
    pub(super) descriptor: RawFd,
    pub(super) offset: u64,
    pub(super) vectors: Vec<libc::iovec>,
    /// The region of the first range, by its position in the job.
    pub(super) local: u32,
    route: Route,
    /// The caller's memory, when `vectors` names the bounce buffer.
    bounced: Option<(libc::iovec, Bounce)>,
    left: usize,
}

// SAFETY: the pointers in `vectors` name either memory lent with the job, see `Piece`, or the heap of `bounced`, which
// moves with this value without moving its bytes.
unsafe impl Send for Call {}

impl Call {
    fn sync(file: &Arc<OpenFile>) -> Self {
        Self {
            operation: FileOperation::Sync,
            file: Arc::clone(file),
            descriptor: file.descriptor(Route::Buffered),
            offset: 0,
            vectors: Vec::new(),
            local: u32::MAX,
            route: Route::Buffered,
            bounced: None,
            left: 0,
        }
    }

    fn new(operation: FileOperation, file: &Arc<OpenFile>, piece: &Piece, route: Route) -> Self {
        Self {
            operation,
            file: Arc::clone(file),
            descriptor: file.descriptor(route),
            offset: piece.offset,
            vectors: vec![vector(piece.base, piece.len)],
            local: piece.local,
            route,
            bounced: None,
            left: piece.len,
        }
    }

    /// Makes the call ready for the kernel. Bounce buffers are made here and not when the job is cut, so that only calls
    /// under way hold memory of ours.
    pub(super) fn begin(&mut self) {
        if self.route != Route::DirectBounced || self.bounced.is_some() {
            return;
        }
        let theirs = self.vectors[0];
        let mut bounce = Bounce::new(self.left, self.file.memory_alignment());
        if self.operation == FileOperation::Write {
            // SAFETY: the piece's memory is readable for its length until the job ends; the buffer is ours and as long.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    theirs.iov_base.cast::<u8>(),
                    bounce.bytes().as_mut_ptr(),
                    self.left,
                );
            }
        }
        self.vectors[0] = vector(bounce.bytes().as_mut_ptr(), self.left);
        self.bounced = Some((theirs, bounce));
    }

    /// Whether `piece` continues this call.
    fn takes(&self, piece: &Piece, file: &Arc<OpenFile>, route: Route) -> bool {
        self.route == route
            && route != Route::DirectBounced
            && Arc::ptr_eq(&self.file, file)
            && self.offset + self.left as u64 == piece.offset
            && self.left + piece.len <= CALL_BYTES_MAX
            && self.vectors.len() < CALL_VECTORS_MAX
    }

    /// The one range of the caller's memory that goes straight to the device, if it is that.
    pub(super) fn direct_range(&self) -> Option<libc::iovec> {
        match self.vectors.as_slice() {
            [range] if self.route == Route::Direct => Some(*range),
            _ => None,
        }
    }

    fn take(&mut self, piece: &Piece) {
        self.left += piece.len;
        match self.vectors.last_mut() {
            Some(last) if last.iov_base as usize + last.iov_len == piece.base as usize => {
                last.iov_len += piece.len;
            }
            _ => self.vectors.push(vector(piece.base, piece.len)),
        }
    }

    /// Takes what the kernel answered: bytes moved, or a negated error number. True: the call is complete.
    ///
    /// # Errors
    /// `NoSpace`, `Io` and the like as the kernel says, `Corrupt` for a file that ends early.
    pub(super) fn advance(&mut self, answer: i32) -> Result<bool> {
        let place = || {
            let path = self.file.path().display();
            let verb = match self.operation {
                FileOperation::Read => "read",
                FileOperation::Write => "write",
                FileOperation::Sync => return format!("sync {path}"),
            };
            format!("{verb} {path} at {}, {} bytes", self.offset, self.left)
        };
        if answer == -libc::EINVAL && self.route == Route::Direct && !self.file.demands_direct() {
            // The kernel wants more alignment than it told, or had no way to tell.
            self.route = Route::Buffered;
            self.descriptor = self.file.descriptor(Route::Buffered);
            return Ok(false);
        }
        if answer < 0 {
            let error = std::io::Error::from_raw_os_error(-answer);
            // Cancelled too: whoever withdrew the job does not ask any more, so this one was hit by mistake.
            if [libc::EINTR, libc::EAGAIN, libc::ECANCELED].contains(&-answer) {
                return Ok(false);
            }
            return Err(Error::io(place(), error));
        }
        if self.operation == FileOperation::Sync {
            return Ok(true);
        }
        if answer == 0 && self.left > 0 {
            let (kind, what) = match self.operation {
                FileOperation::Read => (ErrorKind::Corrupt, "the file ends there"),
                _ => (ErrorKind::Io, "nothing was written"),
            };
            return Err(Error::new(kind, format!("{}: {what}", place())));
        }
        self.consume(answer as usize);
        if self.left > 0 {
            return Ok(false);
        }
        self.copy_out();
        Ok(true)
    }

    fn consume(&mut self, moved: usize) {
        assert!(
            moved <= self.left,
            "the kernel moved {moved} of {} bytes",
            self.left
        );
        self.left -= moved;
        self.offset += moved as u64;
        let mut rest = moved;
        while rest > 0 {
            let first = &mut self.vectors[0];
            let used = rest.min(first.iov_len);
            first.iov_base = first
                .iov_base
                .cast::<u8>()
                .wrapping_add(used)
                .cast::<c_void>();
            first.iov_len -= used;
            rest -= used;
            if first.iov_len == 0 {
                self.vectors.remove(0);
            }
        }
        // A direct call that stopped at an odd place (the end of the file's last sector) goes on through the cache.
        if self.left > 0 && self.route == Route::Direct {
            let aligned = self.vectors.iter().all(|vector| {
                let base = vector.iov_base as usize;
                self.file
                    .route(base, self.offset, vector.iov_len)
                    .is_ok_and(|route| route == Route::Direct)
            });
            if !aligned {
                self.route = Route::Buffered;
                self.descriptor = self.file.descriptor(Route::Buffered);
            }
        }
    }

    fn copy_out(&mut self) {
        let read = self.operation == FileOperation::Read;
        let Some((theirs, bounce)) = self.bounced.as_mut().filter(|_| read) else {
            return;
        };
        // SAFETY: the piece's memory is writable for its length until the job ends; the buffer is ours and as long.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bounce.bytes().as_ptr(),
                theirs.iov_base.cast::<u8>(),
                theirs.iov_len,
            );
        }
    }
}

pub(super) fn vector(address: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: address.cast::<c_void>(),
        iov_len: len,
    }
}

/// Cuts a job into calls.
///
/// # Errors
/// `Invalid` for a range outside its file or not aligned where it must be, `Denied` for a write to a read-only file.
pub(super) fn calls(job: &FileJob) -> Result<Vec<Call>> {
    if job.operation == FileOperation::Sync {
        return Ok(job.files.iter().map(Call::sync).collect());
    }
    for file in &job.files {
        if job.operation == FileOperation::Write && file.is_read_only() {
            let text = format!("{} is open for reading only", file.path().display());
            return Err(Error::new(ErrorKind::Denied, text));
        }
    }
    let mut calls: Vec<Call> = Vec::new();
    for piece in &job.pieces {
        let file = &job.files[piece.file as usize];
        check_range(file, piece)?;
        let mut done = 0;
        while done < piece.len {
            let part = Piece {
                file: piece.file,
                local: piece.local,
                base: piece.base.wrapping_add(done),
                len: (piece.len - done).min(CALL_BYTES_MAX),
                offset: piece.offset + done as u64,
            };
            done += part.len;
            let route = file.route(part.base as usize, part.offset, part.len)?;
            match calls
                .last_mut()
                .filter(|call| call.takes(&part, file, route))
            {
                Some(call) => call.take(&part),
                None => calls.push(Call::new(job.operation, file, &part, route)),
            }
        }
    }
    Ok(calls)
}

fn check_range(file: &OpenFile, piece: &Piece) -> Result<()> {
    let end = piece.offset.checked_add(piece.len as u64);
    if end.is_some_and(|end| end <= file.len()) {
        return Ok(());
    }
    let path = file.path().display();
    let text = format!(
        "{path} at {}, {} bytes: the file has {}",
        piece.offset,
        piece.len,
        file.len()
    );
    Err(Error::new(ErrorKind::Invalid, text))
}
