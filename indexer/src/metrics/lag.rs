//! How long events take from their publisher into the index, with quantiles.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::metrics::histogram::Histogram;

/// Buckets for each doubling: a quantile is at most an eighth too high.
const PER_DOUBLING: u64 = 8;
/// Durations of a doubling more than this many microseconds all count in the last bucket.
const BUCKETS: usize = 40 * PER_DOUBLING as usize;

/// Counts of durations by size.
pub(crate) struct Lag {
    counts: Vec<AtomicU64>,
    seconds: Histogram,
}

impl Lag {
    pub(super) fn new(seconds: Histogram) -> Self {
        Self {
            counts: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            seconds,
        }
    }

    pub(crate) fn record(&self, lag: Duration) {
        self.seconds.observe(lag.as_secs_f64());
        let micros = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
        self.counts[bucket(micros)].fetch_add(1, Ordering::Relaxed);
    }

    /// The lag in microseconds that `share` of all batches did not exceed; 0 when there were none.
    pub(crate) fn quantile_us(&self, share: f64) -> u64 {
        let counts: Vec<u64> = self
            .counts
            .iter()
            .map(|c| c.load(Ordering::Relaxed))
            .collect();
        let total: u64 = counts.iter().sum();
        let rank = (total as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (position, count) in counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return upper_bound(position);
            }
        }
        0
    }
}

/// The bucket of a value: exact below eight, then eight for each doubling.
fn bucket(micros: u64) -> usize {
    if micros < PER_DOUBLING {
        return micros as usize;
    }
    let doubling = u64::from(micros.ilog2()) - 3;
    let within = (micros >> doubling) - PER_DOUBLING;
    ((doubling + 1) * PER_DOUBLING + within).min(BUCKETS as u64 - 1) as usize
}

/// The largest value in a bucket.
fn upper_bound(position: usize) -> u64 {
    let position = position as u64;
    if position < PER_DOUBLING {
        return position;
    }
    let doubling = position / PER_DOUBLING - 1;
    ((PER_DOUBLING + position % PER_DOUBLING + 1) << doubling) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every value up to some thousands, and the ends of the range.
    #[test]
    fn a_bucket_holds_its_value_and_is_an_eighth_wide_at_most() {
        for micros in (0..5000).chain([1 << 20, (1 << 30) + 12_345]) {
            let bound = upper_bound(bucket(micros));
            assert!(
                bound >= micros && bound <= micros + micros / 8,
                "{micros} → {bound}"
            );
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    /// A hundred known values.
    #[test]
    fn quantiles_are_those_of_the_values_recorded() {
        let lag = Lag::new(super::super::seconds());
        assert_eq!(lag.quantile_us(0.5), 0);
        for micros in 1..=100 {
            lag.record(Duration::from_micros(micros));
        }
        assert!(
            (50..=56).contains(&lag.quantile_us(0.5)),
            "{}",
            lag.quantile_us(0.5)
        );
        assert!(
            (99..=111).contains(&lag.quantile_us(0.99)),
            "{}",
            lag.quantile_us(0.99)
        );
    }
}
