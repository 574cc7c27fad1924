//! Memory of GPUs as regions: whose it is and where it begins, as other packages tell it.

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use kvfabric::transfer::{self, CudaOptions, DeviceMemory, Fragments, RegionOptions, Storage};
use kvfabric::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

use crate::errors::to_python;
use crate::fabric::Fabric;
use crate::life::parse_timeout;
use crate::region::Region;

/// DLPack's number for memory of a CUDA device.
const DLPACK_CUDA: i32 = 2;

/// What a capsule is called while nobody has taken its tensor.
const CAPSULE: &CStr = c"dltensor";

/// The most dimensions that are believed.
const DIMENSIONS_MAX: usize = 64;

/// `kvfabric.Cuda`.
#[derive(FromPyObject)]
pub(crate) struct Cuda {
    pin: bool,
    staging_bytes: u64,
    polling: f64,
    fragments: Small,
    window_bytes: u64,
    peers: bool,
    storage: String,
    storage_threads: u32,
}

/// Which ranges a kernel copies: none, those up to so many bytes, or what is measured.
#[derive(FromPyObject)]
enum Small {
    UpTo(u32),
    Named(String),
}

impl Small {
    fn parse(self) -> PyResult<Fragments> {
        match self {
            Self::UpTo(0) => Ok(Fragments::Copies),
            Self::UpTo(up_to_bytes) => Ok(Fragments::Kernel { up_to_bytes }),
            Self::Named(name) if name == "measured" => Ok(Fragments::Measured),
            Self::Named(name) => {
                let accepted = "\"measured\" or a number of bytes";
                Err(invalid("cuda.fragments", format!("{name:?}"), accepted))
            }
        }
    }
}

impl Cuda {
    pub(crate) fn options(self) -> PyResult<CudaOptions> {
        Ok(CudaOptions {
            pin: self.pin,
            staging_bytes: self.staging_bytes,
            window_bytes: self.window_bytes,
            peers: self.peers,
            polling: parse_timeout(self.polling)?,
            fragments: self.fragments.parse()?,
            storage: match &*self.storage {
                "staged" => Storage::Staged,
                "direct" => Storage::Direct,
                "cufile" => Storage::Cufile,
                other => {
                    let accepted = "\"staged\", \"direct\" or \"cufile\"";
                    return Err(invalid("cuda.storage", format!("{other:?}"), accepted));
                }
            },
            storage_threads: self.storage_threads,
        })
    }
}

/// A device's memory, and the object that keeps it.
pub(crate) struct Lent {
    ordinal: u32,
    address: u64,
    len: u64,
    keep: Py<PyAny>,
}

impl Lent {
    pub(crate) fn new(ordinal: u32, address: u64, len: u64, keep: Py<PyAny>) -> Self {
        Self {
            ordinal,
            address,
            len,
            keep,
        }
    }

    /// Registers memory that its caller promises to keep.
    pub(crate) fn register(self, fabric: &Arc<Fabric>, options: RegionOptions) -> PyResult<Region> {
        // SAFETY: the caller of `Agent.register_device_address` promises that it stays as it is until the region is
        // deregistered; an array's does, because the array is kept alive.
        let memory = unsafe { DeviceMemory::from_raw(self.ordinal, self.address, self.len) };
        let registered = memory.and_then(|it| fabric.agent.register_device_with(it, options));
        let region = registered.map_err(to_python)?;
        Ok(Region::on_device(fabric, region, self.address, self.keep))
    }

    /// The memory, and what keeps it.
    pub(crate) fn into_memory(self) -> kvfabric::Result<(DeviceMemory, Py<PyAny>)> {
        // SAFETY: an array's memory stays as it is because the array is kept alive, which is returned for that.
        let memory = unsafe { DeviceMemory::from_raw(self.ordinal, self.address, self.len) }?;
        Ok((memory, self.keep))
    }

    /// What an object says of its memory: a DLPack capsule, or what gives one, or what has `__cuda_array_interface__`.
    ///
    /// `device` is the number of the device, for those that do not tell it.
    pub(crate) fn of_object(object: &Bound<'_, PyAny>, device: Option<u32>) -> PyResult<Self> {
        if let Ok(capsule) = object.cast::<PyCapsule>() {
            return Self::of_capsule(capsule);
        }
        if object.hasattr("__dlpack_device__")? {
            let (kind, _): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
            check_kind(kind)?;
            let capsule = object.call_method0("__dlpack__")?;
            return Self::of_capsule(capsule.cast::<PyCapsule>()?);
        }
        if object.hasattr("__cuda_array_interface__")? {
            return Self::of_interface(object, device);
        }
        let text =
            "an object without __dlpack__ and __cuda_array_interface__, and no DLPack capsule";
        Err(to_python(Error::new(ErrorKind::Invalid, text)))
    }

