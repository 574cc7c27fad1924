use super::tree::Tree;
use super::*;

fn links(machine: &Machine, one: &str) -> Vec<(String, String)> {
    let found = |name: &str| machine.devices.iter().find(|device| device.name == name);
    let of = found(one).unwrap();
    let others = machine.devices.iter().map(|other| {
        let link = machine.link(of, other);
        (
            other.name.clone(),
            link.map_or("?".to_owned(), |link| link.to_string()),
        )
    });
    others.collect()
}

/// Two sockets, four switches, eight GPUs and RDMA devices.
#[test]
fn a_large_machine_is_read_as_it_is_built() {
    let tree = Tree::large();
    let machine = Machine::read(tree.root());
    let of = |kind| -> Vec<_> { machine.of(kind).map(|one| one.name.as_str()).collect() };
    assert_eq!(
        of(Kind::Gpu),
        [
            "GPU0", "GPU1", "GPU2", "GPU3", "GPU4", "GPU5", "GPU6", "GPU7"
        ]
    );
    assert_eq!(of(Kind::Rdma).len(), 8);
    assert_eq!(
        of(Kind::Ethernet),
        ["eno1"],
        "those with RDMA are there once"
    );
    assert_eq!(of(Kind::Nvme), ["nvme0", "nvme1"]);
    assert_eq!(machine.nodes[1].cpus, "48-95");
    let near = links(&machine, "GPU0");
    let to = |name: &str| {
        near.iter()
            .find(|(other, _)| other == name)
            .unwrap()
            .1
            .as_str()
    };
    assert_eq!(to("GPU0"), "X");
    assert_eq!(to("GPU1"), "PIX", "one switch");
    assert_eq!(to("mlx5_0"), "PIX");
    assert_eq!(to("nvme0"), "PIX");
    assert_eq!(to("mlx5_2"), "NODE", "the socket's other switch");
    assert_eq!(to("eno1"), "NODE");
    assert_eq!(to("mlx5_4"), "SYS");
    assert_eq!(to("nvme1"), "SYS");
    let gpu = &machine.devices[0];
    assert_eq!(gpu.about, "NVIDIA H100 80GB HBM3");
    assert_eq!(gpu.node, Some(0));
    let port = machine.of(Kind::Rdma).next().unwrap().port.clone().unwrap();
    assert_eq!((port.number, port.rate), (1, 400));
}

/// A switch below a switch, two devices at the processor, and two functions of one card.
#[test]
fn switches_and_bridges_are_told_apart() {
    let tree = Tree::new(&["0-7"]);
    let up = "pci0000:00/0000:00:01.0/0000:01:00.0";
    tree.gpu(&format!("{up}/0000:02:00.0/0000:03:00.0"), 0);
    let deeper = format!("{up}/0000:02:01.0/0000:04:00.0/0000:05:00.0/0000:06:00.0");
    tree.rdma("mlx5_0", &deeper, 0, "4: ACTIVE");
    tree.rdma(
        "mlx5_1",
        "pci0000:00/0000:00:02.0/0000:07:00.0",
        0,
        "4: ACTIVE",
    );
    tree.rdma(
        "mlx5_2",
        "pci0000:00/0000:00:02.0/0000:07:00.1",
        0,
        "1: DOWN",
    );
    let machine = Machine::read(tree.root());
    let near = |one: &str, other: &str| {
        let all = links(&machine, one);
        all.into_iter().find(|(name, _)| name == other).unwrap().1
    };
    assert_eq!(near("GPU0", "mlx5_0"), "PXB");
    assert_eq!(near("GPU0", "mlx5_1"), "PHB");
    assert_eq!(near("mlx5_1", "mlx5_2"), "PIX");
    assert_eq!(machine.of(Kind::Rdma).nth(2).unwrap().port, None);
}

/// As in a virtual machine: no nodes told, no place for a device that is only software, or that of its card.
#[test]
fn what_is_not_told_is_not_guessed() {
    let tree = Tree::new(&["0-1"]);
    tree.gpu("pci0000:00/0000:00:05.0", -1);
    tree.ethernet("eth0", "pci0001:00/0001:00:03.0", -1);
    tree.write("sys/class/infiniband/rxe0/ports/1/state", "4: ACTIVE");
    tree.write("sys/class/infiniband/rxe0/ports/1/rate", "2.5 Gb/sec");
    tree.write("sys/class/infiniband/rxe0/parent", "nothing");
    tree.write("sys/class/infiniband/rxe1/parent", "eth0");
    let machine = Machine::read(tree.root());
    let near = links(&machine, "GPU0");
    assert_eq!(near[1], ("rxe0".to_owned(), "?".to_owned()));
    assert_eq!(
        near[2],
        ("rxe1".to_owned(), "NODE".to_owned()),
        "there is one node only"
    );
    assert_eq!(machine.devices[0].node, None);
    assert_eq!(machine.devices[1].port.as_ref().unwrap().rate, 2);
    let empty = tempfile::tempdir().unwrap();
    assert!(Machine::read(empty.path()).devices.is_empty());
}

/// A card in a slot with fewer lanes than it has.
#[test]
fn missing_lanes_are_seen() {
    let tree = Tree::new(&["0-7"]);
    let path = "pci0000:00/0000:00:01.0/0000:01:00.0";
    tree.gpu(path, 0);
    tree.write(
        &format!("sys/devices/{path}/current_link_speed"),
        "2.5 GT/s PCIe",
    );
    let rests = Machine::read(tree.root());
    assert_eq!(rests.devices[0].narrowed, None, "it only rests");
    tree.write(&format!("sys/devices/{path}/current_link_width"), "8");
    let narrow = Machine::read(tree.root());
    let (now, most) = narrow.devices[0].narrowed.clone().unwrap();
    assert_eq!((now.width.as_str(), most.width.as_str()), ("8", "16"));
}
