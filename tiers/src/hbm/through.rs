//! Fetches that begin in the HBM tier and go on in the cache.

use std::time::Instant;

use kvcache_core::Result;
use kvcache_core::ports::{Holder, Located};

use super::HbmTier;
use crate::cache::{FetchBlock, FetchReport, Source};

impl HbmTier {
    /// As [`crate::Cache::fetch`], from this tier first: the blocks from the first that are up come from their slots, those after them
    /// from the cache.
    ///
    /// # Errors
    /// As [`HbmTier::fetch`] and [`crate::Cache::fetch`].
    ///
    /// # Cancel safety
    /// As [`crate::Cache::fetch`].
    pub async fn fetch_through(
        &self,
        mut blocks: Vec<FetchBlock>,
        hints: Located,
        deadline: Instant,
    ) -> Result<FetchReport> {
        let wanted = blocks.len();
        let up = self.fetch(blocks.clone(), deadline).await?;
        let mut sources = vec![Source::Device; up.depth];
        if up.is_unsettled() {
            // Nothing else may write where these copies still may.
            sources.resize(wanted, Source::Miss);
            return Ok(FetchReport {
                sources,
                unsettled: (up.depth as u32..up.tried as u32).collect(),
                drained: up.drained,
            });
        }
        let below = blocks.split_off(up.depth);
        let hints = seen_from(hints, up.depth);
        let cache = &self.inner.cache;
        let mut report = cache.fetch(below, hints, deadline).await?;
        sources.append(&mut report.sources);
        report.sources = sources;
        let first = up.depth as u32;
        report.unsettled.iter_mut().for_each(|at| *at += first);
        Ok(report)
    }
}

/// Hints about a chain, as hints about its blocks from position `first` on.
#[must_use]
pub fn seen_from(hints: Located, first: usize) -> Located {
    let first = u32::try_from(first).unwrap_or(u32::MAX);
    let holders = hints
        .holders
        .into_iter()
        .filter(|holder| holder.depth > first);
    let shared = hints.shared.into_iter().filter(|range| range.end > first);
    Located {
        holders: holders
            .map(|holder| Holder {
                depth: holder.depth - first,
                ..holder
            })
            .collect(),
        shared: shared
            .map(|range| range.start.saturating_sub(first)..range.end - first)
            .collect(),
    }
}
