//! Memory of devices that peers read and write: each frame's bytes go through host memory, and the device's own backend copies
//! them between that and the device.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvcache_core::{Error, ErrorKind, Result};

use super::connection::Connection;
use super::scatter::{Piece, Scatter};
use crate::backend::job::Leg;
use crate::backend::{Backend, Job, Operation, cuda};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::region::{Body, MemoryKind, RegionCore, RegionOptions, RegionUse};
use crate::request::Priority;
use crate::sys::memory::{HostMemory, Mapping};

/// Bytes of a connection's frames that may be on their way to or from devices: what an initiator leaves unanswered at most, and
/// a frame more.
const ON_THE_WAY_MAX: u64 = 17 << 20;

/// How much of that is in use.
#[derive(Clone, Default)]
pub(super) struct Allowance(Arc<AtomicU64>);

/// A part of an allowance, given back when it is dropped.
pub(super) struct Allowed(Arc<AtomicU64>, u64);

impl Allowance {
    fn take(&self, bytes: u64) -> Result<Allowed> {
        let before = self.0.fetch_add(bytes, Ordering::AcqRel);
        let allowed = Allowed(self.0.clone(), bytes);
        if before + bytes > ON_THE_WAY_MAX {
            let text = format!("{before} bytes are on their way to or from devices");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        Ok(allowed)
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::AcqRel);
    }
}

/// Whether any of these is memory of a device.
pub(super) fn are_among(uses: &[RegionUse]) -> bool {
    uses.iter().any(|used| used.region().host().is_none())
}

/// Who is told when nothing is under way any more, or nothing will be known of it.
type Then = Box<dyn FnOnce(Result<()>) + Send>;

/// Ranges of regions of which some are memory of devices, and as much host memory as they have.
pub(super) struct Staged {
    uses: Vec<RegionUse>,
    pieces: Vec<Piece>,
    buffer: Arc<RegionCore>,
    allowed: Allowed,
}

impl Staged {
    /// # Errors
    /// [`ErrorKind::Invalid`] for a range outside its region, or memory that its engine has freed; [`ErrorKind::Busy`] for more
    /// than an initiator may leave unanswered; otherwise why there is no memory.
    pub(super) fn new(
        uses: Vec<RegionUse>,
        pieces: Vec<Piece>,
        allowance: &Allowance,
    ) -> Result<Self> {
        for piece in &pieces {
            let region = uses[piece.region as usize].region();
            let end = piece.offset.checked_add(piece.len);
            if end.is_none_or(|end| end > region.bytes()) {
                let (id, at, len) = (region.id(), piece.offset, piece.len);
                let text = format!(
                    "bytes {at}+{len} lie outside region {id} of {} bytes",
                    region.bytes()
                );
                return Err(Error::new(ErrorKind::Invalid, text));
            }
        }
        for memory in uses
            .iter()
            .filter_map(|used| cuda::memory_of(used.region()))
        {
            memory.check_there()?;
        }
        let bytes = pieces.iter().map(|piece| piece.len).sum();
        let allowed = allowance.take(bytes)?;
        let memory = Body::Host(HostMemory::anonymous(bytes)?);
        let buffer = RegionCore::new(memory, RegionOptions::default())?;
        Ok(Self {
            uses,
            pieces,
            buffer: Arc::new(buffer),
            allowed,
        })
    }

    /// Bytes of all ranges together.
    pub(super) fn bytes(&self) -> u64 {
        self.buffer.bytes()
    }

    /// All of the host memory.
    pub(super) fn scatter(&self) -> Result<Scatter> {
        let whole = Piece {
            region: 0,
            offset: 0,
            len: self.bytes(),
        };
        Scatter::admitted(vec![RegionUse::begin(self.buffer.clone())?], vec![whole])
    }

    /// Whether a region is being deregistered.
    pub(super) fn is_withdrawn(&self) -> bool {
        self.uses.iter().any(|used| used.region().is_closed())
    }

    /// Copies: a read into the host memory, a write out of it. The regions are used until that is over; `then` has the
    /// part of the allowance that is given back with it.
    pub(super) fn copy(
        self,
        operation: Operation,
        connection: Weak<Connection>,
        then: impl FnOnce(Result<()>, Allowed) + Send + 'static,
    ) {
        let outcome = self.copy_host(operation);
        let halves = match &outcome {
            Ok(()) => self.halves(operation),
            Err(_) => Vec::new(),
        };
        let allowed = self.allowed;
        let copying = Arc::new(Copying {
            connection,
            state: Mutex::new(State {
                // This call is one of them, so that it does not end before all are begun.
                open: halves.len() + 1,
                failure: None,
                uses: self.uses,
                then: Some(Box::new(move |outcome| then(outcome, allowed))),
            }),
        });
        for (backend, plan) in halves {
            let half = Half {
                copying: copying.clone(),
                plan: Arc::new(plan),
                is_open: true,
            };
            if let Err(refusal) = backend.post(Job::of_leg(Box::new(half))) {
                copying.end_one(Err(refusal.into_error()));
            }
        }
        copying.end_one(outcome);
    }

