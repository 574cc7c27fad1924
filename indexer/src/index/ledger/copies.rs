//! How many copies of a block a source has announced and not withdrawn, by tier.

use kvcache_core::Tier;

use crate::score::TIERS;

/// Copies of a block by tier. More than 65,535 of one block in one tier are as good as that many.
pub(super) type Copies = [u16; TIERS];

/// Counts a copy in; true when it is the first in its tier.
pub(super) fn add_copy(copies: &mut Copies, tier: Tier, is_counted: bool) -> bool {
    let copies = &mut copies[tier as usize];
    let is_first = *copies == 0;
    if is_first || is_counted {
        *copies = copies.saturating_add(1);
    }
    is_first
}

/// Takes a copy out; how many are left, or `None` when there was none.
pub(super) fn take_copy(copies: &mut Copies, tier: Tier) -> Option<u16> {
    let copies = &mut copies[tier as usize];
    *copies = copies.checked_sub(1)?;
    Some(*copies)
}
