//! The end that copies: maps a peer's regions once, reads and writes them in place.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::NAME;
use super::call::{Answer, Call};
use super::link::{Link, TURN_MESSAGES};
use super::message::{Message, Outcome};
use super::peer_region::PeerRegion;
use crate::agent::{CONNECT_TIMEOUT, RemoteRegion};
use crate::backend::copy::{Copier, copy_plan};
use crate::backend::{Backend, Capabilities, Channel, Job, Refusal};
use crate::descriptor::Target;
use crate::metadata::Incarnation;
use crate::plan::Plan;
use crate::reactor::{Interest, Source};
use crate::region::{MemoryKind, RegionId};

/// Notifications that may wait for their answers.
const UNANSWERED_MAX: usize = 4096;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who waits for an answer.
enum Waiting {
    Call(Arc<Call>),
    Notification(Job),
}

/// The path to one process of this host.
pub(super) struct ShmChannel {
    link: Arc<Link>,
    copier: Arc<Copier>,
    capabilities: Capabilities,
    regions: RwLock<HashMap<RegionId, Arc<PeerRegion>>>,
    waiting: Mutex<Option<HashMap<u64, Waiting>>>,
    next: AtomicU64,
    lost: OnceLock<String>,
    /// Held while a region is mapped, so that it is mapped once.
    mapping: Mutex<()>,
    own: Weak<Self>,
}

impl ShmChannel {
    /// Greets the peer, and starts listening to it.
    pub(super) fn start(
        link: Link,
        name: &str,
        wanted: Incarnation,
        copier: Arc<Copier>,
        timeout: Duration,
    ) -> Result<Arc<Self>> {
        let channel = Arc::new_cyclic(|own| Self {
            link: Arc::new(link),
            copier,
            capabilities: Capabilities {
                remote: &[MemoryKind::Host],
                notifications: true,
            },
            regions: RwLock::default(),
            waiting: Mutex::new(Some(HashMap::new())),
            next: AtomicU64::new(1),
            lost: OnceLock::new(),
            mapping: Mutex::new(()),
            own: own.clone(),
        });
        let messages: Arc<dyn Source> = Arc::new(Messages(channel.own.clone()));
        let death: Arc<dyn Source> = Arc::new(Death(channel.own.clone()));
        channel.link.watch(messages, death)?;
        let hello = Message::Hello {
            name: name.to_owned(),
            wanted,
        };
        match channel.call(0, &hello, Instant::now() + timeout)? {
            (Outcome::Done, _) => Ok(channel),
            (Outcome::Failed { code, text }, _) => Err(Outcome::failure(code, &text)),
            (Outcome::Granted { .. }, _) => Err(Error::new(
                ErrorKind::Corrupt,
                "a greeting is answered with memory",
            )),
        }
    }

    fn enter(&self, id: u64, who: Waiting) -> Result<(), (Waiting, Error)> {
        let mut waiting = lock(&self.waiting);
        let Some(open) = &mut *waiting else {
            return Err((who, self.loss()));
        };
        if open.len() >= UNANSWERED_MAX {
            let text = format!("{UNANSWERED_MAX} messages are not answered");
            return Err((who, Error::new(ErrorKind::Busy, text)));
        }
        open.insert(id, who);
        Ok(())
    }

    fn take(&self, id: u64) -> Option<Waiting> {
        lock(&self.waiting).as_mut()?.remove(&id)
    }

    fn loss(&self) -> Error {
        let reason = self.lost.get().map_or("the path is closed", String::as_str);
        Error::new(ErrorKind::PeerLost, reason.to_owned())
    }

    /// Sends a message and waits for its answer.
    fn call(&self, id: u64, message: &Message, until: Instant) -> Answer {
        let call = Arc::new(Call::default());
        self.enter(id, Waiting::Call(call.clone()))
            .map_err(|(_, error)| error)?;
        let answer = self
            .link
            .send(message, None)
            .and_then(|()| call.wait(until));
        self.take(id);
        answer
    }

    /// The peer's region, mapped if it was not.
    fn map(&self, remote: &RemoteRegion) -> Result<Arc<PeerRegion>> {
        if let Some(region) = self.mapped(remote.id) {
            return Ok(region);
        }
        let _mapping = lock(&self.mapping);
        if let Some(region) = self.mapped(remote.id) {
            return Ok(region);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let message = Message::Map {
            id,
            region: remote.id,
            key: remote.key,
        };
        let (outcome, file) = self.call(id, &message, Instant::now() + CONNECT_TIMEOUT)?;
        let (bytes, writable) = match outcome {
            Outcome::Granted { bytes, writable } => (bytes, writable),
            Outcome::Failed { code, text } => return Err(Outcome::failure(code, &text)),
            Outcome::Done => return Err(corrupt("a map is answered without memory")),
        };
        let Some(file) = file else {
            return Err(corrupt("memory is granted without a descriptor"));
        };
        let region = Arc::new(PeerRegion::map(&file, bytes, writable, remote, &self.link)?);
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        regions.insert(remote.id, region.clone());
        Ok(region)
    }

    fn mapped(&self, id: RegionId) -> Option<Arc<PeerRegion>> {
        self.regions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&id)
            .cloned()
    }

