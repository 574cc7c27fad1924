//! Deadlines by name: which lease, operation or command is due first.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::Time;

/// A set of names, each with the time at which it is due; O(log n) each.
#[derive(Clone, Debug)]
pub struct Expiries<N> {
    by_time: BTreeSet<(Time, N)>,
    by_name: BTreeMap<N, Time>,
}

impl<N> Default for Expiries<N> {
    fn default() -> Self {
        Self {
            by_time: BTreeSet::new(),
            by_name: BTreeMap::new(),
        }
    }
}

impl<N: Copy + Ord> Expiries<N> {
    /// `name` is due at `time`, whatever was said of it before.
    pub fn set(&mut self, name: N, time: Time) {
        self.clear(name);
        self.by_name.insert(name, time);
        self.by_time.insert((time, name));
    }

    /// `name` is never due. Returns when it would have been.
    pub fn clear(&mut self, name: N) -> Option<Time> {
        let time = self.by_name.remove(&name)?;
        self.by_time.remove(&(time, name));
        Some(time)
    }

    /// The earliest time at which anything is due.
    #[must_use]
    pub fn next(&self) -> Option<Time> {
        self.by_time.first().map(|(time, _)| *time)
    }

    /// Takes out one name that is due at `now`, the earliest first.
    pub fn pop_due(&mut self, now: Time) -> Option<N> {
        let (time, name) = *self.by_time.first()?;
        if time > now {
            return None;
        }
        self.clear(name);
        Some(name)
    }

    /// How many names have a time.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether nothing will ever be due.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}
