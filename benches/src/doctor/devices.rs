//! GPUs, RDMA devices and drives: what lies between them, and what the system lacks to use them together.

use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use serde::Serialize;

use super::{Finding, State, nvlink};
use crate::machine::{Kind, Link, Machine, Turning};

/// The devices, and the word for what is between each two.
#[derive(Serialize)]
pub(crate) struct Topology {
    #[serde(flatten)]
    machine: Machine,
    /// A row and a column for each device, in their order; `?` where one has no place.
    links: Vec<Vec<String>>,
}

impl Topology {
    pub(crate) fn new(machine: Machine) -> Self {
        let row = |one| {
            let links = machine.devices.iter().map(|other| machine.link(one, other));
            let word = |link: Option<Link>| link.map_or("?".to_owned(), |link| link.to_string());
            links.map(word).collect()
        };
        let links = machine.devices.iter().map(row).collect();
        Self { machine, links }
    }

    /// As a matrix, with what its words mean; none without devices.
    pub(crate) fn matrix(&self) -> Option<String> {
        let devices = &self.machine.devices;
        if devices.is_empty() {
            return None;
        }
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY);
        let names = devices.iter().map(|one| one.name.as_str());
        let header = std::iter::once("").chain(names);
        table.set_header(header.chain(["node", "processors", "what"]));
        for (device, links) in devices.iter().zip(&self.links) {
            let node = device.node.map_or("?".to_owned(), |node| node.to_string());
            let cpus = self.machine.nodes.iter();
            let cpus = cpus.filter(|one| Some(one.number) == device.node);
            let cpus: String = cpus.map(|one| one.cpus.as_str()).collect();
            let row = std::iter::once(device.name.as_str());
            let row = row.chain(links.iter().map(String::as_str));
            table.add_row(row.chain([node.as_str(), cpus.as_str(), device.about.as_str()]));
        }
        let mut text = table.to_string();
        let has_nvlink = self
            .links
            .iter()
            .flatten()
            .any(|link| link.starts_with("NV"));
        for (link, meaning) in Link::legend(has_nvlink) {
            text.push_str(&format!("\n  {link:<5}{meaning}"));
        }
        text.push_str("\n  ?    not told: a device that is only software, or has no place on PCI");
        Some(text)
    }

    /// What is missing for these devices, and what that costs.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let machine = &self.machine;
        let mut findings = vec![reserved_pages(machine), translation(machine)];
        findings.extend(turning(machine));
        findings.extend(nvlink::findings(machine));
        findings.extend(modules(machine));
        findings.extend(machine.devices.iter().filter_map(|one| {
            let (now, most) = one.narrowed.as_ref()?;
            Some(Finding::new(
                &format!("pci: {}", one.name),
                State::Hint,
                format!("{} of {} lanes", now.width, most.width),
                "its bandwidth falls by the lanes that are missing: another slot, or a card that sits badly",
            ))
        }));
        findings
    }
}

/// Pages of 2 MiB or 1 GiB that are set aside.
fn reserved_pages(machine: &Machine) -> Finding {
    let what = "memory: reserved huge pages";
    let mut found = Vec::new();
    for (size, name) in [("2048", "2 MiB"), ("1048576", "1 GiB")] {
        let path = format!("sys/kernel/mm/hugepages/hugepages-{size}kB/nr_hugepages");
        match machine.line(&path).parse::<u64>() {
            Ok(count) if count > 0 => found.push(format!("{count} of {name}")),
            _ => {}
        }
    }
    if found.is_empty() {
        // Nothing here asks for them by name; that is what transparent ones are for.
        return Finding::ok(what, "none; none are needed");
    }
    Finding::ok(what, found.join(", "))
}

