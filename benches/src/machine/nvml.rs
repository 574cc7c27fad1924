//! What NVIDIA's management library (NVML) says of GPUs: the links between them, and what slows them down.
//!
//! Nothing of it was read on a GPU yet: tests use a library of their own beneath the same calls.

use std::ffi::OsStr;
use std::fmt;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{P2pCapabilitiesIndex, P2pStatus};
use nvml_wrapper::enum_wrappers::nv_link::ErrorCounter;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use serde::Serialize;

/// The library as drivers install it; the name without a number comes with development files only.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// How long a driver may take to answer everything: one whose GPU has fallen off the bus may never do so.
const PATIENCE: Duration = Duration::from_secs(20);

/// The most links that a GPU has (`NVML_NVLINK_MAX_LINKS`).
const LINKS_MAX: u32 = 18;

/// All that was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Gpus {
    /// The driver's version.
    pub(crate) driver: String,
    pub(crate) gpus: Vec<Gpu>,
    /// Each two of them once, in their order.
    pub(crate) pairs: Vec<Pair>,
    /// What the driver says of GPUs that do not answer.
    pub(crate) lost: Vec<String>,
}

impl Gpus {
    /// Asks the driver of this machine.
    ///
    /// # Errors
    /// Why it tells nothing: no library, no driver, no answer in time.
    pub(crate) fn read() -> Result<Self, String> {
        read_with(LIBRARY, PATIENCE)
    }

    /// What figures of the GPU at this address depend on, or why it is not known.
    pub(crate) fn line(found: &Result<Self, String>, address: &str) -> String {
        let driver = match found {
            Ok(driver) => driver,
            Err(reason) => return format!("NVML: {reason}"),
        };
        let Some(gpu) = driver.gpus.iter().find(|gpu| gpu.address == address) else {
            return format!("NVML: driver {}, nothing of {address}", driver.driver);
        };
        let mut parts = vec![format!("NVML: driver {}", driver.driver)];
        parts.extend(gpu.pcie.map(|widths| format!("PCIe {widths}")));
        let active = gpu.links.iter().filter(|link| link.is_active).count();
        parts.push(format!("{active} NVLinks up"));
        parts.extend(
            gpu.bar1_bytes
                .map(|bytes| format!("BAR1 of {} MiB", bytes >> 20)),
        );
        if gpu.is_divided {
            parts.push("divided into instances (MIG)".to_owned());
        }
        if !gpu.slowed_by.is_empty() {
            parts.push(format!("slowed by {}", gpu.slowed_by.join(", ")));
        }
        parts.join(", ")
    }

    /// How many NVLinks join two addresses.
    pub(crate) fn links(&self, one: &str, other: &str) -> u32 {
        let found = self.pairs.iter().find(|pair| {
            (pair.one == one && pair.other == other) || (pair.one == other && pair.other == one)
        });
        found.map_or(0, |pair| pair.links)
    }
}

/// One GPU. What the driver did not tell is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Gpu {
    /// Its PCI address, as `/sys` writes it.
    pub(crate) address: String,
    /// Generation and lanes of PCI, now and at most.
    pub(crate) pcie: Option<Widths>,
    /// Bytes that other devices and the processor can reach at a time.
    pub(crate) bar1_bytes: Option<u64>,
    pub(crate) memory_bytes: Option<u64>,
    /// Divided into instances (MIG).
    pub(crate) is_divided: bool,
    /// Why its clocks are lower than they could be.
    pub(crate) slowed_by: Vec<&'static str>,
    pub(crate) links: Vec<NvLink>,
}

/// A generation and a number of lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Widths {
    pub(crate) now: (u32, u32),
    pub(crate) most: (u32, u32),
}

/// One NVLink of a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct NvLink {
    pub(crate) is_active: bool,
    /// Of NVLink: 4 is Hopper's.
    pub(crate) version: Option<u32>,
    /// The PCI address at its other end: a GPU's, or a switch's.
    pub(crate) remote: Option<String>,
    /// Replays, recoveries and checksum errors since the driver was loaded.
    pub(crate) errors: u64,
}

/// Two GPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Pair {
    pub(crate) one: String,
    pub(crate) other: String,
    /// NVLinks that join them, also by switches.
    pub(crate) links: u32,
    /// Why one cannot read the other's memory; none if it can.
    pub(crate) refusal: Option<String>,
}

fn read_with(library: &str, patience: Duration) -> Result<Gpus, String> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let name = library.to_owned();
    // Left behind when it does not come back: nothing can end a call of a driver.
    let started = thread::Builder::new()
        .name("nvml".to_owned())
        .spawn(move || drop(sender.send(ask(&name))));
    started.map_err(|error| format!("start a thread: {error}"))?;
    match receiver.recv_timeout(patience) {
        Ok(answer) => answer.map_err(|error| format!("{library}: {error}")),
        Err(mpsc::RecvTimeoutError::Timeout) => {
            let seconds = patience.as_secs_f64();
            Err(format!("{library} has not answered for {seconds} s"))
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(format!("{library}: no answer")),
    }
}

