//! What one indexer knows, in a form that another can go on with: for the gRPC call `Snapshot` and for files.
//!
//! A snapshot is a row of pieces ([`v1::SnapshotPiece`]): for each source its registration, how far it is applied, by
//! what its publisher is recognised, and an image of what it holds, all as of one moment between two batches. Whoever
//! takes it up asks the publisher whether it is still the one of then, and for what came later; so a snapshot may be
//! old, but what is believed of it never is.
//!
//! Pieces come from another process or a disk: [`Reader`] turns them into checked [`Step`]s or an error that names the
//! piece.

mod file;
mod image;

#[cfg(test)]
mod noise;
#[cfg(test)]
mod tests;

use kvcache_core::ports::Position;
use kvcache_core::{Epoch, Error, ErrorKind, IndexKey, Result, Sequence, Tier};
use kvfabric_proto::v1;
use kvfabric_proto::v1::snapshot_piece::Piece;

use crate::adapter::{NAME_BYTES_MAX, WEIGHED_MEDIA_MAX};
use crate::index::{ImagePiece, Learnt};
use crate::ingest::BatchDigest;
use crate::wire::{self, Registration};

pub(crate) use file::{FileReader, check_replaceable, write};
pub(crate) use image::{image_to_wire, shared_to_wire};

/// The version of the format that is written.
///
/// 2 says of each source what its events have told of it, so that those of several ranks, cache groups or block sizes have
/// images, too. 3 has the blocks of engines that are smaller than the index's.
pub(crate) const FORMAT: u32 = wire::SNAPSHOT_FORMAT;
/// The first version that has blocks smaller than the index's.
pub(crate) const FORMAT_OF_PARTS: u32 = 3;
/// The versions that are read.
const FORMATS_READ: std::ops::RangeInclusive<u32> = 1..=FORMAT;
/// The most pods that are taken from a snapshot.
const PODS_MAX: u32 = 1 << 20;

/// How far a source is applied, and by what its publisher is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) position: Position,
    /// The batch before the position.
    pub(crate) digest: BatchDigest,
}

/// One checked piece of a snapshot.
#[derive(Debug)]
pub(crate) enum Step {
    /// The settings of the indexer that it is of.
    Start { key_scheme: String, block_size: u32 },
    /// The next pod.
    Pod {
        registration: Registration,
        is_configured: bool,
    },
    /// The last pod's next source; no mark when it cannot be continued.
    Source {
        name: String,
        mark: Option<Mark>,
        group: Option<u32>,
        learnt: Learnt,
    },
    /// More of the last source.
    Image(ImagePiece),
    /// What shared tiers hold of a model comes next.
    Shared { tenant: String, model: String },
    /// More of that.
    SharedImage(Vec<(IndexKey, Tier)>),
    /// Nothing is missing.
    End,
}

/// What may come next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Before,
    Started,
    InPod,
    InSource,
    InShared,
    Ended,
}

/// Checks the pieces of one snapshot in their order.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    place: Place,
    /// The kind of each source of the last pod, until that source came.
    awaited: Vec<(String, wire::SourceKind)>,
    kind: Option<wire::SourceKind>,
    tokens_per_block: u32,
    pieces: u64,
    counts: v1::SnapshotEnd,
}

impl Reader {
    /// Whether the snapshot is complete.
    pub(crate) fn is_complete(&self) -> bool {
        self.place == Place::Ended
    }

    /// The next piece, checked.
    ///
    /// # Errors
    /// `Corrupt` naming the piece by its number and what is wrong with it; `Version` naming the versions.
    pub(crate) fn read(&mut self, piece: v1::SnapshotPiece) -> Result<Step> {
        let number = self.pieces;
        self.pieces += 1;
        self.check(piece)
            .map_err(|error| error.at(format_args!("piece {number} of the snapshot")))
    }

    fn check(&mut self, piece: v1::SnapshotPiece) -> Result<Step> {
        let piece = piece
            .piece
            .ok_or_else(|| corrupt("it is of no known kind"))?;
        match (piece, self.place) {
            (Piece::Start(start), Place::Before) => self.start(start),
            (Piece::Pod(pod), Place::Started | Place::InPod | Place::InSource) => self.pod(pod),
            (Piece::Source(source), Place::InPod | Place::InSource) => self.source(source),
            (Piece::Image(image), Place::InSource) => {
                let kind = self
                    .kind
                    .ok_or_else(|| corrupt("an image of a source that cannot be continued"))?;
                let image = image::image_from_wire(image, kind, self.tokens_per_block)?;
                self.counts.blocks += image.len() as u64;
                Ok(Step::Image(image))
            }
            (
                Piece::Shared(shared),
                Place::Started | Place::InPod | Place::InSource | Place::InShared,
            ) => {
                self.place = Place::InShared;
                self.counts.models += 1;
                Ok(Step::Shared {
                    tenant: shared.tenant,
                    model: shared.model,
                })
            }
            (Piece::Image(image), Place::InShared) => {
                let entries = image::shared_from_wire(&image)?;
                self.counts.blocks += image.hashes.len() as u64;
                Ok(Step::SharedImage(entries))
            }
            (
                Piece::End(end),
                Place::Started | Place::InPod | Place::InSource | Place::InShared,
            ) => {
                if end != self.counts {
                    return Err(corrupt(format!(
                        "its end counts {end:?}, but {:?} came",
                        self.counts
                    )));
                }
                self.place = Place::Ended;
                Ok(Step::End)
            }
            (_, place) => Err(corrupt(format!("it cannot come now ({place:?})"))),
        }
    }

