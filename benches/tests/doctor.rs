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
