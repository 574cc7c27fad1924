//! `kv-indexer top`: what an index does, again and again.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use kvcache_core::Result;
use kvfabric_proto::v1;
use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::ask::{Target, tenant_json, tenant_line};
use super::print_line;

/// Clears the screen and goes to its corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Show again and again what a running index does: its rates, and the sources that lag most.
#[derive(Clone, Debug, Args)]
pub struct Top {
    #[command(flatten)]
    target: Target,
    /// The pause between two views, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..))]
    interval_ms: u64,
    /// End after so many views; 0 for never.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    count: u64,
    /// How many sources are shown.
    #[arg(long, value_name = "COUNT", default_value_t = 20)]
    sources: usize,
}

impl Top {
    pub(super) async fn run(self) -> Result<()> {
        let client = self.target.client()?;
        let clear = std::io::stdout().is_terminal() && !self.target.json;
        let interval = Duration::from_millis(self.interval_ms);
        let mut before: Option<(Instant, v1::StatusResponse)> = None;
        let mut views = 0;
        loop {
            let now = Instant::now();
            let status = client.status().await?;
            let since = before.as_ref().map(|(at, status)| (now - *at, status));
            if clear {
                print_line(CLEAR)?;
            }
            self.show(&status, since)?;
            views += 1;
            if views == self.count {
                return Ok(());
            }
            before = Some((now, status));
            sleep_until(now + interval).await;
        }
    }

    fn show(
        &self,
        status: &v1::StatusResponse,
        before: Option<(Duration, &v1::StatusResponse)>,
    ) -> Result<()> {
        // Per second since the view before; none in the first.
        let rate = |of: fn(&v1::StatusResponse) -> u64| {
            before.map(|(time, before)| {
                of(status).saturating_sub(of(before)) as f64 / time.as_secs_f64()
            })
        };
        let (events, lookups) = (rate(|s| s.events_applied), rate(|s| s.lookups));
        let sources = sources(status);
        if self.target.json {
            let shown = sources.iter().take(self.sources).map(|(name, source)| {
                let freshness = source.freshness.unwrap_or_default();
                json!({
                    "source": name,
                    "current": freshness.current,
                    "lag_us": freshness.lag_us,
                    "heard_us": freshness.heard_us,
                    "orphans": source.orphans,
                })
            });
            let line = json!({
                "serving": status.serving,
                "pods": status.pods.len(),
                "blocks": status.blocks,
                "entries": status.entries,
                "bytes": status.bytes,
                "events_per_second": events,
                "lookups_per_second": lookups,
                "lag_p99_us": status.lag_p99_us,
                "expected_blocks": status.expected_blocks,
                "routings": status.routings,
                "tenants": status.tenants.iter().map(tenant_json).collect::<Vec<_>>(),
                "sources": shown.collect::<Vec<_>>(),
            });
            return print_line(&line.to_string());
        }
        let per_second =
            |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}/s"));
        print_line(&format!(
            "{}; {} pods, {} blocks, {} entries, {} MiB; events {}, lookups {}, lag p99 {} us",
            if status.serving {
                "serving"
            } else {
                &status.not_serving_reason
            },
            status.pods.len(),
            status.blocks,
            status.entries,
            status.bytes >> 20,
            per_second(events),
            per_second(lookups),
            status.lag_p99_us
        ))?;
        print_line(&format!(
            "routings {}, expected blocks {}",
            status.routings, status.expected_blocks
        ))?;
        for tenant in &status.tenants {
            print_line(&tenant_line(tenant))?;
        }
        sources
            .iter()
            .take(self.sources)
            .try_for_each(|(name, source)| print_source(name, source))
    }
}

fn print_source(name: &str, source: &v1::SourceStatus) -> Result<()> {
    let freshness = source.freshness.unwrap_or_default();
    let is = match (freshness.connected, freshness.current) {
        (_, true) => "current",
        (true, false) => "catching up",
        (false, false) => "not connected",
    };
    print_line(&format!(
        "{name:<32} {is:<14} lag {:>9} us  orphans {:>6}  gaps {:>5}  resyncs {:>4}  evicted {:>7}",
        freshness.lag_us, source.orphans, source.gaps, source.resyncs, freshness.evicted
    ))
}

/// Those that are not current first, then those that lag most.
fn sources(status: &v1::StatusResponse) -> Vec<(&str, &v1::SourceStatus)> {
    let all = status.pods.iter().flat_map(|pod| &pod.sources);
    let mut sources: Vec<_> = all
        .map(|source| {
            let name = source.position.as_ref().map_or("", |at| at.source.as_str());
            (name, source)
        })
        .collect();
    sources.sort_by_key(|(name, source)| {
        let freshness = source.freshness.unwrap_or_default();
        (
            freshness.current,
            std::cmp::Reverse(freshness.lag_us),
            *name,
        )
    });
    sources
}
