//! The end that copies: asks for a peer's regions once, reads and writes them in place.

use std::collections::{HashMap, LinkedList};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockWriteGuard, Weak};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::call::{Answer, Call, Refused, UNANSWERED_MAX, Unanswered, Waiting};
use super::held::Held;
use super::link::{Link, Received};
use super::message::{Message, Outcome};
use super::{Access, corrupt};
use crate::agent::{CONNECT_TIMEOUT, RemoteRegion};
use crate::backend::copy::{Copier, Place, Progress, Turn};
use crate::backend::{
    Backend, Capabilities, Channel, Job, NOT_WANTED, Operation, Refusal, abandoned,
};
use crate::descriptor::Target;
use crate::look::Look;
use crate::metadata::Incarnation;
use crate::plan::Plan;
use crate::reactor::{Interest, Source};
use crate::region::RegionId;

mod copying;

pub(crate) use copying::Copying;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The peer's regions that this process may use.
struct Regions<A: Access> {
    held: HashMap<RegionId, Arc<Held<A>>>,
    /// The one that is being asked for, and whether it was revoked meanwhile.
    asked: Option<(RegionId, bool)>,
}

/// The path to one process of this host.
pub(super) struct UnixChannel<A: Access> {
    link: Arc<Link>,
    /// Set once the peer has answered the greeting.
    peer: OnceLock<A::Peer>,
    access: Arc<A>,
    copier: Arc<Copier>,
    capabilities: Capabilities,
    regions: RwLock<Regions<A>>,
    unanswered: Unanswered,
    /// Whose notifications are sent when earlier ones are answered: as many as callers hold requests, none is refused.
    unsent: Mutex<LinkedList<Job>>,
    lost: OnceLock<String>,
    /// Held while a region is asked for, so that it is asked for once.
    asking: Mutex<()>,
    own: Weak<Self>,
}

impl<A: Access> UnixChannel<A> {
    /// Greets the peer, and starts listening to it.
    pub(super) fn start(
        link: Link,
        name: &str,
        wanted: Incarnation,
        (access, copier): (Arc<A>, Arc<Copier>),
        timeout: Duration,
    ) -> Result<Arc<Self>> {
        let channel = Arc::new_cyclic(|own| Self {
            link: Arc::new(link),
            peer: OnceLock::new(),
            access,
            copier,
            capabilities: Capabilities {
                local: A::LOCAL,
                remote: A::REMOTE,
                notifications: true,
                checksums: A::UNCHECKED.is_none(),
            },
            regions: RwLock::new(Regions {
                held: HashMap::new(),
                asked: None,
            }),
            unanswered: Unanswered::default(),
            unsent: Mutex::default(),
            lost: OnceLock::new(),
            asking: Mutex::new(()),
            own: own.clone(),
        });
        let messages: Arc<dyn Source> = Arc::new(Messages(channel.own.clone()));
        let death: Arc<dyn Source> = Arc::new(Death(channel.own.clone()));
        channel.link.watch(messages, death)?;
        let hello = Message::Hello {
            name: name.to_owned(),
            wanted,
        };
        let welcome = match channel.call(0, &hello, Instant::now() + timeout)? {
            (Outcome::Failed { code, text }, _) => return Err(Outcome::failure(code, &text)),
            (welcome, _) => welcome,
        };
        // Nobody else has the channel yet, so it is set once.
        let _ = channel.peer.set(A::meet(&channel.link, welcome)?);
        Ok(channel)
    }

    fn refusal(&self, refusal: Refused) -> Error {
        match refusal {
            Refused::Closed => self.loss(),
            Refused::Full => {
                let text = format!("{UNANSWERED_MAX} messages are not answered");
                Error::new(ErrorKind::Busy, text)
            }
        }
    }

    fn loss(&self) -> Error {
        let reason = self.lost.get().map_or("the path is closed", String::as_str);
        Error::new(ErrorKind::PeerLost, reason.to_owned())
    }

