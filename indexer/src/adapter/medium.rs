//! The names that engines give to the places of blocks.

use std::collections::BTreeMap;

use kvcache_core::{Error, ErrorKind, Result, Tier};

use crate::score::{MediumWeight, TierWeights};

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

/// What becomes of events about a medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MediumUse {
    /// They are about this tier.
    Tier(Tier),
    /// They are passed over: what is there is of no use to requests.
    Ignore,
    /// They are refused, as what makes no sense is.
    Refuse,
}

impl MediumUse {
    /// The use with this name in configuration.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the text and what is accepted.
    pub fn parse(name: &str) -> Result<Self> {
        let tier = Tier::ALL.into_iter().find(|tier| tier.name() == name);
        match (tier, name) {
            (Some(tier), _) => Ok(Self::Tier(tier)),
            (None, "ignore") => Ok(Self::Ignore),
            (None, "refuse") => Ok(Self::Refuse),
            (None, _) => Err(Error::invalid(
                "use of a medium",
                format!("{name:?}"),
                "hbm, dram, nvme, object, ignore or refuse",
            )),
        }
    }

    /// Its name in configuration and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tier(tier) => tier.name(),
            Self::Ignore => "ignore",
            Self::Refuse => "refuse",
        }
    }
}

/// What each medium is taken for: configured ones first, then those known here, then all others alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Media {
    /// By name in upper case.
    configured: BTreeMap<String, MediumUse>,
    unknown: MediumUse,
    /// Of those with a weight of their own, by name in upper case.
    weights: BTreeMap<String, f64>,
    /// What all others weigh.
    by_tier: TierWeights,
}

impl Default for Media {
    /// Nothing configured; unknown media are refused.
    fn default() -> Self {
        Self {
            configured: BTreeMap::new(),
            unknown: MediumUse::Refuse,
            weights: BTreeMap::new(),
            by_tier: TierWeights::default(),
        }
    }
}

impl Media {
    /// Takes what is configured, by names in any case, and the use of all media that are neither configured nor known.
    #[must_use]
    pub fn new(
        configured: impl IntoIterator<Item = (String, MediumUse)>,
        unknown: MediumUse,
    ) -> Self {
        let configured = configured.into_iter();
        let configured = configured.map(|(name, told)| (name.to_ascii_uppercase(), told));
        Self {
            configured: configured.collect(),
            unknown,
            ..Self::default()
        }
    }

    /// The same where some media, by names in any case, weigh something else than their tiers do.
    #[must_use]
    pub fn with_weights(
        self,
        weights: impl IntoIterator<Item = (String, f64)>,
        by_tier: TierWeights,
    ) -> Self {
        let weights = weights.into_iter();
        let weights = weights.map(|(name, weight)| (name.to_ascii_uppercase(), weight));
        Self {
            weights: weights.collect(),
            by_tier,
            ..self
        }
    }

    /// What a block in a medium is worth; none where no medium of its tier has a weight of its own.
    #[must_use]
    pub fn weight_of(&self, medium: &str) -> Option<MediumWeight> {
        if self.weights.is_empty() {
            return None;
        }
        let MediumUse::Tier(tier) = self.of(medium).0 else {
            return None;
        };
        let is_of_tier = |name: &String| self.of(name).0 == MediumUse::Tier(tier);
        if !self.weights.keys().any(is_of_tier) {
            return None;
        }
        let medium = medium.to_ascii_uppercase();
        let own = self.weights.get(&medium).copied();
        Some(MediumWeight {
            tier,
            weight: own.unwrap_or_else(|| self.by_tier.of(tier)),
            medium,
        })
    }

    /// Whether any medium has a weight of its own.
    pub(super) fn has_weights(&self) -> bool {
        !self.weights.is_empty()
    }

    /// What a medium is taken for, and whether somebody has said so: false for an unknown one.
    #[must_use]
    pub fn of(&self, medium: &str) -> (MediumUse, bool) {
        if !self.configured.is_empty()
            && let Some(told) = self.configured.get(&medium.to_ascii_uppercase())
        {
            return (*told, true);
        }
        match tier_of_medium(medium) {
            Some(tier) => (MediumUse::Tier(tier), true),
            None => (self.unknown, false),
        }
    }

    /// The tier of an event's medium; none when events about it are passed over.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] naming a medium that is refused.
    pub(super) fn tier(&self, medium: &str) -> Result<Option<Tier>> {
        match self.of(medium) {
            (MediumUse::Tier(tier), _) => Ok(Some(tier)),
            (MediumUse::Ignore, _) => Ok(None),
            (MediumUse::Refuse, is_told) => {
                let why = if is_told {
                    "refused by configuration"
                } else {
                    "not known"
                };
                let context = format!("medium {medium:?} is {why}");
                Err(Error::new(ErrorKind::Unsupported, context))
            }
        }
    }
}
