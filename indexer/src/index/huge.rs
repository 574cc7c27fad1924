//! Memory in pieces of one huge page: a random access then costs one miss rather than two, and what is given back goes
//! to the system at once.

use std::alloc::{Layout, handle_alloc_error};

use bytemuck::Pod;
use memmap2::{Advice, MmapMut};

/// The size of a piece, which is what a huge page has on the machines that this runs on.
pub(super) const HUGE_BYTES: usize = 2 << 20;

/// Zeroed memory of [`HUGE_BYTES`], aligned to its size.
pub(super) struct Huge {
    map: MmapMut,
    start: usize,
}

impl Huge {
    pub(super) fn new() -> Self {
        // Twice the size contains an aligned piece; what is around it is never touched, so it takes no memory.
        let Ok(map) = MmapMut::map_anon(2 * HUGE_BYTES) else {
            handle_alloc_error(Layout::new::<[u8; HUGE_BYTES]>());
        };
        // Where there are no huge pages, small ones serve as well, only slower.
        let _ = map.advise(Advice::HugePage);
        let start = map.as_ptr().addr().wrapping_neg() % HUGE_BYTES;
        Self { map, start }
    }

    /// The piece as elements.
    #[inline]
    pub(super) fn elements<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(&self.map[self.start..][..HUGE_BYTES])
    }

    #[inline]
    pub(super) fn elements_mut<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map[self.start..][..HUGE_BYTES])
    }

    /// One element by its place among as many as fit.
    #[inline]
    pub(super) fn element<T: Pod>(&self, at: usize) -> &T {
        let from = self.start + at % (HUGE_BYTES / size_of::<T>()) * size_of::<T>();
        bytemuck::from_bytes(&self.map[from..from + size_of::<T>()])
    }

    #[inline]
    pub(super) fn element_mut<T: Pod>(&mut self, at: usize) -> &mut T {
        let from = self.start + at % (HUGE_BYTES / size_of::<T>()) * size_of::<T>();
        bytemuck::from_bytes_mut(&mut self.map[from..from + size_of::<T>()])
    }
}
