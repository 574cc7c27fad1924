//! Runs the program as people do, with tiny sizes, and reads the figures that it writes. Times are never looked at.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use support::{PATIENCE, bench, median, read, rows};

/// Runs what must be refused; what it says.
fn refusal(arguments: &str) -> String {
    let output = bench(arguments).output().unwrap();
    refused(&output)
}

fn refused(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(output.stdout.is_empty());
    text
}

/// Every backend both ways beside its references: all blocks are counted and verified on all of them.
#[test]
fn transfers_move_and_verify_every_block_on_every_path() {
    let rows = rows(
        "transfer --block-bytes 4K,16K --total-bytes 256K --blocks 5 --iterations 2 \
         --latency-samples 3",
    );
    let paths: [(&str, &[&str]); 5] = [
        ("memcpy", &["kvfabric", "memcpy"]),
        ("shm", &["kvfabric", "memcpy", "mapped-loop"]),
        ("tcp", &["kvfabric", "raw-tcp", "memcpy"]),
        ("file", &["kvfabric", "disk"]),
        ("object", &["kvfabric", "disk"]),
    ];
    for (path, subjects) in paths {
        for way in ["read", "write"] {
            for block in [4096, 16384] {
                let case = format!("{path}-{way}-{block}");
                for subject in subjects {
                    let value = |metric| median(&rows, subject, &case, metric);
                    assert_eq!(value("bytes"), 2.0 * 262_144.0, "{subject} {case}");
                    assert_eq!(value("verified_blocks"), f64::from(262_144 / block));
                    for metric in ["gb_per_s", "cpu_s_per_gb", "p50_us", "p99_us"] {
                        assert!(value(metric) >= 0.0);
                    }
                }
                for reference in &subjects[1..] {
                    let metric = format!("ratio_to_{}", reference.replace('-', "_"));
                    assert!(median(&rows, "kvfabric", &case, &metric) > 0.0);
                }
            }
        }
    }
}

/// One backend, in order, alone: only what was asked for is there.
#[test]
fn transfers_can_be_contiguous_and_alone() {
    let rows = rows(
        "transfer --backend shm --operation write --block-bytes 8 --total-bytes 4K --blocks 512 \
         --order contiguous --no-references --iterations 1 --latency-samples 0 --quiet",
    );
    assert!(
        rows.iter()
            .all(|row| row["subject"] == "kvfabric" && row["case"] == "shm-write-8")
    );
    assert_eq!(
        median(&rows, "kvfabric", "shm-write-8", "verified_blocks"),
        512.0
    );
    assert!(!rows.iter().any(|row| row["metric"] == "p50_us"));
}

/// The smallest workload from both origins and over gRPC: counts are the workload's, and nothing is left at the end.
#[test]
fn the_index_command_counts_what_the_workload_has() {
    for origin in ["node", "engine"] {
        let rows = rows(&format!(
            "index --sequences 1 --repeats 1 --lookups 4 --origin {origin} --pods 4 --copies 2 --grpc"
        ));
        let value = |case: &str, metric: &str| median(&rows, "kvfabric", case, metric);
        let blocks = value("ingest-16", "blocks");
        assert_eq!(value("ingest-1", "blocks"), blocks);
        assert_eq!(value("ingest-1", "events"), blocks);
        assert_eq!(value("memory-r1", "pairs"), blocks);
        assert!(value("memory-r1", "index_bytes_per_pair") > 0.0);
        assert!(value("memory-r4", "blocks") < value("memory-r1", "blocks"));
        assert!(value("ingest-16", "blocks_per_s") > 0.0);
        for case in [
            "lookup-128",
            "lookup-512",
            "lookup-2048",
            "lookup-512-beside-writer",
            "pods-4-stand-in",
            "pods-8-stand-in",
            "pods-8-stand-in-names",
            "grpc-lookup-0",
            "grpc-lookup-2048",
            "grpc-lookup-512-beside-writers",
        ] {
            assert!(value(case, "p99_us") >= value(case, "p50_us"));
        }
        assert_eq!(
            2.0 * value("pods-4-stand-in", "blocks"),
            value("pods-8-stand-in", "blocks")
        );
        for case in ["grpc-lookup-0", "grpc-lookup-512-beside-writers"] {
            assert!(median(&rows, "grpc-echo", case, "p50_us") > 0.0);
        }
        assert!(value("grpc-lookup-512", "answer_bytes") > value("grpc-lookup-0", "answer_bytes"));
        assert!(value("remove-pod", "ms") >= 0.0);
        assert!(value("after-removal", "rss_ratio") >= 0.0);
    }
}

