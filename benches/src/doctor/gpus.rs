//! The CUDA driver, and the GPUs that it serves to this process.

use std::path::Path;

use kvcache_core::Result;
use kvfabric_transfer::{CudaDevice, CudaReport, RdmaPort, RemoteWrites, cuda_probe};

use super::{Finding, State};

/// Where modules of the kernel tell of themselves that let cards reach memory of GPUs by its address.
const PEER_MODULES: [&str; 3] = [
    "/sys/module/nvidia_peermem",
    "/sys/kernel/mm/memory_peers/nv_mem",
    "/sys/kernel/mm/memory_peers/nv_mem_nc",
];

const DRIVER: &str = "gpu: CUDA driver";

/// `version` is what the kernel's module says of itself.
pub(super) fn look(version: &str, ports: &[RdmaPort]) -> Vec<Finding> {
    let probe = cuda_probe();
    let has_module = PEER_MODULES.iter().any(|path| Path::new(path).exists());
    let of_cards: Vec<Finding> = match &probe {
        Ok(report) if !ports.is_empty() => {
            let devices = report.devices.iter();
            devices
                .map(|one| by_cards(one, ports, has_module))
                .collect()
        }
        _ => Vec::new(),
    };
    let mut all = findings(version, probe);
    all.extend(of_cards);
    all
}

/// Whether RDMA devices reach a GPU's memory themselves, and how.
fn by_cards(device: &CudaDevice, ports: &[RdmaPort], has_module: bool) -> Finding {
    let what = format!("gpu: {} by network cards", device.ordinal);
    let visible = match device.direct.remote_writes {
        RemoteWrites::Ordered => "what they write is visible at once",
        RemoteWrites::Flushed => "what they write is flushed by the driver before anybody is told",
        RemoteWrites::Unordered => "kernels that run already may not see what they write",
    };
    let mut takers: Vec<&str> = ports
        .iter()
        .filter(|port| port.dma_bufs.is_ok())
        .map(|port| port.device.as_str())
        .collect();
    takers.dedup();
    let lacking = |text: String| {
        Finding::new(
            &what,
            State::Hint,
            text,
            "costs a copy through host memory for each transfer: verbs and ucx refuse memory of this GPU. Either dma-bufs on both sides (open kernel modules of CUDA 11.7 and later, Linux 5.12, a \
             card's driver that takes them) or modprobe nvidia_peermem",
        )
    };
    let device = &device.direct;
    match (
        device.dma_buf,
        takers.is_empty(),
        device.peer_memory && has_module,
    ) {
        (true, false, _) => Finding::ok(
            &what,
            format!("as dma-bufs by {}; {visible}", takers.join(", ")),
        ),
        (_, _, true) => Finding::ok(
            &what,
            format!("by address, through a module of the kernel; {visible}"),
        ),
        (gives, takes_none, false) => {
            let gpu = if gives {
                "gives dma-bufs"
            } else {
                "gives no dma-bufs"
            };
            let refused = ports.iter().find_map(|port| port.dma_bufs.as_ref().err());
            let cards = match refused.filter(|_| takes_none) {
                Some(reason) => format!("no card takes them: {reason}"),
                None => "cards take them".to_owned(),
            };
            let module = if has_module {
                "the GPU has no peer memory"
            } else {
                "no nvidia_peermem"
            };
            lacking(format!("not: the GPU {gpu}; {cards}; {module}"))
        }
    }
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
    use kvfabric_transfer::CudaDirect;

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
                direct: CudaDirect {
                    dma_buf: true,
                    peer_memory: true,
                    peer_memory_mapped: true,
                    remote_writes: RemoteWrites::Ordered,
                },
            }],
        }
    }

    fn port(dma_bufs: std::result::Result<(), String>) -> RdmaPort {
        RdmaPort {
            device: "mlx5_0".to_owned(),
            port: 1,
            is_active: true,
            is_ethernet: true,
            mtu: 4096,
            gids: Vec::new(),
            gid_used: None,
            work_max: 128,
            dma_bufs,
        }
    }

    /// As a dma-buf before by address, and what each side lacks where neither goes.
    #[test]
    fn how_cards_reach_a_gpu_is_said_or_what_they_lack() {
        let mut device = report(true).devices.remove(0);
        let (takes, refuses) = ([port(Ok(()))], [port(Err("too old".to_owned()))]);
        let found = by_cards(&device, &takes, true);
        assert_eq!(found.state, State::Ok);
        assert!(
            found.found.starts_with("as dma-bufs by mlx5_0; "),
            "{}",
            found.found
        );
        let found = by_cards(&device, &refuses, true);
        assert_eq!(found.state, State::Ok);
        assert!(found.found.starts_with("by address, "), "{}", found.found);
        let found = by_cards(&device, &refuses, false);
        assert_eq!(found.state, State::Hint);
        for part in ["no card takes them: too old", "no nvidia_peermem"] {
            assert!(found.found.contains(part), "{}", found.found);
        }
        assert!(found.advice.starts_with("costs "));
        device.direct.dma_buf = false;
        let found = by_cards(&device, &takes, false);
        assert!(found.found.contains("gives no dma-bufs"), "{}", found.found);
        device.direct.remote_writes = RemoteWrites::Unordered;
        let found = by_cards(&device, &takes, true);
        assert!(found.found.contains("may not see"), "{}", found.found);
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
