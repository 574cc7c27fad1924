//! How links behave, and how badly.

use std::time::Duration;

use kvcache_core::{Error, Result};

/// A probability in millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chance(u32);

impl Chance {
    /// Never.
    pub const NEVER: Self = Self(0);
    /// Always.
    pub const ALWAYS: Self = Self(1_000_000);

    /// `millionths` of 1,000,000.
    ///
    /// # Errors
    /// `Invalid` above 1,000,000.
    pub fn from_millionths(millionths: u32) -> Result<Self> {
        if millionths > 1_000_000 {
            return Err(Error::invalid(
                "chance in millionths",
                millionths,
                0..=1_000_000,
            ));
        }
        Ok(Self(millionths))
    }

    /// The probability in millionths.
    #[must_use]
    pub const fn millionths(self) -> u32 {
        self.0
    }
}

/// How one direction of a link behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkProfile {
    /// From the last byte sent to the last byte received.
    pub latency: Duration,
    /// Up to this much is added to the latency, evenly distributed; order is kept.
    pub jitter: Duration,
    /// Datagrams queue behind each other at this rate.
    pub bytes_per_second: u64,
    /// A datagram vanishes.
    pub loss: Chance,
    /// A datagram arrives twice.
    pub duplicate: Chance,
    /// A datagram is held back, so that later ones overtake it.
    pub reorder: Chance,
    /// How long a reordered or repeated datagram is held back at most.
    pub reorder_delay: Duration,
    /// One bit of a datagram is wrong when it arrives.
    pub corruption: Chance,
}

impl LinkProfile {
    /// A fast and faultless link: 5 µs, 10 GB/s.
    #[must_use]
    pub fn perfect() -> Self {
        Self {
            latency: Duration::from_micros(5),
            jitter: Duration::ZERO,
            bytes_per_second: 10_000_000_000,
            loss: Chance::NEVER,
            duplicate: Chance::NEVER,
            reorder: Chance::NEVER,
            reorder_delay: Duration::from_micros(50),
            corruption: Chance::NEVER,
        }
    }

    /// A link that loses 1 %, repeats 1 % and reorders 5 % of its datagrams, 50 to 100 µs, 1 GB/s.
    #[must_use]
    pub fn lossy() -> Self {
        Self {
            latency: Duration::from_micros(50),
            jitter: Duration::from_micros(50),
            bytes_per_second: 1_000_000_000,
            loss: Chance(10_000),
            duplicate: Chance(10_000),
            reorder: Chance(50_000),
            reorder_delay: Duration::from_micros(400),
            corruption: Chance::NEVER,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.bytes_per_second == 0 {
            return Err(Error::invalid("link bytes_per_second", 0, 1..=u64::MAX));
        }
        Ok(())
    }
}
