//! Counts of accesses and their sources, and quantiles of durations.

use kvcache_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::Percentiles;

/// The most samples kept; later ones replace earlier ones in turn.
const SAMPLES_MAX: usize = 1 << 20;

/// Where a block's bytes were when the lookup answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// In the prefill pod's own engine pool.
    Hbm,
    /// In its own DRAM tier.
    Dram,
    /// In its own NVMe tier.
    Nvme,
    /// In another pod's memory or on its disk.
    Peer,
    /// In the shared object tier.
    Object,
    /// Nowhere: the block is computed.
    Miss,
}

/// Hits by source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hits {
    /// Own engine pool.
    pub hbm: u64,
    /// Own DRAM tier.
    pub dram: u64,
    /// Own NVMe tier.
    pub nvme: u64,
    /// Another pod.
    pub peer: u64,
    /// The shared object tier.
    pub object: u64,
}

impl Hits {
    /// Hits from anywhere.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.hbm + self.dram + self.nvme + self.peer + self.object
    }
}

/// Accesses and what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Entries of prompts' block lists.
    pub accesses: u64,
    /// Those that had a source.
    pub hits: Hits,
    /// Those that had none.
    pub misses: u64,
}

impl Tally {
    /// Counts one access.
    pub const fn record(&mut self, source: Source) {
        self.accesses += 1;
        match source {
            Source::Hbm => self.hits.hbm += 1,
            Source::Dram => self.hits.dram += 1,
            Source::Nvme => self.hits.nvme += 1,
            Source::Peer => self.hits.peer += 1,
            Source::Object => self.hits.object += 1,
            Source::Miss => self.misses += 1,
        }
    }

    /// Adds another count.
    pub const fn merge(&mut self, other: &Self) {
        self.accesses += other.accesses;
        self.hits.hbm += other.hits.hbm;
        self.hits.dram += other.hits.dram;
        self.hits.nvme += other.hits.nvme;
        self.hits.peer += other.hits.peer;
        self.hits.object += other.hits.object;
        self.misses += other.misses;
    }

    /// Hits from anywhere, per access; 0 without any access.
    #[must_use]
    pub fn cluster_hit_ratio(&self) -> f64 {
        ratio(self.hits.total(), self.accesses)
    }

    /// Hits in own HBM and DRAM, per access; 0 without any access.
    #[must_use]
    pub fn local_hit_ratio(&self) -> f64 {
        ratio(self.hits.hbm + self.hits.dram, self.accesses)
    }

    /// Checks that every access is a hit or a miss, and only one of them.
    ///
    /// # Errors
    /// `Internal` with the counts.
    pub fn check(&self) -> Result<()> {
        let Self {
            accesses,
            hits,
            misses,
        } = self;
        if hits.total() + misses != *accesses {
            let total = hits.total();
            let what = format!("{total} hits and {misses} misses are not {accesses} accesses");
            return Err(Error::new(ErrorKind::Internal, what));
        }
        Ok(())
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// Measurements of one kind, kept for their quantiles.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    values: Vec<f64>,
    count: u64,
    sum: f64,
}

impl Samples {
    /// Adds a measurement.
    pub fn push(&mut self, value: f64) {
        if self.values.len() < SAMPLES_MAX {
            self.values.push(value);
        } else {
            let oldest = self.count as usize % SAMPLES_MAX;
            self.values[oldest] = value;
        }
        self.count += 1;
        self.sum += value;
    }

    /// How many were added.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The mean of all; 0 without any.
    #[must_use]
    pub fn mean(&self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            self.sum / self.count as f64
        }
    }

    /// The smallest value that so many of a hundred samples are not above; none without samples.
    #[must_use]
    pub fn percentile(&self, percent: u32) -> Option<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let rank = (sorted.len() * percent as usize).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }

    /// The two quantiles that reports give.
    #[must_use]
    pub fn percentiles(&self) -> Percentiles {
        Percentiles {
            p50: self.percentile(50),
            p99: self.percentile(99),
        }
    }
}
