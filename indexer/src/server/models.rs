//! The indexes of one server: one a tenant and model.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};

use super::access::Access;
use super::hub::{Hub, Pod, PodSource};
use crate::index::{self, BYTES_MIN, KvIndex, ORPHAN_BLOCKS_MAX};
use crate::metrics::{Holdings, TenantHoldings};
use crate::wire::Registration;

#[cfg(test)]
mod tests;

/// The most models one server takes, each tenant's having an index of its own.
pub(super) const MODELS_MAX: usize = 256;

/// The indexes of one tenant, by model: what is in another tenant's is not even looked at.
pub(super) type Models = BTreeMap<String, Arc<KvIndex>>;

impl Hub {
    /// The index that a tenant's question about `model` goes to; none when nobody has told anything of that model.
    ///
    /// # Errors
    /// `Invalid` when the tenant is not configured, or when the question names no model and several are served.
    pub(super) fn index_for(&self, tenant: &str, model: &str) -> Result<Option<Arc<KvIndex>>> {
        let tenant = self.tenants.of_question(tenant, model)?;
        let models = self.models();
        let Some(models) = models.get(tenant) else {
            return Ok(None);
        };
        if let Some(index) = models.get(model) {
            return Ok(Some(index.clone()));
        }
        match (model, models.len()) {
            ("", 0 | 1) => Ok(models.values().next().cloned()),
            ("", count) => {
                let context = format!("model is empty, but {count} models are served here");
                Err(Error::new(ErrorKind::Invalid, context))
            }
            _ => Ok(None),
        }
    }

    /// The index that a pod's events go to, made when it is the first time.
    ///
    /// # Errors
    /// As [`Self::index_of`].
    pub(super) fn index_for_pod(&self, registration: &Registration) -> Result<Arc<KvIndex>> {
        let Registration { pod, model, .. } = registration;
        self.index_of(self.tenants.of_pod(pod, model), model)
    }

    /// The index of a tenant's model, made when it is the first time; a tenant's models have equal parts of its bytes.
    ///
    /// # Errors
    /// `Busy` when there are too many models, of all tenants or for the bytes of this one.
    pub(super) fn index_of(&self, tenant: usize, model: &str) -> Result<Arc<KvIndex>> {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = models[tenant].get(model) {
            return Ok(index.clone());
        }
        if models.iter().map(BTreeMap::len).sum::<usize>() >= MODELS_MAX {
            let context = format!("{MODELS_MAX} models are served, no more are taken");
            return Err(Error::new(ErrorKind::Busy, context));
        }
        let config = index::IndexConfig {
            scheme: self.scheme.clone(),
            model: model.to_owned(),
            block_size: self.block_size,
            weights: self.weights,
            orphan_blocks_max: ORPHAN_BLOCKS_MAX,
        };
        let models = &mut models[tenant];
        let index = match self.tenants.all()[tenant].bytes_max {
            None => KvIndex::new(config),
            Some(bytes_max) => {
                let share = bytes_max / (models.len() as u64 + 1);
                if share < BYTES_MIN {
                    let name = &self.tenants.all()[tenant].name;
                    let context = format!(
                        "model {model:?}: the {bytes_max} bytes of tenant {name:?} are for {} models",
                        models.len()
                    );
                    return Err(Error::new(ErrorKind::Busy, context));
                }
                // The others first, so that all together never have more than the tenant has.
                for other in models.values() {
                    other.set_bytes_max(share)?;
                }
                KvIndex::bounded(config, share)?
            }
        };
        let index = Arc::new(index);
        models.insert(model.to_owned(), index.clone());
        Ok(index)
    }

    /// The index that a known pod's entries are in.
    pub(super) fn index_of_pod(&self, registration: &Registration) -> Option<Arc<KvIndex>> {
        let tenant = self.tenants.of_pod(&registration.pod, &registration.model);
        self.models().get(tenant)?.get(&registration.model).cloned()
    }

    /// What the indexes hold now that a caller may see.
    pub(super) fn holdings(&self, access: Access) -> Holdings {
        let mut holdings = Holdings {
            is_serving: self.not_serving.borrow().is_none(),
            ..Holdings::default()
        };
        let tenants = self.tenants.all().iter().enumerate();
        let models = self.models();
        for ((place, tenant), models) in tenants.zip(&*models) {
            if !access.allows(place) {
                continue;
            }
            let mut held = TenantHoldings::new(&tenant.name, tenant.bytes_max);
            for index in models.values() {
                holdings.blocks += index.blocks();
                held.add(&index.usage());
                holdings.expected_blocks += index.expected_blocks();
            }
            holdings.entries += held.usage.entries.iter().sum::<u64>();
            holdings.bytes += held.usage.bytes;
            holdings.tenants.push(held);
        }
        drop(models);
        let mut pods: Vec<_> = self.pods().values().cloned().collect();
        pods.retain(|pod| self.may_see(access, pod));
        holdings.pods = pods.len() as u64;
        for pod in &pods {
            holdings.sources += pod.sources.len() as u64;
            let connected = pod
                .sources
                .iter()
                .filter(|s| s.state.progress.borrow().is_connected);
            holdings.sources_connected += connected.count() as u64;
            holdings.orphans += pod
                .sources
                .iter()
                .map(|source| self.orphans_of(pod, source))
                .sum::<u64>();
        }
        holdings
    }

    /// Blocks of a source that wait for the block before them.
    pub(super) fn orphans_of(&self, pod: &Pod, source: &PodSource) -> u64 {
        self.index_of_pod(&pod.registration)
            .map_or(0, |index| index.orphans(source.id))
    }
}
