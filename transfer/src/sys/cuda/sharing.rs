//! The driver's calls about memory of other processes and other devices; a part of [`Calls`](super::calls::Calls).

use std::os::fd::{BorrowedFd, OwnedFd};

use super::calls::{Answer, Device, Handle};

/// Bytes of the driver's name of an allocation.
pub(crate) const IPC_NAME_BYTES: usize = 64;

/// What the driver knows of memory that was mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MappingFacts {
    /// Where the piece that an address lies in is mapped, and its bytes.
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    /// Descriptors can be made of it.
    pub(crate) is_shareable: bool,
}

/// Names memory that can be mapped, or is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PieceHandle(pub(super) u64);

/// Calls about memory that others have, or other devices. As those of [`Calls`](super::calls::Calls).
pub(crate) trait SharingCalls {
    /// What it knows of the mapping that an address lies in; an error for memory that was not mapped, and of drivers that do not
    /// tell. Needs a current context.
    fn mapping_facts(&self, address: u64) -> Answer<MappingFacts>;
    /// `cuDeviceCanAccessPeer`: whether a device can reach another one's memory by itself.
    fn can_access(&self, device: Device, other: Device) -> Answer<bool>;
    /// `cuIpcGetMemHandle`: a name for other processes of an allocation.
    ///
    /// # Safety
    /// The start of an allocation; its context is current.
    unsafe fn name_memory(&self, start: u64) -> Answer<[u8; IPC_NAME_BYTES]>;
    /// `cuIpcOpenMemHandle_v2`: where another process's allocation begins in this one.
    ///
    /// # Safety
    /// A context is current; what is opened is touched by devices alone.
    unsafe fn open_memory(&self, name: &[u8; IPC_NAME_BYTES]) -> Answer<u64>;
    /// `cuIpcCloseMemHandle`.
    ///
    /// # Safety
    /// Opened in the current context, not closed, and used by nothing that is still to run.
    unsafe fn close_memory(&self, start: u64) -> Answer<()>;
    /// `cuMemRetainAllocationHandle`: what is mapped at an address.
    ///
    /// # Safety
    /// Each success is followed by one [`SharingCalls::release_piece`].
    unsafe fn retain_piece(&self, address: u64) -> Answer<PieceHandle>;
    /// `cuMemRelease`.
    ///
    /// # Safety
    /// Retained or imported, and not released.
    unsafe fn release_piece(&self, piece: PieceHandle) -> Answer<()>;
    /// `cuMemExportToShareableHandle`: a descriptor for another process.
    ///
    /// # Safety
    /// Retained, and not released.
    unsafe fn export_piece(&self, piece: PieceHandle) -> Answer<OwnedFd>;
    /// `cuMemImportFromShareableHandle`.
    ///
    /// # Safety
    /// Each success is followed by one [`SharingCalls::release_piece`].
    unsafe fn import_piece(&self, file: BorrowedFd<'_>) -> Answer<PieceHandle>;
    /// `cuMemAddressReserve`: addresses at which nothing is mapped.
    ///
    /// # Safety
    /// Each success is followed by one [`SharingCalls::unreserve`].
    unsafe fn reserve(&self, bytes: u64) -> Answer<u64>;
    /// `cuMemAddressFree`.
    ///
    /// # Safety
    /// All that was reserved together, with nothing mapped in it.
    unsafe fn unreserve(&self, start: u64, bytes: u64) -> Answer<()>;
    /// `cuMemMap`: all of a piece.
    ///
    /// # Safety
    /// The range is reserved, and nothing is mapped there.
    unsafe fn map_piece(&self, start: u64, bytes: u64, piece: PieceHandle) -> Answer<()>;
    /// `cuMemUnmap`.
    ///
    /// # Safety
    /// Mapped as one piece, and used by nothing that is still to run.
    unsafe fn unmap(&self, start: u64, bytes: u64) -> Answer<()>;
    /// `cuMemSetAccess`: a device may read and write it.
    ///
    /// # Safety
    /// All of it is mapped.
    unsafe fn allow_access(&self, start: u64, bytes: u64, ordinal: i32) -> Answer<()>;
    /// `cuCtxEnablePeerAccess`: the current context reaches what is allocated in another one.
    ///
    /// # Safety
    /// Both contexts are retained.
    unsafe fn reach(&self, other: Handle) -> Answer<()>;
    /// `cuMemcpyPeerAsync`: from one context's memory to another's, by the devices themselves where they may reach each other.
    ///
    /// # Safety
    /// As [`Calls::copy`](super::calls::Calls::copy); both contexts are retained.
    unsafe fn copy_across(
        &self,
        to: (Handle, u64),
        from: (Handle, u64),
        bytes: usize,
        stream: Handle,
    ) -> Answer<()>;
}
