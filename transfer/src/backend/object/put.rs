//! Objects on their way out: whole, or in parts where they are large.

use std::ops::Range;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use kvcache_core::{Error, ErrorKind, Result};
use object_store::{
    Error as StoreError, MultipartUpload, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions,
    PutPayload,
};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::ObjectWrite;
use super::transfer::{BUFFER_UNIT_BYTES, OBJECT_BYTES_MAX, Part, memory};
use super::turns::Turn;
use crate::backend::abandoned;
use crate::plan::{Extent, Plan};

/// Writes the object that the part's extents make up.
pub(super) async fn put(plan: &Plan, part: &Part, buffers: &Semaphore) -> Result<()> {
    let bytes = whole(part)?;
    let put = Put {
        plan,
        part,
        buffers,
        bytes,
    };
    if part.write == ObjectWrite::Keep && put.is_there().await? {
        return Ok(());
    }
    if bytes <= part.store.options().part_bytes {
        put.at_once().await
    } else {
        put.in_parts().await
    }
}

/// The size of the object that the part's extents make up without a gap or an overlap.
fn whole(part: &Part) -> Result<u64> {
    let mut end = 0;
    for extent in &part.extents {
        if extent.remote_offset != end {
            let text = format!(
                "write {} in object store {:?}: an object is written whole, but a range starts at {} where {end} is \
                 due",
                part.path,
                part.store.name(),
                extent.remote_offset
            );
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        end += extent.len;
    }
    if end > OBJECT_BYTES_MAX {
        return Err(Error::invalid(
            "bytes of an object to write",
            end,
            1..=OBJECT_BYTES_MAX,
        ));
    }
    Ok(end)
}

/// What of an extent lies in a range of the object.
fn clipped(extent: &Extent, range: &Range<u64>) -> Extent {
    let from = extent.remote_offset.max(range.start);
    let end = (extent.remote_offset + extent.len).min(range.end);
    Extent {
        local_offset: extent.local_offset + (from - extent.remote_offset),
        remote_offset: from,
        len: end - from,
        ..*extent
    }
}

/// One object to write.
struct Put<'a> {
    plan: &'a Plan,
    part: &'a Part,
    buffers: &'a Semaphore,
    bytes: u64,
}

/// Bytes ready to be sent, with what they hold until they are.
struct Gathered<'a> {
    payload: PutPayload,
    _turn: Turn,
    _buffer: SemaphorePermit<'a>,
}

impl<'a> Put<'a> {
    async fn turn(&self) -> Turn {
        self.part.store.turns.take(self.part.priority).await
    }

    fn failed(&self, error: &StoreError) -> Error {
        self.part.store.error("write", &self.part.path, error)
    }

    /// The size of the object that has the name already.
    async fn found(&self) -> Result<Option<u64>> {
        let store = &self.part.store;
        let _turn = self.turn().await;
        match store.inner.head(&self.part.path).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Whether an object of this name and size is there.
    async fn is_there(&self) -> Result<bool> {
        Ok(self.found().await? == Some(self.bytes))
    }

    /// A copy of the object's bytes in that range. The store's client keeps what it sends for repetitions, and the
    /// region's memory may change under it.
    async fn gather(&self, range: Range<u64>) -> Result<Gathered<'a>> {
        let turn = self.turn().await;
        let units = (range.end - range.start).div_ceil(BUFFER_UNIT_BYTES) as u32;
        let buffer = self.buffers.acquire_many(units).await;
        let buffer = buffer.map_err(|_| abandoned())?;
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let extents = &self.part.extents;
        let first = extents.partition_point(|one| one.remote_offset + one.len <= range.start);
        let within = extents[first..].iter();
        let within = within.take_while(|extent| extent.remote_offset < range.end);
        let within = within.map(|extent| clipped(extent, &range));
        match &self.part.near {
            Some(near) => {
                near.gather(within.collect(), range.start, &mut bytes)
                    .await?
            }
            None => {
                for extent in within {
                    let place = (extent.remote_offset - range.start) as usize;
                    let part = &mut bytes[place..place + extent.len as usize];
                    memory(self.plan, &extent)?.read(extent.local_offset, part)?;
                }
            }
        }
        Ok(Gathered {
            payload: PutPayload::from(Bytes::from(bytes)),
            _turn: turn,
            _buffer: buffer,
        })
    }