fn ask(library: &str) -> Result<Gpus, NvmlError> {
    let nvml = Nvml::builder().lib_path(OsStr::new(library)).init()?;
    let (mut devices, mut lost) = (Vec::new(), Vec::new());
    for number in 0..nvml.device_count()? {
        // One that was lost must not hide the others.
        let found = nvml
            .device_by_index(number)
            .and_then(|device| Ok((gpu(&device)?, device)));
        match found {
            Ok(found) => devices.push(found),
            Err(error) => lost.push(format!("GPU {number}: {error}")),
        }
    }
    let mut pairs = Vec::new();
    for (place, one) in devices.iter().enumerate() {
        pairs.extend(devices[place + 1..].iter().map(|other| pair(one, other)));
    }
    Ok(Gpus {
        driver: nvml.sys_driver_version()?,
        gpus: devices.into_iter().map(|(gpu, _)| gpu).collect(),
        pairs,
        lost,
    })
}

/// # Errors
/// When it has no address; anything else that is not told is none.
fn gpu(device: &Device<'_>) -> Result<Gpu, NvmlError> {
    let widths = || -> Result<Widths, NvmlError> {
        let (generation, lanes) = (
            device.current_pcie_link_gen()?,
            device.current_pcie_link_width()?,
        );
        let most = (device.max_pcie_link_gen()?, device.max_pcie_link_width()?);
        Ok(Widths {
            now: (generation, lanes),
            most,
        })
    };
    let slow = device.current_throttle_reasons();
    Ok(Gpu {
        address: address(&device.pci_info()?.bus_id),
        pcie: widths().ok(),
        bar1_bytes: device.bar1_memory_info().ok().map(|found| found.total),
        memory_bytes: device.memory_info().ok().map(|found| found.total),
        is_divided: device.mig_mode().is_ok_and(|mode| mode.current != 0),
        slowed_by: slow.map(slowed_by).unwrap_or_default(),
        links: (0..LINKS_MAX)
            .filter_map(|number| link(device, number))
            .collect(),
    })
}

/// A link that the GPU has.
fn link(device: &Device<'_>, number: u32) -> Option<NvLink> {
    let link = device.link_wrapper_for(number);
    let is_active = link.is_active().ok()?;
    let counters = [
        ErrorCounter::DlReplay,
        ErrorCounter::DlRecovery,
        ErrorCounter::DlCrcFlit,
        ErrorCounter::DlCrcData,
    ];
    let errors = counters.map(|counter| link.error_counter(counter).unwrap_or(0));
    let remote = link.remote_pci_info().ok();
    Some(NvLink {
        is_active,
        version: link.version().ok(),
        remote: remote.map(|found| address(&found.bus_id)),
        errors: errors
            .iter()
            .fold(0, |sum, count| sum.saturating_add(*count)),
    })
}

fn pair(one: &(Gpu, Device<'_>), other: &(Gpu, Device<'_>)) -> Pair {
    let status = |what| one.1.p2p_status(&other.1, what);
    let active = |gpu: &Gpu| gpu.links.iter().filter(|link| link.is_active).count();
    let leads_there =
        |link: &&NvLink| link.is_active && link.remote.as_ref() == Some(&other.0.address);
    let direct = one.0.links.iter().filter(leads_there).count();
    let links = match status(P2pCapabilitiesIndex::NvLink) {
        _ if direct > 0 => direct,
        // By switches, which join every link of one with every link of the other.
        Ok(P2pStatus::Ok) => active(&one.0).min(active(&other.0)),
        _ => 0,
    };
    let refusal = match status(P2pCapabilitiesIndex::Read) {
        Ok(P2pStatus::Ok) => None,
        Ok(P2pStatus::ChipsetNotSupported) => Some("not by this chipset".to_owned()),
        Ok(P2pStatus::GpuNotSupported) => Some("not by these GPUs".to_owned()),
        Ok(P2pStatus::IohTopologyNotSupported) => {
            Some("not across the processors' link".to_owned())
        }
        Ok(P2pStatus::DisabledByRegkey) => Some("switched off in the driver".to_owned()),
        Ok(P2pStatus::NotSupported) => Some("not supported".to_owned()),
        Ok(P2pStatus::Unknown) => Some("not told".to_owned()),
        Err(error) => Some(format!("not told: {error}")),
    };
    Pair {
        one: one.0.address.clone(),
        other: other.0.address.clone(),
        links: links as u32,
        refusal,
    }
}

/// `00000000:17:00.0` as `0000:17:00.0`: the driver writes eight digits of the domain, `/sys` at least four.
fn address(bus: &str) -> String {
    let text = bus.to_ascii_lowercase();
    match text.split_once(':') {
        Some((domain, rest)) => {
            let digits = domain.trim_start_matches('0');
            format!("{digits:0>4}:{rest}")
        }
        None => text,
    }
}

/// What lowers clocks, but for rest and for what somebody has set.
fn slowed_by(reasons: ThrottleReasons) -> Vec<&'static str> {
    let words = [
        (ThrottleReasons::SW_POWER_CAP, "its power limit"),
        (ThrottleReasons::HW_SLOWDOWN, "the hardware (heat or power)"),
        (ThrottleReasons::SW_THERMAL_SLOWDOWN, "heat"),
        (ThrottleReasons::HW_THERMAL_SLOWDOWN, "too much heat"),
        (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "the power supply"),
    ];
    let found = words.iter().filter(|(reason, _)| reasons.contains(*reason));
    found.map(|(_, word)| *word).collect()
}

impl fmt::Display for Widths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((generation, lanes), (most, lanes_most)) = (self.now, self.most);
        write!(
            f,
            "generation {generation} with {lanes} lanes now, at most {most} with {lanes_most}"
        )
    }
}

#[cfg(test)]
mod tests;
