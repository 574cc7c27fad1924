//! When blocks leave DRAM for a lower tier.

use std::fmt;

/// How full DRAM is, and what is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostUsage {
    /// Slots there are.
    pub slots: u32,
    /// Slots that hold nothing.
    pub vacant: u32,
    /// Slots being written.
    pub filling: u32,
    /// Blocks on their way to a lower tier, whose slots become vacant when they are there.
    pub leaving: u32,
    /// Blocks that wait for a slot.
    pub wanted: u32,
    /// Whether a lower tier is in order and has room for a block, or will have some soon.
    pub lower_tier: bool,
}

/// What to do for a block that needs a slot when none is vacant and the coldest block is nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pressure {
    /// Let the new block wait for slots that become vacant by demotion.
    Wait,
    /// Drop the coldest block: it is lost.
    Drop,
}

/// Decides how many blocks to move down, and when to lose some instead. Which ones is the eviction policy's choice.
pub trait OffloadPolicy: fmt::Debug + Send {
    /// How many more blocks should start to leave now. Asked after every change.
    fn demote(&self, usage: &HostUsage) -> u32;

    /// A slot is wanted, and nothing vacant or held elsewhere can supply it.
    fn under_pressure(&self, usage: &HostUsage) -> Pressure;
}

/// Keeps a share of the slots vacant by writing the coldest blocks to the next tier ahead of need; drops only when
/// nothing is leaving and no lower tier takes anything.
#[derive(Clone, Copy, Debug)]
pub struct WriteBehind {
    /// Vacant slots to aim for, in thousandths of all.
    pub vacant_per_mille: u32,
}

impl Default for WriteBehind {
    fn default() -> Self {
        Self {
            vacant_per_mille: 100,
        }
    }
}

impl OffloadPolicy for WriteBehind {
    fn demote(&self, usage: &HostUsage) -> u32 {
        if !usage.lower_tier {
            return 0;
        }
        let reserve = u64::from(usage.slots) * u64::from(self.vacant_per_mille) / 1000;
        let coming = u64::from(usage.vacant) + u64::from(usage.leaving);
        let needed = reserve + u64::from(usage.wanted);
        if coming >= needed {
            return 0;
        }
        // Half as much again, so that blocks leave in batches and not one by one.
        let count = needed + reserve / 2 - coming;
        u32::try_from(count).unwrap_or(u32::MAX).min(usage.slots)
    }

    fn under_pressure(&self, usage: &HostUsage) -> Pressure {
        if usage.lower_tier || usage.leaving > 0 {
            Pressure::Wait
        } else {
            Pressure::Drop
        }
    }
}
