//! Takes up what a peer or the own disk has, before lookups are answered.
//!
//! Nothing of a snapshot is believed before the source's publisher has been asked whether it is still the one of then,
//! and has told what came later. What cannot be verified in time is dropped.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_proto::v1::index_client::IndexClient;
use kvfabric_proto::{PROTOCOL_VERSION, v1};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::transport::Endpoint;

use super::hub::{Hub, Origin, Pod, PodSource, Restored, introduce};
use crate::index::{self, KvIndex, Learnt};
use crate::snapshot::{FORMAT, FileReader, Mark, Reader, Step};
use crate::source::Progress;
use crate::wire::{MESSAGE_BYTES_MAX, Registration};

/// How long a peer may take to accept a connection, and to send the next piece.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const PIECE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pieces that wait to be taken up.
const PIECES_QUEUED_MAX: usize = 4;

/// Takes up a snapshot if there is one, joins the configured pods, and answers lookups as soon as every source is
/// verified and caught up, or dropped. Completes when no pod is left that only the snapshot told of.
pub(super) async fn bootstrap(hub: Arc<Hub>, configured: Vec<Registration>) {
    let verify_by = Instant::now() + hub.config.bootstrap_deadline();
    // Registrations wait: a pod that registers then finds what the snapshot says of it.
    let joining = hub.joining.lock().await;
    load(&hub, &configured, verify_by).await;
    if let Err(error) = hub.join_configured(&configured) {
        tracing::error!(%error, "pods of the configuration");
    }
    drop(joining);
    let pods: Vec<_> = hub.pods().values().cloned().collect();
    settle(&hub, &pods, verify_by).await;
    tracing::info!(pods = pods.len(), "lookups are answered");
    hub.not_serving.send_replace(None);
    let adopted = pods.iter().filter(|pod| pod.origin() == Origin::Adopted);
    join_all(adopted.map(|pod| watch_given_up(&hub, pod, Origin::Adopted))).await;
}

/// The first peer that has a snapshot, else the own disk, else nothing.
async fn load(hub: &Arc<Hub>, configured: &[Registration], verify_by: Instant) {
    for peer in &hub.config.bootstrap_peers {
        match timeout_at(verify_by, load_from_peer(hub, configured, peer, verify_by)).await {
            Ok(Ok(sources)) => {
                tracing::info!(peer, sources, "took up a peer's snapshot");
                hub.metrics.bootstrapped(sources);
                return;
            }
            Ok(Err(error)) => tracing::warn!(peer, %error, "no snapshot from this peer"),
            Err(_) => tracing::warn!(peer, "no snapshot from this peer in time"),
        }
    }
    let Some(path) = hub.config.snapshot_path.clone() else {
        return;
    };
    let taken = match FileReader::open(&path) {
        Ok(Some(mut file)) => {
            let next = move || file.next().map(Some);
            take_up(hub.clone(), configured.to_vec(), verify_by, next).await
        }
        Ok(None) => return,
        Err(error) => Err(error),
    };
    match taken {
        Ok(sources) => {
            tracing::info!(path = %path.display(), sources, "took up the snapshot on disk");
            hub.metrics.bootstrapped(sources);
        }
        Err(error) => tracing::error!(%error, "the snapshot on disk is of no use"),
    }
}

