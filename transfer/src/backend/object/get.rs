//! Ranges of objects on their way in.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use kvcache_core::{Error, ErrorKind, Result};
use object_store::{Error as StoreError, GetOptions, GetResult, GetResultPayload, ObjectStoreExt};
use tokio::runtime::Handle;

use super::transfer::{Part, memory};
use crate::backend::abandoned;
use crate::backend::leg::Control;
use crate::backend::staged::Filling;
use crate::plan::{Extent, Plan};

/// How much of a local object is read at once.
const STEP_BYTES: usize = 1 << 20;

/// Reads the ranges of an object that the part's extents name. Those of several requests are of one version of it.
pub(super) async fn get(plan: &Arc<Plan>, part: &Part, control: &Control) -> Result<()> {
    let mut ranges = ranges(&part.extents, part.store.options().part_bytes).into_iter();
    let Some(first) = ranges.next() else {
        return Ok(());
    };
    let version = get_range(plan, part, first, None, control).await?;
    let version = version.as_deref();
    stream::iter(ranges.map(|range| get_range(plan, part, range, version, control)))
        .buffer_unordered(part.store.options().parts_in_flight_max)
        .try_for_each(|_| std::future::ready(Ok(())))
        .await
}

/// Extents that follow each other in the object together, up to so many bytes.
fn ranges(extents: &[Extent], bytes_max: u64) -> Vec<Vec<Extent>> {
    let mut ranges: Vec<Vec<Extent>> = Vec::new();
    let mut end = 0;
    let mut room = 0;
    for extent in extents {
        let mut rest = *extent;
        while rest.len > 0 {
            if ranges.is_empty() || rest.remote_offset != end || room == 0 {
                ranges.push(Vec::new());
                room = bytes_max;
            }
            let len = rest.len.min(room);
            if let Some(range) = ranges.last_mut() {
                range.push(Extent { len, ..rest });
            }
            rest.local_offset += len;
            rest.remote_offset += len;
            rest.len -= len;
            room -= len;
            end = rest.remote_offset;
        }
    }
    ranges
}

/// Reads one range of the object without gaps, and tells the object's version, where the store has such.
async fn get_range(
    plan: &Arc<Plan>,
    part: &Part,
    extents: Vec<Extent>,
    version: Option<&str>,
    control: &Control,
) -> Result<Option<String>> {
    let start = extents[0].remote_offset;
    let end = start + extents.iter().map(|extent| extent.len).sum::<u64>();
    let failed = |error: StoreError| part.store.error("read", &part.path, &error);
    let torn = |what: String| {
        let (path, store) = (&part.path, part.store.name());
        let text = format!("read {path} in object store {store:?}: {what}");
        Error::new(ErrorKind::Corrupt, text)
    };
    let short = |size: u64| torn(format!("bytes {start}..{end} of an object of {size}"));
    let _turn = part.store.turns.take(part.priority).await;
    let options = GetOptions::new()
        .with_range(Some(start..end))
        .with_if_match(version);
    let found = match part.store.inner.get_opts(&part.path, options).await {
        Ok(found) => found,
        Err(error @ StoreError::NotFound { .. }) => return Err(failed(error)),
        Err(StoreError::Precondition { .. }) => {
            return Err(torn("it was replaced meanwhile".to_owned()));
        }
        Err(error) => {
            // A range past the end is refused by some stores and shortened by others: tell it apart from the rest.
            return Err(match part.store.inner.head(&part.path).await {
                Ok(meta) if meta.size < end => short(meta.size),
                _ => failed(error),
            });
        }
    };
    if found.range != (start..end) {
        return Err(short(found.meta.size));
    }
    // Some stores do not look at the condition.
    if version.is_some_and(|version| found.meta.e_tag.as_deref() != Some(version)) {
        return Err(torn("it was replaced meanwhile".to_owned()));
    }
    let version = found.meta.e_tag.clone();
    let size = found.meta.size;
    let target = match &part.near {
        Some(near) => Sink::Filling(near.filling(&extents)),
        None => Sink::Scatter(Scatter {
            plan: Arc::clone(plan),
            extents,
            position: 0,
            done: 0,
        }),
    };
    if !fill(found, target, control, failed).await? {
        return Err(short(size));
    }
    Ok(version)
}

/// Whether all that was asked for has come.
async fn fill(
    found: GetResult,
    mut target: Sink,
    control: &Control,
    failed: impl Fn(StoreError) -> Error,
) -> Result<bool> {
    match found.payload {
        GetResultPayload::File(file, _) => {
            let held = Arc::clone(&control.busy).read_owned().await;
            let stop = Arc::clone(&control.stop);
            let runtime = Handle::current();
            let work = move || {
                let read = read_file(&file, found.range, (&mut target, &runtime), &stop);
                let outcome = read.and_then(|()| runtime.block_on(target.finish()));
                drop(held);
                outcome
            };
            let outcome = tokio::task::spawn_blocking(work).await;
            outcome.unwrap_or_else(|error| {
                Err(Error::new(ErrorKind::Internal, "read a local object").with_source(error))
            })
        }
        GetResultPayload::Stream(mut stream) => {
            while let Some(bytes) = stream.next().await {
                target.put(&bytes.map_err(&failed)?).await?;
            }
            target.finish().await
        }
    }
}

fn read_file(
    file: &File,
    range: std::ops::Range<u64>,
    (target, runtime): (&mut Sink, &Handle),
    stop: &AtomicBool,
) -> Result<()> {
    let mut offset = range.start;
    let mut step = vec![0; STEP_BYTES.min((range.end - range.start) as usize)];
    while offset < range.end {
        if stop.load(Ordering::Acquire) {
            return Err(abandoned());
        }
        let count = (range.end - offset).min(step.len() as u64) as usize;
        file.read_exact_at(&mut step[..count], offset)
            .map_err(|error| {
                let kind = match error.kind() {
                    std::io::ErrorKind::UnexpectedEof => ErrorKind::Corrupt,
                    _ => ErrorKind::Io,
                };
                Error::new(kind, format!("read a local object at {offset}")).with_source(error)
            })?;
        runtime.block_on(target.put(&step[..count]))?;
        offset += count as u64;
    }
    Ok(())
}

/// What is filled in order.
enum Sink {
    Scatter(Scatter),
    Filling(Filling),
}

impl Sink {
    async fn put(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Scatter(scatter) => scatter.put(bytes),
            Self::Filling(filling) => filling.put(bytes).await,
        }
    }

    /// Whether all is in place.
    async fn finish(&mut self) -> Result<bool> {
        match self {
            Self::Scatter(scatter) => Ok(scatter.is_full()),
            Self::Filling(filling) => filling.finish().await,
        }
    }
}

/// Host memory that is filled in order.
struct Scatter {
    plan: Arc<Plan>,
    extents: Vec<Extent>,
    position: usize,
    done: u64,
}

impl Scatter {
    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let Some(extent) = self.extents.get(self.position) else {
                let text = "an object store sent more than it was asked for";
                return Err(Error::new(ErrorKind::Corrupt, text));
            };
            let count = (extent.len - self.done).min(bytes.len() as u64);
            let (now, later) = bytes.split_at(count as usize);
            memory(&self.plan, extent)?.write(extent.local_offset + self.done, now)?;
            bytes = later;
            self.done += count;
            if self.done == extent.len {
                self.position += 1;
                self.done = 0;
            }
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.position == self.extents.len()
    }
}
