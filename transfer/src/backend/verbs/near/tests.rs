use std::fs::{create_dir_all, write};
use std::os::unix::fs::symlink;

use super::*;

/// A machine with two memory nodes: a GPU and two cards on the first, one behind the GPU's switch; one on the second, and
/// one that sits nowhere.
fn machine() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| root.path().join(path);
    let devices = [
        (
            "0000:3b:00.0",
            "pci0000:3a/0000:3a:00.0/0000:3b:00.0",
            "0",
            None,
        ),
        (
            "0000:3c:00.0",
            "pci0000:3a/0000:3a:00.0/0000:3c:00.0",
            "0",
            Some("mlx5_1"),
        ),
        (
            "0000:3d:00.0",
            "pci0000:3a/0000:3a:01.0/0000:3d:00.0",
            "0",
            Some("mlx5_2"),
        ),
        (
            "0000:5d:00.0",
            "pci0000:5c/0000:5c:00.0/0000:5d:00.0",
            "0",
            Some("mlx5_3"),
        ),
        (
            "0000:af:00.0",
            "pci0000:ae/0000:ae:00.0/0000:af:00.0",
            "1",
            Some("mlx5_0"),
        ),
        (
            "0000:b0:00.0",
            "pci0000:b0/0000:b0:00.0",
            "-1",
            Some("mlx5_4"),
        ),
    ];
    create_dir_all(at("sys/bus/pci/devices")).unwrap();
    create_dir_all(at("sys/class/infiniband/rxe0")).unwrap();
    for (address, path, node, rdma) in devices {
        let folder = at("sys/devices").join(path);
        create_dir_all(&folder).unwrap();
        write(folder.join("numa_node"), format!("{node}\n")).unwrap();
        symlink(&folder, at("sys/bus/pci/devices").join(address)).unwrap();
        if let Some(rdma) = rdma {
            let class = at("sys/class/infiniband").join(rdma);
            create_dir_all(&class).unwrap();
            symlink(&folder, class.join("device")).unwrap();
        }
    }
    for (node, processors) in [(0, "0-3,8-11"), (1, "4-7,12-15")] {
        let folder = at(&format!("sys/devices/system/node/node{node}"));
        create_dir_all(&folder).unwrap();
        write(folder.join("cpulist"), format!("{processors}\n")).unwrap();
    }
    create_dir_all(at("proc/self")).unwrap();
    root
}

fn bound_to(root: &Path, processors: &str) {
    let status =
        format!("Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t{processors}\nThreads:\t1\n");
    write(root.join("proc/self/status"), status).unwrap();
}

/// By PCI from a GPU on: its switch, its host bridge, its node, the other node, and what cannot be said.
#[test]
fn a_card_behind_the_gpus_switch_is_nearest() {
    let root = machine();
    let place = Place::of(Some("0000:3B:00.0"), root.path()).unwrap();
    let all = ["mlx5_1", "mlx5_2", "mlx5_3", "mlx5_4", "rxe0", "mlx5_0"];
    let nearness = all.map(|device| place.nearness(device));
    use Nearness::{Bridge, Far, Node, Switch, Unknown};
    assert_eq!(nearness, [Switch, Bridge, Node, Unknown, Unknown, Far]);
    assert!(nearness.is_sorted());
    for wrong in ["0000:99:00.0", "../../../etc", ""] {
        let error = Place::of(Some(wrong), root.path()).err().map(|e| e.kind());
        assert_eq!(error, Some(kvcache_core::ErrorKind::Invalid), "{wrong:?}");
    }
}

/// Without a device: the memory node that the process is bound to, if it is bound to one.
#[test]
fn a_process_that_is_bound_to_a_memory_node_is_near_its_cards() {
    let root = machine();
    for (processors, near, other) in [
        ("8-9", Nearness::Node, Nearness::Far),
        ("4,15", Nearness::Far, Nearness::Node),
        ("3-4", Nearness::Unknown, Nearness::Unknown),
        ("garbage", Nearness::Unknown, Nearness::Unknown),
    ] {
        bound_to(root.path(), processors);
        let place = Place::of(None, root.path()).unwrap();
        let found = (place.nearness("mlx5_1"), place.nearness("mlx5_0"));
        assert_eq!(found, (near, other), "{processors}");
    }
}

/// Which rails a GPU's bytes go by: those behind its switch if there are any, all of equals, all where nobody can say.
#[test]
fn of_several_ports_the_nearest_to_a_gpu_are_taken() {
    let root = machine();
    let place = Place::of(Some("0000:3B:00.0"), root.path()).unwrap();
    let near = |names: &[&str]| {
        let all: Vec<_> = names.iter().map(|name| place.nearness(name)).collect();
        nearest(&all)
    };
    assert_eq!(near(&["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]), 0b0010);
    assert_eq!(near(&["mlx5_0", "mlx5_3"]), 0b10);
    assert_eq!(near(&["mlx5_0", "mlx5_0"]), 0b11);
    assert_eq!(near(&["rxe0", "rxe0"]), 0b11);
    assert_eq!(near(&[]), u32::MAX);
}
