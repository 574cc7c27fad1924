//! A transfer that can be posted, waited for, given up, and posted again.

use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::{AgentCore, PeerCore};
use crate::backend::{Backend, Point};
use crate::estimate::Estimate;
use crate::outcome::{Completion, MemoryFate, Status, Telemetry, TransferError};
use crate::plan::Plan;
use crate::stats::Counters;

mod check;
mod connecting;
mod core;
mod half;
mod later;
mod order;
mod piece;
mod rate;
mod slow;
mod state;
mod ticket;

use self::connecting::Unconnected;
pub(crate) use self::core::{RequestCore, TRIES_MAX};
use self::later::Due;
pub(crate) use self::later::Later;
pub(crate) use self::rate::Bucket;
pub use self::rate::Priority;
use self::state::{PostNumber, Start, State, Taken};
pub(crate) use self::ticket::Ticket;

/// What applies to a request that names no deadline.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(30);

/// The longest notification, in bytes.
pub const NOTIFICATION_BYTES_MAX: usize = 64 << 10;

/// How a request differs from moving all descriptors of both lists, in order, silently.
#[derive(Clone, Debug, Default)]
pub struct RequestOptions {
    /// Move only these positions of the local and the remote list, paired in order.
    pub positions: Option<(Vec<u32>, Vec<u32>)>,
    /// Delivered to the peer once all bytes are in place; at most [`NOTIFICATION_BYTES_MAX`].
    pub notification: Option<Bytes>,
    /// Counted from the post; [`DEADLINE_DEFAULT`] if none.
    pub deadline: Option<Duration>,
    /// How many pairs each part has, in order; together they are all pairs, at most [`crate::PARTS_MAX`] parts. Parts are
    /// handed over in this order, and each can be waited for ([`Request::wait_part`]): one for each layer lets a prefill
    /// begin with the first. None: one part.
    pub parts: Vec<u32>,
    /// Who goes first where requests wait for each other.
    pub priority: Priority,
    /// Whether the CRC-32C of each descriptor is compared, as it is in the source's memory and as it has arrived in the
    /// other's, each computed where the memory is. A difference is [`ErrorKind::Corrupt`] and names the descriptor; what
    /// may be tried again is. Parts count as in place, and the notification goes, when they are compared. The source must
    /// not change meanwhile, and the peer must let its region be read. Files and objects refuse it.
    pub checksum: bool,
    /// The names of the backends that may be used, such as "shm"; all if there are none. Which of them goes first is the
    /// agent's ([`crate::AgentBuilder::prefer`]).
    pub backends: Vec<String>,
}

/// Who moves the bytes.
pub(crate) enum Route {
    /// An engine of this agent: a copy between own regions, a file, an object.
    Own(Arc<dyn Backend>),
    /// Whatever connection there is to the peer when the request is posted.
    Peer(Arc<PeerCore>),
}

/// A transfer. Its regions stay alive until it is settled, even if the request is dropped before.
pub struct Request {
    core: Arc<RequestCore>,
    agent: Arc<AgentCore>,
    route: Route,
    notification: Option<Bytes>,
    deadline: Duration,
}

impl Request {
    pub(crate) fn new(
        agent: Arc<AgentCore>,
        route: Route,
        (plan, ends): (Plan, &[usize]),
        options: RequestOptions,
    ) -> Result<Self> {
        check_notification(options.notification.as_ref())?;
        let peer = match &route {
            Route::Own(_) => None,
            Route::Peer(peer) => Some(peer),
        };
        let core = RequestCore::new(plan, ends, options.priority, &agent, peer);
        Ok(Self {
            core: Arc::new(core),
            agent,
            route,
            notification: options.notification,
            deadline: options.deadline.unwrap_or(DEADLINE_DEFAULT),
        })
    }

