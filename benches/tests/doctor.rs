//! `kv-bench doctor` on this machine, as people run it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Output};

use serde_json::Value;

fn doctor(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kv-bench"));
    command.arg("doctor").args(arguments).output().unwrap()
}

/// Every way is tried with a real process, and what is found stands in the table and in the JSON alike.
#[test]
fn it_says_what_was_found_as_table_and_json() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("doctor.json");
    let output = doctor(&[
        "--json",
        json.to_str().unwrap(),
        "--dir",
        folder.path().to_str().unwrap(),
    ]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let table = String::from_utf8(output.stdout).unwrap();
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["command"], "doctor");
    let findings = report["findings"].as_array().unwrap();
    let of = |what: &str| {
        findings
            .iter()
            .find(|finding| finding["what"] == what)
            .unwrap()
    };
    for finding in findings {
        assert!(
            table.contains(finding["what"].as_str().unwrap()),
            "{finding}"
        );
        if finding["state"] == "hint" {
            assert_ne!(finding["advice"], "", "{finding}");
        }
    }
    assert_eq!(of("path: shm")["state"], "ok");
    assert_eq!(of("path: tcp")["state"], "ok");
    assert!(
        of("path: tcp")["found"]
            .as_str()
            .unwrap()
            .contains("congestion control")
    );
    let ucx = of("path: ucx")["found"].as_str().unwrap();
    assert!(ucx.starts_with("ucx 1."), "{ucx}");
    // Nothing is left behind.
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 1, "only the report");
}

#[test]
fn places_that_are_not_there_are_named() {
    for place in [["--dir", "/nowhere/at/all"], ["--json", "/nowhere/at/all"]] {
        let output = doctor(&place);
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(&place.join(" ")), "{said}");
    }
}

/// A copied tree of another machine: two sockets with a GPU and a port each.
#[test]
fn the_devices_of_a_copied_tree_are_told_and_planned_for() {
    let tree = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = tree.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let link = |from: &str, to: &str| {
        let from = tree.path().join(from);
        std::fs::create_dir_all(from.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(to, from).unwrap();
    };
    for node in 0..2 {
        write(
            &format!("sys/devices/system/node/node{node}/cpulist"),
            "0-3\n",
        );
        let bus = format!("pci0000:{node}0/0000:{node}0:01.0");
        for (number, class, vendor) in [(1, "0x030200", "0x10de"), (2, "0x020700", "0x15b3")] {
            let address = format!("0000:{node}{number}:00.0");
            let folder = format!("sys/devices/{bus}/{address}");
            write(&format!("{folder}/class"), class);
            write(&format!("{folder}/vendor"), vendor);
            write(&format!("{folder}/numa_node"), &node.to_string());
            link(
                &format!("sys/bus/pci/devices/{address}"),
                &format!("../../../devices/{bus}/{address}"),
            );
        }
        let card = format!("sys/devices/{bus}/0000:{node}2:00.0/infiniband/mlx5_{node}");
        write(&format!("{card}/ports/1/state"), "4: ACTIVE\n");
        write(&format!("{card}/ports/1/rate"), "400 Gb/sec (4X NDR)\n");
        link(&format!("{card}/device"), "../..");
        link(
            &format!("sys/class/infiniband/mlx5_{node}"),
            &format!("../../../{card}"),
        );
    }
    let root = tree.path().to_str().unwrap();
    let output = doctor(&["--root", root]);
    assert!(output.status.success());
    let table = String::from_utf8(output.stdout).unwrap();
    for text in ["mlx5_1", "GPU1", "SYS", "gpu: memory for RDMA"] {
        assert!(table.contains(text), "{text}: {table}");
    }
    let json = tree.path().join("topo.json");
    let output = Command::new(env!("CARGO_BIN_EXE_kv-bench"))
        .args(["topo", "--plan", "--root", root, "--json"])
        .arg(&json)
        .output()
        .unwrap();
    assert!(output.status.success());
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("mlx5_1:1"), "{table}");
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(report["plan"][1]["rail"], "mlx5_1:1");
    assert_eq!(report["plan"][1]["link"], "PIX");
    assert_eq!(report["topology"]["links"][0][1], "SYS");
    assert_eq!(report["topology"]["devices"][0]["kind"], "gpu");
}
