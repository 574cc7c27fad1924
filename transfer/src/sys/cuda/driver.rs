//! The driver, found out once: which one it is, what it serves, or why there is none.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::{Attribute, Calls, Code, Device};
use super::direct::CudaDirect;
use super::gpu::Gpu;
use super::table::Libcuda;

/// The oldest driver that is used: CUDA 11.4 has all calls but the batched copy.
const VERSION_MIN: i32 = 11_040;

/// The environment's list of devices that a process sees.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// What the CUDA driver of this system serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaReport {
    /// The newest CUDA that the driver serves: major and minor.
    pub version: (u32, u32),
    /// Whether it copies many ranges in one call (`cuMemcpyBatchAsync`, CUDA 12.8 and later).
    pub has_batched_copies: bool,
    /// The devices that this process sees, by ordinal.
    pub devices: Vec<CudaDevice>,
}

/// A GPU that this process sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// Its number in this process, counted from 0; another process may number it otherwise.
    pub ordinal: u32,
    /// The vendor's name.
    pub name: String,
    /// What tells it from all others, in every process.
    pub uuid: [u8; 16],
    /// Its address on the PCI bus, such as `0000:17:00.0`.
    pub pci: String,
    /// Its memory, in bytes.
    pub bytes: u64,
    /// Compute capability: major and minor.
    pub compute: (u32, u32),
    /// What it lets network cards do with its memory.
    pub direct: CudaDirect,
}

/// What CUDA there is. Starts the driver, which may take seconds the first time, and makes no context.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with the reason: no driver, one that is too old or does not start, no device, or none that this
/// process may see.
pub fn cuda_probe() -> Result<CudaReport> {
    Cuda::get()?.report()
}

/// A driver that was started.
#[derive(Clone)]
pub(crate) struct Cuda(Arc<Inner>);

struct Inner {
    calls: Arc<dyn Calls>,
    version: i32,
    count: u32,
    /// The devices in use.
    gpus: Mutex<HashMap<u32, Weak<Gpu>>>,
}

impl Cuda {
    /// The system's, started once in the life of the process.
    ///
    /// # Errors
    /// As [`cuda_probe`].
    pub(crate) fn get() -> Result<Self> {
        static CUDA: OnceLock<Result<Cuda, String>> = OnceLock::new();
        let known = CUDA.get_or_init(|| {
            let visible = std::env::var(VISIBLE).ok();
            Self::start(Arc::new(Libcuda::load()?), visible.as_deref())
        });
        known.clone().map_err(unsupported)
    }

    /// Starts a driver.
    ///
    /// # Errors
    /// The reason, when it serves nothing here.
    pub(crate) fn start(calls: Arc<dyn Calls>, visible: Option<&str>) -> Result<Self, String> {
        let failed = |doing: &str, code| why_not(doing, code, &*calls, visible);
        // Before the start, which a driver that is too old may refuse for a reason that says less.
        let version = calls
            .driver_version()
            .map_err(|code| failed("tell its version", code))?;
        if version < VERSION_MIN {
            let (have, need) = (words(version), words(VERSION_MIN));
            return Err(format!(
                "the driver is too old: it serves CUDA {have}, {need} is needed"
            ));
        }
        calls.init().map_err(|code| failed("start", code))?;
        let count = calls
            .device_count()
            .map_err(|code| failed("count its devices", code))?;
        let count = u32::try_from(count).unwrap_or(0);
        if count == 0 {
            return Err(no_device(visible));
        }
        Ok(Self(Arc::new(Inner {
            calls,
            version,
            count,
            gpus: Mutex::default(),
        })))
    }

    /// What it serves.
    pub(crate) fn report(&self) -> Result<CudaReport> {
        let devices = (0..self.0.count).map(|ordinal| self.describe(ordinal));
        let version = u32::try_from(self.0.version).unwrap_or(0);
        Ok(CudaReport {
            version: (version / 1000, version % 1000 / 10),
            has_batched_copies: self.0.calls.has_batch(),
            devices: devices.collect::<Result<_>>()?,
        })
    }

    fn describe(&self, ordinal: u32) -> Result<CudaDevice> {
        let (calls, device) = (&*self.0.calls, self.device(ordinal)?);
        let failed = |code| fault(calls, &format!("describe device {ordinal}"), code);
        let number = |attribute| calls.attribute(device, attribute).map_err(failed);
        let major = number(Attribute::ComputeMajor)?;
        let minor = number(Attribute::ComputeMinor)?;
        Ok(CudaDevice {
            ordinal,
            name: calls.device_name(device).map_err(failed)?,
            uuid: calls.device_uuid(device).map_err(failed)?,
            pci: calls.device_pci(device).map_err(failed)?,
            bytes: calls.device_bytes(device).map_err(failed)?,
            compute: (major.unsigned_abs(), minor.unsigned_abs()),
            direct: CudaDirect::of(|attribute| calls.attribute(device, attribute)),
        })
    }

