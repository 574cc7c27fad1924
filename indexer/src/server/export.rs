//! Snapshots of what this server knows: to whoever asks, and to its own disk.

use std::path::Path;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_proto::v1::snapshot_piece::Piece;
use kvfabric_proto::{PROTOCOL_VERSION, v1};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tonic::Status;

use super::hub::{Hub, Origin, Pod, PodSource};
use super::native::Shared;
use crate::index::{Learnt, SourceImage};
use crate::snapshot::{
    self, FORMAT, FORMAT_OF_PARTS, Mark, image_to_wire, shared_to_wire, source_to_wire,
};
use crate::wire::{SourceSpec, registration_to_wire, status_from_error};

/// Snapshots that are sent at once; further ones are refused as busy.
pub(super) const SNAPSHOTS_MAX: usize = 2;
/// Pieces that wait for the reader; each holds at most 4,096 blocks.
const PIECES_QUEUED_MAX: usize = 4;

type Emit<'a> = &'a mut dyn FnMut(v1::SnapshotPiece) -> Result<()>;

fn emit(emit: Emit<'_>, piece: Piece) -> Result<()> {
    emit(v1::SnapshotPiece { piece: Some(piece) })
}

impl Hub {
    /// Gives everything a new replica needs to `out`, source by source: only one image is in memory at a time.
    ///
    /// In an older format than the newest those parts are left out that it cannot say. A source's own task waits while its
    /// image is taken. Must not be called from an asynchronous task.
    ///
    /// # Errors
    /// What `out` fails with.
    pub(super) fn export(&self, format: u32, out: Emit<'_>) -> Result<()> {
        let mut counts = v1::SnapshotEnd::default();
        let start = v1::SnapshotStart {
            format,
            key_scheme: self.scheme_name(),
            block_size: self.config.block_size,
        };
        emit(out, Piece::Start(start))?;
        let pods: Vec<_> = self.pods().values().cloned().collect();
        // Who takes the snapshot up could not ask a publisher that connects by itself; that will connect there, too.
        for pod in pods.iter().filter(|pod| pod.origin() != Origin::Bound) {
            let registration = registration_to_wire(&pod.registration);
            let opened = v1::SnapshotPod {
                registration: Some(registration),
                configured: pod.origin() == Origin::Configured,
            };
            emit(out, Piece::Pod(opened))?;
            counts.pods += 1;
            for (source, spec) in pod.sources.iter().zip(&pod.registration.sources) {
                counts.sources += 1;
                counts.blocks += self.export_source((pod, source, spec), format, out)?;
            }
        }
        // After the sources: what they announce from here on is replayed, what they announced before is in there.
        let tenants: Vec<_> = self.models().clone();
        let tenants = self.tenants.all().iter().zip(tenants);
        let models = tenants.flat_map(|(tenant, models)| {
            let of_tenant = models.into_iter();
            of_tenant.map(move |(model, index)| (tenant.name_in_snapshots(), model, index))
        });
        for (tenant, model, index) in models {
            counts.models += 1;
            emit(out, Piece::Shared(v1::SnapshotShared { model, tenant }))?;
            for piece in index.export_shared() {
                let image = shared_to_wire(&piece);
                counts.blocks += image.hashes.len() as u64;
                emit(out, Piece::Image(image))?;
            }
        }
        emit(out, Piece::End(counts))
    }

    /// One source at one moment between two batches; returns how many blocks it has.
    fn export_source(
        &self,
        (pod, source, spec): (&Pod, &PodSource, &SourceSpec),
        format: u32,
        out: Emit<'_>,
    ) -> Result<u64> {
        let (mark, image) = self.image_of(pod, source, spec, format).unzip();
        let group = image.as_ref().and_then(|image: &SourceImage| image.group);
        let learnt = image.as_ref().filter(|_| format > 1);
        let learnt = learnt.map_or_else(Learnt::default, |image| image.learnt.clone());
        emit(out, source_to_wire(&spec.name, mark, group, &learnt))?;
        let mut blocks = 0;
        for piece in image.iter().flat_map(|image| &image.pieces) {
            blocks += piece.len() as u64;
            emit(out, Piece::Image(image_to_wire(piece, spec.kind)))?;
        }
        Ok(blocks)
    }

