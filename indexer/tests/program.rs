//! The program's commands that show what an index knows.
#![cfg(test)]

mod rig;

use std::process::Command;

use kvcache_core::Tier;
use rig::*;

/// Runs a command beside the server of this test; what it printed, by line.
async fn lines(server: &kvfabric_indexer::server::Running, arguments: &[&str]) -> Vec<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kv-indexer"));
    command.arg(arguments[0]);
    command.args(["--address", &server.grpc_address().to_string()]);
    command.args(&arguments[1..]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap());
    let output = output.await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let printed = String::from_utf8(output.stdout).unwrap();
    printed.lines().map(str::to_owned).collect()
}

fn json(line: &str) -> serde_json::Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))
}

/// A router's word, recorded from the command line, is in the next view.
async fn recording_is_shown(server: &kvfabric_indexer::server::Running, tokens: &str) {
    let longer = format!("{tokens},1,2,3,4");
    let recording = ["query", "--tokens", &longer, "--record", "pod-0"];
    let told = lines(server, &recording).await;
    let recorded = "recorded for pod-0: it holds 2, 1 more are expected";
    assert_eq!(told.last().unwrap(), recorded);
    let told = json(&lines(server, &["top", "--count", "1", "--json"]).await[0]);
    assert_eq!(
        (&told["expected_blocks"], &told["routings"]),
        (&1.into(), &1.into())
    );
    let by_tier = &told["tenants"][0]["tiers"];
    assert_eq!(by_tier["hbm"]["bytes"], told["tenants"][0]["bytes"]);
}

/// One engine with two blocks, in words and in JSON.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn query_dump_and_top_show_what_the_index_knows() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
    let _registered = join_engine(&client, "pod-0", &engine).await;

    let tokens: Vec<_> = TOKENS.iter().map(u32::to_string).collect();
    let tokens = tokens.join(",");
    let asked = [
        "query",
        "--tokens",
        &tokens,
        "--explain",
        "--by-score",
        "--pods",
        "pod-0",
    ];
    let told = lines(&server, &asked).await;
    assert!(
        told[1].starts_with("pod-0") && told[1].contains("depth      2"),
        "{told:?}"
    );
    assert_eq!(told[2], "  score = 2 in hbm x 1");
    assert!(
        told[3].contains("pod-0/engine") && told[3].contains("sequence 1"),
        "{told:?}"
    );
    let asked = ["query", "--tokens", &tokens, "--explain", "--json"];
    let told = json(&lines(&server, &asked).await[0]);
    assert_eq!(told["pods"][0]["terms"][0]["blocks"], 2);
    assert_eq!(told["positions"][0]["connected"], true);

    let told = lines(&server, &["top", "--count", "2", "--interval-ms", "1"]).await;
    assert!(told[0].starts_with("serving; 1 pods, 2 blocks"), "{told:?}");
    assert_eq!(told[1], "routings 0, expected blocks 0");
    assert!(
        told[2].starts_with("tenant default") && told[2].contains("hbm 2 (bytes "),
        "{told:?}"
    );
    assert!(told[3].starts_with("pod-0/engine"), "{told:?}");
    assert!(
        told[4].contains("events 0/s"),
        "the second view has rates: {told:?}"
    );
    let told = lines(&server, &["top", "--count", "1", "--json"]).await;
    assert_eq!(json(&told[0])["sources"][0]["source"], "pod-0/engine");

    recording_is_shown(&server, &tokens).await;

    let told = lines(&server, &["dump", "--blocks", "--json"]).await;
    assert_eq!(told.len(), 4);
    let mut blocks: Vec<_> = told[..2]
        .iter()
        .map(|line| json(line)["block"].as_str().unwrap().to_owned())
        .collect();
    let mut keys: Vec<_> = keys_of(&TOKENS)
        .iter()
        .map(|key| format!("{:016x}", key.0))
        .collect();
    blocks.sort();
    keys.sort();
    assert_eq!(blocks, keys);
    assert_eq!(json(&told[2])["blocks"]["hbm"], 2);
    let told = lines(&server, &["dump"]).await;
    assert_eq!(
        told,
        [
            "pod-0/engine             epoch 0, sequence 1; blocks: hbm 2; orphans 0",
            "shared tiers hold 0 blocks of model \"m\""
        ]
    );
}