    /// The device of this process that is called so in every process.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when this process does not see it.
    pub(crate) fn gpu_named(&self, uuid: &[u8; 16]) -> Result<Arc<Gpu>> {
        for ordinal in 0..self.0.count {
            let found = self.0.calls.device_uuid(self.device(ordinal)?);
            let failed = |code| fault(&*self.0.calls, &format!("describe device {ordinal}"), code);
            if found.map_err(failed)? == *uuid {
                return self.gpu(ordinal);
            }
        }
        let uuid: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        Err(unsupported(format!(
            "the memory is of CUDA device {uuid}, which this process does not see ({VISIBLE})"
        )))
    }

    fn device(&self, ordinal: u32) -> Result<Device> {
        if ordinal >= self.0.count {
            return Err(Error::invalid("cuda device", ordinal, 0..self.0.count));
        }
        let found = self.0.calls.device(ordinal as i32);
        found.map_err(|code| fault(&*self.0.calls, &format!("find device {ordinal}"), code))
    }

    /// A device with its primary context, the one that engines use, too; kept for as long as anybody holds it.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for an ordinal that there is not, [`ErrorKind::Unsupported`] without unified addresses;
    /// otherwise what the driver says.
    pub(crate) fn gpu(&self, ordinal: u32) -> Result<Arc<Gpu>> {
        let mut gpus = self.0.gpus.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = gpus.get(&ordinal).and_then(Weak::upgrade) {
            return Ok(gpu);
        }
        let device = self.device(ordinal)?;
        let gpu = Arc::new(Gpu::retain(self.0.calls.clone(), device, ordinal)?);
        gpus.insert(ordinal, Arc::downgrade(&gpu));
        Ok(gpu)
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Cuda {}, {} devices",
            words(self.0.version),
            self.0.count
        )
    }
}

fn unsupported(reason: String) -> Error {
    Error::new(ErrorKind::Unsupported, reason)
}

fn words(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn no_device(visible: Option<&str>) -> String {
    match visible {
        Some(visible) => {
            format!("no CUDA device: {VISIBLE}={visible:?} leaves none to this process")
        }
        None => "no CUDA device in this system".to_owned(),
    }
}

/// Why a driver does not start, as far as its answer tells what to do about it.
fn why_not(doing: &str, code: Code, calls: &dyn Calls, visible: Option<&str>) -> String {
    let advice = match code {
        Code::NO_DEVICE => return no_device(visible),
        Code::STUB_LIBRARY => {
            "it is the stub of a toolkit: put the driver's own before it in LD_LIBRARY_PATH"
        }
        Code::SYSTEM_NOT_READY => "on machines with NVSwitch the fabric manager has to run",
        Code::SYSTEM_DRIVER_MISMATCH => {
            "it is of another version than the kernel's module: restart after an upgrade"
        }
        Code::COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "it is a compatibility package that does not serve this device"
        }
        Code::DEVICE_UNAVAILABLE => "a device is used by another process alone",
        Code::NOT_PERMITTED => "the process may not open /dev/nvidia*",
        Code::UNKNOWN => "mostly the kernel's module is not loaded, or /dev/nvidia-uvm is missing",
        _ => return format!("libcuda cannot {doing}: {}", describe(calls, code)),
    };
    format!(
        "libcuda cannot {doing}: {}; {advice}",
        describe(calls, code)
    )
}

fn describe(calls: &dyn Calls, code: Code) -> String {
    match calls.text(code) {
        Some((name, text)) => format!("{text} ({name}, {})", code.0),
        None => format!("error {} of the driver", code.0),
    }
}

/// What a call's answer means, as an error.
pub(super) fn fault(calls: &dyn Calls, doing: &str, code: Code) -> Error {
    let kind = match code {
        Code::INVALID_VALUE | Code::INVALID_DEVICE => ErrorKind::Invalid,
        Code::OUT_OF_MEMORY => ErrorKind::Busy,
        Code::NO_DEVICE | Code::NOT_SUPPORTED => ErrorKind::Unsupported,
        Code::NOT_PERMITTED => ErrorKind::Denied,
        _ => ErrorKind::Io,
    };
    Error::new(kind, format!("cuda: {doing}: {}", describe(calls, code)))
}
