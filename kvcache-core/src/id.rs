//! Names and numbers that must not be mixed up.

use std::fmt;
use std::ops::{Add, Sub};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind};

/// Nanoseconds since some start that the caller chose; only differences mean anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// Later than any deadline.
    pub const MAX: Self = Self(u64::MAX);

    /// How long after `earlier` this is; zero when it is not after.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }
}

impl Sub<Time> for Time {
    type Output = Duration;

    fn sub(self, earlier: Time) -> Duration {
        self.since(earlier)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $raw:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $raw);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// A fixed place for one block in an arena, counted from 0.
    SlotIndex, u32
);
number!(
    /// How often a slot has been given to a new block: tells an old reference from a current one.
    Generation, u32
);
number!(
    /// One lease that a holder granted; unique in that holder's lifetime.
    LeaseId, u64
);
number!(
    /// One pin that is asked of a node: chosen by who asks, never used again there.
    PinId, u64
);
number!(
    /// One store, fetch or flush that was asked for.
    OperationId, u64
);
number!(
    /// A peer as this process knows it; its name is known at the edge.
    PeerId, u32
);
number!(
    /// One incarnation of a source of events.
    Epoch, u64
);
number!(
    /// The place of a batch in its source's stream, counted from 0 in each epoch.
    Sequence, u64
);

/// The longest pod name accepted, in bytes: a DNS name, a port and some room.
pub const POD_NAME_BYTES_MAX: usize = 320;

/// The name by which routers, events and peers know a pod (often `ip:port`).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodName(Arc<str>);

impl PodName {
    /// Checks that the name is printable, without spaces or `@`, and not too long.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the name and the rule it breaks.
    pub fn new(name: &str) -> Result<Self, Error> {
        let rule = if name.is_empty() {
            "is empty"
        } else if name.len() > POD_NAME_BYTES_MAX {
            "is longer than 320 bytes"
        } else if name
            .chars()
            .any(|c| c.is_control() || c.is_whitespace() || c == '@')
        {
            "has a space, a control character or an '@'"
        } else {
            return Ok(Self(name.into()));
        };
        Err(Error::new(
            ErrorKind::Invalid,
            format!("pod name {name:?} {rule}"),
        ))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
