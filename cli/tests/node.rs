//! `kvfabric node` as a user runs it.
#![cfg(test)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

const IDENTITY: &str = "6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b6b";

fn config(folder: &std::path::Path, more: &str) -> String {
    let path = folder.join("node.toml");
    let text = format!(
        "pod = \"pod-0\"\nmodel = \"m\"\nmodel_identity = \"{IDENTITY}\"\nblock_bytes = 4096\nblock_tokens = 16\n\
         {more}\n[host]\nbytes = 1048576\n[disk]\npath = \"{}\"\nbytes = 1048576\nsegment_bytes = 131072\n",
        folder.join("nvme").display()
    );
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Starts, says its addresses, serves metrics, and leaves in order on SIGTERM.
#[test]
fn a_node_serves_metrics_and_ends_on_sigterm() {
    let folder = tempfile::tempdir().unwrap();
    let file = config(folder.path(), "metrics_listen = \"127.0.0.1:0\"");
    let mut node = Command::new(env!("CARGO_BIN_EXE_kvfabric"))
        .args(["node", "--config", &file, "--shutdown-seconds", "20"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(node.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let address = line.trim().rsplit(' ').next().unwrap().to_owned();
    assert!(line.starts_with("pod pod-0 peers 127.0.0.1:"), "{line}");

    let mut stream = TcpStream::connect(&address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut metrics = String::new();
    stream.read_to_string(&mut metrics).unwrap();
    assert!(metrics.contains("kvfabric_node_disk_blocks 0"), "{metrics}");

    // The disk tier's folder belongs to one process at a time.
    let second = Command::new(env!("CARGO_BIN_EXE_kvfabric"))
        .args(["node", "--config", &file])
        .output();
    let second = second.unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("nvme"));

    let killed = Command::new("kill")
        .args(["-TERM", &node.id().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    assert!(node.wait().unwrap().success());
}

/// A key that nobody knows, and a file that is not there: exit 2, by name.
#[test]
fn bad_configuration_ends_with_status_2_and_the_key() {
    let folder = tempfile::tempdir().unwrap();
    for (file, words) in [
        (
            config(folder.path(), "metric_listen = \"127.0.0.1:0\""),
            "metric_listen",
        ),
        ("no/such/file.toml".to_owned(), "no/such/file.toml"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_kvfabric"))
            .args(["node", "--config", &file])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(words), "{text}");
    }
}

/// The version is one line.
#[test]
fn the_version_is_said() {
    let output = Command::new(env!("CARGO_BIN_EXE_kvfabric"))
        .arg("version")
        .output()
        .unwrap();
    let expected = format!("kvfabric {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}