/// A generated workload and a trace of two requests that share one block.
#[test]
fn replays_hit_what_an_infinite_cache_hits() {
    let generated = rows("replay --workload rag --max-requests 30 --pods 3");
    let value = |metric: &str| median(&generated, "kvfabric", "replay-rag", metric);
    assert_eq!(value("requests"), 30.0);
    assert_eq!(value("hit_ratio"), value("infinite_hit_ratio"));
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("two.jsonl");
    let line = |at: u32, ids: &str| {
        format!(
            r#"{{"timestamp": {at}, "input_length": 1000, "output_length": 5, "hash_ids": {ids}}}"#
        )
    };
    std::fs::write(
        &trace,
        format!("{}\n{}\n", line(0, "[1, 2]"), line(9, "[1, 3]")),
    )
    .unwrap();
    let replayed = rows(&format!("replay --trace {}", trace.display()));
    let value = |metric: &str| median(&replayed, "kvfabric", "replay-two", metric);
    assert_eq!((value("block_accesses"), value("hit_ratio")), (4.0, 0.25));
}

/// Options that make no sense end with 2 and name themselves; nothing is measured.
#[test]
fn bad_options_are_refused_by_name() {
    for (arguments, named) in [
        (
            "transfer --block-bytes 12 --total-bytes 24",
            "--block-bytes",
        ),
        (
            "transfer --block-bytes 4K --total-bytes 5000",
            "--total-bytes 5000",
        ),
        ("transfer --block-bytes 4Q", "\"4Q\""),
        ("transfer --backend pigeon", "pigeon"),
        ("transfer --iterations 0", "--iterations"),
        ("transfer --dir /nowhere", "--dir /nowhere"),
        (
            "transfer --json /nowhere/at/all.json",
            "--json /nowhere/at/all.json",
        ),
        ("index --full --sequences 3", "--sequences"),
        ("index --sequences 0", "--sequences"),
        ("replay --trace /nowhere.jsonl", "/nowhere.jsonl"),
        ("replay --pods 0", "--pods"),
        ("replay --speed 3", "--speed"),
    ] {
        let text = refusal(arguments);
        assert!(text.contains(named), "{arguments}: {text}");
    }
}

/// The program alone in a folder, without the one that has the demo.
#[test]
fn a_missing_demo_program_is_named() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let alone = folder.path().join("kv-bench");
    // A link, because a copy may be open for writing in a child that another test is just making, and is not run then.
    std::fs::hard_link(env!("CARGO_BIN_EXE_kv-bench"), &alone).unwrap();
    let output = Command::new(&alone)
        .args(["replay", "--demo", "1:1"])
        .output()
        .unwrap();
    let text = refused(&output);
    assert!(
        text.contains(&folder.path().join("kvfabric").display().to_string()),
        "{text}"
    );
}

/// Interrupts a run that would take an hour, once it has made its folder.
#[test]
fn an_interrupted_run_writes_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.json");
    let work: PathBuf = folder.path().join("work");
    std::fs::create_dir(&work).unwrap();
    let mut child = bench("transfer --backend memcpy --block-bytes 4K --total-bytes 16M --quiet")
        .args(["--iterations", "1000000", "--dir"])
        .arg(&work)
        .arg("--json")
        .arg(&json)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    while std::fs::read_dir(&work).unwrap().next().is_none() {
        assert!(Instant::now() < until, "it never started");
        std::thread::yield_now();
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(read(&json)["command"], "transfer");
    assert!(
        std::fs::read_dir(&work).unwrap().next().is_none(),
        "its folder is left behind"
    );
}
