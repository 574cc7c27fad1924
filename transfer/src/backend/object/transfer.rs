//! The bytes of one job: whole objects out, ranges of objects in.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::try_join_all;
use kvcache_core::{Error, ErrorKind, Result};
use object_store::path::Path;
use tokio::sync::Semaphore;

use super::get::get;
use super::options::{PART_BYTES_MAX, PART_BYTES_MIN};
use super::put::put;
use super::store::Store;
use super::{ObjectTarget, ObjectWrite};
use crate::backend::Operation;
use crate::backend::leg::Control;
use crate::backend::staged::Near;
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::request::Priority;
use crate::sys::memory::Mapping;

/// The largest object that is written.
pub const OBJECT_BYTES_MAX: u64 = 32 << 30;
/// The most parts of one object: what S3 allows.
const PARTS_MAX: u64 = 10_000;
/// Memory of all objects and parts on their way out, in units of [`BUFFER_UNIT_BYTES`]; more wait.
pub(super) const BUFFER_UNITS_MAX: usize = 256 << 10;
pub(super) const BUFFER_UNIT_BYTES: u64 = 1 << 10;

const _: () = assert!(PART_BYTES_MAX.div_ceil(BUFFER_UNIT_BYTES) <= BUFFER_UNITS_MAX as u64);
const _: () = assert!(OBJECT_BYTES_MAX.div_ceil(PART_BYTES_MIN) <= PARTS_MAX);

/// The part of a job that concerns one object.
pub(super) struct Part {
    pub(super) store: Arc<Store>,
    pub(super) path: Path,
    pub(super) write: ObjectWrite,
    /// Whose turn it is at the store.
    pub(super) priority: Priority,
    /// Who has the bytes of this side; none: they are host memory.
    pub(super) near: Option<Near>,
    /// By their place in the object.
    pub(super) extents: Vec<Extent>,
}

/// Moves everything the plan asks for. Dropping the future stops it; what then may still touch memory is awaited with
/// [`Control::drain`].
pub(super) async fn run(
    plan: &Arc<Plan>,
    priority: Priority,
    control: &Control,
    (buffers, near): (&Semaphore, Option<&Near>),
) -> Result<()> {
    let parts = parts(plan, priority, near)?;
    let works = parts.into_iter().map(|part| async move {
        match plan.operation {
            Operation::Write => put(plan, &part, buffers).await,
            Operation::Read => get(plan, &part, control).await,
        }
    });
    try_join_all(works).await.map(drop)
}

fn parts(plan: &Plan, priority: Priority, near: Option<&Near>) -> Result<Vec<Part>> {
    let mut parts = BTreeMap::new();
    for extent in &plan.extents {
        let part = match parts.entry(extent.remote) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let target = &plan.remote[extent.remote as usize];
                entry.insert(part(target, priority, near)?)
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

fn part(target: &Target, priority: Priority, near: Option<&Near>) -> Result<Part> {
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
        priority,
        near: near.cloned(),
        extents: Vec::new(),
    })
}

pub(super) fn memory<'a>(plan: &'a Plan, extent: &Extent) -> Result<&'a Mapping> {
    match &plan.local[extent.local as usize] {
        Target::Local(region) => region.mapping(),
        Target::Remote(_) => Err(Error::new(
            ErrorKind::Internal,
            "the local side names a peer's memory",
        )),
    }
}
