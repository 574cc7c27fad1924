//! Which pods serve a request: the policies that the demo compares.

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use kvcache_core::{Error, ErrorKind, Result};

use crate::seed::Random;

/// A pod with so many more requests in flight than the least loaded one is left out by [`Policy::Prefix`].
///
/// Without it, the first pod to hold a popular prefix would get every request that starts with it.
pub const IMBALANCE_MAX: u32 = 4;

/// How a pod is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The one that holds most of the prompt; among equals the least loaded.
    Prefix,
    /// One after the other.
    RoundRobin,
    /// Any, by seed.
    Random,
    /// The one with the fewest requests in flight; among equals one after the other.
    Load,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 4] = [Self::Prefix, Self::RoundRobin, Self::Random, Self::Load];

    /// The name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefix => "prefix",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::Load => "load",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.name() == text)
            .ok_or_else(|| {
                let rule = "expected prefix, round-robin, random or load";
                Error::new(ErrorKind::Invalid, format!("router is {text:?}, {rule}"))
            })
    }
}

/// What a router knows of one pod when it decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodView {
    /// How much of the prompt it holds, from the first block or token on, as the index said.
    pub depth: u32,
    /// Requests it is serving.
    pub in_flight: u32,
    /// Whether it may be chosen.
    pub alive: bool,
}

/// Who serves a request, as positions in the lists that were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The pod that works on the prompt.
    pub prefill: usize,
    /// The pod that writes the answer; none if no decode pod lives, and the prefill pod goes on alone.
    pub decode: Option<usize>,
}

/// Chooses pods for one request after the other.
#[derive(Clone, Debug)]
pub struct Router {
    policy: Policy,
    random: Random,
    prefill_next: usize,
    decode_next: usize,
}

impl Router {
    /// A router; the seed matters to [`Policy::Random`] only.
    #[must_use]
    pub fn new(policy: Policy, seed: u64) -> Self {
        Self {
            policy,
            random: Random::stream(seed, 0x4007e4),
            prefill_next: 0,
            decode_next: 0,
        }
    }

    /// Chooses among the living.
    ///
    /// # Errors
    /// `PeerLost` if no prefill pod lives.
    pub fn route(&mut self, prefill: &[PodView], decode: &[PodView]) -> Result<Route> {
        let (policy, random) = (self.policy, &mut self.random);
        let chosen = choose(policy, random, &mut self.prefill_next, prefill).ok_or_else(|| {
            let count = prefill.len();
            Error::new(
                ErrorKind::PeerLost,
                format!("none of {count} prefill pods is alive"),
            )
        })?;
        let decode = choose(policy, random, &mut self.decode_next, decode);
        Ok(Route {
            prefill: chosen,
            decode,
        })
    }
}

/// `next` is where the round goes on: it breaks all remaining ties, so that equal pods take turns.
fn choose(
    policy: Policy,
    random: &mut Random,
    next: &mut usize,
    pods: &[PodView],
) -> Option<usize> {
    let round = (0..pods.len()).map(|step| (*next + step) % pods.len());
    let mut living = round.filter(|position| pods[*position].alive);
    let least = pods
        .iter()
        .filter(|pod| pod.alive)
        .map(|pod| pod.in_flight)
        .min()?;
    let chosen = match policy {
        Policy::RoundRobin => living.next(),
        Policy::Random => {
            let living: Vec<usize> = (0..pods.len()).filter(|at| pods[*at].alive).collect();
            Some(living[random.position(living.len())])
        }
        Policy::Load => living.min_by_key(|position| pods[*position].in_flight),
        Policy::Prefix => living
            .filter(|position| pods[*position].in_flight - least <= IMBALANCE_MAX)
            .min_by_key(|at| (std::cmp::Reverse(pods[*at].depth), pods[*at].in_flight)),
    }?;
    *next = (chosen + 1) % pods.len();
    Some(chosen)
}
