//! Streams of an engine, as other packages tell of them.

use kvfabric::transfer::CudaStream;
use kvfabric::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::errors::to_python;

/// The version of `__cuda_stream__` that is known here.
const PROTOCOL: u32 = 0;

/// A stream's handle and the number of its device.
#[derive(Clone, Copy)]
pub(crate) struct Lent {
    device: u32,
    handle: u64,
}

impl Lent {
    /// What an object says of its stream: `__cuda_stream__`, or an attribute `cuda_stream`, as PyTorch's have; or the handle itself.
    ///
    /// `device` is the number of its device, for those that do not tell it by an attribute `device_index`; 0 if neither does.
    pub(crate) fn of_object(object: &Bound<'_, PyAny>, device: Option<u32>) -> PyResult<Self> {
        let told = match object.getattr_opt("device_index")? {
            Some(index) => Some(index.extract::<u32>()?),
            None => None,
        };
        if let (Some(told), Some(device)) = (told, device)
            && told != device
        {
            let text = format!("a stream of device {told}, said to be of device {device}");
            return Err(to_python(Error::new(ErrorKind::Invalid, text)));
        }
        Ok(Self {
            device: device.or(told).unwrap_or(0),
            handle: handle_of(object)?,
        })
    }

    /// The stream as it is used, during a call that the object outlives.
    pub(crate) fn open(self) -> Result<CudaStream> {
        // SAFETY: the caller of `Transfer.post` and `Transfer.order_stream` promises that it is a stream, and captures nothing meanwhile;
        // it lives during the call, as the caller holds the object, and what is made here is dropped before the call returns.
        unsafe { CudaStream::from_raw(self.device, self.handle) }
    }
}

fn handle_of(object: &Bound<'_, PyAny>) -> PyResult<u64> {
    if let Some(protocol) = object.getattr_opt("__cuda_stream__")? {
        // A method by now; it was a property.
        let told = match protocol.is_callable() {
            true => protocol.call0()?,
            false => protocol,
        };
        let (version, handle): (u32, u64) = told.extract()?;
        if version != PROTOCOL {
            let text =
                format!("__cuda_stream__ of version {version}: only {PROTOCOL} is known here");
            return Err(to_python(Error::new(ErrorKind::Unsupported, text)));
        }
        return Ok(handle);
    }
    if let Some(handle) = object.getattr_opt("cuda_stream")? {
        return handle.extract();
    }
    object.extract().map_err(|_| {
        let text = "an object without __cuda_stream__ and cuda_stream, and no handle of a stream";
        to_python(Error::new(ErrorKind::Invalid, text))
    })
}
