//! What this project promises of the index, beside what was measured.

use kvcache_core::Result;

use crate::goals;
use crate::recorder::Recorder;
use crate::report::{Case, OURS, Row};

use super::rivals::SUBJECTS;

/// What is promised, of the workload in its real size.
const GOALS: &str = include_str!("../../index/goals.json");

/// Figures that are compared with the best of the others, less being better.
const COMPARED: [(&str, &[&str]); 4] = [
    ("lookup-128", &["p50_us", "p99_us"]),
    ("lookup-512", &["p50_us", "p99_us"]),
    ("lookup-2048", &["p50_us", "p99_us"]),
    ("lookup-512-beside-writer", &["p99_us"]),
];

/// Compares with the others, and tells of each goal whether it is met; of a smaller workload nothing was promised.
///
/// # Errors
/// `Internal` when the goals cannot be read.
pub(super) fn conclude(is_full: bool, recorder: &mut Recorder) -> Result<()> {
    let rows: Vec<Row> = COMPARED
        .iter()
        .flat_map(|(case, metrics)| metrics.iter().map(move |metric| (*case, *metric)))
        .filter_map(|(case, metric)| ratio_to_least(recorder.rows(), case, metric))
        .collect();
    recorder.extend(rows);
    if is_full {
        goals::conclude(goals::read(GOALS)?, recorder);
    }
    Ok(())
}

/// Ours over the least of the others': of the medians, and how far that may be off when each has its best or worst round.
fn ratio_to_least(rows: &[Row], case: &str, metric: &str) -> Option<Row> {
    let of = |subject: &str| {
        rows.iter()
            .find(|row| row.subject == subject && row.case == case && row.metric == metric)
    };
    let ours = of(OURS)?;
    let others = SUBJECTS.into_iter().filter_map(of);
    let least = others.min_by(|one, other| one.median.total_cmp(&other.median))?;
    let name = format!("{}_to_best", metric.trim_end_matches("_us"));
    let ratio = ours.median / least.median;
    let row = Case {
        subject: OURS,
        name: case,
    }
    .single(&name, "ratio", ratio)?;
    Some(Row {
        min: ours.min / least.max,
        max: ours.max / least.min,
        n: ours.n.min(least.n),
        ..row
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(subject: &str, values: [f64; 3]) -> Row {
        let [min, median, max] = values;
        let case = Case {
            subject,
            name: "lookup-128",
        };
        Row {
            min,
            max,
            n: 5,
            ..case.single("p50_us", "µs", median).unwrap()
        }
    }

    /// Two others, of which one is better.
    #[test]
    fn the_best_of_the_others_is_compared_with() {
        let rows = [
            row(OURS, [1.0, 2.0, 3.0]),
            row("crtc", [4.0, 8.0, 9.0]),
            row("chain", [2.0, 4.0, 5.0]),
        ];
        let ratio = ratio_to_least(&rows, "lookup-128", "p50_us").unwrap();
        assert_eq!(ratio.metric, "p50_to_best");
        assert_eq!((ratio.min, ratio.median, ratio.max), (0.2, 0.5, 1.5));
        assert!(ratio_to_least(&rows[..1], "lookup-128", "p50_us").is_none());
    }

    /// Each has one bound.
    #[test]
    fn goals_can_be_read() {
        for goal in goals::read(GOALS).unwrap() {
            assert!(
                goal.at_least.is_some() != goal.at_most.is_some(),
                "{goal:?}"
            );
        }
    }
}
