//! The bytes of one job: whole objects out, ranges of objects in.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use kvcache_core::{Error, ErrorKind, Result};
use object_store::path::Path;
use object_store::{GetOptions, GetResultPayload, ObjectStore, PutMode, PutOptions, PutPayload};
use tokio::sync::{RwLock, Semaphore};

use super::store::Store;
use super::{ObjectTarget, ObjectWrite};
use crate::backend::{Operation, abandoned};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::request::Priority;
use crate::sys::memory::Mapping;

/// The largest object that is written: it is gathered in memory first.
pub const OBJECT_BYTES_MAX: u64 = 256 << 20;
/// Memory of all objects on their way out, in units of [`BUFFER_UNIT_BYTES`]; more wait.
pub(super) const BUFFER_UNITS_MAX: usize = 256 << 10;
const BUFFER_UNIT_BYTES: u64 = 1 << 10;
/// How much of a local object is read at once.
const STEP_BYTES: usize = 1 << 20;

const _: () = assert!(OBJECT_BYTES_MAX.div_ceil(BUFFER_UNIT_BYTES) <= BUFFER_UNITS_MAX as u64);

/// What ties a job to the threads that block for it.
#[derive(Default)]
pub(super) struct Control {
    /// Held for reading by every thread that may touch the job's memory.
    busy: Arc<RwLock<()>>,
    stop: Arc<AtomicBool>,
}

impl Control {
    /// Stops blocking threads, and returns when none of them touches the job's memory any more.
    pub(super) async fn drain(&self) {
        self.stop.store(true, Ordering::Release);
        let _all = self.busy.write().await;
    }
}

/// The part of a job that concerns one object.
struct Part {
    store: Arc<Store>,
    path: Path,
    write: ObjectWrite,
    /// By their place in the object.
    extents: Vec<Extent>,
}

/// Moves everything the plan asks for. Dropping the future stops it; what then may still touch memory is awaited with
/// [`Control::drain`].
pub(super) async fn run(
    plan: &Arc<Plan>,
    priority: Priority,
    control: &Control,
    buffers: &Semaphore,
) -> Result<()> {
    let parts = parts(plan)?;
    let works = parts.into_iter().map(|part| async move {
        match plan.operation {
            Operation::Write => put(plan, part, priority, buffers).await,
            Operation::Read => get(plan, part, priority, control).await,
        }
    });
    try_join_all(works).await.map(drop)
}

fn parts(plan: &Plan) -> Result<Vec<Part>> {
    let mut parts = BTreeMap::new();
    for extent in &plan.extents {
        let part = match parts.entry(extent.remote) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                entry.insert(part(&plan.remote[extent.remote as usize])?)
            }
        };
        part.extents.push(*extent);
    }
    let mut parts: Vec<Part> = parts.into_values().collect();
    for part in &mut parts {
        part.extents.sort_by_key(|extent| extent.remote_offset);
    }
    Ok(parts)
}

fn part(target: &Target) -> Result<Part> {
    let external = match target {
        Target::Local(region) => region.external(),
        Target::Remote(_) => None,
    };
    let target = external.and_then(|external| {
        let any: &dyn std::any::Any = &**external;
        any.downcast_ref::<ObjectTarget>()
    });
    let Some(target) = target else {
        let text = "the object engine only reaches objects of this agent's stores";
        return Err(Error::new(ErrorKind::Unsupported, text));
    };
    Ok(Part {
        store: Arc::clone(&target.store),
        path: target.path.clone(),
        write: target.write,
        extents: Vec::new(),
    })
}

fn memory<'a>(plan: &'a Plan, extent: &Extent) -> Result<&'a Mapping> {
    match &plan.local[extent.local as usize] {
        Target::Local(region) => region.mapping(),
        Target::Remote(_) => Err(Error::new(
            ErrorKind::Internal,
            "the local side names a peer's memory",
        )),
    }
}

