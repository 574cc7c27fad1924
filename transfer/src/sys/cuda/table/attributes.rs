//! The driver's numbers of the facts that a device is asked for.

use cudarc::driver::sys::CUdevice_attribute as Known;

use super::super::calls::Attribute;

pub(super) fn known(attribute: Attribute) -> Known {
    match attribute {
        Attribute::ComputeMajor => Known::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        Attribute::ComputeMinor => Known::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        Attribute::UnifiedAddressing => Known::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING,
        Attribute::Multiprocessors => Known::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        Attribute::DmaBuf => Known::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED,
        Attribute::PeerMemory => Known::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED,
        Attribute::PeerMemoryMapped => {
            Known::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
        }
        Attribute::RemoteFlushes => Known::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS,
        Attribute::RemoteOrdering => Known::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING,
    }
}
