//! How near RDMA devices are to what an agent serves, as the system tells by its PCI buses and memory nodes.

use std::collections::BTreeSet;
use std::fs::{canonicalize, read_dir, read_to_string};
use std::path::{Path, PathBuf};

use kvcache_core::{Error, Result};

/// What lies between a device and what the agent serves; the nearer, the smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Nearness {
    /// PCI switches only.
    Switch,
    /// The host bridge of a processor.
    Bridge,
    /// Host bridges of one memory node.
    Node,
    /// Nobody can say.
    Unknown,
    /// The link between processors.
    Far,
}

impl Nearness {
    /// In words; none where nobody can say.
    pub(super) fn words(self) -> Option<&'static str> {
        match self {
            Self::Switch => Some("behind the same PCI switch"),
            Self::Bridge => Some("behind the same host bridge"),
            Self::Node => Some("on the same memory node"),
            Self::Unknown => None,
            Self::Far => Some("on another memory node"),
        }
    }
}

/// Of ports that are so near to something those that are as near as the nearest one, as bits: all where nobody can say.
pub(super) fn nearest(all: &[Nearness]) -> u32 {
    let Some(best) = all.iter().min() else {
        return u32::MAX;
    };
    let bits = all.iter().enumerate();
    bits.filter(|(_, one)| *one == best)
        .fold(0, |bits, (at, _)| bits | 1 << at)
}

/// Where something sits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seat {
    /// From the host bridge down to the device itself; empty where it sits on no PCI bus.
    path: Vec<String>,
    node: Option<u32>,
}

impl Seat {
    /// `folder` is the device's own, below `/sys/devices`.
    fn of(folder: &Path) -> Self {
        let parts = folder
            .iter()
            .map(|part| part.to_string_lossy().into_owned());
        let path = parts.skip_while(|part| !is_host_bridge(part)).collect();
        let node = read_to_string(folder.join("numa_node")).ok();
        Self {
            path,
            // -1 where the system does not say.
            node: node.and_then(|text| text.trim().parse().ok()),
        }
    }

    fn nearness(&self, other: &Self) -> Nearness {
        let pairs = self.path.iter().zip(&other.path);
        let shared = pairs.take_while(|(a, b)| a == b).count();
        match (shared, self.node, other.node) {
            (2.., _, _) => Nearness::Switch,
            (1, _, _) => Nearness::Bridge,
            (0, Some(a), Some(b)) if a == b => Nearness::Node,
            (0, Some(_), Some(_)) => Nearness::Far,
            (0, _, _) => Nearness::Unknown,
        }
    }
}

fn is_host_bridge(part: &str) -> bool {
    part.strip_prefix("pci")
        .is_some_and(|rest| rest.contains(':'))
}

/// What an agent serves, for as much as is known.
pub(super) struct Place {
    root: PathBuf,
    seat: Seat,
}

impl Place {
    /// Near a PCI device, such as a GPU; without one near the memory node whose processors alone this process may use.
    /// `root` is where `sys` and `proc` are.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] when the system has no such PCI device.
    pub(super) fn of(device: Option<&str>, root: &Path) -> Result<Self> {
        let root = root.to_owned();
        let Some(device) = device else {
            let node = own_node(&root);
            let path = Vec::new();
            return Ok(Self {
                root,
                seat: Seat { path, node },
            });
        };
        let device = device.to_ascii_lowercase();
        let folder = canonicalize(root.join("sys/bus/pci/devices").join(&device));
        // Names of files only: never a way out of the folder.
        match folder {
            Ok(folder)
                if device.starts_with(|c: char| c.is_ascii_hexdigit()) && !device.contains('/') =>
            {
                Ok(Self {
                    seat: Seat::of(&folder),
                    root,
                })
            }
            _ => Err(Error::invalid(
                "verbs near",
                device,
                "the PCI address of a device, such as 0000:3b:00.0",
            )),
        }
    }

    /// How near an RDMA device is.
    pub(super) fn nearness(&self, device: &str) -> Nearness {
        let link = self.root.join("sys/class/infiniband").join(device);
        // Soft devices have none.
        let Ok(folder) = canonicalize(link.join("device")) else {
            return Nearness::Unknown;
        };
        self.seat.nearness(&Seat::of(&folder))
    }
}

/// Numbers as the kernel lists them: `0-3,8`.
fn listed(text: &str) -> Option<BTreeSet<u32>> {
    let mut all = BTreeSet::new();
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        all.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
    }
    Some(all)
}

/// The only memory node whose processors this process may use; none if there are several.
fn own_node(root: &Path) -> Option<u32> {
    let status = read_to_string(root.join("proc/self/status")).ok()?;
    let mut lines = status.lines();
    let own = listed(lines.find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)?;
    let nodes = read_dir(root.join("sys/devices/system/node")).ok()?;
    let mut used = nodes.filter_map(|entry| {
        let entry = entry.ok()?;
        let name = entry.file_name();
        let number = name.to_str()?.strip_prefix("node")?.parse::<u32>().ok()?;
        let here = listed(&read_to_string(entry.path().join("cpulist")).ok()?)?;
        (!here.is_disjoint(&own)).then_some(number)
    });
    let first = used.next()?;
    used.next().is_none().then_some(first)
}

#[cfg(test)]
mod tests;