async fn put(plan: &Plan, part: Part, priority: Priority, buffers: &Semaphore) -> Result<()> {
    let bytes = whole(&part)?;
    let _turn = part.store.turns.take(priority).await;
    let units = bytes.div_ceil(BUFFER_UNIT_BYTES) as u32;
    let _buffer = buffers.acquire_many(units).await.map_err(|_| abandoned())?;
    // The store's client keeps what it sends for repetitions, and the region's memory may change under it: so a copy.
    let mut object = vec![0; bytes as usize];
    for extent in &part.extents {
        let range = extent.remote_offset as usize..(extent.remote_offset + extent.len) as usize;
        memory(plan, extent)?.read(extent.local_offset, &mut object[range])?;
    }
    let mode = match part.write {
        ObjectWrite::Replace => PutMode::Overwrite,
        ObjectWrite::Create => PutMode::Create,
    };
    let payload = PutPayload::from(Bytes::from(object));
    let options = PutOptions::from(mode);
    part.store
        .inner
        .put_opts(&part.path, payload, options)
        .await
        .map(drop)
        .map_err(|error| part.store.error("write", &part.path, &error))
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

async fn get(plan: &Arc<Plan>, part: Part, priority: Priority, control: &Control) -> Result<()> {
    let mut rest = part.extents.as_slice();
    while let Some(first) = rest.first() {
        let mut end = first.remote_offset;
        let gap = rest.iter().position(|extent| {
            let starts_late = extent.remote_offset != end;
            end = extent.remote_offset + extent.len;
            starts_late
        });
        let count = gap.unwrap_or(rest.len());
        let (run, others) = rest.split_at(count);
        rest = others;
        get_run(plan, (&part, run.to_vec()), priority, control).await?;
    }
    Ok(())
}

/// Reads one range of the object without gaps.
async fn get_run(
    plan: &Arc<Plan>,
    (part, extents): (&Part, Vec<Extent>),
    priority: Priority,
    control: &Control,
) -> Result<()> {
    let start = extents[0].remote_offset;
    let end = start + extents.iter().map(|extent| extent.len).sum::<u64>();
    let failed = |error: object_store::Error| part.store.error("read", &part.path, &error);
    let short = |size: u64| {
        let text = format!(
            "read {} in object store {:?}: bytes {start}..{end} of an object of {size}",
            part.path,
            part.store.name()
        );
        Error::new(ErrorKind::Corrupt, text)
    };
    let _turn = part.store.turns.take(priority).await;
    let options = GetOptions::new().with_range(Some(start..end));
    let found = match part.store.inner.get_opts(&part.path, options).await {
        Ok(found) => found,
        Err(error @ object_store::Error::NotFound { .. }) => return Err(failed(error)),
        Err(error) => {
            // A range past the end is refused by some stores and shortened by others: tell it apart from the rest.
            use object_store::ObjectStoreExt;
            return Err(match part.store.inner.head(&part.path).await {
                Ok(meta) if meta.size < end => short(meta.size),
                _ => failed(error),
            });
        }
    };
    if found.range != (start..end) {
        return Err(short(found.meta.size));
    }
    let mut target = Scatter {
        plan: Arc::clone(plan),
        extents,
        position: 0,
        done: 0,
    };
    match found.payload {
        GetResultPayload::File(file, _) => {
            let held = Arc::clone(&control.busy).read_owned().await;
            let stop = Arc::clone(&control.stop);
            let work = move || {
                let outcome = read_file(&file, start..end, &mut target, &stop);
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
                target.put(&bytes.map_err(failed)?)?;
            }
            if target.is_full() {
                Ok(())
            } else {
                Err(short(found.meta.size))
            }
        }
    }
}

fn read_file(
    file: &File,
    range: std::ops::Range<u64>,
    target: &mut Scatter,
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
        target.put(&step[..count])?;
        offset += count as u64;
    }
    Ok(())
}

/// Memory that is filled in order.
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
