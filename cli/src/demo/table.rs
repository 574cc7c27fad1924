//! The report as people read it.

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use kvfabric_sim::report::{Percentiles, Report};

/// The whole report, a few lines a part.
pub(crate) fn render(report: &Report) -> String {
    let mut text = String::new();
    for table in [requests(report), hits(report), moving(report), pods(report)] {
        text.push_str(&table.to_string());
        text.push('\n');
    }
    text
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn row(table: &mut Table, name: &str, values: &[String]) {
    table.add_row(std::iter::once(name.to_owned()).chain(values.iter().cloned()));
}

fn requests(report: &Report) -> Table {
    let mut table = table(&["run", ""]);
    let config = &report.config;
    let line = |table: &mut Table, name: &str, value: String| row(table, name, &[value]);
    line(
        &mut table,
        "workload",
        format!(
            "{} (seed {}), router {}",
            config.workload, report.seed, config.router
        ),
    );
    line(&mut table, "requests", count(report.requests));
    line(
        &mut table,
        "block accesses",
        format!(
            "{} of {} KiB",
            count(report.block_accesses),
            config.block_bytes as f64 / 1024.0
        ),
    );
    line(
        &mut table,
        "verified blocks / failures",
        format!(
            "{} / {}",
            count(report.verified_blocks),
            count(report.verify_failures)
        ),
    );
    line(
        &mut table,
        "lookups/s, p50 / p99",
        format!(
            "{:.0}, {} µs",
            report.lookups_per_s,
            percentiles(report.lookup_us, 0)
        ),
    );
    line(
        &mut table,
        "KV events/s, index lag p50 / p99",
        format!(
            "{:.0}, {} ms",
            report.events.per_s,
            percentiles(report.events.lag_ms, 1)
        ),
    );
    line(
        &mut table,
        "time to first token: moving (measured)",
        format!("{:.2} ms mean", report.ttft_ms.moving),
    );
    line(
        &mut table,
        "  + computing (modelled)",
        format!(
            "{:.1} ms mean at {:.0} tokens/s",
            report.ttft_ms.computing, report.ttft_ms.computing_tokens_per_s
        ),
    );
    line(&mut table, "elapsed", format!("{:.1} s", report.elapsed_s));
    table
}

fn hits(report: &Report) -> Table {
    let mut table = table(&["hits by source", "blocks", "% of accesses"]);
    let share = |blocks: u64| {
        let ratio = blocks as f64 / report.block_accesses.max(1) as f64;
        vec![count(blocks), format!("{:.2}", ratio * 100.0)]
    };
    row(&mut table, "own HBM", &share(report.hits.hbm));
    row(&mut table, "own DRAM", &share(report.hits.dram));
    row(&mut table, "own NVMe", &share(report.hits.nvme));
    row(&mut table, "peer", &share(report.hits.peer));
    row(&mut table, "object store", &share(report.hits.object));
    row(&mut table, "miss (computed)", &share(report.misses));
    let ratio = |name: &str, table: &mut Table, ratio: Option<f64>| {
        let text = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{:.2}", ratio * 100.0));
        row(table, name, &[String::new(), text]);
    };
    ratio(
        "cluster hit ratio",
        &mut table,
        Some(report.cluster_hit_ratio),
    );
    ratio(
        "  under round-robin",
        &mut table,
        report.round_robin_cluster_hit_ratio,
    );
    ratio(
        "  of an infinite cache",
        &mut table,
        Some(report.infinite_hit_ratio),
    );
    ratio(
        "local hit ratio (own HBM + DRAM)",
        &mut table,
        Some(report.local_hit_ratio),
    );
    ratio(
        "  under round-robin",
        &mut table,
        report.round_robin_local_hit_ratio,
    );
    table
}

fn moving(report: &Report) -> Table {
    let mut table = table(&[
        "backend",
        "MB moved",
        "requests",
        "failed",
        "GB/s while busy",
    ]);
    for (name, backend) in &report.backends {
        let speed = backend
            .gb_per_s
            .map_or_else(|| "-".to_owned(), |gb| format!("{gb:.2}"));
        let values = [
            format!("{:.1}", backend.bytes as f64 / 1e6),
            count(backend.requests),
            count(backend.failures),
            speed,
        ];
        row(&mut table, name, &values);
    }
    table
}

fn pods(report: &Report) -> Table {
    let mut table = table(&[
        "pod",
        "requests",
        "hits",
        "misses",
        "evicted HBM",
        "evicted DRAM",
        "evicted NVMe",
    ]);
    for pod in &report.pods {
        let dead = if pod.alive { "" } else { " (killed)" };
        let values = [
            pod.requests,
            pod.hits.total(),
            pod.misses,
            pod.hbm_evictions,
        ];
        let lower = [pod.dram_evictions, pod.nvme_evictions];
        let values: Vec<String> = values.into_iter().chain(lower).map(count).collect();
        row(&mut table, &format!("{}{dead}", pod.name), &values);
    }
    for kill in &report.kills {
        let gone = kill.left_index_after_s.map_or_else(
            || "still in the index at the end".to_owned(),
            |seconds| format!("out of the index {seconds:.2} s later"),
        );
        let text = format!("{} killed at {:.1} s, {gone}", kill.pod, kill.at_s);
        row(
            &mut table,
            &text,
            &[format!("{} retried", kill.requests_retried)],
        );
    }
    table
}

/// A whole number with thin groups of three.
fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn percentiles(values: Percentiles, decimals: usize) -> String {
    let one = |value: Option<f64>| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
    };
    format!("{} / {}", one(values.p50), one(values.p99))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Grouping, by example.
    #[test]
    fn counts_are_grouped_by_three() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_000), "1,000");
        assert_eq!(count(12_345_678), "12,345,678");
    }

    /// A figure that a run cannot have is a dash, never a zero.
    #[test]
    fn a_missing_figure_is_a_dash() {
        let text = render(&Report::default());
        assert!(text.contains("under round-robin"));
        let line = text
            .lines()
            .find(|line| line.contains("under round-robin"))
            .unwrap();
        assert!(line.trim_end_matches(['│', ' ']).ends_with('-'), "{line}");
    }
}
