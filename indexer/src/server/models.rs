//! The indexes of one server: one a tenant and model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};
use tokio::time::Instant;

use super::access::Access;
use super::hub::{Hub, Pod, PodSource};
use crate::index::{self, BYTES_MIN, KvIndex, ORPHAN_BLOCKS_MAX, Usage};
use crate::metrics::{Holdings, TenantHoldings};
use crate::wire::Registration;

#[cfg(test)]
mod tests;

/// The most models one server takes, each tenant's having an index of its own.
pub(super) const MODELS_MAX: usize = 256;

/// The indexes of one tenant, by model: what is in another tenant's is not even looked at.
pub(super) type Models = BTreeMap<String, Arc<KvIndex>>;

/// Since when models have had no pod and held nothing, by tenant and name.
pub(super) type EmptySince = BTreeMap<(usize, String), Instant>;

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

    /// Ends the models that by `now` have had no pod and held nothing for as long as a source may be away: an engine may
    /// say any name, and no more than [`MODELS_MAX`] are taken.
    pub(super) fn end_models(&self, empty_since: &mut EmptySince, now: Instant) {
        // Who takes an index to put a pod's sources in holds this until the pod is known. Another time, then.
        let Ok(_joining) = self.joining.try_lock() else {
            return;
        };
        let empty = self.empty_models();
        empty_since.retain(|model, _| empty.contains(model));
        for model in empty {
            let since = *empty_since.entry(model.clone()).or_insert(now);
            if now.duration_since(since) >= self.config.source_ttl() {
                self.end_model(&model);
                empty_since.remove(&model);
            }
        }
    }

    fn empty_models(&self) -> BTreeSet<(usize, String)> {
        let used: BTreeSet<_> = self
            .pods()
            .values()
            .map(|pod| {
                let model = &pod.registration.model;
                (self.tenants.of_pod(&pod.name, model), model.clone())
            })
            .collect();
        let mut empty = BTreeSet::new();
        for (tenant, models) in self.models().iter().enumerate() {
            for (model, index) in models {
                let model = (tenant, model.clone());
                if !used.contains(&model) && index.entries() + index.expected_blocks() == 0 {
                    empty.insert(model);
                }
            }
        }
        empty
    }

    /// Takes a model out; the tenant's others have its bytes.
    fn end_model(&self, model: &(usize, String)) {
        let (tenant, name) = model;
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = models[*tenant].remove(name) else {
            return;
        };
        let config = &self.tenants.all()[*tenant];
        let left = models[*tenant].len() as u64;
        if let Some(share) = config.bytes_max.and_then(|most| most.checked_div(left)) {
            for other in models[*tenant].values() {
                if let Err(error) = other.set_bytes_max(share) {
                    tracing::error!(tenant = config.name, %error, "share out a model's bytes");
                }
            }
        }
        let mut ended = self.ended_models.lock();
        let ended = ended.as_mut().unwrap_or_else(|error| error.get_mut());
        add_counted(&mut ended[*tenant], &index.usage());
        drop(models);
        let mut made = self.bound_models.lock();
        let made = made.as_mut().unwrap_or_else(|error| error.get_mut());
        for of_listener in made.iter_mut() {
            of_listener.remove(model);
        }
        self.metrics.model_ended();
        tracing::info!(
            tenant = config.name,
            model = name,
            "a model has no pods any more"
        );
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
        let models = self.models();
        for (place, models) in models.iter().enumerate() {
            if !access.allows(place) {
                continue;
            }
            let tenant = &self.tenants.all()[place];
            let mut held = TenantHoldings::new(&tenant.name, tenant.bytes_max);
            let ended = self.ended_models.lock();
            held.add(&ended.unwrap_or_else(PoisonError::into_inner)[place]);
            holdings.models += models.len() as u64;
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
                .filter(|s| s.state.progress().is_connected);
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

/// Adds what an index has counted, without what it holds.
fn add_counted(sum: &mut Usage, index: &Usage) {
    sum.evicted_blocks += index.evicted_blocks;
    sum.evicted_waiting += index.evicted_waiting;
    sum.refused += index.refused;
    for (sum, evicted) in sum.evicted.iter_mut().zip(index.evicted) {
        *sum += evicted;
    }
}
