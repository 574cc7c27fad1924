//! The side that asks: cuts requests into frames, keeps a window of them in flight, matches answers.

use std::collections::{HashSet, LinkedList};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use super::active::{Active, Chunk, Cut, Next};
use super::channel::Lanes;
use super::connection::Connection;
use super::frame::{FrameKind, HEADER_BYTES, Header, decode_outcome};
use super::outbox::{Frame, Outbox};
use super::receive::{Intake, Then};
use super::scatter::Scatter;
use super::table::{Open, Table};
use crate::agent::{UNHEARD_BYTES_MAX, UNHEARD_MAX};
use crate::backend::{Job, Operation};
use crate::request::Priority;

/// Bytes asked for or sent and not yet answered; more wait here, not in the network.
const WINDOW_BYTES: u64 = 16 << 20;

/// Frames not yet answered; fewer than a target is ready to queue answers for.
const WINDOW_FRAMES: usize = 1024;

/// Frames kept ready to send: enough to fill a socket's buffer in one call.
const FRAMES_READY_MAX: usize = 32;

/// As [`WINDOW_BYTES`], for requests that give way: what others may find in the network before them.
const BACKGROUND_BYTES: u64 = 4 << 20;

/// Frames that may be ready before one of a request that gives way.
const BACKGROUND_FRAMES_READY_MAX: usize = 2;

const _: () = assert!(WINDOW_FRAMES + UNHEARD_MAX < super::target::ANSWERS_MAX);

/// The requests of one connection.
#[derive(Default)]
pub(super) struct Initiator {
    table: Mutex<Table>,
    bytes_open: AtomicU64,
    /// Of requests that give way.
    background_open: AtomicU64,
    frames_open: AtomicUsize,
    /// The connections to the same peer, this one among them.
    pub(super) lanes: OnceLock<Weak<Lanes>>,
}

