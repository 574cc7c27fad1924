//! Everything that one thread at a time looks at: the worker, and who is connected by it.

use std::collections::{HashMap, LinkedList, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::active::Active;
use super::frame::{Frame, Origin, Session, To};
use super::user::{User, own_namespace};
use super::using::{Shared, Using};
use crate::agent::Exports;
use crate::backend::Job;
use crate::backend::giving_way::GivingWay;
use crate::backend::late::Late;
use crate::backend::unix::{Call, Message, Waiting};
use crate::metadata::Incarnation;
use crate::region::{RegionCore, RegionId};
use crate::sys::ucx::{EndpointId, Event, Worker};

/// Peers that may use memory of ours.
pub(super) const USERS_MAX: usize = 4096;

/// How long a path that ends waits for what is under way on it.
const ENDING_MAX: Duration = Duration::from_secs(1);

/// Who is at the other end of an endpoint.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// One that uses our memory.
    User(Session),
    /// One whose memory we use.
    Using(Session),
}

pub(super) struct State {
    pub(super) worker: Worker,
    pub(super) exports: Arc<Exports>,
    pub(super) origin: Origin,
    pub(super) users: HashMap<Session, User>,
    pub(super) using: HashMap<Session, Using>,
    pub(super) sides: HashMap<EndpointId, Side>,
    pub(super) jobs: HashMap<usize, Active>,
    next_job: usize,
    /// Jobs that may have something to do.
    pub(super) ready: VecDeque<usize>,
    /// Those of them that give way to the others.
    pub(super) behind: VecDeque<usize>,
    /// Deregistered regions that UCX or a peer may still use; each counts as a user of its region.
    pub(super) leaving: Vec<Arc<RegionCore>>,
    /// Answers that others give.
    pub(super) late: Arc<Late<Session>>,
    /// Jobs that are over, to be settled without the lock.
    pub(super) settled: Vec<(Job, Result<()>)>,
    /// Nobody is let in any more.
    pub(super) is_closed: bool,
}

impl State {
    pub(super) fn new(worker: Worker, exports: Arc<Exports>) -> Self {
        let origin = Origin {
            host: exports.host(),
            namespace: own_namespace(),
            pid: std::process::id(),
            address: worker.address().to_vec(),
        };
        Self {
            worker,
            exports,
            origin,
            users: HashMap::new(),
            using: HashMap::new(),
            sides: HashMap::new(),
            jobs: HashMap::new(),
            next_job: 0,
            ready: VecDeque::new(),
            behind: VecDeque::new(),
            leaving: Vec::new(),
            late: Arc::default(),
            settled: Vec::new(),
            is_closed: false,
        }
    }

    /// Greets the agent with this worker; the call tells its answer.
    pub(super) fn connect(
        &mut self,
        address: &[u8],
        wanted: Incarnation,
    ) -> Result<(Session, Arc<Shared>, Arc<Call>)> {
        if self.is_closed {
            return Err(Error::new(ErrorKind::Cancelled, "the agent is closed"));
        }
        let session = Session::random()?;
        let endpoint = self.worker.connect(address)?;
        let shared = Arc::<Shared>::default();
        let call = Arc::<Call>::default();
        // Nobody has closed it, and it is the first: it is entered.
        let _ = shared.unanswered.enter(0, Waiting::Call(call.clone()));
        let using = Using {
            endpoint,
            to: None,
            shared: shared.clone(),
            held: HashMap::new(),
            asked: HashMap::new(),
            summing: HashMap::new(),
            jobs: 0,
            background: GivingWay::default(),
            unsent: LinkedList::new(),
            ending: None,
            is_parted: false,
        };
        self.using.insert(session, using);
        self.sides.insert(endpoint, Side::Using(session));
        let greeting = Frame {
            to: To::New(self.origin.clone()),
            from: session,
            message: Message::Hello {
                name: self.exports.name().to_string(),
                wanted,
            },
        };
        if let Err(error) = self.worker.send(endpoint, greeting.encode()) {
            self.lose(session, &error.to_string());
            return Err(error);
        }
        Ok((session, shared, call))
    }

    /// What UCX uses to reach the peer.
    pub(super) fn transports(&self, session: Session) -> Result<String> {
        let gone = || Error::new(ErrorKind::PeerLost, "the path is closed");
        let using = self.using.get(&session).ok_or_else(gone)?;
        self.worker.transports(using.endpoint)
    }

    /// Says something to the peer that we use.
    pub(super) fn ask(&mut self, session: Session, message: Message) -> Result<()> {
        let gone = || Error::new(ErrorKind::PeerLost, "the path is closed");
        let using = self.using.get(&session).ok_or_else(gone)?;
        let frame = Frame {
            to: To::Known(using.to.ok_or_else(gone)?),
            from: session,
            message,
        };
        self.worker.send(using.endpoint, frame.encode())
    }