/// Whether devices see physical addresses.
fn translation(machine: &Machine) -> Finding {
    let what = "pci: IOMMU";
    let devices = || machine.devices.iter();
    let translated =
        |one: &&crate::machine::Device| one.iommu.as_deref().is_some_and(|kind| kind != "identity");
    let names: Vec<_> = devices()
        .filter(translated)
        .map(|one| one.name.as_str())
        .collect();
    if !names.is_empty() {
        return Finding::new(
            what,
            State::Hint,
            format!("translates for {}", names.join(", ")),
            "costs a look-up for each access, and bytes between a GPU and a network card below one switch go up to the processor and back: boot with iommu=pt, where no machine of a \
             tenant gets the devices",
        );
    }
    match devices().any(|one| one.iommu.is_some()) {
        true => Finding::ok(what, "on, addresses of these devices pass as they are"),
        false => Finding::ok(what, "does not stand before these devices"),
    }
}

/// Whether bridges send what goes from device to device up to the processor; nothing without devices that do so.
fn turning(machine: &Machine) -> Option<Finding> {
    let what = "pci: peers below one switch (ACS)";
    let mut bridges: Vec<&str> = Vec::new();
    for device in machine.of(Kind::Gpu).chain(machine.of(Kind::Rdma)) {
        let Some((_, above)) = device.path.split_last() else {
            continue;
        };
        let above = above.iter().filter(|one| !one.starts_with("pci"));
        bridges.extend(above.map(String::as_str));
    }
    bridges.sort_unstable();
    bridges.dedup();
    machine.of(Kind::Gpu).next()?;
    let of = |wanted| {
        let found = bridges
            .iter()
            .filter(|one| machine.turning(one) == wanted)
            .copied();
        found.collect::<Vec<_>>()
    };
    let (redirected, silent) = (of(Turning::Redirected), of(Turning::NotTold));
    Some(match (bridges.len(), redirected.len(), silent.len()) {
        (0, ..) => Finding::ok(what, "no bridge above these devices"),
        (_, 0, 0) => Finding::ok(what, "the short way"),
        (_, 0, count) => Finding::new(
            what,
            State::Hint,
            format!("not told for {count} of {} bridges", bridges.len()),
            "may cost half the bandwidth between a GPU and a network card below one switch: ask again as root, who may read it",
        ),
        _ => Finding::new(
            what,
            State::Hint,
            format!("sent up to the processor by {}", redirected.join(", ")),
            "costs the bandwidth of the processor's own link for bytes between a GPU and a network card below one switch: switch ACS off for these bridges (setpci, or the firmware), where no \
             machine of a tenant gets the devices",
        ),
    })
}

