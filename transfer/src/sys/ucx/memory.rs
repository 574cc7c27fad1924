//! Registered memory, ours and the peers'.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::generated::ucp as ffi;
use super::operations::EndpointId;
use super::worker::{Memory, RemoteKey, Worker};
use crate::region::{RegionCore, RegionId};

/// A peer's region, as the peer handed it out.
pub(crate) struct Granted<'a> {
    pub(crate) region: RegionId,
    /// Where it begins in the peer's memory.
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    /// The packed remote key.
    pub(crate) key: &'a [u8],
}

impl Worker {
    /// Makes a region known to UCX, which pins it where the hardware needs that.
    pub(crate) fn register(&mut self, region: &Arc<RegionCore>) -> Result<()> {
        if self.memories.contains_key(&region.id()) {
            return Ok(());
        }
        let mapping = region.mapping()?;
        let fields = ffi::UCP_MEM_MAP_PARAM_FIELD_ADDRESS | ffi::UCP_MEM_MAP_PARAM_FIELD_LENGTH;
        // SAFETY: as in `connect`.
        let mut params: ffi::ucp_mem_map_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from(fields);
        params.address = std::ptr::with_exposed_provenance_mut(mapping.address() as usize);
        params.length = mapping.len() as usize;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is open, and the range is mapped for as long as the region is kept, beside the handle.
        let status = unsafe {
            self.library
                .calls
                .ucp_mem_map(self.context, &raw const params, &raw mut raw)
        };
        let doing = format!("register {} bytes", mapping.len());
        self.library.check(&doing, status)?;
        let memory = Memory {
            raw,
            region: region.clone(),
            users: 0,
        };
        self.memories.insert(region.id(), memory);
        Ok(())
    }

    /// What lets a peer use a registered region.
    pub(crate) fn pack_key(&self, region: RegionId) -> Result<Vec<u8>> {
        let memory = self.memory(region)?;
        let mut raw = std::ptr::null_mut();
        let mut len = 0;
        // SAFETY: the context is open, the memory is registered with it, both results are writable.
        let status = unsafe {
            self.library
                .calls
                .ucp_rkey_pack(self.context, memory.raw, &raw mut raw, &raw mut len)
        };
        self.library.check("pack a remote key", status)?;
        // SAFETY: the key has that length and lives until it is released, below.
        let key = unsafe { std::slice::from_raw_parts(raw.cast::<u8>(), len) }.to_vec();
        // SAFETY: got above, and not used any more.
        unsafe { self.library.calls.ucp_rkey_buffer_release(raw) };
        Ok(key)
    }

    pub(super) fn memory(&self, region: RegionId) -> Result<&Memory> {
        self.memories.get(&region).ok_or_else(|| {
            let text = format!("ucx: region {region} is not registered");
            Error::new(ErrorKind::Internal, text)
        })
    }

    /// Makes UCX forget a region; false while operations use it. No byte of a peer's can land there any more, provided
    /// that every peer has let go of its key.
    pub(crate) fn deregister(&mut self, region: RegionId) -> bool {
        match self.memories.get(&region) {
            None => return true,
            Some(memory) if memory.users > 0 => return false,
            Some(_) => {}
        }
        if let Some(memory) = self.memories.remove(&region) {
            self.unmap(&memory);
        }
        true
    }

    pub(super) fn unmap(&self, memory: &Memory) {
        // SAFETY: mapped by `register` with this context, with no operation under way; given back once.
        let status = unsafe { self.library.calls.ucp_mem_unmap(self.context, memory.raw) };
        if let Err(error) = self.library.check("deregister memory", status) {
            tracing::warn!(%error, region = %memory.region.id(), "ucx");
        }
    }

    /// Learns how a peer's region is reached.
    ///
    /// The key must come from a UCX context: UCX itself checks it little.
    pub(crate) fn learn(&mut self, id: EndpointId, granted: &Granted<'_>) -> Result<()> {
        let endpoint = self.endpoint(id)?.raw;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the endpoint is open, the key is read during the call, the result is writable.
        let status = unsafe {
            self.library.calls.ucp_ep_rkey_unpack(
                endpoint,
                granted.key.as_ptr().cast(),
                &raw mut raw,
            )
        };
        self.library.check("unpack a remote key", status)?;
        let key = RemoteKey {
            raw,
            address: granted.address,
            bytes: granted.bytes,
        };
        let endpoint = self.endpoints.get_mut(&id);
        let before = endpoint.and_then(|endpoint| endpoint.keys.insert(granted.region, key));
        if let Some(before) = before {
            // SAFETY: replaced just now; the caller asks once for each region and forgets it before it asks again.
            unsafe { self.library.calls.ucp_rkey_destroy(before.raw) };
        }
        Ok(())
    }

    /// Lets go of a peer's region. No operation must be under way on it.
    pub(crate) fn forget(&mut self, id: EndpointId, region: RegionId) {
        let endpoint = self.endpoints.get_mut(&id);
        if let Some(key) = endpoint.and_then(|endpoint| endpoint.keys.remove(&region)) {
            // SAFETY: unpacked by `learn`, dropped only once, and nothing uses it by the caller's word.
            unsafe { self.library.calls.ucp_rkey_destroy(key.raw) };
        }
    }
}