    pub(super) fn post(&mut self, session: Session, job: Job) {
        let Some(using) = self.using.get_mut(&session) else {
            let lost = Error::new(ErrorKind::PeerLost, "the path is closed");
            return self.settled.push((job, Err(lost)));
        };
        using.jobs += 1;
        let number = self.next_job;
        self.next_job += 1;
        self.jobs.insert(number, Active::new(job, session));
        self.enter(number);
    }

    /// One turn: what UCX has to tell, and what is to be handed to it. Whether there was anything to do.
    pub(super) fn turn(&mut self) -> bool {
        self.answer_late();
        let mut busy = self.worker.progress();
        for event in self.worker.events() {
            busy = true;
            self.hear(event);
        }
        busy |= self.pump();
        self.tidy();
        busy
    }

    fn hear(&mut self, event: Event) {
        match event {
            Event::Message(bytes) => match Frame::decode(&bytes) {
                Ok(frame) => self.read(frame),
                Err(error) => tracing::warn!(%error, "a message over ucx was dropped"),
            },
            Event::Over { job, outcome } => {
                if let Some(active) = self.jobs.get_mut(&job) {
                    let (session, gives_way) = (active.session, active.gives_way());
                    active.open -= 1;
                    if let Err(error) = outcome {
                        active.error.get_or_insert(error);
                    }
                    self.ready.push_back(job);
                    if let Some(using) = self.using.get_mut(&session) {
                        using.shared.arrived.fetch_add(1, Ordering::Relaxed);
                        if gives_way {
                            using.background.end();
                            self.go_on_behind(session);
                        }
                    }
                }
            }
            Event::Failed { endpoint, reason } => {
                if let Some(Side::Using(session)) = self.sides.get(&endpoint) {
                    self.lose(*session, &reason);
                }
                self.worker.close(endpoint, true);
            }
            Event::Closed(endpoint) => match self.sides.remove(&endpoint) {
                Some(Side::Using(session)) => {
                    self.lose(session, "the path is closed");
                    self.using.remove(&session);
                }
                Some(Side::User(session)) => self.cut_off(session),
                None => {}
            },
        }
    }

    fn read(&mut self, frame: Frame) {
        let Frame { to, from, message } = frame;
        match to {
            To::New(origin) => self.greeted(origin, from, message),
            To::Known(session) if self.users.contains_key(&session) => {
                self.lend(session, message);
            }
            To::Known(session) if self.using.contains_key(&session) => {
                if let Some(using) = self.using.get(&session) {
                    using.shared.arrived.fetch_add(1, Ordering::Relaxed);
                }
                self.answered(session, from, message);
            }
            // Late, for someone who is gone.
            To::Known(_) => {}
        }
    }

    /// The path ends for this reason: posts are refused, whoever waits is told, what is under way stops.
    pub(super) fn lose(&mut self, session: Session, reason: &str) {
        let Some(using) = self.using.get_mut(&session) else {
            return;
        };
        if !using.shared.lose(reason) {
            return;
        }
        using.ending = Some(Instant::now() + ENDING_MAX);
        let shared = using.shared.clone();
        for asked in std::mem::take(&mut using.asked).into_values() {
            asked
                .calls
                .iter()
                .for_each(|call| call.answer(Err(shared.loss())));
        }
        let unsent = std::mem::take(&mut using.unsent);
        for job in shared.end_waiting().into_iter().chain(unsent) {
            self.settled.push((job, Err(shared.loss())));
        }
        // Each looks whether its path is lost.
        let jobs = self.jobs.iter();
        let of_it = jobs.filter_map(|(number, job)| (job.session == session).then_some(*number));
        self.ready.extend(of_it);
    }

    /// The path stands still, and UCX withdraws nothing that was begun: the path ends, unless somebody still wants of it what
    /// could not be repeated.
    pub(super) fn give_way(&mut self, session: Session) {
        let mut of_it = self.jobs.values().filter(|job| job.session == session);
        if of_it.all(|active| active.job.is_abandoned()) {
            self.lose(session, "it stood still");
        }
    }

    /// Ends paths that are over, once nothing is under way on them or their time has run out; gives up regions.
    fn tidy(&mut self) {
        let now = Instant::now();
        let mut over = Vec::new();
        for (session, using) in &self.using {
            match using.ending {
                _ if using.is_parted => {}
                Some(_) if using.jobs == 0 => over.push((*session, false)),
                Some(until) if until <= now => over.push((*session, true)),
                _ => {}
            }
        }
        for (session, by_force) in over {
            self.part(session, by_force);
        }
        if !self.leaving.is_empty() {
            self.let_leave();
        }
    }