async fn load_from_peer(
    hub: &Arc<Hub>,
    configured: &[Registration],
    peer: &str,
    verify_by: Instant,
) -> Result<u64> {
    let lost = |error: tonic::Status| Error::new(ErrorKind::PeerLost, error.message().to_owned());
    let channel = Endpoint::from_shared(format!("http://{peer}"))
        .map_err(|error| Error::new(ErrorKind::Invalid, "bootstrap_peers").with_source(error))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .connect()
        .await
        .map_err(|error| Error::new(ErrorKind::PeerLost, "connect").with_source(error))?;
    let request = v1::SnapshotRequest {
        protocol_version: PROTOCOL_VERSION,
        format: FORMAT,
    };
    let mut client = IndexClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let mut stream = client.snapshot(request).await.map_err(lost)?.into_inner();
    let (pieces, mut received) = mpsc::channel(PIECES_QUEUED_MAX);
    let receive = async move {
        loop {
            let piece = match timeout(PIECE_TIMEOUT, stream.message()).await {
                Ok(Ok(Some(piece))) => Ok(Some(piece)),
                Ok(Ok(None)) => Ok(None),
                Ok(Err(status)) => Err(lost(status)),
                Err(_) => Err(Error::new(
                    ErrorKind::Timeout,
                    "the peer has stopped sending",
                )),
            };
            let is_last = !matches!(piece, Ok(Some(_)));
            // The other side ends early when it has an error, which is then what counts.
            if pieces.send(piece).await.is_err() || is_last {
                return;
            }
        }
    };
    let next = move || received.blocking_recv().unwrap_or(Ok(None));
    let taken = take_up(hub.clone(), configured.to_vec(), verify_by, next);
    let ((), taken) = tokio::join!(receive, taken);
    taken
}

/// Takes up all pieces that `next` gives, or nothing; returns how many sources go on from there.
///
/// # Errors
/// What `next` fails with; `Corrupt` or `Version` for pieces that are none; `Invalid` when the snapshot is of an indexer
/// with other settings.
async fn take_up(
    hub: Arc<Hub>,
    configured: Vec<Registration>,
    verify_by: Instant,
    mut next: impl FnMut() -> Result<Option<v1::SnapshotPiece>> + Send + 'static,
) -> Result<u64> {
    let taking = {
        let hub = hub.clone();
        tokio::task::spawn_blocking(move || {
            let mut taking = Taking::new(&hub, &configured, verify_by);
            let taken = taking.take(&mut next);
            (taken, taking.pods, taking.resumed)
        })
    };
    let (taken, pods, resumed) = taking.await.map_err(|error| {
        Error::new(ErrorKind::Internal, "take up a snapshot").with_source(error)
    })?;
    match taken {
        Ok(()) => Ok(resumed),
        Err(error) => {
            // A part is worth nothing: what is missing would look as if nobody held it.
            for pod in &pods {
                hub.remove(pod).await;
            }
            Err(error)
        }
    }
}

/// A pod whose sources come in.
struct Coming {
    registration: Registration,
    origin: Origin,
    index: Arc<KvIndex>,
    /// By position in the registration; none until it came.
    sources: Vec<Option<Restored>>,
    /// The source whose image comes.
    current: Option<usize>,
}

/// A snapshot that is being taken up.
struct Taking<'a> {
    hub: &'a Arc<Hub>,
    configured: &'a [Registration],
    verify_by: Instant,
    coming: Option<Coming>,
    shared: Option<Arc<KvIndex>>,
    pods: Vec<Arc<Pod>>,
    resumed: u64,
}

impl<'a> Taking<'a> {
    fn new(hub: &'a Arc<Hub>, configured: &'a [Registration], verify_by: Instant) -> Self {
        Self {
            hub,
            configured,
            verify_by,
            coming: None,
            shared: None,
            pods: Vec::new(),
            resumed: 0,
        }
    }

    fn take(&mut self, next: &mut dyn FnMut() -> Result<Option<v1::SnapshotPiece>>) -> Result<()> {
        let mut reader = Reader::default();
        let taken = self.take_all(&mut reader, next);
        if taken.is_err() {
            self.drop_coming();
        }
        taken
    }

    fn take_all(
        &mut self,
        reader: &mut Reader,
        next: &mut dyn FnMut() -> Result<Option<v1::SnapshotPiece>>,
    ) -> Result<()> {
        while !reader.is_complete() {
            let piece = next()?.ok_or_else(|| {
                Error::new(
                    ErrorKind::Corrupt,
                    "the snapshot ends before its last piece",
                )
            })?;
            match reader.read(piece)? {
                Step::Start {
                    key_scheme,
                    block_size,
                } => self.check_settings(&key_scheme, block_size)?,
                Step::Pod {
                    registration,
                    is_configured,
                } => {
                    self.finish_pod();
                    self.begin_pod(registration, is_configured);
                }
                Step::Source {
                    name,
                    mark,
                    group,
                    learnt,
                } => self.begin_source(&name, mark, (group, &learnt)),
                Step::Image(image) => self.import(&image),
                Step::Shared { tenant, model } => {
                    self.finish_pod();
                    self.shared = self.shared_index(&tenant, &model)?;
                }
                Step::SharedImage(entries) => {
                    if let Some(index) = &self.shared {
                        index.import_shared(&entries)?;
                    }
                }
                Step::End => self.finish_pod(),
            }
        }
        Ok(())
    }

