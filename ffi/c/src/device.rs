//! Memory of GPUs as regions, and what the CUDA driver of the system serves.

use std::ffi::c_char;
use std::fmt::Write;
use std::mem::offset_of;

use kvfabric::transfer::{CudaOptions, CudaReport, DeviceMemory, Fragments, Storage, cuda_probe};
use kvfabric::{Error, Result};

use crate::agent::kvf_agent;
use crate::agent_options::{microseconds, parse_flag};
use crate::boundary::{Listing, Out, boundary, enter, into_raw};
use crate::options::{self, SizePrefixed};
use crate::region::{kvf_region, parse_access};
use crate::status::kvf_status;

/// How CUDA devices are used. With all of it zero it is what is right for most machines.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_cuda_options {
    /// sizeof(struct kvf_cuda_options).
    pub size: usize,
    /// Bytes of pinned buffers for each device, a multiple of 1 MiB, up to 1 GiB; 0: 16 MiB.
    pub staging_bytes: u64,
    /// 1: host memory is not pinned, and goes through those buffers; 0: all memory of a region is, when a transfer first names it
    /// beside a device's.
    pub no_pin: u32,
    /// How long the device's thread looks whether copies are done before it sleeps in between, at most 10,000; 0: 20; KVF_OFF: it
    /// sleeps at once.
    pub polling_us: u32,
    /// Ranges of up to so many bytes, of which a transfer has several, are copied by a kernel, many in one launch; 0: the driver
    /// copies all; KVF_MEASURED: whoever was faster when memory of the device was first registered.
    pub fragments_bytes: u32,
    /// 1: peers of this machine do not open memory of devices that is exported to them, nor this agent theirs; 0: they do, and
    /// devices copy.
    pub no_peers: u32,
    /// Bytes of pinned memory for each device through which transfers with files, objects and peers go: a multiple of 1 MiB, from
    /// 2 MiB to 1 GiB; 0: 16 MiB.
    pub window_bytes: u64,
    /// How bytes go between memory of devices and files. 0: through pinned host memory; KVF_STORAGE_DIRECT: by cuFile (GPUDirect
    /// Storage) where it says that no copy of them is in host memory, which takes that its compatibility mode is off, and as for 0
    /// elsewhere; KVF_STORAGE_CUFILE: by cuFile wherever it takes a file, also where it may take them through host memory.
    pub storage: u32,
    /// Threads that wait in cuFile, where that is used, at most 256; 0: 16.
    pub storage_threads: u32,
}

/// By cuFile where that goes past host memory ([`kvf_cuda_options::storage`]).
pub const KVF_STORAGE_DIRECT: u32 = 1;
/// By cuFile wherever it takes a file ([`kvf_cuda_options::storage`]).
pub const KVF_STORAGE_CUFILE: u32 = 2;

/// What is faster is measured ([`kvf_cuda_options::fragments_bytes`]).
pub const KVF_MEASURED: u32 = 0xFFFF_FFFF;

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_cuda_options {
    const SIZE_MIN: usize = offset_of!(Self, fragments_bytes);
    const NAME: &'static str = "kvf_cuda_options";
}

/// # Safety
/// `options` is null or readable for its size.
pub(crate) unsafe fn cuda_options(options: *const kvf_cuda_options) -> Result<Option<CudaOptions>> {
    // SAFETY: null or readable for its size, by this function's contract.
    let options = unsafe { options::read_optional(options) }?;
    let parse = |options: kvf_cuda_options| {
        let default = CudaOptions::default();
        let or = |bytes: u64, default| if bytes == 0 { default } else { bytes };
        Ok(CudaOptions {
            pin: !parse_flag(options.no_pin, "kvf_cuda_options.no_pin")?,
            staging_bytes: or(options.staging_bytes, default.staging_bytes),
            window_bytes: or(options.window_bytes, default.window_bytes),
            peers: !parse_flag(options.no_peers, "kvf_cuda_options.no_peers")?,
            polling: microseconds(options.polling_us, default.polling),
            storage: match options.storage {
                0 => Storage::Staged,
                KVF_STORAGE_DIRECT => Storage::Direct,
                KVF_STORAGE_CUFILE => Storage::Cufile,
                other => {
                    let accepted = 0..=KVF_STORAGE_CUFILE;
                    return Err(Error::invalid("kvf_cuda_options.storage", other, accepted));
                }
            },
            storage_threads: match options.storage_threads {
                0 => default.storage_threads,
                threads => threads,
            },
            fragments: match options.fragments_bytes {
                0 => Fragments::Copies,
                KVF_MEASURED => Fragments::Measured,
                up_to_bytes => Fragments::Kernel { up_to_bytes },
            },
        })
    };
    options.map(parse).transpose()
}

