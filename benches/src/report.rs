//! The figures of one run, as a table and as JSON.
//!
//! The JSON is one object: `tool`, `version`, `command`, `host` (`cpu`, `cores`, `memory_bytes`, `kernel`, `load`), with a GPU
//! `facts` (lines of text), and `rows`, each with `subject` (who: `kvfabric` or a reference), `case`, `metric`, `unit`, `median`,
//! `min`, `max`, `n`.

use std::io::Write;
use std::path::Path;

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use kvcache_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::statistics::Samples;

/// Who is measured when it is us.
pub(crate) const OURS: &str = "kvfabric";

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Who.
    pub(crate) subject: String,
    /// At what.
    pub(crate) case: String,
    /// Which figure.
    pub(crate) metric: String,
    /// In what.
    pub(crate) unit: String,
    /// The middle of all samples.
    pub(crate) median: f64,
    /// The smallest.
    pub(crate) min: f64,
    /// The largest.
    pub(crate) max: f64,
    /// How many samples.
    pub(crate) n: u64,
    /// Whether it is left out of the table on the screen, which would get too wide; never of a file.
    #[serde(skip)]
    pub(crate) is_detail: bool,
}

/// Whose figures the rows to be made are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case<'a> {
    /// Who.
    pub(crate) subject: &'a str,
    /// At what.
    pub(crate) name: &'a str,
}

impl Case<'_> {
    /// A row of all samples; none if there are none.
    pub(crate) fn row(&self, metric: &str, unit: &str, samples: &Samples) -> Option<Row> {
        let summary = samples.summary()?;
        Some(Row {
            subject: self.subject.to_owned(),
            case: self.name.to_owned(),
            metric: metric.to_owned(),
            unit: unit.to_owned(),
            median: summary.median,
            min: summary.min,
            max: summary.max,
            n: summary.n,
            is_detail: false,
        })
    }

    /// As [`Case::row`], for files only.
    pub(crate) fn detail(&self, metric: &str, unit: &str, samples: &Samples) -> Option<Row> {
        let row = self.row(metric, unit, samples)?;
        Some(Row {
            is_detail: true,
            ..row
        })
    }

    /// A row of a figure that is known once; none if it is not a number.
    pub(crate) fn single(&self, metric: &str, unit: &str, value: f64) -> Option<Row> {
        let mut samples = Samples::default();
        samples.push(value);
        self.row(metric, unit, &samples)
    }
}

/// Writes a report; a reader never sees half of it.
///
/// # Errors
/// `Io` naming the path.
pub(crate) fn write_json(path: &Path, report: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(report)
        .map_err(|error| Error::new(ErrorKind::Internal, "encode the report").with_source(error))?;
    text.push('\n');
    write_text(path, &text)
}

/// Writes a whole file; a reader never sees half of it.
///
/// # Errors
/// `Io` naming the path.
pub(crate) fn write_text(path: &Path, text: &str) -> Result<()> {
    let failed = |error| Error::io(format!("write {}", path.display()), error);
    let mut file = tempfile::NamedTempFile::new_in(folder_of(path)).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Always `kv-bench`.
    pub(crate) tool: String,
    /// Of kvfabric.
    pub(crate) version: String,
    /// The subcommand.
    pub(crate) command: String,
    /// Where it ran.
    pub(crate) host: Host,
    /// What else the figures depend on, such as the GPU and its driver: a line for each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) facts: Vec<String>,
    /// The figures, in the order they were measured.
    pub(crate) rows: Vec<Row>,
}

impl Report {
    /// A run without figures yet.
    pub(crate) fn new(command: &str) -> Self {
        Self {
            tool: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command: command.to_owned(),
            host: Host::read(),
            facts: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Writes the JSON; a reader never sees half of it.
    ///
    /// # Errors
    /// `Io` naming the path.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        write_json(path, self)
    }

    /// Reads a report that was written before.
    ///
    /// # Errors
    /// `Io` or `Invalid`, naming the path.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let place = || format!("read {}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(place(), error))?;
        serde_json::from_str(&text)
            .map_err(|error| Error::new(ErrorKind::Invalid, place()).with_source(error))
    }