    /// Where what a tenant's shared tiers hold goes; nowhere when the tenant is configured no more.
    fn shared_index(&self, tenant: &str, model: &str) -> Result<Option<Arc<KvIndex>>> {
        let place = if tenant.is_empty() {
            Some(0)
        } else {
            self.hub.tenants.by_name(tenant)
        };
        match place {
            Some(place) => self.hub.index_of(place, model).map(Some),
            None => {
                tracing::warn!(tenant, model, "a tenant of the snapshot is not configured");
                Ok(None)
            }
        }
    }

    fn check_settings(&self, key_scheme: &str, block_size: u32) -> Result<()> {
        let ours = (self.hub.scheme_name(), self.hub.config.block_size);
        if (key_scheme, block_size) == (ours.0.as_str(), ours.1) {
            return Ok(());
        }
        let context = format!(
            "the snapshot has keys {key_scheme:?} and blocks of {block_size} tokens, the indexer {:?} and {}",
            ours.0, ours.1
        );
        Err(Error::new(ErrorKind::Invalid, context))
    }

    /// A pod that does not fit here is left out, with its sources.
    fn begin_pod(&mut self, registration: Registration, is_configured: bool) {
        let ours = self
            .configured
            .iter()
            .find(|ours| ours.pod == registration.pod);
        let origin = match ours {
            Some(ours) if *ours == registration => Origin::Configured,
            Some(_) => {
                tracing::info!(pod = %registration.pod, "configured otherwise than in the snapshot");
                return;
            }
            // A configuration without it has dropped it.
            None if is_configured && !self.hub.config.sources.is_empty() => return,
            None => Origin::Adopted,
        };
        let index = self
            .hub
            .check(&registration)
            .and_then(|()| self.hub.check_room())
            .and_then(|()| self.hub.index_for_pod(&registration));
        match index {
            Ok(index) => {
                let sources = registration.sources.iter().map(|_| None).collect();
                self.coming = Some(Coming {
                    registration,
                    origin,
                    index,
                    sources,
                    current: None,
                });
            }
            Err(error) => tracing::warn!(%error, "a pod of the snapshot does not fit"),
        }
    }

    fn begin_source(
        &mut self,
        name: &str,
        mark: Option<Mark>,
        (group, learnt): (Option<u32>, &Learnt),
    ) {
        let verify_by = self.verify_by;
        let Some(coming) = &mut self.coming else {
            return;
        };
        coming.current = None;
        let sources = &coming.registration.sources;
        let Some(place) = sources.iter().position(|source| source.name == name) else {
            return;
        };
        let added = coming.index.add_source(index::SourceSpec {
            pod: coming.registration.pod.clone(),
            name: name.to_owned(),
            kind: sources[place].kind,
            block_size: coming.registration.block_size,
        });
        match added {
            Ok(id) => {
                let spec = &sources[place];
                let introduced = introduce(&coming.index, id, &coming.registration, spec);
                if let Err(error) = introduced {
                    tracing::warn!(%error, "a source of the snapshot does not fit");
                }
                // Only engines with several cache groups have one, and only they keep it.
                let followed = coming.index.follow_group(id, group);
                let followed = followed.and_then(|()| coming.index.take_learnt(id, learnt));
                let media = learnt.media.iter();
                let media = media.filter_map(|medium| self.hub.media.weight_of(medium));
                let followed = followed.and_then(|()| {
                    let mut media = media;
                    media.try_for_each(|named| coming.index.weigh_medium(id, &named))
                });
                if let Err(error) = &followed {
                    tracing::warn!(%error, "a source of the snapshot does not fit");
                }
                let mark = mark.filter(|_| followed.is_ok());
                coming.sources[place] = Some(Restored {
                    id,
                    mark,
                    verify_by,
                });
                coming.current = Some(place);
            }
            Err(error) => tracing::warn!(%error, "a source of the snapshot does not fit"),
        }
    }

