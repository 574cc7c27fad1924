//! Trees of `/sys` as the kernel lays them out, made in a temporary folder.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// A machine that is only files.
pub(crate) struct Tree {
    root: tempfile::TempDir,
}

impl Tree {
    /// With these processors on each memory node.
    pub(crate) fn new(nodes: &[&str]) -> Self {
        let tree = Self {
            root: tempfile::tempdir().unwrap(),
        };
        for (number, cpus) in nodes.iter().enumerate() {
            let folder = format!("sys/devices/system/node/node{number}");
            tree.write(&format!("{folder}/cpulist"), cpus);
        }
        tree
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    fn link(&self, from: &str, to: &Path) {
        let from = self.root().join(from);
        fs::create_dir_all(from.parent().unwrap()).unwrap();
        symlink(to, from).unwrap();
    }

    /// A PCI device at that path below `sys/devices`, with its class, on that node.
    fn pci(&self, path: &str, class: &str, vendor: &str, node: i32) -> PathBuf {
        let folder = format!("sys/devices/{path}");
        self.write(&format!("{folder}/class"), class);
        self.write(&format!("{folder}/vendor"), vendor);
        self.write(&format!("{folder}/numa_node"), &node.to_string());
        for (file, text) in [
            ("current_link_speed", "32.0 GT/s PCIe"),
            ("current_link_width", "16"),
            ("max_link_speed", "32.0 GT/s PCIe"),
            ("max_link_width", "16"),
        ] {
            self.write(&format!("{folder}/{file}"), text);
        }
        let real = self.root().join(&folder);
        let address = path.rsplit('/').next().unwrap();
        self.link(&format!("sys/bus/pci/devices/{address}"), &real);
        real
    }

    pub(crate) fn gpu(&self, path: &str, node: i32) {
        self.pci(path, "0x030200", "0x10de", node);
        let address = path.rsplit('/').next().unwrap();
        let facts = format!("proc/driver/nvidia/gpus/{address}/information");
        self.write(&facts, "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1");
    }

    /// An RDMA device with one port, and its network interface.
    pub(crate) fn rdma(&self, name: &str, path: &str, node: i32, state: &str) {
        let real = self.pci(path, "0x020700", "0x15b3", node);
        let folder = format!("sys/devices/{path}/infiniband/{name}");
        self.write(&format!("{folder}/ports/1/state"), state);
        self.write(&format!("{folder}/ports/1/rate"), "400 Gb/sec (4X NDR)");
        self.write(&format!("{folder}/ports/1/link_layer"), "InfiniBand");
        self.link(&format!("{folder}/device"), &real);
        self.link(
            &format!("sys/class/infiniband/{name}"),
            &self.root().join(&folder),
        );
        self.card(&format!("ib{name}"), path);
    }

    fn card(&self, name: &str, path: &str) {
        let folder = format!("sys/devices/{path}/net/{name}");
        self.write(&format!("{folder}/speed"), "400000");
        let real = self.root().join("sys/devices").join(path);
        self.link(&format!("{folder}/device"), &real);
        self.link(&format!("sys/class/net/{name}"), &self.root().join(&folder));
    }

    /// A network card without RDMA.
    pub(crate) fn ethernet(&self, name: &str, path: &str, node: i32) {
        self.pci(path, "0x020000", "0x8086", node);
        self.card(name, path);
    }

    pub(crate) fn nvme(&self, name: &str, path: &str, node: i32) {
        let real = self.pci(path, "0x010802", "0x144d", node);
        let folder = format!("sys/devices/{path}/nvme/{name}");
        self.write(&format!("{folder}/model"), "SAMSUNG MZQL21T9HCJR");
        self.link(&format!("{folder}/device"), &real);
        self.link(
            &format!("sys/class/nvme/{name}"),
            &self.root().join(&folder),
        );
    }

    /// Two sockets; on each two switches, and below each of these two GPUs and two RDMA devices; on each socket a drive at
    /// the switch, and a network card at the host bridge of the first.
    pub(crate) fn large() -> Self {
        let tree = Self::new(&["0-47", "48-95"]);
        for switch in 0..4 {
            let (node, bus) = (switch / 2, 0x10 + 0x20 * switch);
            let up = format!(
                "pci0000:{bus:02x}/0000:{bus:02x}:01.0/0000:{:02x}:00.0",
                bus + 1
            );
            for port in 0..2 {
                let below = |slot: i32| {
                    let own = bus + 3 + slot;
                    format!("{up}/0000:{:02x}:{slot:02x}.0/0000:{own:02x}:00.0", bus + 2)
                };
                tree.gpu(&below(port), node);
                let name = format!("mlx5_{}", 2 * switch + port);
                tree.rdma(&name, &below(2 + port), node, "4: ACTIVE");
                if port == 0 && switch % 2 == 0 {
                    tree.nvme(&format!("nvme{node}"), &below(4), node);
                }
            }
        }
        tree.ethernet("eno1", "pci0000:00/0000:00:1c.0/0000:05:00.0", 0);
        tree
    }
}