/// What lets devices reach GPU memory.
fn modules(machine: &Machine) -> Vec<Finding> {
    let has = |kind| machine.of(kind).next().is_some();
    if !has(Kind::Gpu) {
        let found = "no GPU of NVIDIA";
        return vec![Finding::new("gpu: devices", State::Absent, found, "")];
    }
    let rows = [
        (
            &["nvidia_peermem", "nv_peer_mem"][..],
            "gpu: memory for RDMA",
            has(Kind::Rdma),
            "costs a copy through host memory, and its bandwidth, for each transfer of GPU memory: modprobe nvidia_peermem; or the open kernel module from Linux 5.12 on, whose dma-buf \
             serves as well",
        ),
        (
            &["gdrdrv"][..],
            "gpu: memory for the processor",
            true,
            "costs a call of the driver for the few bytes that a processor writes or reads there: gdrdrv of GDRCopy",
        ),
        (
            &["nvidia_fs"][..],
            "gpu: memory for drives",
            has(Kind::Nvme),
            "costs a copy through host memory for each block between a drive and a GPU: nvidia_fs (GPUDirect Storage), or PCI P2PDMA of kernel and driver",
        ),
    ];
    let wanted = rows.into_iter().filter(|(_, _, is_of_use, _)| *is_of_use);
    let finding = |(names, what, _, cost): (&[&str], &str, bool, &str)| match names
        .iter()
        .find(|name| machine.has_module(name))
    {
        Some(name) => Finding::ok(what, format!("{name} is loaded")),
        None => Finding::new(
            what,
            State::Hint,
            format!("no {}", names.join(", no ")),
            cost,
        ),
    };
    wanted.map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tree::Tree;

    fn of<'a>(findings: &'a [Finding], what: &str) -> &'a Finding {
        findings.iter().find(|one| one.what == what).unwrap()
    }

    /// Each missing thing has its cost, and no longer when it is there.
    #[test]
    fn what_is_missing_is_said_with_its_cost() {
        let tree = Tree::large();
        let read = || Topology::new(Machine::read(tree.root())).findings();
        let bare = read();
        for what in [
            "gpu: memory for RDMA",
            "gpu: memory for the processor",
            "gpu: memory for drives",
        ] {
            let finding = of(&bare, what);
            assert_eq!(finding.state, State::Hint, "{what}");
            assert!(finding.advice.starts_with("costs "), "{what}");
        }
        assert_eq!(of(&bare, "pci: IOMMU").state, State::Ok);
        for module in ["nvidia_peermem", "gdrdrv", "nvidia_fs"] {
            tree.write(&format!("sys/module/{module}/refcnt"), "0");
        }
        let gpu = "sys/devices/pci0000:10/0000:10:01.0/0000:11:00.0/0000:12:00.0/0000:13:00.0";
        tree.write(&format!("{gpu}/iommu_group/type"), "DMA-FQ");
        tree.write(&format!("{gpu}/current_link_width"), "8");
        let pages = "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
        tree.write(pages, "16");
        let full = read();
        assert_eq!(
            of(&full, "gpu: memory for RDMA").found,
            "nvidia_peermem is loaded"
        );
        assert_eq!(of(&full, "gpu: memory for drives").state, State::Ok);
        assert_eq!(of(&full, "pci: IOMMU").found, "translates for GPU0");
        assert_eq!(of(&full, "pci: GPU0").found, "8 of 16 lanes");
        assert_eq!(
            of(&full, "memory: reserved huge pages").found,
            "16 of 1 GiB"
        );
    }

    /// Bridges whose configuration nobody may read, that redirect, and that do not.
    #[test]
    fn bridges_that_redirect_are_named() {
        let tree = Tree::large();
        let what = "pci: peers below one switch (ACS)";
        let read = || Topology::new(Machine::read(tree.root())).findings();
        assert!(of(&read(), what).found.starts_with("not told"));
        let mut config = vec![0_u8; 4096];
        config[0x100..0x104].copy_from_slice(&[0x0d, 0x00, 0x01, 0x00]);
        let machine = Machine::read(tree.root());
        let bridges = machine.devices.iter().flat_map(|one| {
            let above = one.path.split_last().map_or(&[][..], |(_, above)| above);
            above.iter().filter(|one| !one.starts_with("pci"))
        });
        let folder = |bridge: &str| {
            let folder = tree.root().join("sys/bus/pci/devices").join(bridge);
            std::fs::create_dir_all(&folder).unwrap();
            folder.join("config")
        };
        for bridge in bridges {
            std::fs::write(folder(bridge), &config).unwrap();
        }
        assert_eq!(of(&read(), what).found, "the short way");
        config[0x106] = 0x0c;
        let bridge = &machine.devices[0].path[1];
        std::fs::write(folder(bridge), &config).unwrap();
        let finding = of(&read(), what).clone();
        assert_eq!(
            finding.found,
            format!("sent up to the processor by {bridge}")
        );
        assert!(finding.advice.starts_with("costs "));
    }

    /// The matrix has a row for each device, and is symmetric.
    #[test]
    fn the_matrix_is_complete() {
        let topology = Topology::new(Machine::read(Tree::large().root()));
        let text = topology.matrix().unwrap();
        for name in ["GPU7", "mlx5_7", "eno1", "nvme1", "48-95", "PIX"] {
            assert!(text.contains(name), "{name}");
        }
        for (row, links) in topology.links.iter().enumerate() {
            assert_eq!(links[row], "X");
            for (column, link) in links.iter().enumerate() {
                assert_eq!(*link, topology.links[column][row]);
            }
        }
        let nothing = tempfile::tempdir().unwrap();
        assert!(
            Topology::new(Machine::read(nothing.path()))
                .matrix()
                .is_none()
        );
    }
}
