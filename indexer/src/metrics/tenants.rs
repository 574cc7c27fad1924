//! What tenants hold, and what they had to give up.

use kvcache_core::Tier;
use kvfabric_proto::v1;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::Number;
use super::names::add;
use crate::index::Usage;
use crate::wire::tier_to_wire;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TenantLabel {
    tenant: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TenantTierLabel {
    tenant: String,
    tier: &'static str,
}

/// What the indexes of one tenant hold together.
#[derive(Clone, Debug)]
pub(crate) struct TenantHoldings {
    name: String,
    pub(crate) usage: Usage,
}

impl TenantHoldings {
    pub(crate) fn new(name: &str, bytes_max: Option<u64>) -> Self {
        let usage = Usage {
            bytes_max,
            ..Usage::default()
        };
        Self {
            name: name.to_owned(),
            usage,
        }
    }

    /// Takes one of its indexes in.
    pub(crate) fn add(&mut self, index: &Usage) {
        let sum = &mut self.usage;
        sum.bytes += index.bytes;
        sum.evicted_blocks += index.evicted_blocks;
        sum.evicted_waiting += index.evicted_waiting;
        sum.refused += index.refused;
        for tier in 0..sum.entries.len() {
            sum.entries[tier] += index.entries[tier];
            sum.evicted[tier] += index.evicted[tier];
        }
    }

    /// What a tier's entries take: tiers share all tables, so each is given its part by entries.
    fn bytes_of(&self, tier: Tier) -> u64 {
        let entries: u64 = self.usage.entries.iter().sum();
        let of_tier = u128::from(self.usage.entries[tier as usize]);
        let bytes = u128::from(self.usage.bytes) * of_tier;
        bytes.checked_div(entries.into()).unwrap_or(0) as u64
    }

    pub(crate) fn to_wire(&self) -> v1::TenantStatus {
        let tiers = Tier::ALL.into_iter().map(|tier| v1::TierUsage {
            tier: tier_to_wire(tier).into(),
            entries: self.usage.entries[tier as usize],
            evicted: self.usage.evicted[tier as usize],
            bytes: self.bytes_of(tier),
        });
        v1::TenantStatus {
            tenant: self.name.clone(),
            bytes: self.usage.bytes,
            bytes_max: self.usage.bytes_max,
            tiers: tiers.collect(),
            blocks_evicted: self.usage.evicted_blocks,
        }
    }
}

/// The series of all tenants; there are as many as the configuration names.
#[derive(Default)]
pub(super) struct TenantMetrics {
    bytes: Family<TenantLabel, Number>,
    bytes_max: Family<TenantLabel, Number>,
    entries: Family<TenantTierLabel, Number>,
    tier_bytes: Family<TenantTierLabel, Number>,
    evictions: Family<TenantTierLabel, Counter>,
    blocks_evicted: Family<TenantLabel, Counter>,
    orphans_evicted: Family<TenantLabel, Counter>,
    refused: Family<TenantLabel, Counter>,
}

impl TenantMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let to = registry.sub_registry_with_prefix("kvfabric_indexer_tenant");
        add(
            to,
            "bytes",
            "Bytes that the tenant's entries take",
            &self.bytes,
        );
        add(to, "bytes_max", "Bytes that they may take", &self.bytes_max);
        add(to, "entries", "Entries by tenant and tier", &self.entries);
        let help = "Bytes by tenant and tier, by the tier's part of the entries";
        add(to, "tier_bytes", help, &self.tier_bytes);
        let help = "Entries given up for lack of room";
        add(to, "evictions", help, &self.evictions);
        let help = "Distinct blocks given up for lack of room";
        add(to, "blocks_evicted", help, &self.blocks_evicted);
        let help = "Waiting blocks given up for lack of room";
        add(to, "orphans_evicted", help, &self.orphans_evicted);
        let help = "Events and sources refused because they alone exceed the bound";
        add(to, "refused", help, &self.refused);
    }

    /// Shows what a tenant holds now; returns how many entries it has given up since the last time.
    pub(super) fn show(&self, held: &TenantHoldings) -> u64 {
        let usage = &held.usage;
        let label = TenantLabel {
            tenant: held.name.clone(),
        };
        self.bytes.get_or_create(&label).set(usage.bytes);
        // There is no number for "as much as it needs".
        if let Some(bytes_max) = usage.bytes_max {
            self.bytes_max.get_or_create(&label).set(bytes_max);
        }
        raise(
            &self.blocks_evicted.get_or_create(&label),
            usage.evicted_blocks,
        );
        raise(
            &self.orphans_evicted.get_or_create(&label),
            usage.evicted_waiting,
        );
        raise(&self.refused.get_or_create(&label), usage.refused);
        let by_tier = Tier::ALL.into_iter().map(|tier| {
            let label = TenantTierLabel {
                tenant: held.name.clone(),
                tier: tier.name(),
            };
            let entries = usage.entries[tier as usize];
            self.entries.get_or_create(&label).set(entries);
            let bytes = held.bytes_of(tier);
            self.tier_bytes.get_or_create(&label).set(bytes);
            let evicted = usage.evicted[tier as usize];
            raise(&self.evictions.get_or_create(&label), evicted)
        });
        by_tier.sum()
    }
}

/// Brings a counter to what was counted elsewhere; by how much.
fn raise(counter: &Counter, to: u64) -> u64 {
    let more = to.saturating_sub(counter.get());
    counter.inc_by(more);
    more
}
