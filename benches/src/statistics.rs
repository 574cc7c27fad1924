//! What is said of many measurements of one thing.

use std::time::Duration;

/// Measurements in the order they were made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

/// What a row tells of its samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    /// The middle one; of an even number the mean of both.
    pub(crate) median: f64,
    /// The smallest.
    pub(crate) min: f64,
    /// The largest.
    pub(crate) max: f64,
    /// How many there were.
    pub(crate) n: u64,
}

impl Samples {
    /// One more. What is not a finite number (a rate over no time) is left out.
    pub(crate) fn push(&mut self, value: f64) {
        if value.is_finite() {
            self.0.push(value);
        }
    }

    /// One more, in microseconds.
    pub(crate) fn push_us(&mut self, time: Duration) {
        self.push(time.as_secs_f64() * 1e6);
    }

    /// Each sample over the one of `other` that was measured beside it.
    pub(crate) fn ratio_to(&self, other: &Self) -> Self {
        let mut ratios = Self::default();
        for (own, other) in self.0.iter().zip(&other.0) {
            ratios.push(own / other);
        }
        ratios
    }

    /// The larger one of each sample and the one of `other` that was measured beside it.
    pub(crate) fn larger(&self, other: &Self) -> Self {
        let pairs = self.0.iter().zip(&other.0);
        Self(pairs.map(|(own, other)| own.max(*other)).collect())
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted
    }

    /// None without a sample.
    pub(crate) fn summary(&self) -> Option<Summary> {
        let sorted = self.sorted();
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        let n = sorted.len() as u64;
        Some(Summary {
            median,
            min,
            max,
            n,
        })
    }

    /// The smallest sample that at least `percent` of all do not exceed (nearest rank); none without a sample.
    pub(crate) fn percentile(&self, percent: u32) -> Option<f64> {
        assert!((1..=100).contains(&percent), "{percent} % is no percentile");
        nearest_rank(&self.sorted(), percent * 10)
    }
}

fn nearest_rank(sorted: &[f64], per_mille: u32) -> Option<f64> {
    let rank = (sorted.len() * per_mille as usize).div_ceil(1000);
    sorted.get(rank.checked_sub(1)?).copied()
}

/// So many samples of a round have a 99.9th percentile that is not just their largest.
const TAIL_SAMPLES_MIN: usize = 1000;

/// Percentiles of some rounds of measurements: each round gives one sample of each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Percentiles {
    /// Medians of the rounds.
    pub(crate) p50: Samples,
    /// 90th percentiles of the rounds.
    pub(crate) p90: Samples,
    /// 99th percentiles of the rounds.
    pub(crate) p99: Samples,
    /// 99.9th percentiles of the rounds that have a thousand samples or more.
    pub(crate) p99_9: Samples,
}

impl Percentiles {
    /// One more round; an empty one tells nothing.
    pub(crate) fn push_round(&mut self, round: &Samples) {
        let sorted = round.sorted();
        for (samples, per_mille) in [
            (&mut self.p50, 500),
            (&mut self.p90, 900),
            (&mut self.p99, 990),
        ] {
            if let Some(value) = nearest_rank(&sorted, per_mille) {
                samples.push(value);
            }
        }
        if let (true, Some(value)) = (sorted.len() >= TAIL_SAMPLES_MIN, nearest_rank(&sorted, 999))
        {
            self.p99_9.push(value);
        }
    }
}

/// A rate in 10⁹ bytes a second.
pub(crate) fn gb_per_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e9 / time.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        let mut samples = Samples::default();
        values.iter().for_each(|value| samples.push(*value));
        samples
    }

    /// Summaries of odd, even and single numbers of samples.
    #[test]
    fn the_median_is_the_middle_or_the_mean_of_both() {
        let odd = samples(&[3.0, 1.0, 2.0]).summary().unwrap();
        assert_eq!((odd.median, odd.min, odd.max, odd.n), (2.0, 1.0, 3.0, 3));
        assert_eq!(
            samples(&[4.0, 1.0, 2.0, 3.0]).summary().unwrap().median,
            2.5
        );
        assert_eq!(samples(&[7.0]).summary().unwrap().median, 7.0);
        assert_eq!(samples(&[]).summary(), None);
    }

    /// The numbers 1 to 200, whose percentiles everybody knows.
    #[test]
    fn percentiles_take_the_nearest_rank() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        let many = samples(&values);
        assert_eq!(many.percentile(50), Some(100.0));
        assert_eq!(many.percentile(99), Some(198.0));
        assert_eq!(many.percentile(100), Some(200.0));
        assert_eq!(samples(&[5.0]).percentile(1), Some(5.0));
        assert_eq!(samples(&[]).percentile(50), None);
    }

    /// A rate over no time is infinite and must not become a figure.
    #[test]
    fn what_is_not_a_number_is_left_out() {
        let mut some = samples(&[1.0]);
        some.push(gb_per_s(1, Duration::ZERO));
        some.push(f64::NAN);
        assert_eq!(some.summary().unwrap().n, 1);
        assert_eq!(gb_per_s(2_000_000_000, Duration::from_secs(4)), 0.5);
    }

    /// Ratios are made pair by pair, not of the medians.
    #[test]
    fn ratios_are_made_of_pairs() {
        let ratio = samples(&[1.0, 9.0, 6.0]).ratio_to(&samples(&[2.0, 3.0, 2.0]));
        let summary = ratio.summary().unwrap();
        assert_eq!((summary.median, summary.min, summary.max), (3.0, 0.5, 3.0));
        let larger = samples(&[1.0, 9.0]).larger(&samples(&[2.0, 3.0]));
        assert_eq!(larger.sorted(), [2.0, 9.0]);
    }

    /// Two rounds with different medians.
    #[test]
    fn each_round_gives_one_sample() {
        let mut rounds = Percentiles::default();
        rounds.push_round(&samples(&[1.0, 2.0, 3.0]));
        rounds.push_round(&samples(&[]));
        rounds.push_round(&samples(&[5.0]));
        let p50 = rounds.p50.summary().unwrap();
        assert_eq!((p50.min, p50.max, p50.n), (2.0, 5.0, 2));
        assert_eq!(rounds.p99_9.summary(), None);
    }

    /// A round of 2,000 numbers, whose tail is known, and one that is too short to have one.
    #[test]
    fn the_far_tail_is_told_of_long_rounds_only() {
        let mut rounds = Percentiles::default();
        let long: Vec<f64> = (1..=2000).map(f64::from).collect();
        rounds.push_round(&samples(&long));
        rounds.push_round(&samples(&long[..999]));
        let tail = rounds.p99_9.summary().unwrap();
        assert_eq!((tail.median, tail.n), (1998.0, 1));
        assert_eq!(rounds.p90.summary().unwrap().max, 1800.0);
    }
}
