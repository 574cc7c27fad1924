//! Registered memory, ours and the peers'.

use std::ffi::c_void;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::generated::ucp as ffi;
use super::operations::EndpointId;
use super::worker::{Memory, RemoteKey, Worker};
use crate::backend::Operation;
use crate::region::{RegionCore, RegionId};
use crate::sys::cuda::DeviceMemory;

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
        let (address, bytes) = (region.address()?, region.bytes());
        let kind = match region.device() {
            Some(memory) => {
                let kind = self.kind_of(memory);
                let kind = kind.map_err(|text| Error::new(ErrorKind::Unsupported, text))?;
                memory.open_to_cards();
                Some(kind)
            }
            None => None,
        };
        let fields = ffi::UCP_MEM_MAP_PARAM_FIELD_ADDRESS | ffi::UCP_MEM_MAP_PARAM_FIELD_LENGTH;
        // SAFETY: as in `connect`.
        let mut params: ffi::ucp_mem_map_params_t = unsafe { std::mem::zeroed() };
        params.field_mask = u64::from(fields);
        params.address = std::ptr::with_exposed_provenance_mut(address as usize);
        params.length = bytes as usize;
        if let Some(kind) = kind {
            params.field_mask |= u64::from(ffi::UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE);
            params.memory_type = kind;
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is open, and the range is mapped, or of a device, for as long as the region is kept, beside the
        // handle.
        let mut map = || unsafe {
            self.library
                .calls
                .ucp_mem_map(self.context, &raw const params, &raw mut raw)
        };
        let status = match region.device() {
            Some(memory) => memory.gpu().within(map)?,
            None => map(),
        };
        let doing = format!("register {bytes} bytes of {}", region.kind());
        self.library.check(&doing, status)?;
        let memory = Memory {
            raw,
            kind,
            region: region.clone(),
            users: 0,
        };
        self.memories.insert(region.id(), memory);
        Ok(())
    }

    /// As what UCX takes memory of a device, or why it does not.
    pub(crate) fn kind_of(&self, memory: &DeviceMemory) -> Result<ffi::ucs_memory_type_t, String> {
        if memory.is_of_process() {
            return Ok(ffi::UCS_MEMORY_TYPE_HOST);
        }
        let (version, device) = (self.library.version(), memory.ordinal());
        if !self.knows(ffi::UCS_MEMORY_TYPE_CUDA) {
            return Err(format!(
                "ucx {version} knows no memory of CUDA devices, such as device {device}: it was built without CUDA, or may not use it (UCX_TLS, UCX_MODULES)"
            ));
        }
        if is_before_1_16(version) {
            return Err(format!(
                "ucx {version} has the processor copy small pieces, which cannot reach memory of CUDA device {device}: 1.16 does not"
            ));
        }
        Ok(ffi::UCS_MEMORY_TYPE_CUDA)
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

impl Memory {
    /// Bytes of it, checked to be there, and for reads to be writable.
    pub(super) fn range(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
    ) -> Result<(*mut c_void, usize)> {
        if let Some(memory) = self.region.device() {
            let start = memory.at(offset, len)?;
            let start = std::ptr::with_exposed_provenance_mut(start as usize);
            return Ok((start, len as usize));
        }
        let mapping = self.region.mapping()?;
        let range = match operation {
            Operation::Read => mapping.sink(offset, len)?.raw(),
            Operation::Write => mapping.span(offset, len)?.raw(),
        };
        Ok((range.iov_base, range.iov_len))
    }
}

/// Whether remote access is by the older protocols of UCX, which take the pieces they copy by themselves for memory of the host (from
/// 1.16 on `PROTO_ENABLE` is on).
fn is_before_1_16(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>());
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < (1, 16),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers_and_not_text() {
        for old in ["1.13.1", "1.9.0", "1.15.0", "", "unknown"] {
            assert!(is_before_1_16(old), "{old}");
        }
        for new in ["1.16.0", "1.22.0", "2.0.0"] {
            assert!(!is_before_1_16(new), "{new}");
        }
    }
}
