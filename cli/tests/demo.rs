//! The demo as a user runs it: real processes, real sockets, every block verified.
#![cfg(test)]

use std::path::Path;
use std::process::{Command, Output};

use kvfabric_sim::report::Report;

/// Tiers small enough for each of them to evict in a short run.
const TIGHT: [&str; 10] = [
    "--block-bytes",
    "4K",
    "--hbm-bytes",
    "1M",
    "--dram-bytes",
    "2M",
    "--nvme-bytes",
    "2M",
    "--seed",
    "7",
];

fn kvfabric(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvfabric"))
        .args(args)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a demo that must succeed, and reads its JSON.
fn demo(args: &[&str]) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let mut all = vec!["demo", "--json", json.to_str().unwrap()];
    all.extend(args);
    let output = kvfabric(&all);
    assert!(
        output.status.success(),
        "{args:?}: {}\n{}",
        output.status,
        stderr(&output)
    );
    let report: Report = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    report.check().unwrap();
    assert!(
        report.verified_blocks >= report.block_accesses,
        "every accessed block is compared"
    );
    report
}

/// The ratio of an infinite cache comes from a counter that knows no keys; the cluster must match it block for block.
fn assert_exact(report: &Report) {
    let hits = report.hits.total();
    let ratio = hits as f64 / report.block_accesses as f64;
    assert!(
        (ratio - report.infinite_hit_ratio).abs() < 1e-12,
        "{report:#?}"
    );
    assert!(hits > 0 && report.misses > 0);
}

/// Every workload under every policy, tiers without bounds.
#[test]
fn unbounded_hits_are_an_infinite_caches_under_every_router() {
    for workload in ["chat", "agent", "rag"] {
        for router in ["prefix", "round-robin", "random", "load"] {
            let report = demo(&[
                "--unbounded",
                "--no-comparison",
                "--workload",
                workload,
                "--router",
                router,
                "--max-requests",
                "24",
                "--block-bytes",
                "1K",
            ]);
            assert_eq!(report.requests, 24);
            assert_exact(&report);
        }
    }
}

/// Tight tiers: blocks come from every source, leave every tier, and none is wrong.
#[test]
fn bounded_tiers_evict_and_still_serve_right_bytes_from_every_source() {
    let mut args = vec![
        "--workload",
        "chat",
        "--router",
        "random",
        "--max-requests",
        "150",
    ];
    args.extend(TIGHT);
    let report = demo(&args);
    let hits = &report.hits;
    for (source, blocks) in [
        ("hbm", hits.hbm),
        ("dram", hits.dram),
        ("nvme", hits.nvme),
        ("peer", hits.peer),
        ("object", hits.object),
    ] {
        assert!(blocks > 0, "no hit from {source}: {hits:?}");
    }
    assert!(
        hits.nvme + hits.object > 0,
        "no hit from below DRAM: {hits:?}"
    );
    let evicted = |of: fn(&kvfabric_sim::report::PodReport) -> u64| -> u64 {
        report.pods.iter().map(of).sum()
    };
    assert!(evicted(|pod| pod.hbm_evictions) > 0);
    assert!(evicted(|pod| pod.dram_evictions) > 0);
    assert!(evicted(|pod| pod.nvme_evictions) > 0);
    assert!(report.cluster_hit_ratio <= report.infinite_hit_ratio);
    assert!(report.round_robin_cluster_hit_ratio.is_some());
}

/// TCP only: no byte goes through shared memory between pods.
#[test]
fn pods_that_are_told_tcp_use_tcp() {
    let mut args = vec![
        "--transport",
        "tcp",
        "--no-comparison",
        "--max-requests",
        "40",
    ];
    args.extend(TIGHT);
    let report = demo(&args);
    assert!(
        report.backends.get("tcp").is_some_and(|tcp| tcp.bytes > 0),
        "{:?}",
        report.backends
    );
    assert!(report.backends.get("shm").is_none_or(|shm| shm.bytes == 0));
}

/// RDMA only, each pod with a port of its own choice; skipped where there is no device. `make test-rdma` has one.
#[test]
fn pods_that_are_told_verbs_use_verbs() {
    let options = kvfabric::transfer::VerbsOptions::default();
    let probe = kvfabric::transfer::Agent::builder("probe").verbs(Some(options));
    if let Err(error) = probe.build() {
        assert!(std::env::var_os("KVFABRIC_RDMA").is_none(), "{error}");
        println!("SKIPPED the demo over RDMA: {error}");
        return;
    }
    // Memory alone and few requests, one at a time: where there is soft-RoCE only, the machine is emulated, too.
    let report = demo(&[
        "--transport",
        "verbs",
        "--router",
        "random",
        "--no-comparison",
        "--max-requests",
        "12",
        "--concurrency",
        "1",
        "--block-bytes",
        "4K",
        "--hbm-bytes",
        "1M",
        "--dram-bytes",
        "2M",
        "--nvme-bytes",
        "0",
        "--object",
        "none",
        "--seed",
        "7",
    ]);
    let verbs = report.backends.get("verbs");
    assert!(
        verbs.is_some_and(|verbs| verbs.bytes > 0 && verbs.failures == 0),
        "{:?}",
        report.backends
    );
    assert!(report.hits.peer > 0, "{:?}", report.hits);
    for other in ["tcp", "shm", "cma", "ucx"] {
        let moved = report.backends.get(other).map_or(0, |way| way.bytes);
        assert_eq!(moved, 0, "{other}: {:?}", report.backends);
    }
}

