use super::*;

fn tally() -> Tally {
    let mut tally = Tally::default();
    let sources = [
        Source::Hbm,
        Source::Hbm,
        Source::Dram,
        Source::Nvme,
        Source::Peer,
        Source::Object,
    ];
    for source in sources {
        tally.record(source);
    }
    tally.record(Source::Miss);
    tally.record(Source::Miss);
    tally
}

fn report() -> Report {
    let mut report = Report {
        schema: SCHEMA,
        requests: 1,
        ..Report::default()
    };
    report.set_tally(&tally());
    report
}

/// Records one access per source and reads all counts and ratios back.
#[test]
fn every_access_is_counted_at_its_source() {
    let tally = tally();
    assert_eq!(
        tally.hits,
        Hits {
            hbm: 2,
            dram: 1,
            nvme: 1,
            peer: 1,
            object: 1
        }
    );
    assert_eq!((tally.accesses, tally.misses), (8, 2));
    assert_eq!(tally.cluster_hit_ratio(), 0.75);
    assert_eq!(tally.local_hit_ratio(), 0.375);
    assert_eq!(Tally::default().cluster_hit_ratio(), 0.0);
}

/// Starts from a report that passes and spoils one figure at a time; each must be named.
#[test]
fn a_report_whose_figures_do_not_fit_is_refused() {
    report().check().expect("a sound report");
    type Spoil = fn(&mut Report);
    let cases: [(Spoil, &str); 6] = [
        (
            |report| report.misses += 1,
            "6 hits and 3 misses are not 8 accesses",
        ),
        (
            |report| report.bytes_moved = 5,
            "the backends carried 0 bytes, bytes_moved is 5",
        ),
        (
            |report| report.cluster_hit_ratio = 0.5,
            "cluster_hit_ratio is 0.5",
        ),
        (
            |report| report.local_hit_ratio = f64::NAN,
            "local_hit_ratio is NaN",
        ),
        (
            |report| report.pods.push(PodReport::default()),
            "the pods add up to",
        ),
        (
            |report| (report.verified_blocks, report.verify_failures) = (9, 1),
            "1 of 9 verified blocks have a wrong byte",
        ),
    ];
    for (spoil, expected) in cases {
        let mut report = report();
        spoil(&mut report);
        let error = report.check().expect_err(expected);
        assert!(error.context().contains(expected), "{error}");
    }
}

/// Writes a report and looks for each documented key, with null where there was no second run; then reads it back.
#[test]
fn the_json_has_its_documented_keys_and_reads_back() {
    let report = report();
    let text = report.to_json().expect("JSON");
    let json: serde_json::Value = serde_json::from_str(&text).expect("parses");
    for key in [
        "requests",
        "block_accesses",
        "cluster_hit_ratio",
        "local_hit_ratio",
        "hits",
        "misses",
        "verified_blocks",
        "verify_failures",
        "bytes_moved",
        "seed",
        "version",
        "config",
        "pods",
        "events",
        "kills",
        "backends",
    ] {
        assert!(
            json.get(key).is_some_and(|value| !value.is_null()),
            "{key}: {text}"
        );
    }
    for key in ["hbm", "dram", "nvme", "peer", "object"] {
        assert!(json["hits"][key].is_u64(), "{key}: {text}");
    }
    assert!(json["round_robin_cluster_hit_ratio"].is_null());
    assert!(json["round_robin_local_hit_ratio"].is_null());
    assert!(json["lookup_us"].get("p50").is_some() && json["lookup_us"].get("p99").is_some());
    assert!(json["ttft_ms"]["moving"].is_number() && json["ttft_ms"]["computing"].is_number());
    assert_eq!(
        serde_json::from_str::<Report>(&text).expect("reads back"),
        report
    );
}

/// Checks quantiles of known lists, the empty one included.
#[test]
fn percentiles_are_samples_by_nearest_rank() {
    let mut samples = Samples::default();
    assert_eq!(
        samples.percentiles(),
        Percentiles {
            p50: None,
            p99: None
        }
    );
    for value in (1..=200).rev() {
        samples.push(f64::from(value));
    }
    assert_eq!(
        samples.percentiles(),
        Percentiles {
            p50: Some(100.0),
            p99: Some(198.0)
        }
    );
    assert_eq!((samples.count(), samples.mean()), (200, 100.5));
}