    /// Sends a message and waits for its answer.
    fn call(&self, id: u64, message: &Message, until: Instant) -> Answer {
        let call = Arc::new(Call::default());
        self.unanswered
            .enter(id, Waiting::Call(call.clone()))
            .map_err(|(_, refusal)| self.refusal(refusal))?;
        let answer = self
            .link
            .send(message, None)
            .and_then(|()| call.wait(until));
        self.unanswered.take(id);
        answer
    }

    fn regions(&self) -> RwLockWriteGuard<'_, Regions<A>> {
        self.regions.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self, id: RegionId) -> Option<Arc<Held<A>>> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions.held.get(&id).cloned()
    }

    /// The peer's region, asked for if this process may not use it yet.
    fn hold(&self, remote: &RemoteRegion) -> Result<Arc<Held<A>>> {
        if let Some(region) = self.held(remote.id) {
            return Ok(region);
        }
        let _asking = lock(&self.asking);
        if let Some(region) = self.held(remote.id) {
            return Ok(region);
        }
        self.regions().asked = Some((remote.id, false));
        let asked = self.ask(remote);
        if asked.is_err() {
            // It may be handed out all the same, too late or not as it should be; the peer would wait for it.
            self.link.send_last_word(remote.id);
        }
        let mut regions = self.regions();
        let revoked = regions.asked.take().is_some_and(|(_, revoked)| revoked);
        let region = asked?;
        if revoked {
            // The guard is gone before the region is, which tells the peer.
            drop(regions);
            let text = format!("region {} is deregistered", remote.id);
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        regions.held.insert(remote.id, region.clone());
        Ok(region)
    }

    fn ask(&self, remote: &RemoteRegion) -> Result<Arc<Held<A>>> {
        let id = self.unanswered.number();
        let message = Message::Map {
            id,
            region: remote.id,
            key: remote.key,
        };
        let granted = self.asked(id, &message)?;
        let mut piece = |number| {
            let id = self.unanswered.number();
            let message = Message::Piece {
                id,
                region: remote.id,
                key: remote.key,
                number,
            };
            self.asked(id, &message)
        };
        let memory = self.access.accept(remote, granted, &mut piece)?;
        Ok(Arc::new(Held::new(remote.id, memory, &self.link)))
    }

    /// What the peer hands out.
    fn asked(&self, id: u64, message: &Message) -> Answer {
        match self.call(id, message, Instant::now() + CONNECT_TIMEOUT)? {
            (Outcome::Failed { code, text }, _) => Err(Outcome::failure(code, &text)),
            granted => Ok(granted),
        }
    }

    /// The regions of a plan, in its order.
    fn resolve(&self, plan: &Plan) -> Result<Vec<Arc<Held<A>>>> {
        let mut regions = Vec::with_capacity(plan.remote.len());
        for target in &*plan.remote {
            let Target::Remote(remote) = target else {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "the remote side is our own",
                ));
            };
            // Asked for when the request was made, unless the path was lost or the region revoked meanwhile.
            regions.push(self.hold(remote)?);
        }
        Ok(regions)
    }

    /// Moves a job's bytes, on whatever thread.
    fn copy(
        &self,
        job: &Job,
        regions: &[Arc<Held<A>>],
        place: &mut Place,
        turn: &Turn<'_>,
    ) -> Result<Progress> {
        let peer = self.peer.get().ok_or_else(|| self.loss())?;
        let go_on = || {
            // Memory that is used in place may be gone with the peer; a mapping of our own stays.
            if A::IN_PLACE && self.lost.get().is_some() {
                return Err(self.loss());
            }
            turn.go_on(job)
        };
        let copied = A::copy(peer, job.plan(), regions, place, &go_on);
        if let Err(error) = &copied
            && error.kind() == ErrorKind::PeerLost
        {
            // The copy has seen it before the socket tells.
            self.lose(&error.to_string());
        }
        copied
    }

    /// Hands a job's notification to the peer, after those that came before it; its answer settles the job.
    fn notify(&self, job: Job) {
        if !job.notifies() {
            return job.settle(Ok(()));
        }
        job.awaits_peer();
        let mut unsent = lock(&self.unsent);
        // Whoever gives up later finds it here.
        if job.is_abandoned() {
            drop(unsent);
            return job.settle(Err(abandoned()));
        }
        unsent.push_back(job);
        drop(unsent);
        self.send_notifications();
    }

    /// Sends the notifications that wait, as many as may be unanswered.
    fn send_notifications(&self) {
        let mut failed = Vec::new();
        let mut unsent = lock(&self.unsent);
        while self.unanswered.has_room()
            && let Some(job) = unsent.pop_front()
        {
            failed.extend(self.send_notification(job).err());
        }
        drop(unsent);
        failed
            .into_iter()
            .for_each(|(job, error)| job.settle(Err(error)));
    }

    fn send_notification(&self, job: Job) -> Result<(), (Job, Error)> {
        let bytes = job.notification().cloned().unwrap_or_default();
        let id = self.unanswered.number();
        let entered = self.unanswered.enter(id, Waiting::Notification(job));
        if let Err((Waiting::Notification(job), refusal)) = entered {
            return Err((job, self.refusal(refusal)));
        }
        match self.link.send(&Message::Notify { id, bytes }, None) {
            Ok(()) => Ok(()),
            Err(error) => match self.unanswered.take(id) {
                Some(Waiting::Notification(job)) => Err((job, error)),
                // Settled by the end of the path.
                _ => Ok(()),
            },
        }
    }

    fn handle(&self, received: Received) -> Result<()> {
        let file = received.file;
        match received.message {
            Message::Done { id, outcome } => {
                match self.unanswered.take(id) {
                    // Whoever asked has stopped waiting.
                    None | Some(Waiting::GivenUp(_)) => {}
                    Some(Waiting::Call(call)) => {
                        call.answer(file.map(|file| (outcome, file)));
                    }
                    Some(Waiting::Notification(job)) => job.settle(match outcome {
                        Outcome::Done => Ok(()),
                        Outcome::Failed { code, text } => Err(Outcome::failure(code, &text)),
                        _ => Err(corrupt("a notification is answered by something else")),
                    }),
                }
                self.send_notifications();
                Ok(())
            }
            Message::Revoke { region } => {
                self.revoke(region);
                Ok(())
            }
            _ => Err(corrupt("a message that only users of memory send")),
        }
    }

    /// The peer wants a region back.
    fn revoke(&self, id: RegionId) {
        let mut regions = self.regions();
        let revoked = regions.held.remove(&id);
        match &mut regions.asked {
            Some((asked, revoked)) if *asked == id => *revoked = true,
            // The peer granted it to someone here who had stopped waiting.
            _ if revoked.is_none() => self.link.send_last_word(id),
            _ => {}
        }
        drop(regions);
        // Let go of, and told, here or by the last copy that uses it.
        if let Some(held) = revoked {
            self.access.let_go(held);
        }
    }

    /// The path ends: posts are refused, waiting calls and notifications fail, regions are let go of.
    fn lose(&self, reason: &str) {
        // The first reason is the interesting one.
        let _ = self.lost.set(reason.to_owned());
        self.link.ignore_death();
        for who in self.unanswered.close() {
            match who {
                Waiting::Call(call) => call.answer(Err(self.loss())),
                Waiting::Notification(job) => job.settle(Err(self.loss())),
                Waiting::GivenUp(_) => {}
            }
        }
        // Whoever adds to them later finds the path closed.
        let unsent = std::mem::take(&mut *lock(&self.unsent));
        for job in unsent {
            job.settle(Err(self.loss()));
        }
        let unused = std::mem::take(&mut self.regions().held);
        // Those in use by a copy are let go of when it ends.
        for held in unused.into_values() {
            self.access.let_go(held);
        }
        self.link.ignore_messages();
    }
}

