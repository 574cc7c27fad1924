//! What this project promises, beside what was measured.

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use kvcache_core::{Error, ErrorKind, Result};
use serde::Deserialize;

use crate::recorder::Recorder;
use crate::report::{Case, OURS, Row, number};

/// One promise.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Goal {
    /// For people.
    pub(crate) what: String,
    /// Of which case of ours.
    pub(crate) case: String,
    /// Which figure of it.
    pub(crate) metric: String,
    pub(crate) at_least: Option<f64>,
    pub(crate) at_most: Option<f64>,
    /// Who stands beside it and may be missing.
    pub(crate) needs: Option<String>,
}

impl Goal {
    pub(crate) fn is_met(&self, median: f64) -> bool {
        self.at_least.is_none_or(|least| median >= least)
            && self.at_most.is_none_or(|most| median <= most)
    }

    /// As people write it.
    pub(crate) fn target(&self) -> String {
        let least = self.at_least.map(|least| format!("≥ {least}"));
        let most = self.at_most.map(|most| format!("≤ {most}"));
        least.or(most).unwrap_or_default()
    }
}

/// Promises as they are written.
///
/// # Errors
/// `Internal` when that is not what goals are written in.
pub(crate) fn read(written: &str) -> Result<Vec<Goal>> {
    serde_json::from_str(written)
        .map_err(|error| Error::new(ErrorKind::Internal, "the goals").with_source(error))
}

fn find<'a>(rows: &'a [Row], goal: &Goal) -> Option<&'a Row> {
    rows.iter()
        .find(|row| row.subject == OURS && row.case == goal.case && row.metric == goal.metric)
}

/// The verdicts: as a table to be printed last, and as rows.
pub(crate) fn conclude(goals: Vec<Goal>, recorder: &mut Recorder) {
    let mut table = Table::new();
    table
        .load_style(UTF8_BORDERS_ONLY)
        .set_header(["goal", "target", "measured", "range", ""]);
    let (mut met, mut missed, mut unknown) = (0, 0, 0);
    let mut verdicts = Vec::new();
    for goal in goals {
        let target = goal.target();
        let Some(row) = find(recorder.rows(), &goal) else {
            unknown += 1;
            let why = goal.needs.map_or_else(
                || "not measured".to_owned(),
                |needs| format!("not measured: no {needs}"),
            );
            table.add_row([goal.what, target, String::new(), String::new(), why]);
            continue;
        };
        let is_met = goal.is_met(row.median);
        met += u32::from(is_met);
        missed += u32::from(!is_met);
        let range = format!("{}–{}", number(row.min), number(row.max));
        let verdict = if is_met { "met" } else { "MISSED" };
        let case = Case {
            subject: OURS,
            name: &format!("goal: {}", goal.what),
        };
        for (metric, value) in [
            ("target", goal.at_least.or(goal.at_most).unwrap_or(f64::NAN)),
            ("measured", row.median),
            ("is_met", f64::from(u8::from(is_met))),
        ] {
            let row = case.single(metric, "", value);
            verdicts.extend(row.map(|row| Row {
                is_detail: true,
                ..row
            }));
        }
        table.add_row([
            goal.what,
            target,
            number(row.median),
            range,
            verdict.to_owned(),
        ]);
    }
    for column in table.column_iter_mut().skip(1).take(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    recorder.extend(verdicts);
    recorder.conclude(format!(
        "{table}\n{met} met, {missed} missed, {unknown} not measured"
    ));
}
