//! What network cards may do with the stand-in's memory.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use super::super::calls::{Answer, Attribute, Code};
use super::super::direct::DirectCalls;
use super::{FIRST, Fake, State};

/// What devices say, and what was asked of them.
pub(super) struct Direct {
    /// Memory is allocated where network cards reach it.
    is_open: bool,
    has_dma_bufs: bool,
    has_peer_memory: bool,
    has_peer_memory_mapped: bool,
    flushes: i32,
    ordering: i32,
    /// Addresses of allocations whose copies are waited for.
    pub(super) synchronized: BTreeSet<u64>,
}

impl Default for Direct {
    fn default() -> Self {
        Self {
            is_open: false,
            has_dma_bufs: true,
            has_peer_memory: true,
            has_peer_memory_mapped: true,
            flushes: 1,
            ordering: 100,
            synchronized: BTreeSet::new(),
        }
    }
}

impl Direct {
    pub(super) fn attribute(&self, attribute: Attribute) -> i32 {
        match attribute {
            Attribute::DmaBuf => self.has_dma_bufs.into(),
            Attribute::PeerMemory => self.has_peer_memory.into(),
            Attribute::PeerMemoryMapped => self.has_peer_memory_mapped.into(),
            Attribute::RemoteFlushes => self.flushes,
            Attribute::RemoteOrdering => self.ordering,
            // Others have answers of their own.
            _ => 0,
        }
    }

    /// Whether memory is allocated where network cards reach it.
    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }
}

impl State {
    /// Whether an address is one of a device, allocated or not.
    pub(super) fn is_of_device(&self, address: u64) -> bool {
        let found = self.memory.range(..=address).next_back();
        let is_within =
            |(start, memory): (&u64, &super::Allocation)| address < start + memory.backing.len();
        address >= FIRST || found.is_some_and(is_within)
    }
}

impl Fake {
    /// Memory that is allocated from now on lies where network cards reach it: in the process.
    pub(crate) fn open_memory(&self) {
        self.lock().direct.is_open = true;
    }

    /// What devices say of dma-bufs, of a module for network cards, and of the latter for memory that is mapped in pieces.
    pub(crate) fn set_direct(&self, dma_bufs: bool, peer_memory: bool, mapped: bool) {
        let mut state = self.lock();
        let direct = &mut state.direct;
        (direct.has_dma_bufs, direct.has_peer_memory) = (dma_bufs, peer_memory);
        direct.has_peer_memory_mapped = mapped;
    }

    /// What devices say of writes of network cards: how they are made visible, and for whom they are anyway.
    pub(crate) fn set_remote_writes(&self, flushes: i32, ordering: i32) {
        let mut state = self.lock();
        (state.direct.flushes, state.direct.ordering) = (flushes, ordering);
    }

    /// A drive reads or writes memory by a call that wants a current context: whether all of it is there.
    pub(crate) fn is_reached(&self, call: &'static str, address: u64, bytes: u64) -> bool {
        let mut state = self.lock();
        if state.begin_in(call).is_err() {
            return false;
        }
        let found = state.memory.range(..=address).next_back();
        found.is_some_and(|(start, memory)| address + bytes <= start + memory.backing.len())
    }

    /// Whether copies with memory at this address are waited for.
    pub(crate) fn is_synchronized(&self, address: u64) -> bool {
        self.lock().direct.synchronized.contains(&address)
    }
}

impl DirectCalls for Fake {
    fn dma_buf(&self, address: u64, bytes: usize) -> Answer<OwnedFd> {
        let mut state = self.lock();
        state.begin_in("cuMemGetHandleForAddressRange")?;
        let page = rustix::param::page_size() as u64;
        let is_aligned = address.is_multiple_of(page) && (bytes as u64).is_multiple_of(page);
        // All of it is mapped: allocations are of whole pages, whatever was asked for.
        let found = state.memory.range(..=address).next_back();
        let is_there = found.is_some_and(|(start, memory)| {
            address + bytes as u64 <= start + (memory.backing.len()).next_multiple_of(page)
        });
        if !is_aligned || !is_there {
            return Err(Code::INVALID_VALUE);
        }
        // No dma-buf: whoever uses it is told so by the kernel.
        rustix::fs::memfd_create("stand-in", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|_| Code::OUT_OF_MEMORY)
    }

    fn synchronize_copies(&self, address: u64) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuPointerSetAttribute")?;
        let found = state.memory.range(..=address).next_back();
        match found {
            Some((_, memory)) if memory.facts.is_legacy => {
                state.direct.synchronized.insert(address);
                Ok(())
            }
            Some(_) => Err(Code::NOT_SUPPORTED),
            None => Err(Code::INVALID_VALUE),
        }
    }

    fn flush_remote_writes(&self) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuFlushGPUDirectRDMAWrites")?;
        Ok(())
    }

    fn is_of_process(&self) -> bool {
        self.lock().direct.is_open
    }
}
