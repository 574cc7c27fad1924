//! The devices of a machine and how near they are to each other, as its `/sys` tells.

mod link;
mod nvml;
mod pci;
#[cfg(test)]
pub(crate) mod tree;

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub(crate) use link::Link;
pub(crate) use nvml::{Gpu, Gpus};
#[cfg(test)]
pub(crate) use nvml::{NvLink, Pair};
pub(crate) use pci::{Pci, Turning, turning};

/// PCI class of a GPU without outputs, and of one with them.
const CLASSES_OF_GPUS: [&str; 2] = ["0x0302", "0x0300"];
const VENDOR_OF_GPUS: &str = "0x10de";

/// What a device is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Gpu,
    Rdma,
    /// A network card without RDMA.
    Ethernet,
    Nvme,
}

/// A lane speed and a number of lanes, as the kernel writes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Lanes {
    pub(crate) speed: String,
    pub(crate) width: String,
}

/// One device.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    /// Its PCI address; none for one that is only software.
    pub(crate) address: Option<String>,
    /// From the host bridge down to itself; empty without an address.
    pub(crate) path: Vec<String>,
    /// The memory node that it is attached to.
    pub(crate) node: Option<u32>,
    /// What it is, in words.
    pub(crate) about: String,
    /// RDMA: the first port that is active.
    pub(crate) port: Option<Port>,
    /// How it is connected, where that is less than it could be.
    pub(crate) narrowed: Option<(Lanes, Lanes)>,
    /// How the IOMMU treats it: `identity`, or another word where it translates.
    pub(crate) iommu: Option<String>,
}

/// An RDMA port that is active.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Port {
    pub(crate) number: u32,
    /// Gbit/s.
    pub(crate) rate: u64,
    /// `InfiniBand` or `Ethernet`.
    pub(crate) layer: String,
}

/// A memory node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Node {
    pub(crate) number: u32,
    /// Its processors, as the kernel lists them.
    pub(crate) cpus: String,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    /// GPUs, then RDMA devices, other network cards, NVMe drives.
    pub(crate) devices: Vec<Device>,
    pub(crate) nodes: Vec<Node>,
    /// What the driver says of the GPUs; none where there is no GPU, or the files are another machine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) driver: Option<Gpus>,
    /// Why the driver says nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) driver_refusal: Option<String>,
    #[serde(skip)]
    root: PathBuf,
}

impl Machine {
    /// Reads `sys` and `proc` below `root`. What is not there, or cannot be read, is not a device.
    pub(crate) fn read(root: &Path) -> Self {
        let mut devices = gpus(root);
        devices.extend(rdma(root));
        let taken: Vec<_> = devices
            .iter()
            .filter_map(|one| one.address.clone())
            .collect();
        devices.extend(
            of_class(root, "net", Kind::Ethernet)
                .into_iter()
                .filter(|one| {
                    one.address
                        .as_ref()
                        .is_some_and(|address| !taken.contains(address))
                }),
        );
        devices.extend(of_class(root, "nvme", Kind::Nvme));
        let folder = root.join("sys/devices/system/node");
        let mut nodes: Vec<_> = entries(&folder)
            .into_iter()
            .filter_map(|path| {
                let number = name_of(&path).strip_prefix("node")?.parse().ok()?;
                let cpus = text(&path.join("cpulist"));
                Some(Node { number, cpus })
            })
            .collect();
        nodes.sort_by_key(|node| node.number);
        Self {
            devices,
            nodes,
            driver: None,
            driver_refusal: None,
            root: root.to_owned(),
        }
    }

    /// As [`Machine::read`]; what `/sys` does not tell of GPUs comes from their driver, where the machine is this one.
    pub(crate) fn read_with_driver(root: &Path) -> Self {
        let mut machine = Self::read(root);
        if root == Path::new("/") && machine.of(Kind::Gpu).next().is_some() {
            match Gpus::read() {
                Ok(found) => machine.driver = Some(found),
                Err(reason) => machine.driver_refusal = Some(reason),
            }
        }
        machine
    }

    /// The devices of a kind, in order.
    pub(crate) fn of(&self, kind: Kind) -> impl Iterator<Item = &Device> {
        self.devices.iter().filter(move |one| one.kind == kind)
    }

    /// How near two devices are; none where one of them has no place.
    pub(crate) fn link(&self, one: &Device, other: &Device) -> Option<Link> {
        if one.name == other.name {
            return Some(Link::Same);
        }
        if let (Some(driver), Some(a), Some(b)) = (&self.driver, &one.address, &other.address)
            && let links @ 1.. = driver.links(a, b)
        {
            return Some(Link::Nv(links));
        }
        Link::between(one, other, self.nodes.len() > 1)
    }

    /// What a bridge does with requests between devices below it.
    pub(crate) fn turning(&self, bridge: &str) -> Turning {
        turning(&self.root, bridge)
    }

    /// Whether a module of the kernel is there.
    pub(crate) fn has_module(&self, name: &str) -> bool {
        self.root.join("sys/module").join(name).is_dir()
    }

    /// The first line of a file of this machine; empty if there is none.
    pub(crate) fn line(&self, path: &str) -> String {
        text(&self.root.join(path))
    }
}

