use kvcache_core::manager::Limits;

use super::*;
use crate::router::Policy;
use crate::workload::WorkloadKind;

/// Stormy runs when `KVFABRIC_SEEDS` does not say how many: some seconds.
const SEEDS_DEFAULT: u64 = 80;

/// Counters that may be 0 at the end: levels, and answers that came too late, which need a death at the right moment.
const MAY_BE_NOUGHT: [&str; 8] = [
    "host_quarantined",
    "operations",
    "leases",
    "commands_in_flight",
    "disk_stopped",
    "stray_answers",
    "pins",
    "pinned_blocks",
];

fn run(config: Config) -> Result<Summary, Failure> {
    // Seen only if the test fails, also by a panic below.
    println!("KVFABRIC_SEED={}", config.seed);
    Cluster::new(config).expect("sound settings").run()
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is {text:?}, expected a number")),
    )
}

/// `KVFABRIC_SEED` alone if it is set, else as many as `KVFABRIC_SEEDS` says.
fn seeds() -> Vec<u64> {
    match number("KVFABRIC_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("KVFABRIC_SEEDS").unwrap_or(SEEDS_DEFAULT)).collect(),
    }
}

/// Every workload under every policy, without limits and without faults, against the independent counter, request by
/// request.
#[test]
fn a_cluster_without_limits_hits_what_an_infinite_cache_hits_under_every_policy() {
    for kind in WorkloadKind::ALL {
        let mut tallies = Vec::new();
        for policy in Policy::ALL {
            let summary = run(Config::calm(7, kind, policy))
                .unwrap_or_else(|failure| panic!("{kind} {policy}: {failure}"));
            assert_eq!(
                summary.tally.hits.total(),
                summary.infinite.hits,
                "{kind} {policy}"
            );
            assert_eq!(
                summary.counters["corrupt"], 0,
                "{kind} {policy}: nothing was ever wrong"
            );
            assert!(
                summary.infinite.hits > 300,
                "{kind} shares too little: {:?}",
                summary.infinite
            );
            tallies.push(summary.tally);
        }
        assert!(
            tallies.iter().any(|tally| tally.hits.peer > 0),
            "{kind}: no block ever came from a peer"
        );
        assert!(
            tallies.iter().any(|tally| *tally != tallies[0]),
            "{kind}: policies made no difference"
        );
    }
}

/// Engine pools and DRAM too small for the workload, but nothing is lost on the way down: what was computed is found again,
/// request by request, though no longer in HBM.
#[test]
fn small_fast_tiers_lose_nothing_when_a_lower_tier_is_large_enough() {
    let disk = Limits {
        host_slots: 80,
        disk_segments: 64,
        disk_segment_slots: 64,
        operations_max: 4,
        ..Limits::default()
    };
    for limits in [
        Limits {
            host_slots: 1 << 14,
            ..Limits::default()
        },
        disk,
    ] {
        for kind in WorkloadKind::ALL {
            let config = Config {
                engine_slots: 40,
                ..Config::calm(3, kind, Policy::RoundRobin)
            };
            let has_disk = limits.disk_segments > 0;
            let config = Config {
                limits: limits.clone(),
                ..config
            };
            let summary = run(config).unwrap_or_else(|failure| panic!("{kind}: {failure}"));
            assert_eq!(summary.tally.hits.total(), summary.infinite.hits, "{kind}");
            let hits = summary.tally.hits;
            let slow = if has_disk { hits.nvme } else { hits.dram };
            assert!(
                slow + hits.peer > hits.hbm / 4,
                "{kind}: the small tiers were not small: {hits:?}"
            );
            assert!(
                !has_disk || summary.counters["demoted_disk"] > 100,
                "{kind}: {:?}",
                summary.counters
            );
        }
    }
}

/// Small tiers, a lossy network, failing disks, dying pods, pins, removals, flushes and pods that end in order: each seed
/// another mixture, all invariants checked.
#[test]
fn whatever_happens_no_wrong_byte_is_served_and_nothing_is_left_over() {
    let (mut steps, mut kills, mut partitions, mut unsettled) = (0, 0, 0, 0);
    let (mut retired, mut written, mut found, mut pinned, mut flushed) = (0, 0, 0, 0, 0);
    let mut tally = Tally::default();
    let mut counters = BTreeMap::<&str, u64>::new();
    for seed in seeds() {
        let summary = run(Config::stormy(seed)).unwrap_or_else(|failure| panic!("{failure}"));
        steps += summary.steps;
        kills += summary.kills;
        partitions += summary.partitions;
        unsettled += summary.unsettled;
        retired += summary.retired;
        written += summary.written_at_the_end;
        found += summary.found_on_disk;
        pinned += summary.pinned;
        flushed += summary.flushed;
        tally.merge(&summary.tally);
        for (name, value) in summary.counters {
            *counters.entry(name).or_default() += value;
        }
    }
    println!(
        "{steps} steps, {kills} kills, {partitions} partitions, {unsettled} unsettled fetches"
    );
    println!(
        "{retired} ends in order, {written} blocks written there, {found} found at starts, {pinned} pins, {flushed} flushes"
    );
    println!("{tally:?}");
    println!("{counters:?}");
    if (seeds().len() as u64) < SEEDS_DEFAULT {
        return;
    }
    // The storms must reach what they are made for.
    assert!(steps > 50_000 && kills > 100 && partitions > 100 && unsettled > 10);
    assert!(retired > 100 && written > 1000 && found > 1000 && pinned > 100 && flushed > 100);
    let hits = tally.hits;
    assert!(
        [hits.hbm, hits.dram, hits.nvme, hits.peer, hits.object]
            .iter()
            .all(|hits| *hits > 100)
    );
    for (name, count) in counters {
        assert!(
            count > 0 || MAY_BE_NOUGHT.contains(&name),
            "no storm ever led to {name}"
        );
    }
}

/// Runs some seeds twice and compares everything, the network's digest included.
#[test]
fn equal_seeds_give_equal_runs() {
    for seed in 100..105 {
        assert_eq!(run(Config::stormy(seed)), run(Config::stormy(seed)));
    }
    let (one, other) = (run(Config::stormy(100)), run(Config::stormy(101)));
    assert_ne!(
        one.expect("sound").network_digest,
        other.expect("sound").network_digest
    );
}

/// Plants one bug after the other in the driver; some seed must find each, and say what and how to replay it.
#[test]
fn planted_bugs_are_found() {
    let bugs = [
        (Sabotage::TrustBytes, "wrong byte accepted"),
        (Sabotage::ReuseUnsettledSlots, "wrong byte accepted"),
        (Sabotage::SwallowRemovals, "not withdrawn"),
    ];
    for (sabotage, expected) in bugs {
        let found = (0..300).find_map(|seed| {
            run(Config {
                sabotage,
                ..Config::stormy(seed)
            })
            .err()
        });
        let failure = found.unwrap_or_else(|| panic!("{sabotage:?} was not found"));
        assert!(failure.what.contains(expected), "{sabotage:?}: {failure}");
        assert!(
            failure
                .to_string()
                .contains(&format!("KVFABRIC_SEED={}", failure.seed))
        );
        let again = run(Config {
            sabotage,
            ..Config::stormy(failure.seed)
        });
        assert_eq!(again, Err(failure), "the seed replays it");
    }
}
