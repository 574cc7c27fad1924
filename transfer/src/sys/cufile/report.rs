//! cuFile, opened once in the life of a process: which one it is, and whether it goes past host memory.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};

use kvcache_core::{Error, ErrorKind, Result};

use super::binding as ffi;
use super::calls::{Code, CufileCalls, Properties};
use super::library::Libcufile;
use super::memory::Registered;
use crate::sys::cuda::Cuda;
use crate::sys::fork::Process;

/// Whether cuFile may take bytes through host memory, which it calls compatibility mode. It never says so of a file or a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageBounce {
    /// It may not (`allow_compat_mode` is off): what it does not move directly it refuses.
    Never,
    /// It may, wherever it finds no direct way, and does not tell.
    Allowed,
    /// It always does (`force_compat_mode`, or nothing that it reaches directly).
    Always,
}

/// What cuFile is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageReport {
    /// The library's version; none if it does not tell.
    pub version: Option<(u32, u32)>,
    /// The version of the kernel's module nvidia-fs; none if it is not loaded.
    pub module: Option<(u32, u32)>,
    /// The drives and file systems that it says it reaches directly, such as `NVMe` (by nvidia-fs) and `NVMe by P2PDMA` (by the kernel
    /// alone).
    pub reached: Vec<&'static str>,
    /// Whether bytes may go through host memory.
    pub bounce: StorageBounce,
}

/// What [`StorageReport::reached`] calls the library's bits.
const REACHED: [(u32, &str); 12] = [
    (ffi::CU_FILE_NVME_SUPPORTED, "NVMe"),
    (ffi::CU_FILE_NVME_P2P_SUPPORTED, "NVMe by P2PDMA"),
    (ffi::CU_FILE_NVMEOF_SUPPORTED, "NVMe-oF"),
    (ffi::CU_FILE_SCSI_SUPPORTED, "SCSI"),
    (ffi::CU_FILE_SCALEFLUX_CSD_SUPPORTED, "ScaleFlux CSD"),
    (ffi::CU_FILE_NVMESH_SUPPORTED, "NVMesh"),
    (ffi::CU_FILE_LUSTRE_SUPPORTED, "Lustre"),
    (ffi::CU_FILE_WEKAFS_SUPPORTED, "WekaFS"),
    (ffi::CU_FILE_NFS_SUPPORTED, "NFS"),
    (ffi::CU_FILE_GPFS_SUPPORTED, "Spectrum Scale"),
    (ffi::CU_FILE_BEEGFS_SUPPORTED, "BeeGFS"),
    (ffi::CU_FILE_SCATEFS_SUPPORTED, "ScaTeFS"),
];

impl StorageReport {
    fn of(calls: &dyn CufileCalls, properties: Properties) -> Self {
        let reached: Vec<_> = REACHED
            .iter()
            .filter(|(bit, _)| properties.reached >> bit & 1 != 0)
            .map(|(_, name)| *name)
            .collect();
        let bounce = match (calls.always_bounces(), properties.may_bounce) {
            (Some(true), _) => StorageBounce::Always,
            (_, true) if reached.is_empty() => StorageBounce::Always,
            (_, true) => StorageBounce::Allowed,
            (_, false) => StorageBounce::Never,
        };
        Self {
            version: calls.version().map(version),
            module: (properties.module != (0, 0)).then_some(properties.module),
            reached,
            bounce,
        }
    }
}

impl fmt::Display for StorageReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cuFile")?;
        if let Some((major, minor)) = self.version {
            write!(f, " {major}.{minor}")?;
        }
        match self.module {
            Some((major, minor)) => write!(f, ", nvidia-fs {major}.{minor}")?,
            None => f.write_str(", no nvidia-fs")?,
        }
        match &self.reached[..] {
            [] => f.write_str(", no drive that it reaches"),
            reached => write!(f, ", {}", reached.join(", ")),
        }
    }
}

fn version(number: i32) -> (u32, u32) {
    let number = u32::try_from(number).unwrap_or(0);
    (number / 1000, number % 1000 / 10)
}

/// What cuFile there is. Opens it, which makes contexts on the GPUs that this process sees and may take seconds the first time; not
/// where there is no CUDA driver.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with the reason: no library, no CUDA driver, or what the library says; nothing is opened without the
/// first two.
pub fn storage_probe() -> Result<StorageReport> {
    Ok(Cufile::get()?.report().clone())
}

/// cuFile, open.
pub(crate) struct Cufile {
    pub(super) calls: Arc<dyn CufileCalls>,
    pub(super) process: Process,
    /// Memory that is registered, by its address.
    pub(super) registered: Mutex<HashMap<u64, Registered>>,
    report: StorageReport,
    call_bytes_max: u64,
}

impl Cufile {
    /// Whether there is a library: loaded once in the life of the process, and not opened.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the reason.
    pub(crate) fn library() -> Result<Arc<dyn CufileCalls>> {
        static LIBRARY: OnceLock<Result<Arc<Libcufile>, String>> = OnceLock::new();
        let known = LIBRARY.get_or_init(|| Libcufile::load().map(Arc::new));
        match known {
            Ok(library) => Ok(library.clone()),
            Err(reason) => Err(unsupported(reason.clone())),
        }
    }

    /// The system's, opened once in the life of the process.
    ///
    /// # Errors
    /// As [`storage_probe`].
    pub(crate) fn get() -> Result<Arc<Self>> {
        static CUFILE: OnceLock<Result<Arc<Cufile>, String>> = OnceLock::new();
        let known = CUFILE.get_or_init(|| {
            let opened = Self::library().and_then(|library| {
                // Without a driver it would fail all the same, and print that to standard output and into a file of the working folder.
                Cuda::get()?;
                Self::open(library)
            });
            opened.map_err(|error| error.context().to_owned())
        });
        known.clone().map_err(unsupported)
    }

    /// Opens a library.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with what it says.
    pub(crate) fn open(calls: Arc<dyn CufileCalls>) -> Result<Arc<Self>> {
        let failed =
            |doing: &str, code: Code| unsupported(format!("cuFile: {doing}: {}", code.words()));
        match calls.open() {
            // By somebody else in this process.
            Ok(())
            | Err(Code {
                error: Code::ALREADY_OPEN,
                ..
            }) => {}
            Err(code) => return Err(failed("open", code)),
        }
        let properties = calls
            .properties()
            .map_err(|code| failed("tell its properties", code))?;
        let report = StorageReport::of(&*calls, properties);
        tracing::info!(%report, bounce = ?report.bounce, "cuFile is open");
        Ok(Arc::new(Self {
            calls,
            process: Process::current(),
            registered: Mutex::default(),
            report,
            call_bytes_max: properties.call_bytes_max,
        }))
    }

    pub(crate) fn report(&self) -> &StorageReport {
        &self.report
    }

    /// The most bytes that it moves in one piece; 0 if it does not tell.
    pub(crate) fn call_bytes_max(&self) -> u64 {
        self.call_bytes_max
    }
}

impl fmt::Debug for Cufile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cufile({})", self.report)
    }
}

fn unsupported(reason: String) -> Error {
    Error::new(ErrorKind::Unsupported, reason)
}
