//! The figures of a run as one page, with plots against the size of a block; it needs nothing beside it.

use crate::plot::{Plot, Point, Series, escaped, legend};
use crate::report::{Report, Row, number};

const STYLE: &str = "body{font:14px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em}\
h2{border-bottom:1px solid #ccc}.plots{display:flex;flex-wrap:wrap;gap:8px}svg{width:560px;max-width:100%}\
svg text{font-size:11px;fill:#444}svg .title{font-size:13px;font-weight:600;fill:#000}\
svg .y{text-anchor:end}svg .x{text-anchor:middle}.grid{stroke:#ddd}polyline{fill:none;stroke-width:2}\
.band{opacity:.15}.legend span{margin-right:1.2em}.legend i{display:inline-block;width:1em;height:.7em;margin-right:.4em}\
table{border-collapse:collapse}td,th{padding:2px 10px;border-bottom:1px solid #eee;text-align:left}\
td.n{text-align:right;font-variant-numeric:tabular-nums}";

/// The metrics that are drawn, in this order, and whether by powers.
const DRAWN: [(&str, bool); 7] = [
    ("gb_per_s", false),
    ("p50_us", true),
    ("p99_us", true),
    ("cpu_s_per_gb", true),
    ("cpu_initiator_s_per_gb", true),
    ("cpu_target_s_per_gb", true),
    ("total_gb_per_s", false),
];

/// The whole page.
pub(crate) fn page(report: &Report) -> String {
    let host = &report.host;
    let title = format!("{} {}", report.tool, report.command);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n\
         <p>Version {}. {}, {} hardware threads, {:.1} GiB, Linux {}; load before the run {}. \
         Lines are medians, the shades behind them reach from the smallest to the largest sample.</p>\n",
        escaped(&report.version),
        escaped(&host.cpu),
        host.cores,
        host.memory_bytes as f64 / f64::from(1 << 30),
        escaped(&host.kernel),
        host.load,
    );
    for fact in &report.facts {
        page.push_str(&format!("<p>{}</p>\n", escaped(fact)));
    }
    for family in families(&report.rows) {
        page.push_str(&section(report, family));
    }
    page.push_str("<h2>All figures</h2>\n<table><tr><th>case<th>subject<th>metric<th>unit<th>median<th>min<th>max<th>n</tr>\n");
    for row in &report.rows {
        page.push_str(&line(row));
    }
    page.push_str("</table>\n</body></html>\n");
    page
}

fn line(row: &Row) -> String {
    let words = [&row.case, &row.subject, &row.metric, &row.unit];
    let words: String = words
        .iter()
        .map(|word| format!("<td>{}", escaped(word)))
        .collect();
    let figures: String = [row.median, row.min, row.max]
        .iter()
        .map(|value| format!("<td class=\"n\">{}", number(*value)))
        .collect();
    format!("<tr>{words}{figures}<td class=\"n\">{}</tr>\n", row.n)
}

/// The case without its size, and the size.
fn sized(case: &str) -> Option<(&str, f64)> {
    let (family, size) = case.rsplit_once('-')?;
    let size: u64 = size.parse().ok().filter(|size| *size > 0)?;
    Some((family, size as f64))
}

/// Cases that differ in their size alone, in the order of their first.
fn families(rows: &[Row]) -> Vec<&str> {
    let mut families = Vec::new();
    for row in rows {
        if let Some((family, _)) = sized(&row.case)
            && !families.contains(&family)
        {
            families.push(family);
        }
    }
    families
}

fn section(report: &Report, family: &str) -> String {
    let own: Vec<(&Row, f64)> = report
        .rows
        .iter()
        .filter_map(|row| match sized(&row.case) {
            Some((name, size)) if name == family => Some((row, size)),
            _ => None,
        })
        .collect();
    let mut names: Vec<&str> = Vec::new();
    for (row, _) in &own {
        if !names.contains(&row.subject.as_str()) {
            names.push(&row.subject);
        }
    }
    let mut plots = String::new();
    for (metric, is_logarithmic) in DRAWN {
        let of_metric: Vec<_> = own.iter().filter(|(row, _)| row.metric == metric).collect();
        let Some((first, _)) = of_metric.first() else {
            continue;
        };
        let series = names.iter().map(|&name| {
            let mut points: Vec<Point> = of_metric
                .iter()
                .filter(|(row, _)| row.subject == name)
                .map(|(row, size)| Point {
                    x: *size,
                    y: row.median,
                    min: row.min,
                    max: row.max,
                })
                .collect();
            points.sort_by(|one, other| one.x.total_cmp(&other.x));
            Series { name, points }
        });
        let plot = Plot {
            title: format!("{family}: {metric}"),
            unit: first.unit.clone(),
            is_logarithmic,
            series: series.collect(),
        };
        plots.push_str(&plot.svg());
    }
    if plots.is_empty() {
        return String::new();
    }
    format!(
        "<h2>{}</h2>\n{}<div class=\"plots\">\n{plots}</div>\n",
        escaped(family),
        legend(&names)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Case, OURS};

    /// Two families of two sizes: a plot for each metric that is there, all subjects in the legend, nothing from outside.
    #[test]
    fn the_page_has_a_plot_for_each_family_and_metric() {
        let mut report = Report::new("transfer");
        for case in ["shm-read-4096", "shm-read-65536", "tcp-read-4096", "setup"] {
            for subject in [OURS, "mem<cpy"] {
                let case = Case {
                    subject,
                    name: case,
                };
                report.rows.extend(case.single("gb_per_s", "GB/s", 2.0));
                report.rows.extend(case.single("p50_us", "µs", 3.0));
                report.rows.extend(case.single("bytes", "bytes", 3.0));
            }
        }
        let page = page(&report);
        assert_eq!(page.matches("<svg").count(), 4);
        assert_eq!(page.matches("<circle").count(), 2 * (2 * 2 + 2));
        assert!(page.contains("<h2>tcp-read</h2>") && page.contains("mem&lt;cpy"));
        assert!(!page.contains("mem<cpy") && !page.contains("<script") && !page.contains("http"));
        assert_eq!(page.matches("<td>setup").count(), 6);
    }
}
