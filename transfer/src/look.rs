//! How long those who wait look for what they wait for before they sleep.

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use kvcache_core::{Error, Result};

/// How long a wait looks before it sleeps, unless [`crate::AgentBuilder::look`] says otherwise: about as long as going to
/// sleep and being woken takes where a processor without work halts.
pub const LOOK_DEFAULT: Duration = Duration::from_micros(50);

/// The longest that [`crate::AgentBuilder::look`] takes.
pub const LOOK_MAX: Duration = Duration::from_millis(1);

/// What a score begins with: the first waits look.
const SCORE_FIRST: i32 = 1;
const SCORE_MAX: i32 = 8;

/// What a look in vain takes from the score: looks go on where three of four are not.
const SCORE_OF_VAIN: i32 = 3;

/// Waits of one kind: what they wait for is looked for, for a short time, as long as that has paid lately.
///
/// A wait that is over while it looks has saved a sleep, and what it takes to be woken. One that looks in vain has used a
/// processor for nothing: after a few of them nobody looks any more, until most waits are again so short that a look would
/// have met their ends.
#[derive(Debug)]
pub(crate) struct Looks {
    longest: Duration,
    /// Looks are taken while it is above 0. It is a guide only: what is lost when two waits end at once does not matter.
    score: AtomicI32,
}

/// A wait of some kind.
#[derive(Debug)]
pub(crate) struct Look<'a> {
    looks: &'a Looks,
    began: Instant,
    /// It looks until then, and sleeps afterwards.
    until: Instant,
    /// Whether it may last longer than a look.
    is_long: bool,
}

impl Looks {
    /// For waits that look for as long as `longest`.
    pub(crate) fn new(longest: Duration) -> Self {
        Self {
            longest,
            score: AtomicI32::new(SCORE_FIRST),
        }
    }

    /// Somebody begins to wait, at most until `until`.
    pub(crate) fn begin(&self, until: Instant) -> Look<'_> {
        let began = Instant::now();
        let end = began + self.longest;
        let looks = self.score.load(Ordering::Relaxed) > 0;
        Look {
            looks: self,
            began,
            until: if looks { end.min(until) } else { began },
            is_long: until > end,
        }
    }

    /// A wait has lasted so long, and was `looked` for all the while or slept in. What pays is remembered.
    fn learn(&self, waited: Duration, looked: bool) {
        let score = self.score.load(Ordering::Relaxed);
        let found = waited <= self.longest;
        let next = match (looked, found) {
            (true, true) => (score + 1).min(SCORE_MAX),
            (true, false) if score > SCORE_OF_VAIN => score - SCORE_OF_VAIN,
            (true, false) => -SCORE_MAX,
            // Half of it may have been the sleep's own cost.
            (false, _) if waited <= 2 * self.longest => score + 1,
            (false, _) => (score - 1).max(-SCORE_MAX),
        };
        self.score.store(next, Ordering::Relaxed);
    }
}

impl Look<'_> {
    /// Whether to look once more before sleeping.
    pub(crate) fn goes_on(&self) -> bool {
        self.until > self.began && Instant::now() < self.until
    }

    /// Looks until it is `done`, or it is time to sleep. Whether it is done.
    pub(crate) fn at(&self, done: impl Fn() -> bool) -> bool {
        loop {
            if done() {
                return true;
            }
            if !self.goes_on() {
                return false;
            }
            give_way();
        }
    }

    /// The wait is over. `found`: by what was waited for, not by time.
    pub(crate) fn end(self, found: bool) {
        if self.looks.longest.is_zero() || !(found || self.is_long) {
            return;
        }
        self.looks
            .learn(self.began.elapsed(), self.until > self.began);
    }
}

/// Between two looks: whoever else has work for this processor goes first.
pub(crate) fn give_way() {
    std::thread::yield_now();
}

/// How long waits of this process look if they are to for so long: not at all with one processor, which is better left to
/// who is waited for.
///
/// # Errors
/// [`kvcache_core::ErrorKind::Invalid`] above [`LOOK_MAX`].
pub(crate) fn longest(wanted: Duration) -> Result<Duration> {
    if wanted > LOOK_MAX {
        return Err(Error::invalid(
            "look before sleep, in ns",
            wanted.as_nanos(),
            0..=LOOK_MAX.as_nanos(),
        ));
    }
    Ok(match std::thread::available_parallelism() {
        Ok(count) if count.get() == 1 => Duration::ZERO,
        _ => wanted,
    })
}

#[cfg(test)]
mod tests;
