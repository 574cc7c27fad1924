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

/// A medium that a source's events have named, and what a block in it is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct MediumWeight {
    /// As engines name it, in upper case.
    pub medium: String,
    /// What it is taken for.
    pub tier: Tier,
    /// Its own weight, or its tier's.
    pub weight: f64,
}

/// What a pod's blocks are worth where media have weights of their own, and which media say so.
#[derive(Clone, Debug, PartialEq)]
pub struct PodWeights {
    weights: TierWeights,
    media: [Option<String>; TIERS],
}

impl PodWeights {
    /// Of several media that a pod has for one tier, the one that is worth least counts: which of them a block is in is
    /// not kept, and a score may be too small, but never too large.
    ///
    /// None when every tier is worth what it is without.
    #[must_use]
    pub fn of<'a>(
        named: impl Iterator<Item = &'a MediumWeight>,
        weights: &TierWeights,
    ) -> Option<Self> {
        let mut least: [Option<&MediumWeight>; TIERS] = [None; TIERS];
        for medium in named {
            let known = &mut least[medium.tier as usize];
            let order = |other: &&MediumWeight| {
                let by_weight = medium.weight.total_cmp(&other.weight);
                by_weight
                    .then_with(|| medium.medium.cmp(&other.medium))
                    .is_lt()
            };
            if known.as_ref().is_none_or(order) {
                *known = Some(medium);
            }
        }
        let mut found = Self {
            weights: *weights,
            media: Default::default(),
        };
        for (place, least) in least.into_iter().enumerate() {
            let Some(least) = least.filter(|least| least.weight != weights.0[place]) else {
                continue;
            };
            found.weights.0[place] = least.weight;
            found.media[place] = Some(least.medium.clone());
        }
        (found.weights != *weights).then_some(found)
    }

    /// What a block of the pod is worth, by tier.
    #[must_use]
    pub const fn weights(&self) -> &TierWeights {
        &self.weights
    }

    /// The medium whose weight a tier's is; none when it is the tier's own.
    #[must_use]
    pub fn medium(&self, tier: Tier) -> Option<&str> {
        self.media[tier as usize].as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tier with two media, one with a medium that weighs what the tier does, and one without any.
    #[test]
    fn of_several_media_of_a_tier_the_least_counts() {
        let medium = |medium: &str, tier, weight| MediumWeight {
            medium: medium.to_owned(),
            tier,
            weight,
        };
        let plain = TierWeights::default();
        let named = [
            medium("CPU", Tier::Host, 0.8),
            medium("CXL", Tier::Host, 0.6),
            medium("GPU", Tier::Device, 1.0),
        ];
        let found = PodWeights::of(named.iter(), &plain).unwrap();
        assert_eq!(found.weights().score(&[2, 10, 4, 0]), 2.0 + 6.0 + 2.0);
        assert_eq!(found.medium(Tier::Host), Some("CXL"));
        assert_eq!(found.medium(Tier::Device), None);
        assert_eq!(PodWeights::of(named[2..].iter(), &plain), None);
        let faster = [
            medium("CPU", Tier::Host, 0.8),
            medium("NEAR", Tier::Host, 0.9),
        ];
        assert_eq!(PodWeights::of(faster.iter(), &plain), None);
        assert_eq!(PodWeights::of([].iter(), &plain), None);
    }

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