/// What the CUDA driver of this system serves to this process: how many devices, and in words a line for the driver and one for
/// each device. Makes no context; the first call may take seconds.
///
/// With `buffer` NULL only its length is told, which counts the terminating NUL. KVF_INVALID when `capacity` is too small;
/// `len_out` is written then too. KVF_UNSUPPORTED when CUDA cannot be used; kvf_last_error says why.
///
/// # Safety
/// Each pointer is null or valid: `device_count_out` for a write, `buffer` for `capacity` writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_cuda_probe(
    device_count_out: *mut u32,
    buffer: *mut c_char,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(device_count_out, "device_count_out") }?;
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        let report = cuda_probe()?;
        listing.fill_text(&in_words(&report), "report")?;
        out.write(report.devices.len() as u32);
        Ok(())
    })
}

fn in_words(report: &CudaReport) -> String {
    let (major, minor) = report.version;
    let lists = match report.has_batched_copies {
        true => "in one call",
        false => "one by one",
    };
    let mut text = format!("CUDA {major}.{minor}, lists of copies {lists}");
    for device in &report.devices {
        let (major, minor) = device.compute;
        // To a string it cannot fail.
        let _ = write!(
            text,
            "\n{}: {}, {} bytes, compute capability {major}.{minor}, {}, UUID ",
            device.ordinal, device.name, device.bytes, device.pci
        );
        for byte in device.uuid {
            let _ = write!(text, "{byte:02x}");
        }
    }
    text
}

/// Registers memory of a GPU that the caller has allocated, by its address on the device, in this process. The driver is asked
/// whether all of it is there. Transfers move it from and to host memory of the same agent, and within the GPU; they begin at once:
/// what computes the bytes must be done before. `access` as in kvf_region_register: peers that may reach it open it on the same
/// machine, and reach it over network cards, or through host memory of this agent. Its kvf_region_base is NULL.
///
/// The memory must stay allocated and mapped until kvf_region_deregister or kvf_region_free has answered KVF_OK for the region.
///
/// KVF_UNSUPPORTED for an agent without kvf_agent_options.cuda, without CUDA, and for managed memory; KVF_INVALID for a device that
/// there is not, for no bytes, for memory of the host or of another device, and for a range that goes past its allocation.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `region_out` for a write. The device's memory is kept as said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_register_device(
    agent: *const kvf_agent,
    device: u32,
    address: u64,
    len: u64,
    access: u32,
    region_out: *mut *mut kvf_region,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let options = parse_access(access)?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(region_out, "region_out") }?;
        if address == 0 {
            return Err(Error::invalid("address", "NULL", "memory of a device"));
        }
        // SAFETY: stays as it is until the region is deregistered and drained, by contract.
        let memory = unsafe { DeviceMemory::from_raw(device, address, len) }?;
        let region = agent.agent.register_device_with(memory, options)?;
        out.write(into_raw(kvf_region::of_place(&agent, region)));
        Ok(())
    })
}

/// Allocates memory of the GPU with number `device`, of unspecified content, and registers it. It is freed after kvf_region_deregister
/// or kvf_region_free has answered KVF_OK for the region; that makes the driver wait until the GPU has done all it was asked for, by
/// anybody. Its address on the device goes to `address_out`. Otherwise as kvf_region_register_device.
///
/// KVF_UNSUPPORTED for an agent without kvf_agent_options.cuda and without CUDA; KVF_INVALID for a device that there is not, and no
/// bytes; KVF_BUSY when the device has no memory left.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `address_out` and `region_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_allocate_device(
    agent: *const kvf_agent,
    device: u32,
    len: u64,
    access: u32,
    address_out: *mut u64,
    region_out: *mut *mut kvf_region,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let options = parse_access(access)?;
        // SAFETY: null or writable, by contract.
        let address = unsafe { Out::new(address_out, "address_out") }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(region_out, "region_out") }?;
        if len == 0 {
            return Err(Error::invalid("len", len, 1..=u64::MAX));
        }
        let memory = DeviceMemory::allocate(device, len)?;
        let begins = memory.address();
        let region = agent.agent.register_device_with(memory, options)?;
        address.write(begins);
        out.write(into_raw(kvf_region::of_place(&agent, region)));
        Ok(())
    })
}