    /// None when the source could not be continued: nothing applied, part of it missing, nobody to ask, or a pod that is more
    /// than one prefix cache, or blocks smaller than the index's, where the format cannot say so.
    fn image_of(
        &self,
        pod: &Pod,
        source: &PodSource,
        spec: &SourceSpec,
        format: u32,
    ) -> Option<(Mark, SourceImage)> {
        spec.replay_endpoint.as_ref()?;
        let index = self.index_of_pod(&pod.registration)?;
        let cursor = source.state.cursor.blocking_lock();
        let mark = cursor.mark.filter(|_| cursor.is_whole)?;
        if format == 1 && !index.is_plain(&pod.name) {
            // It does not say of which rank or with which groups a source is.
            return None;
        }
        // The pod may have left meanwhile.
        let image = index.export(source.id).ok()?;
        drop(cursor);
        let has_parts = image.pieces.iter().any(|piece| !piece.parts.is_empty());
        let is_told = format >= FORMAT_OF_PARTS || !has_parts;
        is_told.then_some((mark, image))
    }

    /// Writes a snapshot to disk.
    ///
    /// # Errors
    /// `Io` naming the file.
    async fn save(self: &Arc<Self>, path: &Path) -> Result<u64> {
        let (hub, path) = (self.clone(), path.to_owned());
        let saved = tokio::task::spawn_blocking(move || {
            snapshot::write(&path, |out| hub.export(FORMAT, out))
        });
        let saved = saved.await.map_err(|error| {
            Error::new(ErrorKind::Internal, "write a snapshot").with_source(error)
        });
        let saved = saved.and_then(|saved| saved);
        self.metrics.snapshot_saved(saved.as_ref().ok().copied());
        saved
    }
}

impl Shared {
    /// Starts to send a snapshot.
    ///
    /// # Errors
    /// `Version` naming both versions; `PeerLost` while this server has none to give; `Busy` when enough are under way.
    pub(super) fn send_snapshot(
        &self,
        request: &v1::SnapshotRequest,
    ) -> Result<mpsc::Receiver<Result<v1::SnapshotPiece, Status>>> {
        if request.protocol_version != PROTOCOL_VERSION {
            let context = format!(
                "the request speaks protocol version {}, the indexer {PROTOCOL_VERSION}",
                request.protocol_version
            );
            return Err(Error::new(ErrorKind::Version, context));
        }
        if let Some(reason) = &*self.hub.not_serving.borrow() {
            let context = format!("the indexer has no snapshot to give yet: {reason}");
            return Err(Error::new(ErrorKind::PeerLost, context));
        }
        let room = self.snapshots.clone().try_acquire_owned().map_err(|_| {
            let context = format!("{SNAPSHOTS_MAX} snapshots are being sent");
            Error::new(ErrorKind::Busy, context)
        })?;
        let format = request.format.clamp(1, FORMAT);
        let (pieces, stream) = mpsc::channel(PIECES_QUEUED_MAX);
        let hub = self.hub.clone();
        let runtime = Handle::current();
        let patience = hub.config.reader_timeout();
        tokio::task::spawn_blocking(move || {
            let _room = room;
            let sent = hub.export(format, &mut |piece| {
                let sent = runtime.block_on(timeout(patience, pieces.send(Ok(piece))));
                match sent {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(_)) => Err(Error::new(ErrorKind::Cancelled, "the reader is gone")),
                    Err(_) => Err(Error::new(ErrorKind::Timeout, "the reader has stopped")),
                }
            });
            if let Err(error) = sent {
                tracing::info!(%error, "snapshot not sent to its end");
                // Full when the reader has stopped: it learns of the end by the end.
                let _ = pieces.try_send(Err(status_from_error(&error)));
            }
        });
        Ok(stream)
    }
}

/// Writes snapshots as often as configured while lookups are answered, and a last one when the server stops.
pub(super) async fn keep_saved(hub: Arc<Hub>, mut stopping: watch::Receiver<bool>) {
    let Some(path) = hub.config.snapshot_path.clone() else {
        return;
    };
    let interval = hub.config.snapshot_interval();
    loop {
        let is_stopping = timeout(interval, stopping.wait_for(|stopping| *stopping))
            .await
            .is_ok();
        // What is not verified yet would be worth less than what the file has.
        if hub.not_serving.borrow().is_none() {
            match hub.save(&path).await {
                Ok(bytes) => tracing::debug!(path = %path.display(), bytes, "snapshot written"),
                Err(error) => tracing::error!(%error, "snapshot not written; the old one stays"),
            }
        }
        if is_stopping {
            return;
        }
    }
}
