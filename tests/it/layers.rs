//! Crates know each other only downwards, as ARCHITECTURE.md draws it.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Which of our packages each of our packages may depend on (outside its tests).
const ALLOWED: [(&str, &[&str]); 15] = [
    ("kvcache-core", &[]),
    ("kvfabric-proto", &[]),
    ("kvfabric-transfer", &["kvcache-core"]),
    ("kvfabric-transfer-orders", &["kvcache-core"]),
    (
        "kvfabric-tiers",
        &["kvcache-core", "kvfabric-transfer", "kvfabric-proto"],
    ),
    ("kvfabric-indexer", &["kvcache-core", "kvfabric-proto"]),
    ("kvfabric-index-orders", &["kvcache-core"]),
    ("kvfabric-index-schedules", &["kvcache-core"]),
    ("kvfabric", &NODE),
    ("kvfabric-c", &SKIN),
    ("kvfabric-python", &SKIN),
    ("kvfabric-sim", &SKIN),
    ("kvfabric-cli", &TOP),
    ("kv-bench", &TOP),
    ("kvfabric-tests", &TOP),
];
const NODE: [&str; 5] = [
    "kvcache-core",
    "kvfabric-transfer",
    "kvfabric-tiers",
    "kvfabric-proto",
    "kvfabric-indexer",
];
const SKIN: [&str; 6] = [
    "kvcache-core",
    "kvfabric-transfer",
    "kvfabric-tiers",
    "kvfabric-proto",
    "kvfabric-indexer",
    "kvfabric",
];
const TOP: [&str; 7] = [
    "kvcache-core",
    "kvfabric-transfer",
    "kvfabric-tiers",
    "kvfabric-proto",
    "kvfabric-indexer",
    "kvfabric",
    "kvfabric-sim",
];

/// Reads `cargo metadata` and compares every edge with the table.
#[test]
fn no_crate_knows_one_above_it() {
    let metadata = MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .no_deps()
        .exec()
        .unwrap();
    let allowed: BTreeMap<&str, BTreeSet<&str>> = ALLOWED
        .iter()
        .map(|(name, below)| (*name, below.iter().copied().collect()))
        .collect();
    let ours: BTreeSet<&str> = metadata.packages.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(
        ours,
        allowed.keys().copied().collect(),
        "a crate is missing from the table"
    );
    let mut wrong = Vec::new();
    for package in &metadata.packages {
        for dependency in &package.dependencies {
            if dependency.kind != DependencyKind::Normal || !ours.contains(&*dependency.name) {
                continue;
            }
            if !allowed[package.name.as_str()].contains(&*dependency.name) {
                wrong.push(format!("{} -> {}", package.name, dependency.name));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "edges the architecture does not have: {wrong:?}"
    );
}

/// The core may not reach for time, threads, the network or the disk, whatever the crates it uses allow.
#[test]
fn the_core_has_no_effects() {
    const EFFECTS: [&str; 8] = [
        "std::net",
        "std::fs",
        "std::thread",
        "std::time::Instant",
        "std::time::SystemTime",
        "tokio",
        "std::process",
        "async fn",
    ];
    let root = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../kvcache-core/src"));
    let mut found = Vec::new();
    for path in crate::tidy::files_below(root, "rs") {
        if path.ends_with("tests.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for effect in EFFECTS {
                if code.contains(effect) {
                    found.push(format!("{}:{}: {effect}", path.display(), number + 1));
                }
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}