    /// The capsule is kept, and nobody else may take its tensor: whoever made it ends it with the capsule.
    fn of_capsule(capsule: &Bound<'_, PyCapsule>) -> PyResult<Self> {
        // Of another name: taken already, or no tensor, or one of a newer version that nobody asked for.
        let tensor = capsule.pointer_checked(Some(CAPSULE)).map_err(|_| {
            let text = "a capsule that is no DLPack tensor, or whose tensor was taken";
            to_python(Error::new(ErrorKind::Invalid, text))
        })?;
        // SAFETY: a capsule of this name points to a tensor of DLPack's layout, which lives as long as the capsule does; it is only
        // read, and copied.
        let tensor = unsafe { tensor.cast::<Tensor>().as_ptr().read() };
        check_kind(tensor.device_kind)?;
        let ordinal = u32::try_from(tensor.device)
            .map_err(|_| invalid("device of the capsule", tensor.device, "0 or more"))?;
        let dimensions = usize::try_from(tensor.dimensions).unwrap_or(usize::MAX);
        if dimensions > DIMENSIONS_MAX {
            return Err(invalid("dimensions", tensor.dimensions, "at most 64"));
        }
        // SAFETY: as many numbers as there are dimensions, or null, by DLPack; alive as above.
        let shape = unsafe { numbers(tensor.shape, dimensions) };
        // SAFETY: as above.
        let strides = unsafe { numbers(tensor.strides, dimensions) };
        let shape = shape.unwrap_or_default();
        if strides.is_some_and(|strides| !is_contiguous(&shape, &strides)) {
            return Err(scattered());
        }
        let bits = u64::from(tensor.bits) * u64::from(tensor.lanes);
        let len = bytes_of(&shape, bits)?;
        Ok(Self {
            ordinal,
            address: (tensor.data.addr() as u64).saturating_add(tensor.byte_offset),
            len,
            keep: capsule.clone().into_any().unbind(),
        })
    }

    fn of_interface(object: &Bound<'_, PyAny>, device: Option<u32>) -> PyResult<Self> {
        let facts = object.getattr("__cuda_array_interface__")?;
        let facts = facts.cast::<PyDict>()?;
        let fact = |name: &str| {
            let value = facts.get_item(name)?;
            value.ok_or_else(|| invalid("__cuda_array_interface__", format!("no {name:?}"), "one"))
        };
        let shape: Vec<i64> = fact("shape")?.extract()?;
        let kind: String = fact("typestr")?.extract()?;
        let (address, _): (u64, bool) = fact("data")?.extract()?;
        let strides: Option<Vec<i64>> = match facts.get_item("strides")? {
            Some(strides) => strides.extract()?,
            None => None,
        };
        // "<f2": byte order, kind, bytes of an element.
        let element = kind.get(2..).and_then(|bytes| bytes.parse::<i64>().ok());
        let Some(element) = element.filter(|element| *element > 0) else {
            return Err(invalid("typestr", format!("{kind:?}"), "such as \"<f2\""));
        };
        let in_elements = strides.map(|strides| {
            let whole = |stride: &i64| {
                let fits = stride % element == 0;
                fits.then_some(stride / element)
            };
            strides.iter().map(whole).collect::<Option<Vec<_>>>()
        });
        match in_elements {
            Some(Some(strides)) if !is_contiguous(&shape, &strides) => return Err(scattered()),
            Some(None) => return Err(scattered()),
            _ => {}
        }
        Ok(Self {
            // The driver says whose it is, if that is wrong.
            ordinal: device.unwrap_or(0),
            address,
            len: bytes_of(&shape, element as u64 * 8)?,
            keep: object.clone().unbind(),
        })
    }
}

/// `DLManagedTensor`, as far as it is read.
#[derive(Clone, Copy)]
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_kind: i32,
    device: i32,
    dimensions: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// # Safety
/// `place` is null, or points to `count` numbers that nobody changes meanwhile.
unsafe fn numbers(place: *const i64, count: usize) -> Option<Vec<i64>> {
    if place.is_null() || !place.is_aligned() {
        return None;
    }
    // SAFETY: not null, aligned, and so many numbers, by this function's contract.
    Some(unsafe { std::slice::from_raw_parts(place, count) }.to_vec())
}

fn check_kind(kind: i32) -> PyResult<()> {
    if kind == DLPACK_CUDA {
        return Ok(());
    }
    let text = format!(
        "memory of a device of DLPack's kind {kind}: only CUDA's ({DLPACK_CUDA}) is known here"
    );
    Err(to_python(Error::new(ErrorKind::Unsupported, text)))
}

/// Whether elements lie one after the other, the last dimension's side by side.
fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut wanted = 1_i64;
    let mut dimensions = shape.iter().zip(strides).rev();
    shape.len() == strides.len()
        && dimensions.all(|(&count, &stride)| {
            let fits = count == 1 || stride == wanted;
            wanted = wanted.saturating_mul(count);
            fits
        })
}

fn bytes_of(shape: &[i64], bits: u64) -> PyResult<u64> {
    let elements = shape.iter().try_fold(1_u64, |product, &count| {
        product.checked_mul(u64::try_from(count).ok()?)
    });
    let bytes = elements.and_then(|count| count.checked_mul(bits));
    match bytes {
        Some(bits) if bits > 0 && bits.is_multiple_of(8) => Ok(bits / 8),
        _ => Err(invalid(
            "shape",
            format!("{shape:?}"),
            "whole bytes, and some",
        )),
    }
}

fn scattered() -> PyErr {
    let text = "the array is not contiguous: register what it is a view of";
    to_python(Error::new(ErrorKind::Invalid, text))
}

fn invalid(field: &str, found: impl std::fmt::Display, accepted: &str) -> PyErr {
    to_python(Error::invalid(field, found, accepted))
}

/// What the CUDA driver of this system serves: (major, minor), whether it copies lists in one call, and for each device its number,
/// name, UUID, PCI address, bytes, and (major, minor).
#[pyfunction]
pub(crate) fn cuda_facts(py: Python<'_>) -> PyResult<Facts> {
    let report = py.detach(transfer::cuda_probe).map_err(to_python)?;
    let device = |device: transfer::CudaDevice| {
        let uuid = device
            .uuid
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let transfer::CudaDevice {
            ordinal,
            name,
            pci,
            bytes,
            compute,
            ..
        } = device;
        (ordinal, name, uuid, pci, bytes, compute)
    };
    let devices = report.devices.into_iter().map(device).collect();
    Ok((report.version, report.has_batched_copies, devices))
}

type Facts = (
    (u32, u32),
    bool,
    Vec<(u32, String, String, String, u64, (u32, u32))>,
);
