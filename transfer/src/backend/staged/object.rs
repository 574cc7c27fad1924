//! Objects: they are written whole, and read as one version, so their engine moves them, and asks here for the bytes.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};
use tokio::runtime::Handle;

use super::super::leg::{Answer, Control};
use super::super::object as engine;
use super::cut::{Cut, Piece};
use super::stage::Stage;
use super::window::Chunk;
use super::{Task, staged};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::request::Priority;

/// Where the runtime of a plan's object stores is; none for a plan without objects.
pub(super) fn handle(plan: &Plan) -> Option<Handle> {
    plan.remote.iter().find_map(|target| match target {
        Target::Local(region) => engine::backend_of(region).map(|backend| backend.handle()),
        Target::Remote(_) => None,
    })
}

impl Task {
    /// Moves a plan over objects; none if there are none.
    pub(super) async fn run_objects(&self) -> Option<Result<()>> {
        let backend = self.plan.remote.iter().find_map(|target| match target {
            Target::Local(region) => engine::backend_of(region),
            Target::Remote(_) => None,
        })?;
        let near = Near {
            stage: self.stage.clone(),
            plan: self.plan.clone(),
            priority: self.priority,
            control: self.control.clone(),
        };
        let moved = backend.run(&self.plan, self.priority, &self.control, &near);
        Some(moved.await.map_err(staged))
    }
}

/// A local side that is memory of devices.
#[derive(Clone)]
pub(crate) struct Near {
    stage: Arc<Stage>,
    plan: Arc<Plan>,
    priority: Priority,
    control: Control,
}

impl Near {
    /// Copies ranges into `bytes`: those of an object, of which `bytes` has all from `first` on.
    pub(crate) async fn gather(
        &self,
        ranges: Vec<Extent>,
        first: u64,
        bytes: &mut [u8],
    ) -> Result<()> {
        let plan = Arc::new(self.plan.with(ranges, Vec::new()));
        for piece in Cut::new(&plan) {
            let chunk = self.take(&piece).await?;
            self.post(&plan, &piece, &chunk)?.wait().await?;
            for (extent, at) in &piece.ranges {
                let place = (extent.remote_offset - first) as usize;
                let part = &mut bytes[place..place + extent.len as usize];
                chunk.mapping()?.read(chunk.start() + at, part)?;
            }
        }
        Ok(())
    }

    /// What is to come into ranges that follow each other in an object.
    pub(crate) fn filling(&self, ranges: &[Extent]) -> Filling {
        let plan = Arc::new(self.plan.with(ranges.to_vec(), Vec::new()));
        Filling {
            near: self.clone(),
            left: plan.bytes,
            pieces: Cut::new(&plan),
            plan,
            open: None,
            under_way: Vec::new(),
        }
    }

    async fn take(&self, piece: &Piece) -> Result<Arc<Chunk>> {
        let window = self.stage.window(piece.ordinal)?;
        Ok(Arc::new(window.take(self.priority).await?))
    }

    fn post(&self, plan: &Plan, piece: &Piece, chunk: &Arc<Chunk>) -> Result<Answer> {
        let leg = piece.of_device(plan, chunk.region(), chunk.start());
        let leg = (leg, self.priority);
        self.stage.post(leg, &self.control, chunk.clone())
    }
}

/// Bytes of an object on their way to devices: a chunk is filled while those before it are copied.
pub(crate) struct Filling {
    near: Near,
    plan: Arc<Plan>,
    pieces: Cut,
    /// Bytes that have not come.
    left: u64,
    open: Option<Open>,
    under_way: Vec<Answer>,
}

/// A piece whose chunk is not full.
struct Open {
    piece: Piece,
    chunk: Arc<Chunk>,
    /// Where its ranges, which lie side by side, begin and end in the chunk, and how far they are there.
    at: u64,
    end: u64,
}

impl Filling {
    /// The bytes that come next.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for more than there is room for; otherwise why a device does not take them.
    pub(crate) async fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let mut open = match self.open.take() {
                Some(open) => open,
                None => self.next().await?,
            };
            let count = (open.end - open.at).min(bytes.len() as u64);
            let (now, later) = bytes.split_at(count as usize);
            open.chunk
                .mapping()?
                .write(open.chunk.start() + open.at, now)?;
            open.at += count;
            self.left -= count;
            bytes = later;
            match open.at == open.end {
                true => {
                    let answer = self.near.post(&self.plan, &open.piece, &open.chunk)?;
                    self.under_way.push(answer);
                }
                false => self.open = Some(open),
            }
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Open> {
        let Some(piece) = self.pieces.next() else {
            let text = "an object store sent more than it was asked for";
            return Err(Error::new(ErrorKind::Corrupt, text));
        };
        let chunk = self.near.take(&piece).await?;
        let at = piece.ranges.first().map_or(0, |(_, at)| *at);
        let bytes: u64 = piece.ranges.iter().map(|(extent, _)| extent.len).sum();
        Ok(Open {
            piece,
            chunk,
            at,
            end: at + bytes,
        })
    }

    /// Returns when everything that has come is on the devices. Whether nothing is missing.
    pub(crate) async fn finish(&mut self) -> Result<bool> {
        for answer in std::mem::take(&mut self.under_way) {
            answer.wait().await?;
        }
        Ok(self.left == 0)
    }
}
