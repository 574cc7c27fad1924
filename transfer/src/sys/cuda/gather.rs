//! Small pieces of a batch, copied by a kernel.

use std::sync::Arc;

use kvcache_core::Result;

use super::calls::{Answer, CopyList, Handle};
use super::kernels::{Kernel, Kernels, Lists, Upload, argument};

/// Fewer pieces are left to the driver: a launch needs a list, whose way to the device is a copy of its own.
pub(super) const PIECES_MIN: usize = 8;

/// `struct piece` of `kernels.cu`: where to, where from, how many bytes.
const PIECE_WORDS: usize = 3;

/// The threads that share a piece.
const PIECE_THREADS: u64 = 32;

/// A stream's way to do that.
pub(super) struct Gather {
    lists: Arc<Lists>,
    free: Vec<u64>,
    /// Longer pieces are left to the driver. 0: all are.
    pub(super) up_to: u64,
}

/// A list that a flight uses. It keeps the kernels, too.
pub(super) struct UsedList {
    pub(super) lists: Arc<Lists>,
    pub(super) slot: u64,
}

/// Pieces to be copied.
pub(super) struct Pieces {
    upload: Upload,
    count: u32,
}

impl Gather {
    /// For so many batches at once of so many copies each.
    pub(super) fn new(kernels: &Arc<Kernels>, batches: u64, copies_max: u64) -> Result<Self> {
        let slot_bytes = copies_max * (PIECE_WORDS * 8) as u64;
        Ok(Self {
            lists: Lists::new(kernels, batches, slot_bytes)?,
            free: (0..batches).collect(),
            up_to: 0,
        })
    }

    /// Takes the small copies out of a batch; `reached` says which of them a kernel may make. None when they are few, or all lists are
    /// in use.
    pub(super) fn take(
        &mut self,
        copies: &mut CopyList,
        reached: &[bool],
    ) -> Result<Option<(UsedList, Pieces)>> {
        let is_small = |copies: &CopyList, at: usize| {
            reached.get(at) == Some(&true) && copies.bytes[at] as u64 <= self.up_to
        };
        let room = self.lists.slot_bytes() as usize / (PIECE_WORDS * 8);
        let count = (0..copies.len()).filter(|&at| is_small(copies, at)).count();
        if count < PIECES_MIN || count > room {
            return Ok(None);
        }
        let Some(&slot) = self.free.last() else {
            return Ok(None);
        };
        let (mut words, mut rest) = (Vec::with_capacity(count * PIECE_WORDS), CopyList::default());
        for at in 0..copies.len() {
            let (target, source) = (copies.targets[at], copies.sources[at]);
            match is_small(copies, at) {
                true => words.extend([target, source, copies.bytes[at] as u64]),
                false => rest.push(target, source, copies.bytes[at]),
            }
        }
        let upload = self.lists.write(slot, &words)?;
        self.free.pop();
        *copies = rest;
        let used = UsedList {
            lists: self.lists.clone(),
            slot,
        };
        let count = count as u32;
        Ok(Some((used, Pieces { upload, count })))
    }

    /// A flight is over.
    pub(super) fn give_back(&mut self, used: UsedList) {
        self.free.push(used.slot);
    }
}

impl Pieces {
    /// Queues the list and the kernel.
    ///
    /// # Safety
    /// All pieces lie in memory that is kept, and `used` with it, until the stream has run the kernel; kernels reach that memory; the
    /// stream is live and of the current context.
    pub(super) unsafe fn queue(&self, used: &UsedList, stream: Handle) -> Answer<()> {
        let (mut list, mut count) = (self.upload.target, self.count);
        // SAFETY: the slot is the flight's alone until it is given back, after the flight; the rest is the caller's promise.
        unsafe { self.upload.queue(&used.lists, stream) }?;
        let threads = u64::from(count) * PIECE_THREADS;
        let mut arguments = [argument(&mut list), argument(&mut count)];
        let kernels = &used.lists.kernels;
        // SAFETY: the kernel takes a list and its length; the list is there when the stream comes to it, and the pieces and the kernels
        // are kept, by the caller's promise.
        unsafe { kernels.launch(Kernel::CopyPieces, threads, &mut arguments, stream) }
    }
}
