//! What media that engines name are taken for, and what blocks there are worth.

use std::fmt;

use kvcache_core::{Error, Result, Tier};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::adapter::{MediumUse, tier_of_medium};

/// A medium's entry: one word, or a table with a weight.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MediumConfig {
    /// A tier, `ignore` or `refuse`; absent: what the medium is known as.
    pub tier: Option<String>,
    /// What a block there is worth in scores; absent: what its tier's is.
    pub weight: Option<f64>,
}

impl From<&str> for MediumConfig {
    fn from(tier: &str) -> Self {
        Self {
            tier: Some(tier.to_owned()),
            weight: None,
        }
    }
}

impl MediumConfig {
    /// What the medium is taken for, and its own weight.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] naming the value: no use, a weight that cannot order pods or that nothing has,
    /// a medium that is not known without one.
    pub(super) fn parse(&self, name: &str) -> Result<(MediumUse, Option<f64>)> {
        let taken_for = match (&self.tier, tier_of_medium(name)) {
            (Some(told), _) => MediumUse::parse(told)?,
            (None, Some(tier)) => MediumUse::Tier(tier),
            (None, None) => {
                let accepted = "a tier, for a medium that is not known without one";
                return Err(Error::invalid("tier", "absent", accepted));
            }
        };
        let Some(weight) = self.weight else {
            return Ok((taken_for, None));
        };
        if !weight.is_finite() || weight < 0.0 {
            return Err(Error::invalid("weight", weight, 0.0..f64::MAX));
        }
        let is_own = matches!(taken_for, MediumUse::Tier(tier) if tier != Tier::Object);
        if !is_own {
            let used = taken_for.name();
            let accepted = format!("none: {used} is part of no pod's score");
            return Err(Error::invalid("weight", weight, accepted));
        }
        Ok((taken_for, Some(weight)))
    }
}

/// The table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    tier: Option<String>,
    weight: Option<f64>,
}

impl<'de> Deserialize<'de> for MediumConfig {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Entry;

        impl<'de> Visitor<'de> for Entry {
            type Value = MediumConfig;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a tier, `ignore`, `refuse`, or a table with `tier` and `weight`")
            }

            fn visit_str<E>(self, tier: &str) -> Result<MediumConfig, E> {
                Ok(tier.into())
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<MediumConfig, A::Error> {
                let Table { tier, weight } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(MediumConfig { tier, weight })
            }
        }

        from.deserialize_any(Entry)
    }
}
