//! Pods whose engines connect to the index by themselves and say in their topics who they are.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::bootstrap::watch_given_up;
use super::hub::{Hub, Origin, Pod, PodSource, introduce};
use crate::adapter::{TOPIC_PREFIX, Topic};
use crate::index::{self, KvIndex};
use crate::source::{FED_QUEUED_MAX, Fed, SourceState};
use crate::wire::{Registration, SourceSpec, parse_source_kind, source_name};
use crate::zmtp::{Connection, Listener};

/// A connection that does not shake hands within so long is closed.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pods that one connection may speak for: an engine is one, a relay several.
const TOPICS_PER_CONNECTION_MAX: usize = 64;
/// When the system cannot accept, it is asked again so much later.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Pods that wait to be watched.
const JOINED_QUEUED_MAX: usize = 64;

/// One endpoint that engines connect to.
pub(super) struct Door {
    pub(super) listener: Listener,
    /// Its place in the configuration, and in the sources of the pods that come in.
    pub(super) place: usize,
}

impl Hub {
    /// What every pod that connects by itself has as sources: one for each endpoint.
    ///
    /// # Errors
    /// `Invalid` naming the kind.
    fn bound_sources(&self) -> Result<Vec<SourceSpec>> {
        let specs = self.listeners.iter().map(|listener| {
            Ok(SourceSpec {
                name: listener.name.clone(),
                kind: parse_source_kind(&listener.kind)?,
                endpoint: listener.endpoint.clone(),
                replay_endpoint: None,
                data_parallel_rank: listener.data_parallel_rank,
                groups: Vec::new(),
            })
        });
        specs.collect()
    }

    /// # Errors
    /// `Busy` naming the setting.
    fn check_pods_of_listeners(&self, place: usize) -> Result<()> {
        let all = self.config.pods_max;
        let most = self.listeners[place].pods_max;
        let most = most.unwrap_or(all - all / 8);
        let is_bound = |pod: &&Arc<Pod>| pod.origin() == Origin::Bound;
        let known = self.pods().values().filter(is_bound).count();
        if known >= most {
            let setting = format!("listeners[{place}].pods_max");
            let context =
                format!("{known} pods came by themselves, at most {most} may ({setting})");
            return Err(Error::new(ErrorKind::Busy, context));
        }
        Ok(())
    }

    /// The index of a pod of a listener, made if that may have one more model; `joining` is held.
    ///
    /// # Errors
    /// `Invalid` for a model that is not served there; `Busy` naming the setting when there are too many.
    fn index_for_bound(&self, registration: &Registration, place: usize) -> Result<Arc<KvIndex>> {
        let (listener, model) = (&self.listeners[place], &registration.model);
        if !listener.models.is_empty() && !listener.models.contains(model) {
            let context = format!("model {model:?} is not served here (listeners[{place}].models)");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        if let Some(index) = self.index_of_pod(registration) {
            return Ok(index);
        }
        let made = self.bound_models.lock();
        let mut made = made.unwrap_or_else(PoisonError::into_inner);
        let most = listener.models_max;
        if made[place].len() >= most {
            let setting = format!("listeners[{place}].models_max");
            let context = format!(
                "model {model:?} is one more than the {most} that may come to be known here ({setting})"
            );
            return Err(Error::new(ErrorKind::Busy, context));
        }
        let index = self.index_for_pod(registration)?;
        let tenant = self.tenants.of_pod(&registration.pod, model);
        made[place].insert((tenant, model.clone()));
        Ok(index)
    }

    /// The pod that a topic names, taken in when it is new; true if it is.
    ///
    /// # Errors
    /// `Invalid` when another pod has the name; `Busy` when there are too many pods or models.
    async fn join_bound(&self, topic: &Topic, place: usize) -> Result<(Arc<Pod>, bool)> {
        let joining = self.joining.lock().await;
        let known = self.pods().get(&topic.pod).cloned();
        if let Some(known) = known {
            let is_connected = known
                .sources
                .iter()
                .any(|source| source.state.progress().is_connected);
            if known.origin() != Origin::Bound {
                let context = format!(
                    "pod {} is known by registration or configuration",
                    known.name
                );
                return Err(Error::new(ErrorKind::Invalid, context));
            }
            if known.registration.model == topic.model {
                return Ok((known, false));
            }
            if is_connected {
                let context = format!(
                    "pod {} is connected with model {:?}, this is model {:?}",
                    known.name, known.registration.model, topic.model
                );
                return Err(Error::new(ErrorKind::Invalid, context));
            }
            self.remove(&known).await;
        }
        let registration = Registration {
            pod: topic.pod.clone(),
            model: topic.model.clone(),
            block_size: self.config.block_size,
            key_scheme: self.scheme_name(),
            sources: self.bound_sources()?,
            peer_address: None,
            pool_for: Vec::new(),
        };
        self.check(&registration)?;
        self.check_room()?;
        self.check_pods_of_listeners(place)?;
        let index = self.index_for_bound(&registration, place)?;
        let mut sources = Vec::with_capacity(registration.sources.len());
        for spec in &registration.sources {
            let id = index.add_source(index::SourceSpec {
                pod: registration.pod.clone(),
                name: spec.name.clone(),
                kind: spec.kind,
                block_size: registration.block_size,
            });
            let id = match id {
                Ok(id) => id,
                Err(error) => {
                    index.remove_pod(&registration.pod);
                    return Err(error);
                }
            };
            introduce(&index, id, &registration, spec)?;
            let name = source_name(&registration.pod, &spec.name);
            let state = Arc::new(SourceState::new(None));
            let follower = self.follower(spec, &name, (index.clone(), id), state.clone());
            let (feed, inputs) = mpsc::channel(FED_QUEUED_MAX);
            let task = tokio::spawn(follower.run_fed(inputs)).abort_handle();
            let source = PodSource::new((name, state), (&index, id), task, Some(feed));
            sources.push(source);
        }
        let pod = self.insert(&registration, Origin::Bound, sources);
        drop(joining);
        Ok((pod, true))
    }
}

/// Takes in engines until the task is aborted.
pub(super) async fn listen(hub: Arc<Hub>, door: Door) {
    let rooms = Arc::new(Semaphore::new(
        hub.config.pods_max.min(Semaphore::MAX_PERMITS),
    ));
    let (joined, mut pods) = mpsc::channel(JOINED_QUEUED_MAX);
    let mut tasks = JoinSet::new();
    let mut connections = 0;
    loop {
        let accepted = tokio::select! {
            accepted = door.listener.accept() => accepted,
            Some(pod) = pods.recv() => {
                let hub = hub.clone();
                tasks.spawn(async move { watch_given_up(&hub, &pod, Origin::Bound).await });
                continue;
            }
            Some(_) = tasks.join_next() => continue,
        };
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "engines cannot connect now");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(room) = rooms.clone().try_acquire_owned() else {
            let most = hub.config.pods_max;
            tracing::warn!(
                from = accepted.1,
                most,
                "an engine is turned away (pods_max)"
            );
            hub.metrics.publisher_refused();
            continue;
        };
        connections += 1;
        let guest = Guest {
            hub: hub.clone(),
            place: door.place,
            number: connections,
            feeds: HashMap::new(),
            joined: joined.clone(),
        };
        tasks.spawn(async move {
            let _room = room;
            let most = guest.hub.config.event_bytes_max;
            let connected =
                Connection::accepted(accepted, TOPIC_PREFIX, most, HANDSHAKE_TIMEOUT).await;
            match connected {
                Ok(connection) => guest.serve(connection).await,
                Err(error) => guest.refuse(&error),
            }
        });
    }
}