    /// Bytes that it moves.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.core.plan.bytes
    }

    /// Delivered with the next post, instead of the last notification.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] above [`NOTIFICATION_BYTES_MAX`].
    pub fn set_notification(&mut self, notification: Option<Bytes>) -> Result<()> {
        check_notification(notification.as_ref())?;
        self.notification = notification;
        Ok(())
    }

    /// Starts it. Small copies within this host are finished when this returns; nothing else is waited for. Without a
    /// connection that serves it the request waits for one, after those that were posted before it: the first notification
    /// to a peer, and whatever is first posted after losing it. It fails with [`ErrorKind::PeerLost`] when there is none
    /// to be had. No peer's connection is waited for by requests to others.
    ///
    /// # Errors
    /// Nothing is started then. [`ErrorKind::Busy`] when it is in flight or its memory unsettled, never for want of room: it
    /// waits for its turn, until its deadline; [`ErrorKind::NotFound`] when a region was deregistered;
    /// [`ErrorKind::Forked`] in a forked child.
    pub fn post(&self) -> Result<()> {
        self.agent.check()?;
        match &self.route {
            Route::Own(backend) => self.post_to(backend, 0, None),
            Route::Peer(peer) => self.post_to_peer(peer),
        }
    }

    fn post_to_peer(&self, peer: &Arc<PeerCore>) -> Result<()> {
        let (agent, plan) = (&self.agent, &self.core.plan);
        let mut tries = 0;
        while let Some(channel) = peer.connected(agent, plan) {
            let backend: Arc<dyn Backend> = channel;
            let Err(error) = self.post_to(&backend, peer.closings(), None) else {
                return Ok(());
            };
            tries += 1;
            peer.leave_refusing(&backend, tries, error)?;
        }
        self.post_unconnected(peer)
    }

    fn post_to(
        &self,
        backend: &Arc<dyn Backend>,
        closings: u64,
        after: Option<Point>,
    ) -> Result<()> {
        let way = Some((backend, self.counters(backend.name())));
        let number = self.start(way, closings, after)?;
        if let Err(error) = self.core.post_pieces(number) {
            self.core.withdraw();
            return Err(error);
        }
        self.core.watch(number, Some(backend));
        Ok(())
    }

    /// Has the request posted as soon as there is a connection.
    fn post_unconnected(&self, peer: &Arc<PeerCore>) -> Result<()> {
        let closings = peer.closings();
        let number = self.start(None, closings, None)?;
        peer.enter_queue();
        let posted_at = Instant::now();
        let due = Due::Unconnected(Unconnected {
            core: self.core.clone(),
            number,
            agent: Arc::downgrade(&self.agent),
            peer: Arc::downgrade(peer),
            closings,
            posted_at,
        });
        if self.agent.later().add(posted_at, due).is_err() {
            self.core.withdraw();
            let text = "nothing connects: the agent is closed, or no thread could be started";
            return Err(Error::new(ErrorKind::Busy, text));
        }
        self.core.watch(number, None);
        Ok(())
    }

    fn start(
        &self,
        way: Option<(&Arc<dyn Backend>, Arc<Counters>)>,
        closings: u64,
        after: Option<Point>,
    ) -> Result<PostNumber> {
        self.core.plan.enter()?;
        let started = self.core.start(Start {
            way,
            deadline: self.deadline,
            notice: self.notification.clone(),
            closings,
            after,
        });
        if started.is_err() {
            self.core.plan.leave();
        }
        started
    }

    fn counters(&self, backend: &'static str) -> Arc<Counters> {
        match &self.route {
            Route::Own(_) => self.agent.stats().counters(backend),
            Route::Peer(peer) => peer.counters(&self.agent, backend),
        }
    }

    /// What a post would take now, and which way it would go; connects if there is no connection.
    ///
    /// By what requests took before, to this peer or else to others, from the post to the completion: those of about the
    /// same size, or corrected from the nearest size by what the backend usually costs
    /// ([`crate::AgentBuilder::assume_cost`]). A rate that limits the request counts; what waits before it, what is
    /// scattered more than usual, and checksums do not.
    ///
    /// # Errors
    /// As [`Request::post`] when the peer can't be reached.
    pub fn estimate(&self) -> Result<Estimate> {
        self.agent.check()?;
        let plan = &self.core.plan;
        let (backend, detail, refused) = match &self.route {
            Route::Own(backend) => (backend.name(), backend.how(plan), backend.passed_over(plan)),
            Route::Peer(peer) => {
                let report = peer.report_for(&self.agent, plan)?;
                (report.backend.unwrap_or("none"), report.why, report.refused)
            }
        };
        let usual = self.agent.stats().assumed(backend);
        let all = self.agent.stats().counters(backend);
        let seen = [self.counters(backend), all]
            .map(|counters| counters.costs(plan.operation).expect(plan.bytes, &usual));
        let (ns, measured) = if seen[0].1 { seen[0] } else { seen[1] };
        let paced = self.core.pace.iter().filter_map(|rate| rate.bytes_per_s());
        let paced = paced.map(|rate| plan.bytes as f64 * 1e9 / rate as f64);
        Ok(Estimate {
            backend,
            detail,
            expected: Duration::from_nanos(paced.fold(ns, f64::max) as u64),
            measured,
            refused,
        })
    }

    /// Where it stands.
    #[must_use]
    pub fn poll(&self) -> Status {
        self.core.lock().status.clone()
    }

    /// Waits until it is done or has failed, at most `timeout`. Running out of `timeout` fails the wait, not the
    /// request.
    ///
    /// # Errors
    /// Why the transfer failed; [`ErrorKind::Timeout`] with memory in flight when `timeout` ran out first;
    /// [`ErrorKind::Invalid`] when it was never posted.
    pub fn wait(&self, timeout: Duration) -> Result<Completion, TransferError> {
        let until = Instant::now() + timeout;
        let backend = match self.core.take_result() {
            Taken::Result(result) => return result,
            Taken::Pending(backend) => backend,
        };
        let is_decided = |state: &State| !matches!(state.status, Status::InFlight);
        self.wait_for(until, backend.as_ref(), is_decided);
        match self.core.take_result() {
            Taken::Result(result) => result,
            Taken::Pending(_) => {
                let text = format!("transfer not finished after {timeout:?}");
                Err(TransferError::new(
                    Error::new(ErrorKind::Timeout, text),
                    MemoryFate::InFlight,
                ))
            }
        }
    }

    /// Waits until it is `done`, at most until `until`: looks for a while, and then sleeps.
    fn wait_for(
        &self,
        until: Instant,
        backend: Option<&Arc<dyn Backend>>,
        done: impl Fn(&State) -> bool,
    ) {
        let look = self.agent.looks().begin(until);
        let is_done = || done(&self.core.lock());
        if let Some(backend) = backend {
            self.core.lead_by(self.agent.reactor());
            backend.assist(until, &look, &is_done);
        }
        let found = look.at(is_done) || self.core.wait(until, &done);
        look.end(found);
    }

    /// How many parts it has ([`RequestOptions::parts`]), at least one.
    #[must_use]
    pub fn parts(&self) -> usize {
        self.core.parts()
    }

    /// Waits until all bytes of a part, counted from 0, are in place, at most `timeout`. A part that is in place stays so
    /// when the request fails later.
    ///
    /// # Errors
    /// Why the request failed before the part was in place; [`ErrorKind::Timeout`] with memory in flight when `timeout` ran
    /// out first; [`ErrorKind::Invalid`] for a part that there is not, and when it was never posted.
    pub fn wait_part(&self, part: usize, timeout: Duration) -> Result<(), TransferError> {
        let until = Instant::now() + timeout;
        let state = self.core.lock();
        let (known, backend) = (state.part(part), state.backends.last().cloned());
        drop(state);
        if let Some(known) = known {
            return known;
        }
        self.wait_for(until, backend.as_ref(), |state| state.part(part).is_some());
        let found = self.core.lock().part(part);
        found.unwrap_or_else(|| {
            let text = format!("part {part} not in place after {timeout:?}");
            let error = Error::new(ErrorKind::Timeout, text);
            Err(TransferError::new(error, MemoryFate::InFlight))
        })
    }

    /// Resolves as [`Request::wait_part`] does.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing; ask for another one at any time.
    pub fn part(&self, part: usize) -> PartCompleted {
        PartCompleted {
            core: self.core.clone(),
            part,
        }
    }

    /// Resolves when it is done or has failed.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing; ask for another one at any time.
    pub fn completion(&self) -> Completed {
        Completed {
            core: self.core.clone(),
        }
    }

    /// A descriptor that polls as readable while the last post is decided: done or failed, as [`Request::poll`] then
    /// says. Made at the first call; the same one, to be closed by nobody else, for as long as the request lives.
    ///
    /// The next post makes it unreadable again, so nobody has to read from it. It tells nothing of memory that is still
    /// in flight after a failure: that is for [`Request::drained`].
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the process has no descriptors left, [`ErrorKind::Forked`] in a forked child.
    pub fn event_fd(&self) -> Result<BorrowedFd<'_>> {
        self.agent.check()?;
        self.core.event_fd()
    }

    /// What the last post that was done took; none before one was. A failed post leaves it as it was.
    #[must_use]
    pub fn telemetry(&self) -> Option<Telemetry> {
        let finished = self.core.lock().finished?;
        Some(Telemetry {
            posted: finished
                .started
                .saturating_duration_since(self.agent.started()),
            post: finished.post,
            transfer: finished.done.elapsed,
            bytes: finished.done.bytes,
            descriptors: self.core.plan.descriptors,
            path: finished.done.backend,
            failovers: finished.done.failovers,
            left: finished.left,
        })
    }

    /// Resolves when no byte of its memory is in use any more: at once, unless its fate is
    /// [`MemoryFate::InFlight`] or it is running.
    pub fn drained(&self) -> Drained {
        Drained {
            core: self.core.clone(),
        }
    }

    /// As [`Request::drained`], for callers without an executor. Whether it is drained within `timeout`.
    #[must_use]
    pub fn wait_drained(&self, timeout: Duration) -> bool {
        self.core
            .wait(Instant::now() + timeout, |state| state.is_drained())
    }

    /// Asks for it to end. If it is in flight it fails with [`ErrorKind::Cancelled`] now; its memory is settled when
    /// [`Request::drained`] says so.
    pub fn cancel(&self) {
        self.core
            .give_up(Error::new(ErrorKind::Cancelled, "cancelled by the caller"));
    }
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request")
            .field("bytes", &self.bytes())
            .field("status", &self.poll())
            .finish()
    }
}

