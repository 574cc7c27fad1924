//! Copies to and from the object store: one object a block, which says itself what it is.

use std::sync::{Arc, PoisonError};

use futures_util::future::join_all;
use kvcache_core::manager::{Move, MoveFailure};
use kvcache_core::place::DiskSlot;
use kvcache_core::{BlockKey, Checksum, Error, ErrorKind, Result};
use kvfabric_transfer::{ObjectWrite, Operation, Region};

use super::local::speaks_of_source;
use super::transport::{Part, Unsettled, transfer};
use super::{Job, Memory, Moved, Mover, Objects};
use crate::pages::{self, BlockMemory};
use crate::record::{RECORD_HEADER_BYTES, RecordFault, RecordHeader};
use crate::scratch::{Buffers, Scratch};

const HEADER_BYTES: u64 = RECORD_HEADER_BYTES as u64;
/// The most damaged objects that are remembered; one that is forgotten is found again when it is read again.
const DOUBTED_MAX: usize = 4096;

impl Objects {
    /// The object of this key is not what it should be.
    fn doubt(&self, key: BlockKey) {
        let mut doubted = self.doubted.lock().unwrap_or_else(PoisonError::into_inner);
        if doubted.len() >= DOUBTED_MAX {
            doubted.pop_first();
        }
        doubted.insert(key);
    }

    /// Whether the object of this key is to be replaced.
    fn is_doubted(&self, key: &BlockKey) -> bool {
        let doubted = self.doubted.lock().unwrap_or_else(PoisonError::into_inner);
        doubted.contains(key)
    }

    /// The object of this key has been replaced.
    fn believe(&self, key: &BlockKey) {
        let mut doubted = self.doubted.lock().unwrap_or_else(PoisonError::into_inner);
        doubted.remove(key);
    }
}

impl Mover {
    pub(super) async fn memory_to_objects(
        &self,
        job: &Job,
        from: &[Memory],
        unsettled: &mut Unsettled,
    ) -> Result<Vec<Moved>> {
        let moved = job.moves.iter().zip(from).map(|(one, from)| async move {
            let mut unsettled = Unsettled::default();
            let checksum = one.checksum.map_or_else(|| self.sum(from), Ok);
            let result = match checksum {
                Ok(checksum) => {
                    let payload = self.block(from);
                    self.put(job, one, checksum, &payload, &mut unsettled).await
                }
                Err(error) => Err(MoveFailure::settled(error.kind())),
            };
            (result, unsettled)
        });
        Ok(gather(join_all(moved).await, unsettled))
    }

    /// Puts one object whose bytes are `payload`, in this agent's memory. One that is there already stays, because a key
    /// stands for its bytes, unless it was found damaged.
    async fn put(
        &self,
        job: &Job,
        one: &Move,
        checksum: Checksum,
        payload: &BlockMemory,
        unsettled: &mut Unsettled,
    ) -> Moved {
        let prepared = async {
            let objects = self.objects()?;
            let write = match objects.is_doubted(&one.info.key) {
                true => ObjectWrite::Replace,
                false => ObjectWrite::Keep,
            };
            let name = objects.names.name(&one.info.key);
            let object = self.agent.object_for(&objects.store_name, &name, write)?;
            let page = self.pages.take(1, job.deadline).await?;
            page.write(0, &self.header(one, checksum).encode())?;
            Ok::<_, Error>((objects, object, page))
        };
        let (objects, object, page) = match prepared.await {
            Ok(prepared) => prepared,
            Err(error) => return Err(MoveFailure::settled(error.kind())),
        };
        let pairs = pairs(&page, payload, &object);
        let put = transfer(&self.agent, Operation::Write, pairs, None, job.deadline).await;
        if put.is_ok() {
            objects.believe(&one.info.key);
        }
        let result = put.map(|()| checksum).map_err(|failed| {
            tracing::debug!(error = %failed.error, "block not put into the object store");
            unsettled.note(failed)
        });
        unsettled.hold(page);
        result
    }

    pub(super) async fn objects_to_memory(
        &self,
        job: &Job,
        to: &[Memory],
        unsettled: &mut Unsettled,
    ) -> Result<Vec<Moved>> {
        self.begin_fill(to)?;
        let moved = job.moves.iter().zip(to).map(|(one, to)| async move {
            let mut unsettled = Unsettled::default();
            let result = self.take_object(job, one, to, &mut unsettled).await;
            (result, unsettled)
        });
        Ok(gather(join_all(moved).await, unsettled))
    }