/// One connection of an engine.
struct Guest {
    hub: Arc<Hub>,
    place: usize,
    /// Counts up with every connection to the endpoint.
    number: u64,
    /// Where the messages of each topic go.
    feeds: HashMap<Bytes, mpsc::Sender<Fed>>,
    joined: mpsc::Sender<Arc<Pod>>,
}

impl Guest {
    fn refuse(&self, error: &Error) {
        tracing::warn!(%error, "engine refused");
        self.hub.metrics.publisher_refused();
    }

    async fn serve(mut self, mut connection: Connection) {
        let error = loop {
            let frames = match connection.recv().await {
                Ok(frames) => frames,
                Err(error) => break error,
            };
            let Some(topic) = frames.first().cloned() else {
                continue;
            };
            let feed = match self.feed(&topic).await {
                Ok(feed) => feed,
                Err(error) if error.kind() == ErrorKind::Busy => {
                    // It would go on for ever: the engine tries again by itself.
                    self.refuse(&error);
                    break error;
                }
                Err(error) => {
                    tracing::debug!(%error, "message of an engine left out");
                    self.hub.metrics.events_rejected(1);
                    continue;
                }
            };
            let connection = self.number;
            if feed
                .send(Fed::Message { connection, frames })
                .await
                .is_err()
            {
                // The pod was forgotten meanwhile; what comes next takes it in again.
                self.feeds.remove(&topic);
                self.hub.metrics.events_rejected(1);
            }
        };
        if error.kind() != ErrorKind::PeerLost {
            self.refuse(&error);
        }
        for feed in self.feeds.values() {
            let context = error.to_string();
            let error = Error::new(error.kind(), context);
            let connection = self.number;
            // Nobody to tell when the pod is forgotten.
            let _ = feed.send(Fed::Closed { connection, error }).await;
        }
    }

    /// # Errors
    /// `Invalid` for a topic that is none, or of a pod that does not fit; `Busy` when there are too many.
    async fn feed(&mut self, topic: &Bytes) -> Result<mpsc::Sender<Fed>> {
        if let Some(feed) = self.feeds.get(topic) {
            return Ok(feed.clone());
        }
        if self.feeds.len() >= TOPICS_PER_CONNECTION_MAX {
            let context =
                format!("one connection speaks for {TOPICS_PER_CONNECTION_MAX} pods already");
            return Err(Error::new(ErrorKind::Busy, context));
        }
        let kind = parse_source_kind(&self.hub.listeners[self.place].kind)?;
        let parsed = Topic::parse(topic, kind)?;
        let (pod, is_new) = self.hub.join_bound(&parsed, self.place).await?;
        let feed = pod
            .sources
            .get(self.place)
            .and_then(|source| source.feed.clone());
        if is_new {
            // The listener lives as long as this task.
            let _ = self.joined.send(pod).await;
        }
        let feed = feed.ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!("pod {} has no such source", parsed.pod),
            )
        })?;
        self.feeds.insert(topic.clone(), feed.clone());
        Ok(feed)
    }
}