fn check_notification(notification: Option<&Bytes>) -> Result<()> {
    match notification {
        Some(bytes) if bytes.len() > NOTIFICATION_BYTES_MAX => Err(Error::invalid(
            "notification bytes",
            bytes.len(),
            0..=NOTIFICATION_BYTES_MAX,
        )),
        _ => Ok(()),
    }
}

/// Resolves to how a request ended.
pub struct Completed {
    core: Arc<RequestCore>,
}

impl Future for Completed {
    type Output = Result<Completion, TransferError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Taken::Result(result) = self.core.take_result() {
            return Poll::Ready(result);
        }
        let mut state = self.core.lock();
        if matches!(state.status, Status::InFlight) {
            RequestCore::register(&mut state, context);
            return Poll::Pending;
        }
        drop(state);
        match self.core.take_result() {
            Taken::Result(result) => Poll::Ready(result),
            // Posted again in between: look again.
            Taken::Pending(_) => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }
}

/// Resolves when a part of a request is in place, or the request has failed before.
pub struct PartCompleted {
    core: Arc<RequestCore>,
    part: usize,
}

impl Future for PartCompleted {
    type Output = Result<(), TransferError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.core.lock();
        match state.part(self.part) {
            Some(found) => Poll::Ready(found),
            None => {
                RequestCore::register(&mut state, context);
                Poll::Pending
            }
        }
    }
}

/// Resolves when a request's memory is no longer in use.
pub struct Drained {
    core: Arc<RequestCore>,
}

impl Future for Drained {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.core.lock();
        if state.is_drained() {
            return Poll::Ready(());
        }
        RequestCore::register(&mut state, context);
        Poll::Pending
    }
}
