//! What one server knows: an index per model, the pods that feed them, and who may join.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex as StdMutex, PoisonError, RwLock, RwLockReadGuard};

use kvcache_core::prefix::IndexScheme;
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{Error, ErrorKind, PodName, Result, Time};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::access::Access;
use super::models::Models;
use crate::adapter::Media;
use crate::config::{ListenerConfig, ServerConfig, StaticSource, Tenants};
use crate::index::{self, Evicted, KvIndex, SourceId, Usage};
use crate::ingest::Room;
use crate::metrics::Metrics;
use crate::score::TierWeights;
use crate::snapshot::Mark;
use crate::source::{Fed, Follower, Limits, Probes, Seen, SourceState, Steps};
use crate::wire::{Registration, SourceKind, SourceSpec, source_name};

/// Bytes that wait in all sources together: live batches behind a replay, and images on their way. One source alone may
/// have half of it.
const WAITING_BYTES_MAX: usize = 512 << 20;

/// The pods that are known.
pub(super) type Pods = BTreeMap<PodName, Arc<Pod>>;

/// A pod while it is known.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) name: PodName,
    pub(super) registration: Registration,
    pub(super) sources: Vec<PodSource>,
    /// Set when the pod is no longer known: it left, or registered anew.
    pub(super) ended: watch::Sender<bool>,
    /// Changes once at most: an adopted pod may register.
    origin: StdMutex<Origin>,
}

/// How a pod came to be known, and so what ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// From the configuration: it stays.
    Configured,
    /// By its registration: it lives as long as that stream.
    Registered,
    /// By its engine's connection to one of our endpoints: it lives until all its sources are given up.
    Bound,
    /// From a snapshot: it lives until all its sources are given up, or until it registers.
    Adopted,
}