impl<A: Access> Backend for UnixChannel<A> {
    fn name(&self) -> &'static str {
        A::NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// It is this process that copies, and what it copies has ended when the job is settled.
    fn fences(&self, _operation: Operation) -> bool {
        true
    }

    fn refusal(&self, plan: &Plan) -> Option<String> {
        if !plan.wants(A::NAME) {
            return Some(NOT_WANTED.to_owned());
        }
        let unchecked = A::UNCHECKED.filter(|_| plan.is_checked() || plan.sums);
        unchecked.map(str::to_owned)
    }

    fn prepare(&self, plan: &Plan) -> Result<()> {
        let regions = self.resolve(plan)?;
        self.access.make_ready(plan, &regions)
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        if self.lost.get().is_some() {
            return Err(job.refuse(self.loss()));
        }
        let regions = match self.resolve(job.plan()) {
            Ok(regions) => regions,
            Err(error) => return Err(job.refuse(error)),
        };
        let Some(own) = self.own.upgrade() else {
            return Err(job.refuse(self.loss()));
        };
        let work = Copying {
            channel: own,
            regions,
            place: Place::default(),
        };
        self.access.post(&self.copier, job, work)
    }

    /// Copies what waits to be copied; answers to notifications come by the reactor.
    fn assist(&self, until: Instant, look: &Look<'_>, done: &dyn Fn() -> bool) {
        self.copier.assist(until, done);
        if self.unanswered.is_notifying() {
            self.link.assist(until, look, done);
        }
    }

