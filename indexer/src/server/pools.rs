//! Pools in answers: what they hold, and who may use them.

use std::collections::BTreeSet;

use kvcache_core::PodName;
use kvfabric_proto::v1;

use super::hub::{Hub, Pods};
use super::told::{range_to_wire, tiers};
use crate::index::PoolDepth;
use crate::wire::Registration;

impl Hub {
    /// Leaves the pools that one of these pods may use.
    pub(super) fn leave_usable(&self, pods: &Pods, pools: &mut Vec<PoolDepth>, asked: &[PodName]) {
        pools.retain(|found| {
            let pool = pods.get(&found.pool);
            pool.is_some_and(|pool| !self.users_of(pods, &pool.registration, asked).is_empty())
        });
    }

    /// The pools, and of those who were asked about, who may use each.
    pub(super) fn pools_to_wire(
        &self,
        pods: &Pods,
        pools: &[PoolDepth],
        asked: &[PodName],
    ) -> Vec<v1::PoolDepth> {
        let to_wire = |found: &PoolDepth| {
            let pool = &pods.get(&found.pool)?.registration;
            let users = self.users_of(pods, pool, asked);
            Some(v1::PoolDepth {
                pool: found.pool.as_str().to_owned(),
                depth: found.depth,
                held: found.held.iter().map(range_to_wire).collect(),
                by_tier: tiers(&found.by_tier).collect(),
                pods: users.into_iter().map(str::to_owned).collect(),
                peer_address: pool.peer_address.clone().unwrap_or_default(),
            })
        };
        pools.iter().filter_map(to_wire).collect()
    }

    /// The known pods of the pool's model and tenant that may use it, of those that were asked about if any were named.
    fn users_of<'a>(
        &self,
        pods: &'a Pods,
        pool: &Registration,
        asked: &[PodName],
    ) -> BTreeSet<&'a str> {
        let mut users = BTreeSet::new();
        let tenant = self.tenant_of(pool);
        for beginning in &pool.pool_for {
            // A name that is the beginning itself comes first of all that begin so.
            let Ok(first) = PodName::new(beginning) else {
                continue;
            };
            let fitting = pods.range(first..);
            let fitting =
                fitting.take_while(|(name, _)| name.as_str().starts_with(beginning.as_str()));
            let fitting = fitting.filter(|(name, pod)| {
                pod.registration.model == pool.model
                    && pod.registration.pool_for.is_empty()
                    && self.tenant_of(&pod.registration) == tenant
                    && (asked.is_empty() || asked.contains(name))
            });
            users.extend(fitting.map(|(name, _)| name.as_str()));
        }
        users
    }
}
