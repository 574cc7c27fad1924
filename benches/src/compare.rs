//! A run beside one that was saved: the ratio of each figure, and whether ours got worse.

use std::path::{Path, PathBuf};

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use kvcache_core::{Error, ErrorKind, Result};

use crate::report::{OURS, Report, Row, number};

/// What less of is better of.
const UNITS_OF_COST: [&str; 9] = [
    "ns",
    "µs",
    "ms",
    "s",
    "s/GB",
    "KB",
    "MB",
    "% of a core",
    "ratio of cost",
];
/// A saved run, and what counts as worse.
#[derive(Debug)]
pub(crate) struct Comparison {
    path: PathBuf,
    saved: Report,
    /// Worse by more than this share is a regression; nothing is without it.
    worse_by: Option<f64>,
    /// Only these metrics; all if empty.
    metrics: Vec<String>,
}

/// How a comparison ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Figures of ours that are worse by more than was allowed.
    pub(crate) regressions: usize,
}

impl Comparison {
    /// Reads the saved run.
    ///
    /// # Errors
    /// `Io` or `Invalid` naming the path; `Invalid` for a share that is none.
    pub(crate) fn open(path: &Path, worse_by: Option<f64>, metrics: Vec<String>) -> Result<Self> {
        if let Some(share) = worse_by.filter(|share| !(share.is_finite() && *share >= 0.0)) {
            let context = format!("--worse-by {}: not a percentage", share * 100.0);
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let saved = Report::read(path).map_err(|error| error.at("--compare"))?;
        Ok(Self {
            path: path.to_owned(),
            saved,
            worse_by,
            metrics,
        })
    }

    /// The table of all figures that both runs have, and the verdict.
    pub(crate) fn with(&self, now: &Report) -> (String, Verdict) {
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY).set_header([
            "case",
            "subject",
            "metric",
            "saved",
            "now",
            "now/saved",
            "",
        ]);
        let (mut compared, mut regressions) = (0, 0);
        for row in &now.rows {
            let Some(saved) = self.counterpart(row) else {
                continue;
            };
            compared += 1;
            let ratio = row.median / saved.median;
            let is_worse = self.is_regression(row, ratio);
            regressions += usize::from(is_worse);
            table.add_row([
                row.case.clone(),
                row.subject.clone(),
                row.metric.clone(),
                number(saved.median),
                number(row.median),
                format!("{ratio:.3}"),
                if is_worse { "WORSE" } else { "" }.to_owned(),
            ]);
        }
        for column in table.column_iter_mut().skip(3).take(3) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut text = format!(
            "compared with {} (version {}, load {})\n{table}\n{compared} figures compared",
            self.path.display(),
            self.saved.version,
            self.saved.host.load
        );
        if self.saved.host.cpu != now.host.cpu || self.saved.host.cores != now.host.cores {
            text.push_str("; THE SAVED RUN IS OF ANOTHER MACHINE");
        }
        if let Some(share) = self.worse_by {
            let percent = share * 100.0;
            text.push_str(&format!(
                ", {regressions} of {OURS} worse by more than {percent} %"
            ));
        }
        (text, Verdict { regressions })
    }

    fn counterpart(&self, row: &Row) -> Option<&Row> {
        let is_wanted = self.metrics.is_empty() || self.metrics.contains(&row.metric);
        let is_same = |saved: &&Row| {
            saved.subject == row.subject && saved.case == row.case && saved.metric == row.metric
        };
        let saved = self.saved.rows.iter().find(is_same);
        saved.filter(|saved| is_wanted && saved.median != 0.0)
    }

    fn is_regression(&self, row: &Row, ratio: f64) -> bool {
        let Some(share) = self.worse_by.filter(|_| row.subject == OURS) else {
            return false;
        };
        let unit = row.unit.as_str();
        if unit == "ratio" || unit.ends_with("/s") {
            ratio < 1.0 - share
        } else {
            UNITS_OF_COST.contains(&unit) && ratio > 1.0 + share
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Case;

    fn report(figures: &[(&str, &str, f64)]) -> Report {
        let mut report = Report::new("transfer");
        for (metric, unit, value) in figures {
            for subject in [OURS, "memcpy"] {
                let case = Case {
                    subject,
                    name: "shm-read-4096",
                };
                report.rows.extend(case.single(metric, unit, *value));
            }
        }
        report
    }

    fn comparison(saved: Report, worse_by: Option<f64>, metrics: &[&str]) -> Comparison {
        Comparison {
            path: "saved.json".into(),
            saved,
            worse_by,
            metrics: metrics.iter().map(|metric| (*metric).to_owned()).collect(),
        }
    }

    /// Throughput that falls and latency that grows are worse; the other ways round, within the share, and others' are not.
    #[test]
    fn only_our_own_figures_can_get_worse() {
        let saved = report(&[("gb_per_s", "GB/s", 10.0), ("p50_us", "µs", 2.0)]);
        let verdict = |share, rows: &[_]| {
            let now = report(rows);
            let (text, verdict) = comparison(saved.clone(), share, &[]).with(&now);
            assert_eq!(text.matches("WORSE").count(), verdict.regressions, "{text}");
            verdict.regressions
        };
        let slower = [("gb_per_s", "GB/s", 8.0), ("p50_us", "µs", 2.5)];
        assert_eq!(verdict(Some(0.1), &slower), 2);
        assert_eq!(verdict(Some(0.3), &slower), 0);
        assert_eq!(verdict(None, &slower), 0);
        assert_eq!(
            verdict(
                Some(0.0),
                &[("gb_per_s", "GB/s", 12.0), ("p50_us", "µs", 1.0)]
            ),
            0
        );
    }

    /// Metrics that were not asked for, and those that the saved run lacks, are not compared.
    #[test]
    fn what_only_one_run_has_is_not_compared() {
        let saved = report(&[("gb_per_s", "GB/s", 10.0), ("p50_us", "µs", 2.0)]);
        let now = report(&[
            ("gb_per_s", "GB/s", 5.0),
            ("p50_us", "µs", 9.0),
            ("new", "µs", 1.0),
        ]);
        let (text, verdict) = comparison(saved.clone(), Some(0.1), &["p50_us"]).with(&now);
        assert_eq!(verdict.regressions, 1);
        assert!(
            text.contains("2 figures compared") && !text.contains("gb_per_s"),
            "{text}"
        );
        assert!(text.contains("4.500"), "{text}");
    }

    /// A file that is no report, and a share that is none, are refused by name.
    #[test]
    fn what_cannot_be_compared_with_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.json");
        std::fs::write(&path, "{}").unwrap();
        let error = Comparison::open(&path, None, Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("other.json"), "{error}");
        let error = Comparison::open(&path, Some(-0.1), Vec::new()).unwrap_err();
        assert!(error.to_string().contains("--worse-by -10"), "{error}");
    }
}
