//! Numbers that mean nothing in another run of this node.

/// Between the manager's numbers, which count from 0 in every run, and those that others are told, which start elsewhere
/// in each: so that one given back after a restart names nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbers(u64);

impl Numbers {
    /// Those of one run.
    pub(crate) fn of(incarnation: u64) -> Self {
        // An odd factor, about 2^64 divided by the golden ratio: it keeps the starts of neighbouring runs far apart.
        Self(incarnation.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// What others are told.
    pub(crate) fn outside(self, number: u64) -> u64 {
        number.wrapping_add(self.0)
    }

    /// What the manager calls it.
    pub(crate) fn inside(self, number: u64) -> u64 {
        number.wrapping_sub(self.0)
    }
}