    /// The ranges, with the place of each in the host memory.
    fn placed(&self) -> impl Iterator<Item = (&Arc<RegionCore>, Piece, u64)> {
        let mut at = 0;
        self.pieces.iter().map(move |&piece| {
            at += piece.len;
            let region = self.uses[piece.region as usize].region();
            (region, piece, at - piece.len)
        })
    }

    /// What is host memory on both sides.
    fn copy_host(&self, operation: Operation) -> Result<()> {
        let buffer = self.buffer.mapping()?;
        for (region, piece, at) in self.placed() {
            let Some(host) = region.host() else {
                continue;
            };
            let (host, offset) = (host.mapping(), piece.offset);
            match operation {
                Operation::Read => Mapping::copy(host, offset, buffer, at, piece.len)?,
                Operation::Write => Mapping::copy(buffer, at, host, offset, piece.len)?,
            }
        }
        Ok(())
    }

    /// The rest, device by device.
    fn halves(&self, operation: Operation) -> Vec<(Arc<dyn Backend>, Plan)> {
        let mut halves: BTreeMap<u32, OneDevice> = BTreeMap::new();
        for (region, piece, at) in self.placed() {
            let (Some(external), MemoryKind::Device { ordinal }) =
                (region.external(), region.kind())
            else {
                continue;
            };
            let half = halves.entry(ordinal).or_insert_with(|| OneDevice {
                backend: external.backend(),
                targets: Vec::new(),
                extents: Vec::new(),
            });
            let remote = half.position(region);
            half.extents.push(Extent {
                local: 0,
                remote,
                local_offset: at,
                remote_offset: piece.offset,
                len: piece.len,
            });
        }
        let plan = |half: OneDevice| Plan {
            operation,
            local: Arc::from([Target::Local(self.buffer.clone())]),
            remote: half.targets.into(),
            bytes: half.extents.iter().map(|extent| extent.len).sum(),
            descriptors: half.extents.len() as u32,
            extents: half.extents,
            ..Plan::empty()
        };
        let halves = halves.into_values();
        halves
            .map(|half| (half.backend.clone(), plan(half)))
            .collect()
    }
}

/// What of a frame concerns one device.
struct OneDevice {
    backend: Arc<dyn Backend>,
    targets: Vec<Target>,
    extents: Vec<Extent>,
}

impl OneDevice {
    /// A region's position among the targets.
    fn position(&mut self, region: &Arc<RegionCore>) -> u32 {
        let is_it =
            |target: &Target| matches!(target, Target::Local(known) if Arc::ptr_eq(known, region));
        let known = self.targets.iter().position(is_it);
        let position = known.unwrap_or(self.targets.len());
        if known.is_none() {
            self.targets.push(Target::Local(region.clone()));
        }
        position as u32
    }
}

/// What the halves of a frame's copy share.
struct Copying {
    connection: Weak<Connection>,
    state: Mutex<State>,
}

struct State {
    /// Halves that are not over.
    open: usize,
    failure: Option<Error>,
    uses: Vec<RegionUse>,
    then: Option<Then>,
}

impl Copying {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_one(&self, outcome: Result<()>) {
        let mut state = self.lock();
        state.open -= 1;
        if let Err(error) = outcome {
            state.failure.get_or_insert(error);
        }
        if state.open > 0 {
            return;
        }
        let (uses, then) = (std::mem::take(&mut state.uses), state.then.take());
        let failure = state.failure.take();
        drop(state);
        // The regions' use ends before the initiator hears of it.
        drop(uses);
        if let Some(then) = then {
            then(failure.map_or(Ok(()), Err));
        }
    }

    /// It has failed, and its memory may still be in use.
    fn report(&self, error: Error) {
        let then = self.lock().then.take();
        if let Some(then) = then {
            then(Err(error));
        }
    }
}

/// What a device's backend holds of it. If it loses it, the regions are kept for ever.
struct Half {
    copying: Arc<Copying>,
    plan: Arc<Plan>,
    is_open: bool,
}

impl Leg for Half {
    fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    fn priority(&self) -> Priority {
        Priority::Normal
    }

    fn is_abandoned(&self) -> bool {
        let connection = self.copying.connection.upgrade();
        connection.is_none_or(|connection| connection.check().is_err())
    }

    fn settle(mut self: Box<Self>, outcome: Result<()>) {
        self.is_open = false;
        self.copying.end_one(outcome);
    }

    fn report(&self, error: Error) {
        self.copying.report(error);
    }

    fn hand_back(mut self: Box<Self>) {
        self.is_open = false;
    }
}

impl Drop for Half {
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn drop(&mut self) {
        if self.is_open {
            let text = "a backend lost track of a device's copy";
            self.copying.report(Error::new(ErrorKind::Internal, text));
            std::mem::forget((self.copying.clone(), self.plan.clone()));
        }
    }
}
