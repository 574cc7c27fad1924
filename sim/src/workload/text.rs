//! What generated requests are made of: spans, tokens and arrival times.

use std::fmt;

use kvcache_core::{Error, ErrorKind, Result};

use crate::seed::Random;

/// Generated tokens are below this: the size of a current model's vocabulary.
pub const VOCABULARY_TOKENS: u32 = 128_256;

/// The longest text, and the largest count of anything, that a generator accepts.
const SPAN_MAX: u32 = 1 << 20;

/// The smallest and the largest value of a random size; both occur.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The smallest.
    pub min: u32,
    /// The largest.
    pub max: u32,
}

impl Span {
    /// From `min` to `max`.
    #[must_use]
    pub const fn new(min: u32, max: u32) -> Self {
        Self { min, max }
    }

    /// One value out of the span.
    pub(crate) fn draw(self, random: &mut Random) -> u32 {
        self.min + random.below(u64::from(self.max - self.min) + 1) as u32
    }

    /// Checks that there is something in the span and that it is not absurd.
    pub(crate) fn check(self, field: &str) -> Result<()> {
        if self.min == 0 || self.min > self.max || self.max > SPAN_MAX {
            let rule = format!("{field} is {self}, expected 1 to {SPAN_MAX}, the smaller first");
            return Err(Error::new(ErrorKind::Invalid, rule));
        }
        Ok(())
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={}", self.min, self.max)
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Checks a count that must be at least 1.
pub(crate) fn check_count(field: &str, value: u32) -> Result<()> {
    Span::new(value, value).check(field)
}

/// What a text is, so that no two texts of a workload share their random stream.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Text {
    System(u32),
    Document(u32),
    /// The n-th text that only one request introduces.
    Own(u64),
}

/// Appends `len` tokens of a text; the same text of the same seed always has the same tokens.
pub(crate) fn append(seed: u64, text: Text, len: u32, tokens: &mut Vec<u32>) {
    let stream = match text {
        Text::System(number) => (1 << 56) | u64::from(number),
        Text::Document(number) => (2 << 56) | u64::from(number),
        Text::Own(number) => (3 << 56) | number,
    };
    let mut random = Random::stream(seed, stream);
    tokens.extend((0..len).map(|_| random.below(u64::from(VOCABULARY_TOKENS)) as u32));
}

/// Arrival times at a mean rate: gaps are uniform between nothing and twice the mean.
#[derive(Clone, Debug)]
pub(crate) struct Arrivals {
    now_us: u64,
    gap_us_mean: u64,
}

impl Arrivals {
    pub(crate) fn new(requests_per_minute: u32) -> Self {
        Self {
            now_us: 0,
            gap_us_mean: 60_000_000 / u64::from(requests_per_minute),
        }
    }

    /// The next arrival, in milliseconds from the start.
    pub(crate) fn next_ms(&mut self, random: &mut Random) -> u64 {
        self.now_us += random.below(2 * self.gap_us_mean + 1);
        self.now_us / 1_000
    }
}