fn gpus(root: &Path) -> Vec<Device> {
    let mut found: Vec<_> = entries(&root.join("sys/bus/pci/devices"))
        .into_iter()
        .filter(|path| {
            let class = text(&path.join("class"));
            let is_gpu = CLASSES_OF_GPUS.iter().any(|one| class.starts_with(one));
            is_gpu && text(&path.join("vendor")) == VENDOR_OF_GPUS
        })
        .collect();
    // Their numbers are those of the driver's tools: by address.
    found.sort();
    let device = |(number, path): (usize, &PathBuf)| {
        let mut gpu = device(format!("GPU{number}"), Kind::Gpu, path);
        let folder = root.join("proc/driver/nvidia/gpus").join(name_of(path));
        let facts = fs::read_to_string(folder.join("information")).unwrap_or_default();
        let model = facts.lines().find_map(|line| line.strip_prefix("Model:"));
        gpu.about = model.map_or("no driver", str::trim).to_owned();
        gpu
    };
    found.iter().enumerate().map(device).collect()
}

fn rdma(root: &Path) -> Vec<Device> {
    let mut found = entries(&root.join("sys/class/infiniband"));
    found.sort_by_key(|path| natural(&name_of(path)));
    let device = |path: PathBuf| {
        let mut place = path.join("device");
        if !place.exists() {
            // Software over a network card.
            let card = text(&path.join("parent"));
            place = root.join("sys/class/net").join(card).join("device");
        }
        let mut one = device(name_of(&path), Kind::Rdma, &place);
        let mut ports = entries(&path.join("ports"));
        ports.sort();
        one.port = ports.iter().find_map(|port| {
            text(&port.join("state")).ends_with("ACTIVE").then(|| Port {
                number: name_of(port).parse().unwrap_or(1),
                rate: rate(&text(&port.join("rate"))),
                layer: text(&port.join("link_layer")),
            })
        });
        one.about = match &one.port {
            Some(port) => format!("{}, {} Gbit/s", port.layer, port.rate),
            None => "no active port".to_owned(),
        };
        one
    };
    found.into_iter().map(device).collect()
}

/// `400 Gb/sec (4X NDR)`, `2.5 Gb/sec`
fn rate(text: &str) -> u64 {
    let number = text.split_whitespace().next().unwrap_or_default();
    number.parse::<f64>().map_or(0, |rate| rate as u64)
}

fn of_class(root: &Path, class: &str, kind: Kind) -> Vec<Device> {
    let mut found = entries(&root.join("sys/class").join(class));
    found.sort_by_key(|path| natural(&name_of(path)));
    let devices = found.into_iter().filter_map(|path| {
        let mut one = device(name_of(&path), kind, &path.join("device"));
        one.about = match kind {
            Kind::Nvme => text(&path.join("model")),
            _ => match text(&path.join("speed")).parse::<i64>() {
                Ok(speed @ 1..) => format!("{speed} Mbit/s"),
                _ => "speed not told".to_owned(),
            },
        };
        one.address.is_some().then_some(one)
    });
    devices.collect()
}

/// A device whose folder is `place`.
fn device(name: String, kind: Kind, place: &Path) -> Device {
    let real = place.canonicalize().unwrap_or_default();
    let parts = real.iter().filter_map(|part| part.to_str());
    let path: Vec<_> = parts
        .filter(|part| is_pci(part))
        .map(str::to_owned)
        .collect();
    let address = path.last().filter(|last| !last.starts_with("pci")).cloned();
    // Where it is below a device of its own, such as virtio's, the card is above it.
    let card = real
        .ancestors()
        .find(|folder| address.as_deref().is_some_and(|one| name_of(folder) == one));
    let fact = |file: &str| card.map_or_else(String::new, |card| text(&card.join(file)));
    let lanes = |which: &str| Lanes {
        speed: fact(&format!("{which}_link_speed")),
        width: fact(&format!("{which}_link_width")),
    };
    let (now, most) = (lanes("current"), lanes("max"));
    // Speed falls when a device rests, so only lanes are believed to be missing.
    let is_narrow = matches!((now.width.parse(), most.width.parse()), (Ok::<u32, _>(a), Ok::<u32, _>(b)) if a < b && a > 0);
    let iommu = fact("iommu_group/type");
    Device {
        name,
        kind,
        node: fact("numa_node").parse().ok(),
        about: String::new(),
        port: None,
        narrowed: is_narrow.then_some((now, most)),
        iommu: (!iommu.is_empty()).then_some(iommu),
        path: if address.is_some() { path } else { Vec::new() },
        address,
    }
}

/// A host bridge (`pci0000:00`) or an address (`0000:00:01.0`).
fn is_pci(part: &str) -> bool {
    let digits = part.strip_prefix("pci").unwrap_or(part);
    let is_text = digits
        .chars()
        .all(|one| one.is_ascii_hexdigit() || matches!(one, ':' | '.'));
    let colons = if part.starts_with("pci") { 1 } else { 2 };
    is_text && digits.matches(':').count() == colons
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str());
    name.unwrap_or_default().to_owned()
}

/// So that `mlx5_10` comes after `mlx5_9`.
fn natural(name: &str) -> (String, u64) {
    let end = name.trim_end_matches(|one: char| one.is_ascii_digit());
    let number = name[end.len()..].parse().unwrap_or(0);
    (end.to_owned(), number)
}

/// The first line of a file; empty if there is none.
fn text(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests;