    /// The figures as comma-separated values: a line of names, then one for each row. Text is quoted where it must be.
    pub(crate) fn csv(&self) -> String {
        let mut text = "subject,case,metric,unit,median,min,max,n\n".to_owned();
        for row in &self.rows {
            let words = [&row.subject, &row.case, &row.metric, &row.unit].map(|word| quoted(word));
            let Row {
                median,
                min,
                max,
                n,
                ..
            } = row;
            text.push_str(&format!("{},{median},{min},{max},{n}\n", words.join(",")));
        }
        text
    }

    /// The figures for people: a line for each case and subject, a column for each metric; those that are told by the
    /// same figure first stand in one table. A cell has the median, and the range where there are several samples.
    pub(crate) fn table(&self) -> String {
        let mut lines: Vec<Line<'_>> = Vec::new();
        for row in self.rows.iter().filter(|row| !row.is_detail) {
            let is_same =
                |line: &&mut Line<'_>| line.case == row.case && line.subject == row.subject;
            let cell = (title_of(row), cell_of(row));
            match lines.iter_mut().find(is_same) {
                Some(line) => line.cells.push(cell),
                None => {
                    let (case, subject) = (&*row.case, &*row.subject);
                    lines.push(Line {
                        case,
                        subject,
                        cells: vec![cell],
                    });
                }
            }
        }
        let mut groups: Vec<Vec<Line<'_>>> = Vec::new();
        for line in lines {
            let is_same = |group: &&mut Vec<Line<'_>>| group[0].cells[0].0 == line.cells[0].0;
            match groups.iter_mut().find(is_same) {
                Some(group) => group.push(line),
                None => groups.push(vec![line]),
            }
        }
        let tables: Vec<String> = groups.iter().map(|group| draw(group)).collect();
        tables.join("\n")
    }
}

fn quoted(word: &str) -> String {
    if word.contains([',', '"', '\n']) {
        format!("\"{}\"", word.replace('"', "\"\""))
    } else {
        word.to_owned()
    }
}

/// The figures of one case and subject: titles and cells.
struct Line<'a> {
    case: &'a str,
    subject: &'a str,
    cells: Vec<(String, String)>,
}

/// So many columns fit on a screen.
const COLUMNS_MAX: usize = 9;