/// SIGKILL in the middle: the run ends normally, the pod leaves the index, nothing is wrong, the rest is recomputed.
#[test]
fn a_killed_pod_costs_misses_and_nothing_else() {
    let mut args = vec![
        "--kill-pod",
        "0.4",
        "--workload",
        "agent",
        "--max-requests",
        "600",
    ];
    args.extend(TIGHT);
    let report = demo(&args);
    assert_eq!(report.requests, 600);
    assert_eq!(
        report.kills.len(),
        1,
        "the pod was to die before the workload's end"
    );
    assert!(
        report.kills[0].left_index_after_s.is_some(),
        "{:?}",
        report.kills
    );
    assert_eq!(report.pods.iter().filter(|pod| !pod.alive).count(), 1);
    assert_eq!(report.round_robin_cluster_hit_ratio, None);
}

fn write_trace(folder: &Path, lines: &[&str]) -> String {
    let path = folder.join("trace.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

const LINE_1: &str =
    r#"{"timestamp": 0, "input_length": 1100, "output_length": 600, "hash_ids": [1, 2, 3]}"#;
const LINE_2: &str =
    r#"{"timestamp": 5, "input_length": 1536, "output_length": 10, "hash_ids": [1, 2, 4]}"#;
const LINE_3: &str =
    r#"{"timestamp": 9, "input_length": 600, "output_length": 10, "hash_ids": [1, 9]}"#;

/// A trace of three requests, whose hits can be counted by hand: 0 of 3, 2 of 3, 1 of 2.
#[test]
fn a_trace_is_replayed_block_for_block() {
    let folder = tempfile::tempdir().unwrap();
    let trace = write_trace(folder.path(), &[LINE_1, LINE_2, LINE_3]);
    let report = demo(&["--trace", &trace, "--unbounded", "--block-bytes", "2K"]);
    assert_eq!((report.requests, report.block_accesses), (3, 8));
    assert_eq!((report.hits.total(), report.misses), (3, 5));
    assert_exact(&report);
}

/// Broken traces: the complaint names file, line and reason, nothing runs and nothing is written.
#[test]
fn a_broken_trace_is_refused_by_line() {
    let folder = tempfile::tempdir().unwrap();
    let too_few = r#"{"timestamp": 5, "input_length": 5000, "output_length": 1, "hash_ids": [1]}"#;
    for (line, reason) in [("{not json", "not JSON"), (too_few, "hash_ids")] {
        let trace = write_trace(folder.path(), &[LINE_1, line]);
        let json = folder.path().join("report.json");
        let output = kvfabric(&["demo", "--trace", &trace, "--json", json.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        let text = stderr(&output);
        assert!(
            text.contains("trace.jsonl") && text.contains(reason),
            "{text}"
        );
        assert!(text.contains("trace.jsonl:2:"), "{text}");
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            1,
            "something was written"
        );
    }
}

/// Options that cannot work say why, with the option's name.
#[test]
fn impossible_options_are_refused_by_name() {
    for (args, expected) in [
        (vec!["--pods", "0:1"], "0:1"),
        (vec!["--hbm-bytes", "64K"], "--hbm-bytes"),
        (vec!["--model", "gpt-99"], "gpt-99"),
        (vec!["--setting", "turn=3"], "requests_per_minute"),
        (vec!["--setting", "turns=x"], "turns is \"x\""),
        (vec!["--setting", "turns"], "NAME=VALUE"),
        (vec!["--trace", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (
            vec!["--json", "no-such-folder/report.json"],
            "no-such-folder/report.json",
        ),
        (vec!["--kill-pod", "1", "--pods", "1:1"], "--pods"),
        (vec!["--object", "ftp://somewhere"], "ftp"),
    ] {
        let mut all = vec!["demo"];
        all.extend(&args);
        let output = kvfabric(&all);
        assert!(!output.status.success(), "{args:?} was accepted");
        assert!(
            stderr(&output).contains(expected),
            "{args:?}: {}",
            stderr(&output)
        );
    }
}

/// The public conversation trace: 36.64 % of 288,500 accesses, exactly. Needs KVFABRIC_TRACE.
#[test]
fn the_conversation_trace_hits_like_an_infinite_cache() {
    let Some(trace) = std::env::var_os("KVFABRIC_TRACE") else {
        println!("SKIPPED the conversation trace: KVFABRIC_TRACE does not point at it");
        return;
    };
    let trace = trace.to_str().unwrap();
    let report = demo(&[
        "--trace",
        trace,
        "--unbounded",
        "--no-comparison",
        "--block-bytes",
        "512",
    ]);
    assert_eq!((report.requests, report.block_accesses), (12_031, 288_500));
    assert_eq!(format!("{:.2}", report.cluster_hit_ratio * 100.0), "36.64");
    assert_exact(&report);
}