    /// An image that contradicts itself costs its source, which then begins anew.
    fn import(&mut self, image: &index::ImagePiece) {
        let Some(coming) = &mut self.coming else {
            return;
        };
        let current = coming
            .current
            .and_then(|place| coming.sources[place].as_mut());
        let Some(restored) = current.filter(|restored| restored.mark.is_some()) else {
            return;
        };
        if let Err(error) = coming.index.import(restored.id, image) {
            let pod = &coming.registration.pod;
            tracing::warn!(%pod, %error, "an image of the snapshot contradicts itself");
            coming.index.clear_source(restored.id);
            restored.mark = None;
        }
    }

    /// Starts to follow the pod's sources.
    fn finish_pod(&mut self) {
        let Some(coming) = self.coming.take() else {
            return;
        };
        let specs = coming.registration.sources.iter().zip(coming.sources);
        let sources: Result<Vec<PodSource>> = specs
            .map(|(spec, restored)| match restored {
                Some(restored) => {
                    self.resumed += u64::from(restored.mark.is_some());
                    let hub = &self.hub;
                    Ok(hub.follow(&coming.registration, spec, &coming.index, &restored))
                }
                None => self
                    .hub
                    .follow_new(&coming.registration, spec, &coming.index),
            })
            .collect();
        match sources {
            Ok(sources) => {
                let pod = self
                    .hub
                    .insert(&coming.registration, coming.origin, sources);
                self.pods.push(pod);
            }
            Err(error) => {
                tracing::warn!(%error, "a pod of the snapshot does not fit");
                coming.index.remove_pod(&coming.registration.pod);
            }
        }
    }

    fn drop_coming(&mut self) {
        if let Some(coming) = self.coming.take() {
            coming.index.remove_pod(&coming.registration.pod);
        }
    }
}

/// Waits until each source has all that its publisher has, at most until the deadline; then until nothing unverified is
/// left, which every source's own task sees to.
async fn settle(hub: &Hub, pods: &[Arc<Pod>], verify_by: Instant) {
    let sources: usize = pods.iter().map(|pod| pod.sources.len()).sum();
    let mut settled = 0;
    for pod in pods {
        for source in &pod.sources {
            let reason = format!("{settled} of {sources} sources are verified and caught up");
            hub.not_serving.send_replace(Some(reason));
            let synced = reach(pod, source, |progress| progress.is_synced);
            if timeout_at(verify_by, synced).await.is_err() {
                tracing::warn!(source = %source.name, "not verified in time");
                reach(pod, source, |progress| !progress.is_unverified).await;
            }
            settled += 1;
        }
    }
}

/// Waits until the source is so, or its pod is no longer known.
async fn reach(pod: &Pod, source: &PodSource, is_so: impl FnMut(&Progress) -> bool) {
    let mut progress = source.state.subscribe();
    let mut ended = pod.ended.subscribe();
    tokio::select! {
        _ = progress.wait_for(is_so) => {}
        _ = ended.wait_for(|ended| *ended) => {}
    }
}

/// Lets a pod go when all its sources are given up, as long as it is of this origin: no registration's end will tell.
pub(super) async fn watch_given_up(hub: &Hub, pod: &Arc<Pod>, origin: Origin) {
    loop {
        for source in &pod.sources {
            reach(pod, source, |progress| progress.is_given_up).await;
        }
        if *pod.ended.borrow() || pod.origin() != origin {
            return;
        }
        let is_gone = |source: &PodSource| source.state.progress().is_given_up;
        if pod.sources.iter().all(is_gone) {
            tracing::info!(pod = %pod.name, "all sources of the pod are gone");
            hub.leave(pod).await;
            return;
        }
    }
}