    fn start(&mut self, start: v1::SnapshotStart) -> Result<Step> {
        if !FORMATS_READ.contains(&start.format) {
            let context = format!(
                "snapshot of format {}, formats {} to {} are read",
                start.format,
                FORMATS_READ.start(),
                FORMATS_READ.end()
            );
            return Err(Error::new(ErrorKind::Version, context));
        }
        self.place = Place::Started;
        self.tokens_per_block = start.block_size;
        Ok(Step::Start {
            key_scheme: start.key_scheme,
            block_size: start.block_size,
        })
    }

    fn pod(&mut self, pod: v1::SnapshotPod) -> Result<Step> {
        self.counts.pods += 1;
        if self.counts.pods > PODS_MAX {
            return Err(Error::invalid("pods", self.counts.pods, 0..=PODS_MAX));
        }
        let registration = pod
            .registration
            .ok_or_else(|| corrupt("a pod without registration"))?;
        let registration = wire::registration_from_wire(registration)?;
        self.awaited = registration
            .sources
            .iter()
            .map(|source| (source.name.clone(), source.kind))
            .collect();
        self.place = Place::InPod;
        Ok(Step::Pod {
            registration,
            is_configured: pod.configured,
        })
    }

    fn source(&mut self, source: v1::SnapshotSource) -> Result<Step> {
        self.counts.sources += 1;
        let place = self
            .awaited
            .iter()
            .position(|(name, _)| *name == source.name);
        let place = place.ok_or_else(|| {
            corrupt(format!(
                "source {:?} is not (or twice) in its pod",
                source.name
            ))
        })?;
        let (name, kind) = self.awaited.swap_remove(place);
        self.place = Place::InSource;
        let mark = if source.last_batch.is_empty() {
            None
        } else {
            Some(mark_from_wire(&source)?)
        };
        self.kind = mark.map(|_| kind);
        Ok(Step::Source {
            name,
            mark,
            group: source.group,
            learnt: Learnt {
                rank: source.data_parallel_rank,
                groups: source
                    .groups
                    .iter()
                    .map(wire::group_from_wire)
                    .collect::<Result<_>>()?,
                block_size: source.block_size,
                media: media_from_wire(source.media)?,
            },
        })
    }
}

fn media_from_wire(media: Vec<String>) -> Result<Vec<String>> {
    let longest = media.iter().map(String::len).max().unwrap_or(0);
    if media.len() > WEIGHED_MEDIA_MAX || longest > NAME_BYTES_MAX {
        return Err(corrupt(format!(
            "{} media, the longest name of {longest} bytes",
            media.len()
        )));
    }
    Ok(media)
}

fn mark_from_wire(source: &v1::SnapshotSource) -> Result<Mark> {
    let digest: [u8; 16] = source.last_batch.as_ref().try_into().map_err(|_| {
        corrupt(format!(
            "a digest of {} bytes, expected 16",
            source.last_batch.len()
        ))
    })?;
    if source.next_sequence == 0 {
        return Err(corrupt("a digest of a batch before the first"));
    }
    Ok(Mark {
        position: Position {
            epoch: Epoch(source.epoch),
            next: Sequence(source.next_sequence),
        },
        digest: BatchDigest(u128::from_le_bytes(digest)),
    })
}

/// The piece that opens a source.
pub(crate) fn source_to_wire(
    name: &str,
    mark: Option<Mark>,
    group: Option<u32>,
    learnt: &Learnt,
) -> Piece {
    let position = mark.map(|mark| mark.position);
    Piece::Source(v1::SnapshotSource {
        name: name.to_owned(),
        epoch: position.map_or(0, |at| at.epoch.0),
        next_sequence: position.map_or(0, |at| at.next.0),
        last_batch: mark.map_or_else(Default::default, |mark| {
            mark.digest.0.to_le_bytes().to_vec().into()
        }),
        group,
        data_parallel_rank: learnt.rank,
        groups: learnt.groups.iter().map(wire::group_to_wire).collect(),
        block_size: learnt.block_size,
        media: learnt.media.clone(),
    })
}

fn corrupt(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}
