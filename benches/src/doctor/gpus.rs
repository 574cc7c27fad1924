//! The CUDA driver, and the GPUs that it serves to this process.

use kvcache_core::Result;
use kvfabric_transfer::{CudaDevice, CudaReport, cuda_probe};

use super::{Finding, State};

const DRIVER: &str = "gpu: CUDA driver";

/// `version` is what the kernel's module says of itself.
pub(super) fn look(version: &str) -> Vec<Finding> {
    findings(version, cuda_probe())
}

fn findings(version: &str, probe: Result<CudaReport>) -> Vec<Finding> {
    let module = version.lines().next().map(str::trim);
    match probe {
        Ok(report) => {
            let devices = report.devices.iter().map(device);
            std::iter::once(driver(module, &report))
                .chain(devices)
                .collect()
        }
        Err(reason) => vec![match module {
            None => Finding::new(DRIVER, State::Absent, reason.to_string(), ""),
            Some(module) => Finding::new(
                DRIVER,
                State::Hint,
                format!("{reason}; {module}"),
                "the kernel's module is there, and this process cannot use it: libcuda.so.1 and /dev/nvidia* have to be in its container, of one version with the module",
            ),
        }],
    }
}

fn driver(module: Option<&str>, report: &CudaReport) -> Finding {
    let (major, minor) = report.version;
    let mut found = format!("serves CUDA {major}.{minor}");
    if let Some(module) = module {
        found = format!("{found}; {module}");
    }
    if report.has_batched_copies {
        return Finding::ok(DRIVER, found);
    }
    let advice = "costs a call for each scattered range: a driver for CUDA 12.8 or newer takes them all in one";
    Finding::new(DRIVER, State::Hint, found, advice)
}

fn device(device: &CudaDevice) -> Finding {
    let gib = device.bytes as f64 / (1 << 30) as f64;
    let (major, minor) = device.compute;
    let uuid: String = device
        .uuid
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Finding::ok(
        &format!("gpu: {}", device.ordinal),
        format!(
            "{}, {gib:.1} GiB, compute capability {major}.{minor}, {}, UUID {uuid}",
            device.name, device.pci
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvcache_core::{Error, ErrorKind};

    fn report(has_batched_copies: bool) -> CudaReport {
        CudaReport {
            version: (12, 8),
            has_batched_copies,
            devices: vec![CudaDevice {
                ordinal: 0,
                name: "A GPU".to_owned(),
                uuid: [0xab; 16],
                pci: "0000:17:00.0".to_owned(),
                bytes: 80 << 30,
                compute: (9, 0),
            }],
        }
    }

    #[test]
    fn a_driver_and_its_devices_are_named() {
        let found = findings("NVRM version: NVIDIA 570\nGCC", Ok(report(true)));
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].state, State::Ok);
        assert_eq!(found[0].found, "serves CUDA 12.8; NVRM version: NVIDIA 570");
        for part in ["A GPU", "80.0 GiB", "9.0", "0000:17:00.0", "abab"] {
            assert!(found[1].found.contains(part), "{part}: {}", found[1].found);
        }
        let found = findings("", Ok(report(false)));
        assert_eq!(found[0].state, State::Hint);
        assert!(found[0].advice.contains("12.8"));
    }

    /// Nothing at all, and a driver of which this process sees only one half.
    #[test]
    fn a_missing_driver_is_told_from_one_that_cannot_be_used() {
        let probe = || {
            Err(Error::new(
                ErrorKind::Unsupported,
                "no CUDA driver in this system",
            ))
        };
        let found = findings("", probe());
        assert_eq!((found.len(), found[0].state), (1, State::Absent));
        assert!(found[0].found.contains("no CUDA driver"));
        let found = findings("NVRM version: NVIDIA 570", probe());
        assert_eq!(found[0].state, State::Hint);
        assert!(found[0].advice.contains("container"));
    }
}