    /// Says that the peer's memory is used no more, if that is so, and closes the endpoint.
    fn part(&mut self, session: Session, by_force: bool) {
        let Some(using) = self.using.get_mut(&session) else {
            return;
        };
        using.is_parted = true;
        let endpoint = using.endpoint;
        if !by_force {
            let held = std::mem::take(&mut using.held);
            for region in held.into_keys() {
                self.worker.forget(endpoint, region);
                // If it cannot be said, the peer waits for the endpoint's end.
                let _ = self.ask(session, Message::Unmapped { region });
            }
        }
        self.worker.close(endpoint, by_force);
    }

    pub(super) fn let_leave(&mut self) {
        let (users, worker) = (&self.users, &mut self.worker);
        self.leaving.retain(|region| {
            let used = users
                .values()
                .any(|user| user.used.contains_key(&region.id()));
            let stays = used || !worker.deregister(region.id());
            if !stays {
                region.leave();
            }
            stays
        });
    }

    /// A region is being deregistered: it counts as used until every peer has let go of it, and UCX has.
    pub(super) fn withdraw(&mut self, region: &Arc<RegionCore>) {
        let mut used = false;
        let mut told = Vec::new();
        for (session, user) in &mut self.users {
            let Some(waiting) = user.used.get_mut(&region.id()) else {
                continue;
            };
            used = true;
            if waiting.is_none() {
                region.hold();
                *waiting = Some(region.clone());
                told.push(*session);
            }
        }
        for session in told {
            let region = region.id();
            self.tell(session, Message::Revoke { region });
        }
        if used || !self.worker.deregister(region.id()) {
            region.hold();
            self.leaving.push(region.clone());
        }
    }

    /// A region that was closed while a job was still to come that made it known to UCX.
    pub(super) fn forget_closed(&mut self, region: &RegionCore) {
        let id: RegionId = region.id();
        if region.is_closed() && !self.leaving.iter().any(|leaving| leaving.id() == id) {
            self.worker.deregister(id);
        }
    }

    /// The agent goes: every path ends, and every region that peers use is taken back.
    pub(super) fn close(&mut self) {
        self.is_closed = true;
        let sessions: Vec<_> = self.using.keys().copied().collect();
        for session in sessions {
            self.lose(session, "the agent was closed");
        }
        let used: Vec<RegionId> = self
            .users
            .values()
            .flat_map(|user| user.used.keys().copied())
            .collect();
        for region in used {
            if let Ok(region) = self.exports.find(region) {
                self.withdraw(&region);
            }
        }
    }

    /// Whether there is nothing that UCX or the thread has to go on with.
    pub(super) fn is_quiet(&self) -> bool {
        self.ready.is_empty() && self.behind.is_empty() && self.worker.is_quiet()
    }

    /// Whether something ends after a time.
    pub(super) fn has_limits(&self) -> bool {
        let ends = |using: &Using| using.ending.is_some() && !using.is_parted;
        self.using.values().any(ends)
    }

    /// Whether an operation or an answer is to come. UCX 1.13 does not always tell when it is there: what its own thread has
    /// found on datagrams (`ud`, by which queue pairs meet) lies until somebody looks.
    pub(super) fn is_owed(&self) -> bool {
        !self.worker.is_quiet() || self.using.values().any(Using::is_owed)
    }

    /// What is left when nobody is waited for any more: memory that may be in use for ever is never given back.
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    pub(super) fn end(&mut self) {
        let endpoints: Vec<_> = self.sides.keys().copied().collect();
        for endpoint in endpoints {
            self.worker.close(endpoint, true);
        }
        let until = Instant::now() + ENDING_MAX;
        while !(self.sides.is_empty() && self.jobs.is_empty()) && Instant::now() < until {
            if !self.turn() {
                std::thread::yield_now();
            }
        }
        self.look_for_deaths();
        for active in std::mem::take(&mut self.jobs).into_values() {
            std::mem::forget(active.job);
        }
        for (_, user) in self.users.drain() {
            for region in user.used.into_values().flatten() {
                let region_id = region.id();
                tracing::warn!(peer = %user.name, %region_id, "a peer did not let go of memory; it is kept for good");
                std::mem::forget(region);
            }
        }
        for region in self.leaving.drain(..) {
            std::mem::forget(region);
        }
    }

    /// Whether nothing is left that a closed agent waits for.
    pub(super) fn is_over(&self) -> bool {
        self.using.is_empty() && self.leaving.is_empty() && self.jobs.is_empty()
    }
}