/// Two pods, one of which has lost its engine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_lists_pods_and_sources_with_their_state() {
    let server = start(config()).await;
    let client = client(&server);
    let (held, lost) = (engine("pod-0"), engine("pod-1"));
    let mut kept = Vec::new();
    for (name, engine) in [("pod-0", &held), ("pod-1", &lost)] {
        engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
        let registered = join_engine(&client, name, engine).await;
        kept.push(registered);
    }
    drop(lost);
    wait_until(&client, |status| !status.pods[1].sources[0].connected).await;
    let told = lines(&server, &["pods"]).await;
    assert_eq!(
        told[0],
        "2 pods, 2 blocks, 4 entries; keys xxh3:1337, 4 tokens a block"
    );
    assert!(
        told[1].starts_with("tenant default") && told[1].contains("hbm 4 (bytes "),
        "{told:?}"
    );
    assert_eq!(
        told[2..],
        [
            "pod-0                    entries 2",
            "  pod-0/engine           connected, epoch 0, sequence 1, gaps 0, resyncs 0",
            "pod-1                    entries 2",
            "  pod-1/engine           not connected, epoch 0, sequence 1, gaps 0, resyncs 0",
        ]
    );
    let told = lines(&server, &["pods", "--json"]).await;
    assert_eq!(told.len(), 1);
    let told = json(&told[0]);
    assert_eq!(
        (&told["entries"], &told["block_size"]),
        (&4.into(), &4.into())
    );
    assert_eq!(told["key_scheme"], "xxh3:1337");
    let pod = &told["pods"][1];
    assert_eq!((&pod["pod"], &pod["entries"]), (&"pod-1".into(), &2.into()));
    assert_eq!(pod["peer_address"], "127.0.0.1:9");
    let source = &pod["sources"][0];
    assert_eq!(source["source"], "pod-1/engine");
    assert_eq!(
        (&source["connected"], &source["next_sequence"]),
        (&false.into(), &1.into())
    );
    assert_eq!(told["tenants"][0]["tiers"]["hbm"]["entries"], 4);
}

/// Each command where nobody listens: one line that says what was tried where, and a status that is not success.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_says_where_nobody_listens() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = free.local_addr().unwrap().to_string();
    drop(free);
    for arguments in [
        &["query", "--tokens", "1,2,3,4"][..],
        &["query", "--keys", "ab", "--json"],
        &["pods"],
        &["pods", "--json"],
        &["top", "--count", "1"],
        &["dump"],
        &["dump", "--file", "/tmp/never-written.snapshot"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kv-indexer"));
        command.args(arguments).args(["--address", &nobody]);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap());
        let output = output.await.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        let said: Vec<_> = said.lines().collect();
        assert!(
            said.len() == 1 && said[0].starts_with("error: ") && said[0].contains(&nobody),
            "{arguments:?}: {said:?}"
        );
    }
}

/// Arguments that make no sense are named, with another status than failures have.
#[test]
fn arguments_that_make_no_sense_are_named() {
    for (arguments, named) in [
        (&["query", "--tokens", "1,x"][..], "'x'"),
        (&["query"], "--tokens"),
        (&["query", "--keys", "xyz"], "'xyz'"),
        (&["query", "--tokens", "1", "--pods", "a b"], "a b"),
        (&["top", "--interval-ms", "0"], "'0'"),
        (&["dump", "--file", "x", "--json"], "--json"),
        (&["pods", "--deadline-ms", "soon"], "'soon'"),
        (&["serve", "--block-size", "0"], "block_size"),
        (&["serve", "--key-scheme", "md5"], "md5"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kv-indexer"));
        let output = command.args(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(named), "{arguments:?}: {said}");
    }
}

/// A dump into a file, from which another index begins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dumped_file_is_a_snapshot_to_begin_from() {
    let server = start(config()).await;
    let client = client(&server);
    let engine = engine("pod-0");
    engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
    let _registered = join_engine(&client, "pod-0", &engine).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump.snapshot");
    let told = lines(&server, &["dump", "--file", path.to_str().unwrap()]).await;
    assert!(told.is_empty());
    let mut config = config();
    config.snapshot_path = Some(path);
    let second = start(config).await;
    let replica = rig::client(&second);
    wait_until(&replica, |status| status.serving).await;
    assert_eq!(replica.status().await.unwrap().entries, 2);
}