impl Initiator {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, open: Open) -> u64 {
        self.bytes_open
            .fetch_add(open.chunk.bytes, Ordering::AcqRel);
        if open.active.priority == Priority::Background {
            self.background_open
                .fetch_add(open.chunk.bytes, Ordering::AcqRel);
        }
        let mut table = self.table();
        match open.kind {
            FrameKind::Notify => {
                table.notices += 1;
                table.notice_bytes += open.notice_bytes;
            }
            _ => {
                self.frames_open.fetch_add(1, Ordering::AcqRel);
                if !table.owes_data() {
                    table.since = Some(Instant::now());
                }
            }
        }
        let id = table.next;
        table.next += 1;
        table.open.insert(id, open);
        id
    }

    /// Whether one more notification may be sent alone.
    fn may_notify(&self) -> bool {
        let table = self.table();
        table.notices < UNHEARD_MAX && table.notice_bytes < UNHEARD_BYTES_MAX
    }

    /// Since when there has been data without an answer; none if there is none.
    pub(super) fn owed_since(&self) -> Option<Instant> {
        let table = self.table();
        table.since.filter(|_| table.owes_data())
    }

    fn leave(&self, open: &Open) {
        self.bytes_open
            .fetch_sub(open.chunk.bytes, Ordering::AcqRel);
        if open.active.priority == Priority::Background {
            self.background_open
                .fetch_sub(open.chunk.bytes, Ordering::AcqRel);
        }
        if open.kind != FrameKind::Notify {
            self.frames_open.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The request whose turn it is.
    fn next(&self, outbox: &mut Outbox) -> Option<Arc<Active>> {
        let first = outbox.jobs.pop_front();
        if first.is_some()
            || outbox.frames.len() >= BACKGROUND_FRAMES_READY_MAX
            || self.background_open.load(Ordering::Acquire) >= BACKGROUND_BYTES
        {
            return first;
        }
        outbox.background.pop_front()
    }

    /// Cuts waiting requests, in turn, into as many frames as the window allows, and notifications likewise.
    pub(super) fn refill(&self, outbox: &mut Outbox) {
        self.refill_with_data(outbox);
        while self.may_notify()
            && let Some(active) = outbox.notices.pop_front()
        {
            let frame = self.notification(&active);
            outbox.frames.push_back(frame);
        }
    }

    fn refill_with_data(&self, outbox: &mut Outbox) {
        while outbox.frames.len() < FRAMES_READY_MAX
            && self.bytes_open.load(Ordering::Acquire) < WINDOW_BYTES
            && self.frames_open.load(Ordering::Acquire) < WINDOW_FRAMES
        {
            let Some(active) = self.next(outbox) else {
                return;
            };
            if self.bytes_open.load(Ordering::Acquire) >= active.share {
                // Goes on when something of it is answered, unless others have taken the rest by then.
                return outbox.put_back(active);
            }
            let mut state = active.lock();
            let Some(cut) = active.cut(&mut state) else {
                let next = state.next();
                drop(state);
                self.follow(&active, next, outbox);
                continue;
            };
            let more = !state.is_all_cut();
            drop(state);
            outbox.frames.push_back(self.frame(&active, cut));
            if more {
                outbox.queue(active);
            }
        }
    }

    fn frame(&self, active: &Arc<Active>, cut: Cut) -> Frame {
        let mut head = Vec::with_capacity(64 + cut.access.ranges.len() * 16);
        cut.access.encode(&mut head);
        let (kind, payload_bytes, pieces, payload) = match active.plan.operation {
            Operation::Read if active.plan.sums => (FrameKind::Sums, 0, cut.pieces, None),
            Operation::Read => (FrameKind::Read, 0, cut.pieces, None),
            Operation::Write => {
                let scatter = Scatter::of_plan(active.plan.clone(), cut.pieces);
                (FrameKind::Write, cut.chunk.bytes, Vec::new(), Some(scatter))
            }
        };
        let id = self.enter(Open {
            active: active.clone(),
            kind,
            chunk: cut.chunk,
            counts: true,
            pieces,
            notice_bytes: 0,
        });
        let header = Header {
            kind,
            head_bytes: head.len() as u32,
            id,
            payload_bytes,
        };
        let mut bytes = Vec::with_capacity(HEADER_BYTES + head.len());
        header.encode(&mut bytes);
        bytes.append(&mut head);
        Frame::new(bytes, payload)
    }

    fn notification(&self, active: &Arc<Active>) -> Frame {
        let notification = active
            .lock()
            .job
            .as_ref()
            .and_then(Job::notification)
            .cloned()
            .unwrap_or_default();
        let kind = FrameKind::Notify;
        let open = Open {
            active: active.clone(),
            kind,
            chunk: Chunk::default(),
            counts: true,
            pieces: Vec::new(),
            notice_bytes: notification.len(),
        };
        let id = self.enter(open);
        let head_bytes = notification.len() as u32;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + notification.len());
        Header {
            kind,
            head_bytes,
            id,
            payload_bytes: 0,
        }
        .encode(&mut bytes);
        bytes.extend_from_slice(&notification);
        Frame::new(bytes, None)
    }

    fn follow(&self, active: &Arc<Active>, next: Next, outbox: &mut Outbox) {
        match next {
            Next::Nothing => {}
            Next::Notify => outbox.notices.push_back(active.clone()),
            Next::Settle(job, outcome) => outbox.settled.push((job, outcome)),
        }
    }

    /// Takes requests that were given up out of the queue, where a full window would keep them.
    pub(super) fn sweep(&self, outbox: &mut Outbox) {
        let mut jobs = std::mem::take(&mut outbox.jobs);
        jobs.append(&mut outbox.background);
        for active in jobs {
            match active.give_up() {
                None => outbox.queue(active),
                Some(next) => self.follow(&active, next, outbox),
            }
        }
        for active in std::mem::take(&mut outbox.notices) {
            match active.give_up_notice() {
                None => outbox.notices.push_back(active),
                Some(next) => self.follow(&active, next, outbox),
            }
        }
    }

    /// An answer has begun.
    pub(super) fn begin(
        &self,
        connection: &Connection,
        header: &Header,
        head: &[u8],
    ) -> Result<Intake> {
        match header.kind {
            FrameKind::Data => self.begin_data(header),
            FrameKind::Done if header.payload_bytes == 0 => {
                let outcome = decode_outcome(head)?;
                let open = self.answered(header.id)?;
                if outcome.is_ok() && open.kind.asks_for_bytes() {
                    return Err(breach(header, "a read is answered without bytes"));
                }
                self.complete(connection, &open, outcome);
                Ok(Intake::NOTHING)
            }
            _ => Err(breach(header, "not an answer")),
        }
    }

    fn begin_data(&self, header: &Header) -> Result<Intake> {
        let mut table = self.table();
        let Some(open) = table.open.get_mut(&header.id) else {
            return Err(breach(header, "no such request is open"));
        };
        let wanted: u64 = open.pieces.iter().map(|piece| piece.len).sum();
        if !open.kind.asks_for_bytes() || wanted != header.payload_bytes {
            return Err(breach(header, "not what was asked for"));
        }
        let pieces = std::mem::take(&mut open.pieces);
        let (active, wanted) = (open.active.clone(), open.counts);
        drop(table);
        let scatter = || Scatter::of_plan(active.plan.clone(), pieces);
        Ok(Intake {
            left: header.payload_bytes,
            scatter: wanted.then(scatter),
            then: Then::Arrived(active),
        })
    }

    /// An answer is complete.
    pub(super) fn finish(
        &self,
        connection: &Connection,
        header: &Header,
        intake: Intake,
    ) -> Result<()> {
        if let Then::Arrived(_) = intake.then {
            let open = self.answered(header.id)?;
            self.complete(connection, &open, Ok(()));
        }
        Ok(())
    }

    fn answered(&self, id: u64) -> Result<Open> {
        let mut table = self.table();
        let open = table.open.remove(&id);
        let Some(open) = open else {
            let text = format!("answer to request {id}, which is not open");
            return Err(Error::new(ErrorKind::Corrupt, text));
        };
        if open.kind == FrameKind::Notify {
            table.notices -= 1;
            table.notice_bytes -= open.notice_bytes;
        }
        drop(table);
        self.leave(&open);
        Ok(open)
    }

    fn complete(&self, connection: &Connection, open: &Open, outcome: Result<()>) {
        if !open.counts {
            // Given up, or brought by another connection.
            return;
        }
        let mut state = open.active.lock();
        state.close();
        match outcome {
            // Nothing else of a write finds the peer busy: its bytes are in place.
            Err(error) if open.chunk.notifies && error.kind() == ErrorKind::Busy => {
                state.repeat_notice();
            }
            Err(error) => state.fail(|| error),
            Ok(()) => {}
        }
        let next = state.next();
        drop(state);
        match next {
            Next::Nothing => {}
            Next::Settle(job, outcome) => job.settle(outcome),
            Next::Notify => connection.outbox().notices.push_back(open.active.clone()),
        }
    }

    /// Lets go of the memory of reads that were given up: what still arrives for them is dropped. The caller holds the
    /// receiver, so nothing is being received. The last connection that does so settles them. Writes that were given up end
    /// with the answers to what was sent of them, but do not wait for that to their notifications.
    pub(super) fn reap(&self) {
        let mut ended = Vec::new();
        for open in self.table().open.values_mut() {
            if open.counts && open.kind == FrameKind::Notify {
                if let Some(next) = open.active.give_up_notice() {
                    open.counts = false;
                    if let Next::Settle(job, outcome) = next {
                        ended.push((job, outcome));
                    }
                }
                continue;
            }
            let mut state = open.active.lock();
            let reads = open.active.plan.operation == Operation::Read;
            if reads && open.counts && state.yield_memory() {
                open.counts = false;
                state.close();
                if let Next::Settle(job, outcome) = state.next() {
                    ended.push((job, outcome));
                }
            }
        }
        ended
            .into_iter()
            .for_each(|(job, outcome)| job.settle(outcome));
    }

    /// Whether what arrives for a frame is dropped.
    pub(super) fn is_dropped(&self, id: u64) -> bool {
        self.table().open.get(&id).is_some_and(|open| !open.counts)
    }

    /// The connection stands still: what it owes of reads goes over the others, as does what was not begun. Writes that
    /// were begun stay: they may still land. The caller holds the receiver, so nothing is being received.
    pub(super) fn hand_over(&self, connection: &Connection) {
        let Some(lanes) = self.lanes.get().and_then(Weak::upgrade) else {
            return;
        };
        let mut outbox = connection.outbox();
        let mut jobs = std::mem::take(&mut outbox.jobs);
        jobs.append(&mut outbox.background);
        jobs.append(&mut outbox.take_notices());
        drop(outbox);
        let (mut rest, mut ended) = (Vec::from_iter(jobs), Vec::new());
        for open in self.table().open.values_mut() {
            if !open.counts || !open.kind.asks_for_bytes() {
                continue;
            }
            let mut state = open.active.lock();
            open.counts = false;
            state.close();
            state.hand_back(open.chunk);
            match state.next() {
                Next::Settle(job, outcome) => ended.push((job, outcome)),
                _ => rest.push(open.active.clone()),
            }
        }
        let mut seen = HashSet::new();
        rest.retain(|active| seen.insert(Arc::as_ptr(active)));
        for active in rest {
            if !lanes.queue_but(&active, Some(connection)) {
                // Nobody else is left: it goes on when the connection does.
                connection.outbox().queue(active);
            }
        }
        for (job, outcome) in ended {
            job.settle(outcome);
        }
    }

    /// The connection has ended: nothing of any request is sent or received on it any more. What is left of requests goes
    /// to the other connections, if there are any; of what was sent, only reads: a write may still land.
    pub(super) fn end(&self, jobs: LinkedList<Arc<Active>>, reason: &str) {
        let lanes = self.lanes.get().and_then(Weak::upgrade);
        let lanes = lanes.filter(|lanes| lanes.is_alive());
        if lanes.is_some() {
            tracing::warn!(
                reason,
                "a tcp connection was lost; the others to the peer go on"
            );
        }
        let lost = || Error::new(ErrorKind::PeerLost, reason.to_owned());
        let open = std::mem::take(&mut self.table().open);
        let (mut rest, mut ended) = (Vec::from_iter(jobs), Vec::new());
        for open in open.into_values().filter(|open| open.counts) {
            let mut state = open.active.lock();
            state.close();
            match &lanes {
                Some(_) if open.kind.asks_for_bytes() => {
                    state.hand_back(open.chunk);
                    rest.push(open.active.clone());
                }
                _ => state.fail(lost),
            }
            if let Next::Settle(job, outcome) = state.next() {
                ended.push((job, outcome));
            }
        }
        let mut seen = HashSet::new();
        rest.retain(|active| seen.insert(Arc::as_ptr(active)));
        for active in rest {
            if !lanes.as_ref().is_some_and(|lanes| lanes.queue(&active)) {
                let mut state = active.lock();
                state.fail(lost);
                if let Next::Settle(job, outcome) = state.next() {
                    ended.push((job, outcome));
                }
            }
        }
        for (job, outcome) in ended {
            job.settle(outcome);
        }
    }

    /// Starts a request. Whether there is something to cut.
    pub(super) fn start(&self, active: &Arc<Active>, outbox: &mut Outbox) -> bool {
        let mut state = active.lock();
        let next = state.next();
        drop(state);
        match next {
            Next::Nothing => {
                outbox.queue(active.clone());
                true
            }
            next => {
                self.follow(active, next, outbox);
                false
            }
        }
    }
}

fn breach(header: &Header, what: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("{:?} frame {}: {what}", header.kind, header.id),
    )
}
