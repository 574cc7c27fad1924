//! Over a library of ours, compiled when the tests run, in place of the driver's.

use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::machine::tree::Tree;
use crate::machine::{Kind, Link, Machine};

/// A library that describes this machine, in a folder that goes with it.
struct Library {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Library {
    fn of(machine: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libnvidia-ml.so.1");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/machine/nvml/library.c");
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
        let mut command = Command::new(compiler);
        command.args(["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]);
        let made = command
            .arg(format!("-D{machine}"))
            .arg(source)
            .arg("-o")
            .arg(&path);
        assert!(made.status().unwrap().success());
        Self {
            _folder: folder,
            path,
        }
    }

    fn read(&self, patience: Duration) -> Result<Gpus, String> {
        read_with(self.path.to_str().unwrap(), patience)
    }
}

fn active(gpu: &Gpu) -> usize {
    gpu.links.iter().filter(|link| link.is_active).count()
}

#[test]
fn links_by_switches_are_those_that_both_have() {
    let found = Library::of("SWITCHED").read(PATIENCE).unwrap();
    assert_eq!(found.driver, "570.86.15");
    let addresses: Vec<_> = found.gpus.iter().map(|gpu| gpu.address.as_str()).collect();
    assert_eq!(addresses, ["0000:10:00.0", "0000:11:00.0"]);
    let (one, other) = (&found.gpus[0], &found.gpus[1]);
    assert_eq!((active(one), active(other)), (18, 17));
    assert_eq!(other.links.len(), 18);
    assert_eq!(other.links[17].version, Some(4));
    assert_eq!(
        (one.links[2].errors, other.links[2].errors),
        (0, 1 + 2 + 3 + 4)
    );
    let most = (5, 16);
    let widths = |now| Some(Widths { now, most });
    assert_eq!((one.pcie, other.pcie), (widths((4, 16)), widths((4, 8))));
    assert_eq!(one.bar1_bytes, Some(256 << 20));
    assert_eq!(one.memory_bytes, Some(80 << 30));
    assert_eq!((one.is_divided, other.is_divided), (false, true));
    assert!(one.slowed_by.is_empty(), "rest is no fault");
    assert_eq!(other.slowed_by, ["heat"]);
    assert_eq!(found.links("0000:11:00.0", "0000:10:00.0"), 17);
    assert_eq!(found.links("0000:11:00.0", "0000:12:00.0"), 0);
    assert_eq!(found.pairs[0].refusal, None);
    assert!(found.lost.is_empty());
    let found = Ok(found);
    assert_eq!(
        Gpus::line(&found, "0000:11:00.0"),
        "NVML: driver 570.86.15, PCIe generation 4 with 8 lanes now, at most 5 with 16, 17 NVLinks up, BAR1 of 256 MiB, divided into instances (MIG), slowed by heat"
    );
    let none = "NVML: driver 570.86.15, nothing of 0000:99:00.0";
    assert_eq!(Gpus::line(&found, "0000:99:00.0"), none);
}

#[test]
fn links_without_switches_are_counted_for_each_two() {
    let found = Library::of("DIRECT").read(PATIENCE).unwrap();
    assert_eq!(found.gpus.len(), 3);
    assert_eq!((active(&found.gpus[0]), found.gpus[0].links.len()), (4, 6));
    assert!(found.gpus[2].links.is_empty());
    let pairs: Vec<_> = found.pairs.iter().map(|pair| pair.links).collect();
    assert_eq!(pairs, [4, 0, 0]);
    let refusals: Vec<_> = found
        .pairs
        .iter()
        .map(|pair| pair.refusal.as_deref())
        .collect();
    let chipset = Some("not by this chipset");
    assert_eq!(refusals, [None, chipset, chipset]);
    assert_eq!(found.lost.len(), 1);
    assert!(found.lost[0].starts_with("GPU 3: "), "{:?}", found.lost);
}

/// No library, no driver below it, a library that is none, one without functions, a driver that never comes back.
#[test]
fn a_driver_that_tells_nothing_says_why() {
    let missing = read_with("libnvidia-ml.so.no-such", PATIENCE).unwrap_err();
    assert!(missing.contains("no-such"), "{missing}");
    let unloaded = Library::of("UNLOADED").read(PATIENCE).unwrap_err();
    assert!(unloaded.contains("driver"), "{unloaded}");
    let silent = Library::of("SILENT")
        .read(Duration::from_millis(100))
        .unwrap_err();
    assert!(silent.ends_with("has not answered for 0.1 s"), "{silent}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    std::fs::write(&path, "no library").unwrap();
    let path = path.to_str().unwrap();
    let text = read_with(path, PATIENCE).unwrap_err();
    assert!(text.contains(path), "{text}");
    let other = read_with("libm.so.6", PATIENCE).unwrap_err();
    assert!(other.contains("nvmlInit_v2"), "{other}");
}

/// The matrix tells NVLinks before what PCI has, and each other device as before.
#[test]
fn gpus_with_links_are_joined_by_them() {
    let tree = Tree::new(&["0-7"]);
    tree.gpu("pci0000:00/0000:00:01.0/0000:10:00.0", 0);
    tree.gpu("pci0000:00/0000:00:02.0/0000:11:00.0", 0);
    let mut machine = Machine::read(tree.root());
    let between = |machine: &Machine| {
        let gpus: Vec<_> = machine.of(Kind::Gpu).collect();
        machine.link(gpus[0], gpus[1])
    };
    assert_eq!(between(&machine), Some(Link::Phb));
    machine.driver = Some(Library::of("SWITCHED").read(PATIENCE).unwrap());
    assert_eq!(between(&machine), Some(Link::Nv(17)));
    assert_eq!(Link::Nv(17).to_string(), "NV17");
    assert!(Link::Same < Link::Nv(1) && Link::Nv(17) < Link::Pix);
    let words: Vec<_> = Link::legend(true).map(|(word, _)| word).collect();
    assert_eq!(words, ["X", "PIX", "PXB", "PHB", "NODE", "SYS", "NV#"]);
}

#[test]
fn addresses_are_written_as_the_system_does() {
    for (bus, sys) in [
        ("00000000:17:00.0", "0000:17:00.0"),
        ("00010000:AF:00.0", "10000:af:00.0"),
        ("0000:01:00.0", "0000:01:00.0"),
    ] {
        assert_eq!(address(bus), sys);
    }
}
