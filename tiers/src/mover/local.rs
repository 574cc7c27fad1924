//! Copies within this node: between memories, and between memory and disk.

use kvcache_core::manager::MoveFailure;
use kvcache_core::place::DiskSlot;
use kvcache_core::{ErrorKind, Result};
use kvfabric_transfer::Operation;

use super::transport::{Part, Unsettled, transfer_each};
use super::{Job, Memory, Moved, Mover};
use crate::disk::{PAGE_BYTES, SegmentFiles};
use crate::pages;
use crate::record::RecordHeader;

impl Mover {
    pub(super) async fn memory_to_memory(
        &self,
        job: &Job,
        from: &[Memory],
        to: &[Memory],
        unsettled: &mut Unsettled,
    ) -> Result<Vec<Moved>> {
        self.begin_fill(to)?;
        let parts = from
            .iter()
            .zip(to)
            .map(|(from, to)| {
                let mut part = Vec::new();
                pages::pair(&self.block(from), &self.block(to), &mut part);
                part
            })
            .collect();
        let copied = transfer_each(
            &self.agent,
            Operation::Write,
            parts,
            job.deadline,
            unsettled,
        )
        .await;
        let sums = self.sum_each(job, to, &came(&copied)).await;
        let mut results = Vec::with_capacity(copied.len());
        for (position, copied) in copied.into_iter().enumerate() {
            let place = || match &from[position] {
                Memory::Engine(_) => String::from("the engine's memory"),
                Memory::Host(_) => String::from("host memory"),
            };
            results.push(match copied {
                Ok(()) => self.verify(&job.moves[position], sums[position], place),
                Err((failure, _)) => {
                    Err(self.blame(&to[position], self.blame(&from[position], failure)))
                }
            });
        }
        Ok(results)
    }

    pub(super) async fn disk_to_memory(
        &self,
        job: &Job,
        from: &[DiskSlot],
        to: &[Memory],
        unsettled: &mut Unsettled,
    ) -> Result<Vec<Moved>> {
        let disk = self.disk()?;
        self.begin_fill(to)?;
        let parts: Result<Vec<Part>> = from
            .iter()
            .zip(to)
            .map(|(from, to)| {
                let mut part = Vec::new();
                self.pair(to, disk.payload(*from)?, &mut part);
                Ok(part)
            })
            .collect();
        let copied = transfer_each(
            &self.agent,
            Operation::Read,
            parts?,
            job.deadline,
            unsettled,
        )
        .await;
        let sums = self.sum_each(job, to, &came(&copied)).await;
        let mut results = Vec::with_capacity(copied.len());
        for (position, copied) in copied.into_iter().enumerate() {
            let one = &job.moves[position];
            let place = || disk.place(from[position]);
            results.push(match copied {
                Ok(()) => self.verify(one, sums[position], place),
                Err((failure, error)) => {
                    let failure = self.blame(&to[position], failure);
                    if failure.settled && speaks_of_source(failure.kind) {
                        let kind = failure.kind.to_string();
                        let text = error.map_or(kind, |error| error.to_string());
                        Err(self.corrupt(one, &place(), text))
                    } else {
                        Err(failure)
                    }
                }
            });
        }
        Ok(results)
    }

    pub(super) async fn memory_to_disk(
        &self,
        job: &Job,
        from: &[Memory],
        to: &[DiskSlot],
        unsettled: &mut Unsettled,
    ) -> Result<Vec<Moved>> {
        let disk = self.disk()?;
        let headers = self.pages.take(job.moves.len(), job.deadline).await?;
        let mut parts = Vec::with_capacity(job.moves.len());
        let mut checksums = Vec::with_capacity(job.moves.len());
        for (position, one) in job.moves.iter().enumerate() {
            let checksum = one.checksum.map_or_else(|| self.sum(&from[position]), Ok)?;
            let (header, payload) = match disk.record(to[position]).await {
                Ok(record) => record,
                // A new segment that does not fit is no reason to leave room in the last one.
                Err(error) => {
                    let place = disk.place(to[position]);
                    tracing::debug!(%error, place, "no record to write");
                    checksums.push(Err(MoveFailure::settled(error.kind())));
                    continue;
                }
            };
            headers.write(position, &self.header(one, checksum).encode())?;
            // A crash between the two leaves a header whose bytes do not match it: found on reading.
            let mut part = Vec::new();
            self.pair(&from[position], payload, &mut part);
            part.push((headers.descriptor(position, PAGE_BYTES), header));
            parts.push(part);
            checksums.push(Ok(checksum));
        }
        let copied = transfer_each(
            &self.agent,
            Operation::Write,
            parts,
            job.deadline,
            unsettled,
        )
        .await;
        unsettled.hold(headers);
        let mut copied = copied.into_iter();
        let mut written = || match copied.next() {
            Some(Err((failure, error))) => {
                if let Some(error) = error {
                    tracing::debug!(%error, "block not written to disk");
                }
                Err(failure)
            }
            _ => Ok(()),
        };
        Ok(checksums
            .into_iter()
            .map(|checksum| checksum.and_then(|sum| written().map(|()| sum)))
            .collect())
    }

    pub(super) fn header(
        &self,
        one: &kvcache_core::manager::Move,
        checksum: kvcache_core::Checksum,
    ) -> RecordHeader {
        RecordHeader {
            model_identity: self.expected.model_identity,
            info: one.info,
            payload_bytes: self.expected.block_bytes,
            checksum,
        }
    }

    pub(super) fn disk(&self) -> Result<&SegmentFiles> {
        self.disk.as_ref().ok_or_else(|| {
            kvcache_core::Error::new(ErrorKind::Internal, "a disk command without a disk tier")
        })
    }
}

/// Which copies have come.
fn came<E>(copied: &[std::result::Result<(), E>]) -> Vec<bool> {
    copied.iter().map(std::result::Result::is_ok).collect()
}

/// Whether a failed read says that the bytes cannot be had from there, now or later: a file that
/// became shorter, a sector that cannot be read.
pub(super) fn speaks_of_source(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::Io | ErrorKind::Invalid | ErrorKind::Corrupt | ErrorKind::NotFound
    )
}

/// A failure of everything in a command for one reason.
pub(super) fn all_failed(count: usize, failure: MoveFailure) -> Vec<Moved> {
    vec![Err(failure); count]
}