    fn reap(&self) {
        // Copies look for themselves. A notification's job holds memory that is no longer in use. In the order in which jobs
        // go from the one to the other, so that none is missed.
        let mut unsent = lock(&self.unsent);
        let mut given_up: Vec<Job> = unsent.extract_if(|job| job.is_abandoned()).collect();
        drop(unsent);
        given_up.extend(self.unanswered.take_abandoned());
        for job in given_up {
            job.settle(Err(abandoned()));
        }
        self.send_notifications();
    }
}

impl<A: Access> Channel for UnixChannel<A> {
    fn check(&self) -> Result<()> {
        if self.lost.get().is_some() {
            return Err(self.loss());
        }
        Ok(())
    }

    fn reaches(&self, region: &RemoteRegion) -> Result<(), String> {
        A::reaches(region)
    }

    fn detail(&self) -> String {
        A::detail(&self.link)
    }

    fn close(&self) {
        self.lose("the peer was forgotten");
    }
}

impl<A: Access> Drop for UnixChannel<A> {
    fn drop(&mut self) {
        self.lose("nobody uses the path any more");
    }
}

/// The socket of the path.
struct Messages<A: Access>(Weak<UnixChannel<A>>);

impl<A: Access> Source for Messages<A> {
    fn ready(&self, readiness: Interest) {
        let Some(channel) = self.0.upgrade() else {
            return;
        };
        if readiness.writable
            && let Err(error) = channel.link.flush()
        {
            return channel.lose(&error.to_string());
        }
        // One of them: whether there is another is asked with all other sockets.
        let outcome = match channel.link.receive() {
            Ok(None) => Ok(()),
            Ok(Some(received)) => channel.handle(received),
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            channel.lose(&error.to_string());
        }
    }

    fn orphaned(&self) {
        if let Some(channel) = self.0.upgrade() {
            channel.lose("the agent was closed");
        }
    }
}

/// The process at the other end.
struct Death<A: Access>(Weak<UnixChannel<A>>);

impl<A: Access> Source for Death<A> {
    fn ready(&self, _readiness: Interest) {
        if let Some(channel) = self.0.upgrade() {
            channel.lose("the process of the peer is dead");
        }
    }

    fn orphaned(&self) {}
}
