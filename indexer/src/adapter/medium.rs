//! The names that engines give to the places of blocks.

use kvcache_core::Tier;

/// The tier that an event's `medium` means, in any case; `None` for a name not known here.
///
/// An unknown medium is not guessed at: calling it fast would send requests to blocks that are far away.
#[must_use]
pub fn tier_of_medium(medium: &str) -> Option<Tier> {
    const NAMES: [(&str, Tier); 15] = [
        ("GPU", Tier::Device),
        ("CPU", Tier::Host),
        ("CPU_PINNED", Tier::Host),
        ("CPU_TIER1", Tier::Host),
        ("CPU_TIER2", Tier::Host),
        ("DRAM", Tier::Host),
        ("STORAGE", Tier::Disk),
        ("DISK", Tier::Disk),
        ("NVME", Tier::Disk),
        ("FS", Tier::Disk),
        ("OBJ", Tier::Object),
        ("OBJECT_STORE", Tier::Object),
        // One file system that every pod of a deployment mounts.
        ("SHARED_STORAGE", Tier::Object),
        // SGLang's storage backends, shared by all its instances.
        ("EXTERNAL", Tier::Object),
        ("HBM", Tier::Device),
    ];
    NAMES
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(medium))
        .map(|(_, tier)| *tier)
}