/// One table; on its side when it is wider than a screen and has fewer lines than columns.
fn draw(lines: &[Line<'_>]) -> String {
    let mut titles: Vec<&String> = Vec::new();
    for (title, _) in lines.iter().flat_map(|line| &line.cells) {
        if !titles.contains(&title) {
            titles.push(title);
        }
    }
    let mut grid = vec![vec!["case".to_owned(), "subject".to_owned()]];
    grid[0].extend(titles.iter().map(|title| (*title).clone()));
    for line in lines {
        let mut cells = vec![line.case.to_owned(), line.subject.to_owned()];
        cells.extend(titles.iter().map(|title| {
            let found = line.cells.iter().find(|(own, _)| own == *title);
            found.map_or_else(String::new, |(_, cell)| cell.clone())
        }));
        grid.push(cells);
    }
    let is_upright = titles.len() <= COLUMNS_MAX || lines.len() >= titles.len();
    if !is_upright {
        grid = (0..grid[0].len())
            .map(|column| grid.iter().map(|cells| cells[column].clone()).collect())
            .collect();
    }
    let mut table = Table::new();
    let mut rows = grid.into_iter();
    table
        .load_style(UTF8_BORDERS_ONLY)
        .set_header(rows.next().unwrap_or_default());
    rows.for_each(|cells| {
        table.add_row(cells);
    });
    for column in table.column_iter_mut().skip(if is_upright { 2 } else { 1 }) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// The folder that a file is or will be in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// The metric, with its unit where the name does not end in it.
fn title_of(row: &Row) -> String {
    let plain = |text: &str| text.to_lowercase().replace('/', "_per_").replace('µ', "u");
    if row.unit.is_empty() || row.metric.ends_with(&plain(&row.unit)) {
        row.metric.clone()
    } else {
        format!("{} ({})", row.metric, row.unit)
    }
}

fn cell_of(row: &Row) -> String {
    if row.n < 2 {
        return number(row.median);
    }
    format!(
        "{} ({}–{})",
        number(row.median),
        number(row.min),
        number(row.max)
    )
}

/// Three digits that matter, and no more.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new("transfer");
        let ours = Case {
            subject: OURS,
            name: "shm-read-4096",
        };
        let mut samples = Samples::default();
        [1.0, 3.0, 2.0]
            .into_iter()
            .for_each(|value| samples.push(value));
        report.rows.extend(ours.row("gb_per_s", "GB/s", &samples));
        let memcpy = Case {
            subject: "memcpy",
            ..ours
        };
        report.rows.extend(memcpy.single("gb_per_s", "GB/s", 4.0));
        report
            .rows
            .extend(ours.single("verified_blocks", "blocks", 64.0));
        report
    }

    /// Compares the names at every level with the documented ones, in their order.
    #[test]
    fn the_json_has_exactly_the_documented_keys() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        report().write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let order = [
            "tool",
            "version",
            "command",
            "host",
            "cpu",
            "cores",
            "memory_bytes",
            "kernel",
            "load",
            "rows",
            "subject",
            "case",
            "metric",
            "unit",
            "median",
            "min",
            "max",
            "n",
        ];
        let mut keys: Vec<&str> = Vec::new();
        for line in text.lines() {
            if let Some((key, _)) = line
                .trim()
                .strip_prefix('"')
                .and_then(|l| l.split_once("\":"))
                && !keys.contains(&key)
            {
                keys.push(key);
            }
        }
        assert_eq!(keys, order);
        let read: Report = serde_json::from_str(&text).unwrap();
        assert_eq!((read.tool.as_str(), read.rows.len()), ("kv-bench", 3));
        assert_eq!((read.rows[0].median, read.rows[0].n), (2.0, 3));
    }

    /// A folder that is not there cannot take the file.
    #[test]
    fn a_report_that_cannot_be_written_names_the_path() {
        let error = report()
            .write(Path::new("/nowhere/report.json"))
            .unwrap_err();
        assert!(
            error.to_string().contains("/nowhere/report.json"),
            "{error}"
        );
    }

    /// Looks for one line per subject, and for each figure in it.
    #[test]
    fn the_table_has_a_line_for_each_case_and_subject() {
        let table = report().table();
        let line = |name: &str| {
            table
                .lines()
                .find(|line| line.contains(name))
                .unwrap()
                .to_owned()
        };
        assert!(
            line(OURS).contains("2.00 (1.00–3.00)") && line(OURS).contains("64.0"),
            "{table}"
        );
        assert!(line(" memcpy").contains("4.00"), "{table}");
        assert!(
            table.contains("verified_blocks") && !table.contains("GB/s"),
            "{table}"
        );
    }

    /// A case with more metrics than fit side by side, and one that is told by another figure.
    #[test]
    fn wide_tables_lie_on_their_side_and_unlike_ones_are_apart() {
        let mut report = report();
        let case = Case {
            subject: OURS,
            name: "demo",
        };
        for number in 0..12 {
            report
                .rows
                .extend(case.single(&format!("figure_{number}"), "", 5.0));
        }
        let table = report.table();
        let header = |name: &str| table.lines().filter(|line| line.contains(name)).count();
        assert_eq!((header("case"), header("figure_11")), (2, 1));
        assert!(
            table
                .lines()
                .any(|line| line.contains("figure_3 ") && line.contains("5.00"))
        );
    }

    /// Reads the lines back, one of a case that has to be quoted; details are in the file and not in the table.
    #[test]
    fn comma_separated_values_have_a_line_for_each_row() {
        let mut report = report();
        let case = Case {
            subject: OURS,
            name: "a,\"b\"",
        };
        let mut samples = Samples::default();
        samples.push(2.5);
        report.rows.extend(case.detail("p90_us", "µs", &samples));
        let csv = report.csv();
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines.len(), 1 + report.rows.len());
        assert_eq!(lines[1], "kvfabric,shm-read-4096,gb_per_s,GB/s,2,1,3,3");
        assert_eq!(lines[4], "kvfabric,\"a,\"\"b\"\"\",p90_us,µs,2.5,2.5,2.5,1");
        assert!(!report.table().contains("p90_us"));
    }

    /// A figure that is not a number has no row.
    #[test]
    fn what_was_not_measured_has_no_row() {
        let case = Case {
            subject: OURS,
            name: "x",
        };
        assert_eq!(case.single("ratio", "", f64::NAN), None);
        assert_eq!(case.row("ratio", "", &Samples::default()), None);
    }
}