    /// The mapped regions of a plan, in its order.
    fn resolve(&self, plan: &Plan) -> Result<Vec<Arc<PeerRegion>>> {
        let mut regions = Vec::with_capacity(plan.remote.len());
        for target in &*plan.remote {
            let Target::Remote(remote) = target else {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "the remote side is our own",
                ));
            };
            // Mapped since the request was made, unless the path was lost or the region revoked meanwhile.
            regions.push(self.map(remote)?);
        }
        Ok(regions)
    }

    /// Hands a job's notification to the peer; its answer settles the job.
    fn notify(&self, job: Job) {
        let Some(bytes) = job.notification().cloned() else {
            return job.settle(Ok(()));
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        if let Err((Waiting::Notification(job), error)) = self.enter(id, Waiting::Notification(job))
        {
            return job.settle(Err(error));
        }
        if let Err(error) = self.link.send(&Message::Notify { id, bytes }, None)
            && let Some(Waiting::Notification(job)) = self.take(id)
        {
            job.settle(Err(error));
        }
    }

    fn handle(&self, message: Message, file: Option<OwnedFd>) -> Result<()> {
        match message {
            Message::Done { id, outcome } => {
                match self.take(id) {
                    // Whoever asked has stopped waiting.
                    None => {}
                    Some(Waiting::Call(call)) => call.answer(Ok((outcome, file))),
                    Some(Waiting::Notification(job)) => job.settle(match outcome {
                        Outcome::Done => Ok(()),
                        Outcome::Failed { code, text } => Err(Outcome::failure(code, &text)),
                        Outcome::Granted { .. } => {
                            Err(corrupt("a notification is answered with memory"))
                        }
                    }),
                }
                Ok(())
            }
            Message::Revoke { region } => {
                let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
                let revoked = regions.remove(&region);
                drop(regions);
                // Unmapped, and told, here or by the last copy that uses it.
                drop(revoked);
                Ok(())
            }
            _ => Err(corrupt("a message that only users of memory send")),
        }
    }

    /// The path ends: posts are refused, waiting calls and notifications fail, memory is unmapped.
    fn lose(&self, reason: &str) {
        // The first reason is the interesting one.
        let _ = self.lost.set(reason.to_owned());
        self.link.ignore_death();
        let waiting = lock(&self.waiting).take().unwrap_or_default();
        for who in waiting.into_values() {
            match who {
                Waiting::Call(call) => call.answer(Err(self.loss())),
                Waiting::Notification(job) => job.settle(Err(self.loss())),
            }
        }
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let unused = std::mem::take(&mut *regions);
        drop(regions);
        // Those in use by a copy are unmapped when it ends.
        drop(unused);
        self.link.ignore_messages();
    }
}

fn corrupt(text: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}

impl Backend for ShmChannel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn prepare(&self, plan: &Plan) -> Result<()> {
        for target in &*plan.remote {
            if let Target::Remote(remote) = target {
                self.map(remote)?;
            }
        }
        Ok(())
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
        self.copier.post(job, move |job: Job| {
            let plan = job.plan().clone();
            let outcome = copy_plan(&job, &plan, |remote| regions[remote as usize].mapping());
            drop(regions);
            match outcome {
                Ok(()) => own.notify(job),
                Err(error) => job.settle(Err(error)),
            }
        })
    }

    fn reap(&self) {
        // Copies look for themselves. A notification's job holds memory that is no longer in use.
        let mut given_up = Vec::new();
        if let Some(waiting) = &mut *lock(&self.waiting) {
            let ids: Vec<u64> = waiting
                .iter()
                .filter(|(_, who)| matches!(who, Waiting::Notification(job) if job.is_abandoned()))
                .map(|(id, _)| *id)
                .collect();
            given_up.extend(ids.iter().filter_map(|id| waiting.remove(id)));
        }
        for who in given_up {
            if let Waiting::Notification(job) = who {
                job.settle(Err(crate::backend::abandoned()));
            }
        }
    }
}

impl Channel for ShmChannel {
    fn check(&self) -> Result<()> {
        if self.lost.get().is_some() {
            return Err(self.loss());
        }
        Ok(())
    }

    fn reaches(&self, region: &RemoteRegion) -> Result<(), String> {
        if region.shareable {
            return Ok(());
        }
        Err(format!("region {} is not in shared memory", region.id))
    }

    fn detail(&self) -> String {
        format!(
            "memory mapped from process {} of this host",
            self.link.pid()
        )
    }

    fn close(&self) {
        self.lose("the peer was forgotten");
    }
}

impl Drop for ShmChannel {
    fn drop(&mut self) {
        self.lose("nobody uses the path any more");
    }
}

/// The socket of the path.
struct Messages(Weak<ShmChannel>);

impl Source for Messages {
    fn ready(&self, _readiness: Interest) {
        let Some(channel) = self.0.upgrade() else {
            return;
        };
        for _ in 0..TURN_MESSAGES {
            let outcome = match channel.link.receive() {
                Ok(None) => return,
                Ok(Some((message, file))) => channel.handle(message, file),
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                return channel.lose(&error.to_string());
            }
        }
    }

    fn orphaned(&self) {
        if let Some(channel) = self.0.upgrade() {
            channel.lose("the agent was closed");
        }
    }
}

/// The process at the other end.
struct Death(Weak<ShmChannel>);

impl Source for Death {
    fn ready(&self, _readiness: Interest) {
        if let Some(channel) = self.0.upgrade() {
            channel.lose("the process of the peer is dead");
        }
    }

    fn orphaned(&self) {}
}
