//! From depth per tier to one number that routers compare.

use kvcache_core::{Error, Result, Tier};

/// How many tiers there are, and so how long a count by tier is: indexed by `Tier as usize`.
pub const TIERS: usize = Tier::ALL.len();

/// What a block is worth in each tier, beside one in the accelerator's memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TierWeights([f64; TIERS]);

impl Default for TierWeights {
    /// llm-d's weights where it has them: 1.0 in HBM, 0.8 in DRAM; then 0.5 on NVMe.
    ///
    /// Object stores weigh nothing: every pod reaches them alike, so they tell no pod from another.
    fn default() -> Self {
        Self([1.0, 0.8, 0.5, 0.0])
    }
}

impl TierWeights {
    /// Takes one weight per tier, fastest first.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] with the tier and the weight when one is negative or not finite.
    pub fn new(weights: [f64; TIERS]) -> Result<Self> {
        for (tier, weight) in Tier::ALL.into_iter().zip(weights) {
            if !weight.is_finite() || weight < 0.0 {
                return Err(Error::invalid(
                    &format!("weight of {tier}"),
                    weight,
                    0.0..f64::MAX,
                ));
            }
        }
        Ok(Self(weights))
    }

    /// The weight of a tier.
    #[must_use]
    pub const fn of(&self, tier: Tier) -> f64 {
        self.0[tier as usize]
    }

    /// The score of a pod: over all tiers, weight × blocks for which the tier is the pod's fastest.
    #[must_use]
    pub fn score(&self, by_tier: &[u32; TIERS]) -> f64 {
        self.0
            .iter()
            .zip(by_tier)
            .map(|(weight, blocks)| weight * f64::from(*blocks))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two counts by hand.
    #[test]
    fn a_score_is_the_weighted_sum_over_tiers() {
        let weights = TierWeights::default();
        assert_eq!(weights.score(&[3, 5, 2, 0]), 3.0 + 4.0 + 1.0);
        assert_eq!(weights.score(&[0, 0, 0, 9]), 0.0);
        assert_eq!(weights.of(Tier::Host), 0.8);
    }

    /// Each kind of number that would break an ordering.
    #[test]
    fn a_weight_that_cannot_order_pods_is_refused_by_name() {
        for bad in [-0.1, f64::NAN, f64::INFINITY] {
            let refusal = TierWeights::new([1.0, bad, 0.0, 0.0]).unwrap_err();
            assert!(refusal.context().contains("dram"), "{refusal}");
        }
    }
}