    /// One request for the whole object.
    async fn at_once(&self) -> Result<()> {
        let mut gathered = self.gather(0..self.bytes).await?;
        match self.part.write {
            ObjectWrite::Replace => return self.send(&gathered, PutMode::Overwrite).await,
            ObjectWrite::Create => return self.send(&gathered, PutMode::Create).await,
            ObjectWrite::Keep => {}
        }
        if self.part.store.is_conditional() {
            let payload = gathered.payload.clone();
            match self.try_send(payload, PutMode::Create).await {
                Ok(()) => return Ok(()),
                Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => {
                    // Another was faster, or is about to be. Its object is kept if it can be this one.
                    let payload = gathered.payload;
                    drop((gathered._turn, gathered._buffer));
                    if self.is_there().await? {
                        return Ok(());
                    }
                    gathered = self.again(payload).await?;
                }
                Err(error) if self.part.store.note_unconditional(&error) => {}
                Err(error) => return Err(self.failed(&error)),
            }
        }
        self.send(&gathered, PutMode::Overwrite).await
    }

    /// Takes what a request needs once more.
    async fn again(&self, payload: PutPayload) -> Result<Gathered<'a>> {
        let turn = self.turn().await;
        let units = self.bytes.div_ceil(BUFFER_UNIT_BYTES) as u32;
        let buffer = self.buffers.acquire_many(units).await;
        Ok(Gathered {
            payload,
            _turn: turn,
            _buffer: buffer.map_err(|_| abandoned())?,
        })
    }

    async fn send(&self, gathered: &Gathered<'_>, mode: PutMode) -> Result<()> {
        let sent = self.try_send(gathered.payload.clone(), mode).await;
        sent.map_err(|error| self.failed(&error))
    }

    async fn try_send(&self, payload: PutPayload, mode: PutMode) -> Result<(), StoreError> {
        let store = &self.part.store.inner;
        let options = PutOptions::from(mode);
        store
            .put_opts(&self.part.path, payload, options)
            .await
            .map(drop)
    }

    /// Parts of one upload, a few at a time; the object appears when all are there.
    ///
    /// Stores have no conditional end of an upload that our client could use, so for `Create` the name is looked up before
    /// and after: of two that write at the same time the later one wins.
    async fn in_parts(&self) -> Result<()> {
        let store = &self.part.store;
        self.refuse_existing().await?;
        let begun = {
            let _turn = self.turn().await;
            let options = PutMultipartOptions::default();
            store
                .inner
                .put_multipart_opts(&self.part.path, options)
                .await
        };
        let mut upload = Upload {
            inner: Some(begun.map_err(|error| self.failed(&error))?),
            runtime: store.runtime().clone(),
        };
        let step = store.options().part_bytes;
        let mut sending = FuturesUnordered::new();
        let mut start = 0;
        while start < self.bytes {
            let end = (start + step).min(self.bytes);
            let gathered = {
                let mut gathering = Box::pin(self.gather(start..end));
                loop {
                    tokio::select! {
                        gathered = &mut gathering => break gathered?,
                        // Those under way hold what this one waits for.
                        Some(sent) = sending.next(), if !sending.is_empty() => sent?,
                    }
                }
            };
            let sent = upload.part(gathered.payload.clone());
            sending.push(async move {
                let sent = sent?.await;
                drop(gathered);
                sent.map_err(|error| self.failed(&error))
            });
            while sending.len() >= store.options().parts_in_flight_max {
                sending.next().await.transpose()?;
            }
            start = end;
        }
        while let Some(sent) = sending.next().await {
            sent?;
        }
        drop(sending);
        self.refuse_existing().await?;
        let _turn = self.turn().await;
        let done = upload.complete().await?;
        done.map_err(|error| self.failed(&error))
    }

    async fn refuse_existing(&self) -> Result<()> {
        if self.part.write != ObjectWrite::Create || self.found().await?.is_none() {
            return Ok(());
        }
        let (path, store) = (&self.part.path, self.part.store.name());
        let text = format!("write {path} in object store {store:?}: it exists already");
        Err(Error::new(ErrorKind::Denied, text))
    }
}

/// An upload in parts, which is taken back when it is not completed: stores keep, and charge for, what was sent.
struct Upload {
    inner: Option<Box<dyn MultipartUpload>>,
    runtime: Handle,
}

impl Upload {
    fn open(&mut self) -> Result<&mut Box<dyn MultipartUpload>> {
        self.inner
            .as_mut()
            .ok_or_else(|| Error::new(ErrorKind::Internal, "an upload that has ended"))
    }

    fn part(&mut self, payload: PutPayload) -> Result<object_store::UploadPart> {
        Ok(self.open()?.put_part(payload))
    }

    async fn complete(&mut self) -> Result<Result<(), StoreError>> {
        let done = self.open()?.complete().await.map(drop);
        if done.is_ok() {
            self.inner = None;
        }
        Ok(done)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut upload) = self.inner.take() else {
            return;
        };
        self.runtime.spawn(async move {
            if let Err(error) = upload.abort().await {
                // What is said of it may hold secrets.
                drop(error);
                tracing::debug!("an unfinished upload could not be taken back");
            }
        });
    }
}