impl Pod {
    pub(super) fn origin(&self) -> Origin {
        *self.origin.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A source that follows what a snapshot says: its entries are in the index already.
pub(super) struct Restored {
    pub(super) id: SourceId,
    pub(super) mark: Option<Mark>,
    /// Until when its publisher must have been asked.
    pub(super) verify_by: Instant,
}

/// One source of a pod; dropping it stops its task.
#[derive(Debug)]
pub(super) struct PodSource {
    /// `pod/source`.
    pub(super) name: String,
    pub(super) state: Arc<SourceState>,
    pub(super) id: SourceId,
    /// What the index gave up of it.
    evicted: Evicted,
    task: AbortHandle,
    /// Where messages are put in of a publisher that connects by itself.
    pub(super) feed: Option<mpsc::Sender<Fed>>,
}

impl PodSource {
    pub(super) fn new(
        (name, state): (String, Arc<SourceState>),
        (index, id): (&KvIndex, SourceId),
        task: AbortHandle,
        feed: Option<mpsc::Sender<Fed>>,
    ) -> Self {
        Self {
            name,
            state,
            id,
            evicted: index.evicted(id),
            task,
            feed,
        }
    }

    /// What answers say of it at `now`.
    pub(super) fn seen(&self, now: std::time::Instant) -> Seen {
        let mut seen = self.state.seen(now);
        seen.freshness.evicted = self.evicted.entries();
        seen
    }
}

impl Drop for PodSource {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Says of a source that the index has let in what is known of it beforehand.
///
/// # Errors
/// What the index refuses.
pub(super) fn introduce(
    index: &KvIndex,
    id: SourceId,
    registration: &Registration,
    spec: &SourceSpec,
) -> Result<()> {
    index.set_rank(id, spec.data_parallel_rank)?;
    index.set_groups(id, &spec.groups)?;
    if !registration.pool_for.is_empty() {
        index.set_pool(&registration.pod);
    }
    Ok(())
}

/// The state that all services share.
pub(super) struct Hub {
    pub(super) config: ServerConfig,
    pub(super) metrics: Arc<Metrics>,
    /// Counts up when pods come or go.
    pub(super) membership: watch::Sender<u64>,
    pub(super) scheme: IndexScheme,
    pub(super) block_size: TokensPerBlock,
    pub(super) weights: TierWeights,
    pub(super) media: Arc<Media>,
    pub(super) tenants: Tenants,
    /// The configured ones, one a rank.
    pub(super) listeners: Vec<ListenerConfig>,
    /// One a tenant, in their order.
    pub(super) models: RwLock<Vec<Models>>,
    pods: RwLock<Pods>,
    /// Held while a pod joins or leaves, removal of its entries included, and while a snapshot is taken up; never by a
    /// lookup.
    pub(super) joining: Mutex<()>,
    /// Why lookups are not answered; none when they are.
    pub(super) not_serving: watch::Sender<Option<String>>,
    started: Instant,
    /// Counts up whenever any source is further, or begins anew.
    pub(super) steps: Arc<Steps>,
    /// For what all sources together keep until it can be applied.
    room: Arc<Room>,
    /// Models that are here because of what engines said at each listener, with their tenant.
    pub(super) bound_models: StdMutex<Vec<BTreeSet<(usize, String)>>>,
    /// What the indexes of models that ended had counted, by tenant.
    pub(super) ended_models: StdMutex<Vec<Usage>>,
}

impl Hub {
    pub(super) fn new(config: ServerConfig) -> Result<Self> {
        let tenants = Tenants::new(&config)?;
        let listeners = config.listeners_by_rank()?;
        Ok(Self {
            models: RwLock::new(vec![Models::new(); tenants.all().len()]),
            scheme: config.scheme()?,
            block_size: TokensPerBlock::try_from(config.block_size)
                .map_err(|error| error.at("block_size"))?,
            weights: config.weights()?,
            media: Arc::new(config.media()?),
            metrics: Arc::new(Metrics::new(&config.tokenizers)),
            config,
            membership: watch::Sender::new(0),
            pods: RwLock::default(),
            joining: Mutex::default(),
            not_serving: watch::Sender::new(None),
            started: Instant::now(),
            steps: Arc::default(),
            room: Room::new(WAITING_BYTES_MAX),
            bound_models: StdMutex::new(vec![BTreeSet::new(); listeners.len()]),
            ended_models: StdMutex::new(vec![Usage::default(); tenants.all().len()]),
            tenants,
            listeners,
        })
    }

    /// The time by which expectations end.
    pub(super) fn now(&self) -> Time {
        self.time_at(Instant::now())
    }

    /// The same, of a moment.
    pub(super) fn time_at(&self, moment: Instant) -> Time {
        let elapsed = moment.duration_since(self.started);
        Time(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX))
    }

    // Nothing in either map is ever half-way changed, so a panic elsewhere need not end every answer.
    pub(super) fn pods(&self) -> RwLockReadGuard<'_, Pods> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn models(&self) -> RwLockReadGuard<'_, Vec<Models>> {
        self.models.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn scheme_name(&self) -> String {
        self.scheme.name()
    }

    /// The state of the source with this full name, if it is known and the caller may see it.
    pub(super) fn source(&self, full_name: &str, access: Access) -> Option<Arc<SourceState>> {
        let pods = self.pods();
        // Pod names may contain slashes, so every cut is tried.
        full_name.match_indices('/').find_map(|(cut, _)| {
            let pod = pods.get(&PodName::new(&full_name[..cut]).ok()?)?;
            if !self.may_see(access, pod) {
                return None;
            }
            let source = pod.sources.iter().find(|source| source.name == full_name)?;
            Some(source.state.clone())
        })
    }

    /// Takes a pod in, in the place of an earlier registration of the same name.
    ///
    /// # Errors
    /// `Invalid` naming what does not fit the index; `Busy` when there are too many pods or models; `Denied` at the address
    /// of another tenant.
    pub(super) async fn join(
        &self,
        registration: &Registration,
        access: Access,
    ) -> Result<Arc<Pod>> {
        self.check(registration)?;
        let joining = self.joining.lock().await;
        self.may_register(access, registration)?;
        let known = self.pods().get(&registration.pod).cloned();
        if let Some(known) = known {
            match known.origin() {
                Origin::Configured => {
                    let context = format!("pod {} is in the indexer's configuration", known.name);
                    return Err(Error::new(ErrorKind::Invalid, context));
                }
                Origin::Adopted if known.registration == *registration => {
                    tracing::info!(pod = %known.name, "pod of the snapshot registers");
                    *known.origin.lock().unwrap_or_else(PoisonError::into_inner) =
                        Origin::Registered;
                    return Ok(known);
                }
                Origin::Adopted | Origin::Bound | Origin::Registered => {
                    tracing::info!(pod = %known.name, "pod registers anew");
                    self.remove(&known).await;
                }
            }
        }
        let joined = self.add(registration, Origin::Registered);
        drop(joining);
        joined
    }

    /// The pods of the configuration.
    ///
    /// # Errors
    /// As [`Hub::join`].
    pub(super) fn configured(&self) -> Result<Vec<Registration>> {
        let mut pods: BTreeMap<PodName, Vec<&StaticSource>> = BTreeMap::new();
        for source in &self.config.sources {
            pods.entry(source.pod_name()?).or_default().push(source);
        }
        let registrations = pods.into_iter().map(|(pod, sources)| {
            let model = &sources[0].model;
            if let Some(other) = sources.iter().find(|source| source.model != *model) {
                let context = format!(
                    "sources: pod {pod} has models {model:?} and {:?}",
                    other.model
                );
                return Err(Error::new(ErrorKind::Invalid, context));
            }
            let registration = Registration {
                pod,
                model: model.clone(),
                block_size: sources
                    .iter()
                    .find_map(|source| source.engine_block_size)
                    .unwrap_or(self.config.block_size),
                key_scheme: self.scheme_name(),
                sources: sources
                    .iter()
                    .map(|source| source.specs())
                    .collect::<Result<Vec<_>>>()?
                    .concat(),
                peer_address: sources
                    .iter()
                    .find_map(|source| source.peer_address.clone()),
                pool_for: sources
                    .iter()
                    .flat_map(|source| source.pool_for.iter().cloned())
                    .collect(),
            };
            self.check(&registration)?;
            Ok(registration)
        });
        registrations.collect()
    }

    /// Takes in those pods of the configuration that are not known yet; `joining` is held.
    ///
    /// # Errors
    /// `Busy` when there are too many pods or models.
    pub(super) fn join_configured(&self, configured: &[Registration]) -> Result<()> {
        for registration in configured {
            if !self.pods().contains_key(&registration.pod) {
                self.add(registration, Origin::Configured)?;
            }
        }
        Ok(())
    }

    /// Takes the pod out, unless it has been replaced already.
    pub(super) async fn leave(&self, pod: &Arc<Pod>) {
        let _joining = self.joining.lock().await;
        let is_current = self
            .pods()
            .get(&pod.name)
            .is_some_and(|known| Arc::ptr_eq(known, pod));
        if is_current {
            self.remove(pod).await;
        }
    }

    fn add(&self, registration: &Registration, origin: Origin) -> Result<Arc<Pod>> {
        self.check_room()?;
        let index = self.index_for_pod(registration)?;
        let mut sources = Vec::with_capacity(registration.sources.len());
        for spec in &registration.sources {
            match self.follow_new(registration, spec, &index) {
                Ok(source) => sources.push(source),
                Err(error) => {
                    for source in &sources {
                        index.remove_source(source.id);
                    }
                    return Err(error);
                }
            }
        }
        Ok(self.insert(registration, origin, sources))
    }

    /// # Errors
    /// `Busy` naming the setting.
    pub(super) fn check_room(&self) -> Result<()> {
        let (known, most) = (self.pods().len(), self.config.pods_max);
        if known >= most {
            let context = format!("{known} pods are registered, at most {most} may be (pods_max)");
            return Err(Error::new(ErrorKind::Busy, context));
        }
        Ok(())
    }

    pub(super) fn insert(
        &self,
        registration: &Registration,
        origin: Origin,
        sources: Vec<PodSource>,
    ) -> Arc<Pod> {
        let pod = Arc::new(Pod {
            name: registration.pod.clone(),
            registration: registration.clone(),
            sources,
            ended: watch::Sender::new(false),
            origin: StdMutex::new(origin),
        });
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        pods.insert(pod.name.clone(), pod.clone());
        drop(pods);
        self.membership.send_modify(|count| *count += 1);
        tracing::info!(pod = %pod.name, sources = pod.sources.len(), "pod joined");
        pod
    }

    /// Lets a source in and starts its task.
    ///
    /// # Errors
    /// What the index refuses.
    pub(super) fn follow_new(
        &self,
        registration: &Registration,
        spec: &SourceSpec,
        index: &Arc<KvIndex>,
    ) -> Result<PodSource> {
        let block_size = match spec.kind {
            // A node's blocks are index keys.
            SourceKind::Node => self.config.block_size,
            _ => registration.block_size,
        };
        let id = index.add_source(index::SourceSpec {
            pod: registration.pod.clone(),
            name: spec.name.clone(),
            kind: spec.kind,
            block_size,
        })?;
        introduce(index, id, registration, spec)?;
        let nothing = Restored {
            id,
            mark: None,
            verify_by: Instant::now(),
        };
        Ok(self.follow(registration, spec, index, &nothing))
    }

    /// Starts the task of one source that the index has let in.
    pub(super) fn follow(
        &self,
        registration: &Registration,
        spec: &SourceSpec,
        index: &Arc<KvIndex>,
        restored: &Restored,
    ) -> PodSource {
        let name = source_name(&registration.pod, &spec.name);
        let state = Arc::new(SourceState::new(restored.mark));
        let mut follower = self.follower(spec, &name, (index.clone(), restored.id), state.clone());
        if let Some(mark) = restored.mark {
            follower.resume(mark, restored.verify_by);
        }
        let task = if spec.kind == SourceKind::Approximate {
            // Nothing is published that could be waited for.
            state.change(|progress| {
                progress.is_synced = true;
                true
            });
            tokio::spawn(std::future::ready(())).abort_handle()
        } else {
            tokio::spawn(follower.run()).abort_handle()
        };
        PodSource::new((name, state), (index, restored.id), task, None)
    }

    /// What a source's task works on.
    pub(super) fn follower(
        &self,
        spec: &SourceSpec,
        name: &str,
        place: (Arc<KvIndex>, SourceId),
        state: Arc<SourceState>,
    ) -> Follower {
        let limits = Limits {
            ttl: self.config.source_ttl(),
            message_bytes_max: self.config.event_bytes_max,
            media: self.media.clone(),
            room: self.room.clone(),
            steps: self.steps.clone(),
            probes: Probes::default(),
        };
        let metrics = self.metrics.clone();
        Follower::new(spec.clone(), name.to_owned(), place, state, metrics, limits)
    }

    /// Forgets the pod: first its entries, so that whoever sees it gone finds nothing of it any more.
    pub(super) async fn remove(&self, pod: &Arc<Pod>) {
        if let Some(index) = self.index_of_pod(&pod.registration) {
            let ids: Vec<_> = pod.sources.iter().map(|source| source.id).collect();
            let removal = tokio::task::spawn_blocking(move || {
                ids.into_iter().for_each(|id| index.remove_source(id));
            });
            if let Err(error) = removal.await {
                tracing::error!(pod = %pod.name, %error, "remove the entries of a pod");
            }
        }
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        pods.remove(&pod.name);
        drop(pods);
        pod.ended.send_replace(true);
        self.membership.send_modify(|count| *count += 1);
        tracing::info!(pod = %pod.name, "pod left");
    }

    /// Entries of a pod.
    pub(super) fn entries_of(&self, pod: &Pod) -> u64 {
        self.index_of_pod(&pod.registration)
            .map_or(0, |index| index.pod_entries(&pod.name))
    }
}