    async fn take_object(
        &self,
        job: &Job,
        one: &Move,
        to: &Memory,
        unsettled: &mut Unsettled,
    ) -> Moved {
        let prepared = async {
            let objects = self.objects()?;
            let name = objects.names.name(&one.info.key);
            let object = self.agent.object(&objects.store_name, &name)?;
            let page = self.pages.take(1, job.deadline).await?;
            Ok::<_, Error>((objects, object, name, page))
        };
        let (objects, object, name, page) = match prepared.await {
            Ok(prepared) => prepared,
            Err(error) => return Err(MoveFailure::settled(error.kind())),
        };
        let pairs = pairs(&page, &self.block(to), &object);
        let taken = transfer(&self.agent, Operation::Read, pairs, None, job.deadline).await;
        let result = match taken {
            Ok(()) => self.check_object((job, one), to, &name, &page).await,
            Err(failed) => {
                let text = failed.error.to_string();
                let failure = self.blame(to, unsettled.note(failed));
                if failure.settled && is_short(failure.kind) {
                    // An object too short for its block.
                    Err(self.corrupt(one, &name, text))
                } else {
                    if failure.kind != ErrorKind::NotFound {
                        tracing::debug!(error = text, "block not taken from the object store");
                    }
                    Err(failure)
                }
            }
        };
        if result.is_err_and(|failure| failure.kind == ErrorKind::Corrupt) {
            objects.doubt(one.info.key);
        }
        unsettled.hold(page);
        result
    }

    /// The header must name this block of this model; then the bytes must match the header.
    async fn check_object(
        &self,
        (job, one): (&Job, &Move),
        to: &Memory,
        name: &str,
        page: &Buffers,
    ) -> Moved {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        page.read(0, 0, &mut bytes)
            .map_err(|error| MoveFailure::settled(error.kind()))?;
        let header = RecordHeader::decode(&bytes).and_then(|header| {
            header.check(&self.expected)?;
            match header.info.key == one.info.key {
                true => Ok(header),
                false => Err(RecordFault::Key {
                    found: header.info.key,
                }),
            }
        });
        let header = header.map_err(|fault| self.corrupt(one, name, fault))?;
        let summed = self.sum_each(job, std::slice::from_ref(to), &[true]).await;
        let sum = self.verify(one, summed[0], || name.to_owned())?;
        if sum != header.checksum {
            let (sum, known) = (sum.value, header.checksum.value);
            let what = format!("checksum {sum:08x}, header says {known:08x}");
            return Err(self.corrupt(one, name, what));
        }
        Ok(sum)
    }

    pub(super) async fn disk_to_objects(
        &self,
        job: &Job,
        from: &[DiskSlot],
        unsettled: &mut Unsettled,
    ) -> Result<Vec<Moved>> {
        let mut results = Vec::with_capacity(job.moves.len());
        // One after the other: a rescue has time, and staging memory is dear.
        for (one, from) in job.moves.iter().zip(from) {
            // Each with its own, so that one that hangs does not keep the staging memory of those after it.
            let mut left = Unsettled::default();
            results.push(self.disk_to_object(job, one, *from, &mut left).await);
            unsettled.merge(left);
        }
        Ok(results)
    }

    async fn disk_to_object(
        &self,
        job: &Job,
        one: &Move,
        from: DiskSlot,
        unsettled: &mut Unsettled,
    ) -> Moved {
        let block_bytes = self.expected.block_bytes;
        let prepared = async {
            let payload = self.disk()?.payload(from)?;
            Ok::<_, Error>((self.staging()?.take(1, job.deadline).await?, payload))
        };
        let (buffer, payload) = match prepared.await {
            Ok(prepared) => prepared,
            Err(error) => return Err(MoveFailure::settled(error.kind())),
        };
        let staged = buffer.descriptor(0, block_bytes);
        let pairs = vec![(staged, payload)];
        let read = transfer(&self.agent, Operation::Read, pairs, None, job.deadline).await;
        let place = || {
            self.disk()
                .map_or_else(|_| String::new(), |disk| disk.place(from))
        };
        if let Err(failed) = read {
            // The object store must not be blamed, and left alone, for what the disk cannot read.
            if failed.in_flight.is_none() && speaks_of_source(failed.error.kind()) {
                return Err(self.corrupt(one, &place(), &failed.error));
            }
            let failure = unsettled.note(failed);
            unsettled.hold(buffer);
            return Err(failure);
        }
        let sum = buffer.checksum(0, block_bytes).map(Checksum::crc32c);
        let sum = sum.map_err(|error| MoveFailure::settled(error.kind()))?;
        if one.checksum.is_some_and(|known| known != sum) {
            return Err(self.corrupt(one, &place(), "bytes do not match their checksum"));
        }
        let result = self.put(job, one, sum, &staged.into(), unsettled).await;
        unsettled.hold(buffer);
        result
    }

    fn staging(&self) -> Result<&Arc<Scratch>> {
        self.staging
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "a rescue without disk or object tier"))
    }

    fn objects(&self) -> Result<&Objects> {
        self.objects.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                "an object command without an object tier",
            )
        })
    }
}

/// An object's header page and payload, with where each lies in it.
fn pairs(page: &Buffers, payload: &BlockMemory, object: &Region) -> Part {
    let header = object.descriptor(0, HEADER_BYTES);
    let mut pairs = vec![(page.descriptor(0, HEADER_BYTES), header)];
    let body = object.descriptor(HEADER_BYTES, payload.bytes());
    pages::pair(payload, &body.into(), &mut pairs);
    pairs
}

fn is_short(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Invalid | ErrorKind::Corrupt)
}

fn gather(moved: Vec<(Moved, Unsettled)>, unsettled: &mut Unsettled) -> Vec<Moved> {
    let gathered = moved.into_iter().map(|(result, left)| {
        unsettled.merge(left);
        result
    });
    gathered.collect()
}
