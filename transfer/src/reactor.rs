//! One thread an agent that sleeps until a socket has something to do, and those who do its work while they wait.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use crate::look::{Look, give_way};

const EVENTS_MAX: usize = 64;
const WAKE: u64 = 0;

/// How long the reactor's thread leaves the sockets to those who lead in quick succession before it looks after them: as
/// long as what comes between two of them may wait.
const LINGER: Duration = Duration::from_micros(100);

/// Leads between two looks of the thread that are a quick succession.
const QUICK: u64 = 2;

/// What is to be told of a file descriptor. Hang-ups and errors are told as readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interest {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
}

impl Interest {
    pub(crate) const READABLE: Self = Self {
        readable: true,
        writable: false,
    };

    fn flags(self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN | EventFlags::RDHUP, self.readable);
        flags.set(EventFlags::OUT, self.writable);
        flags
    }
}

/// Something with a file descriptor that the reactor watches.
pub(crate) trait Source: Send + Sync {
    /// Called on the reactor's thread or on one that leads, never on two at once, and again as long as it holds: must not
    /// block. With neither, it was nudged.
    fn ready(&self, readiness: Interest);

    /// The reactor ends: nothing will be told any more. Called on its thread, once.
    fn orphaned(&self);
}

/// Names a watched descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token(u64);

/// Watches sockets, and calls those who own them.
///
/// Somebody who waits for what a socket brings leads: reads the sockets in the reactor's place for as long as the wait lasts,
/// which saves waking the reactor's thread, and by it the one who waits. The thread does not watch the sockets themselves
/// but a gate, which is closed meanwhile, so that it is neither woken to give up its place nor to get it back. While waits
/// follow each other quickly, as in a caller's loop, the gate stays closed between them, and the thread looks from time to
/// time whether they still do: else what comes right after a wait, or right before one, would wake the thread to no purpose.
pub(crate) struct Reactor {
    epoll: OwnedFd,
    /// Readable while `epoll` is, unless somebody leads.
    gate: OwnedFd,
    /// Held by whoever reads the sockets.
    lead: Mutex<()>,
    /// Names the thread that leads and has gone to sleep over it; 0 if none does.
    sleeper: AtomicUsize,
    /// How often somebody has led.
    leads: AtomicU64,
    /// The thread keeps the gate closed, and looks after [`LINGER`].
    lingers: AtomicBool,
    wake: OwnedFd,
    sources: Mutex<HashMap<u64, Arc<dyn Source>>>,
    /// Those to be called although their descriptors have nothing to tell; each of them once.
    nudged: Mutex<BTreeSet<u64>>,
    next: AtomicU64,
    closed: AtomicBool,
}

impl Reactor {
    /// Starts the thread; it ends after [`Reactor::close`].
    pub(crate) fn start() -> Result<(Arc<Self>, JoinHandle<()>)> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)
            .map_err(|e| Error::io("create an epoll instance", e.into()))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("create an eventfd", e.into()))?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)
            .map_err(|e| Error::io("watch an eventfd", e.into()))?;
        let gate = epoll::create(CreateFlags::CLOEXEC)
            .map_err(|e| Error::io("create an epoll instance", e.into()))?;
        epoll::add(&gate, &epoll, EventData::new_u64(WAKE), EventFlags::IN)
            .map_err(|e| Error::io("watch an epoll instance", e.into()))?;
        let reactor = Arc::new(Self {
            epoll,
            gate,
            lead: Mutex::new(()),
            sleeper: AtomicUsize::new(0),
            leads: AtomicU64::new(0),
            lingers: AtomicBool::new(false),
            wake,
            sources: Mutex::default(),
            nudged: Mutex::default(),
            next: AtomicU64::new(WAKE + 1),
            closed: AtomicBool::new(false),
        });
        let shared = reactor.clone();
        let thread = std::thread::Builder::new()
            .name("kvf-reactor".into())
            .spawn(move || shared.run())
            .map_err(|e| Error::io("start the reactor thread", e))?;
        Ok((reactor, thread))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<dyn Source>>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches `fd`, which must stay open until [`Reactor::remove`].
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`] when the reactor has ended, otherwise what the system says.
    pub(crate) fn add(
        &self,
        fd: BorrowedFd<'_>,
        interest: Interest,
        source: Arc<dyn Source>,
    ) -> Result<Token> {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        let mut sources = self.lock();
        // Under the lock under which the last ones are taken out: what comes later would stay for good.
        if self.closed.load(Ordering::Acquire) {
            let text = "the agent is closed: nothing is watched any more";
            return Err(Error::new(ErrorKind::PeerLost, text));
        }
        sources.insert(token, source);
        drop(sources);
        let added = epoll::add(&self.epoll, fd, EventData::new_u64(token), interest.flags());
        if let Err(error) = added {
            self.lock().remove(&token);
            return Err(Error::io("watch a file descriptor", error.into()));
        }
        Ok(Token(token))
    }

    pub(crate) fn modify(&self, token: Token, fd: BorrowedFd<'_>, interest: Interest) {
        let data = EventData::new_u64(token.0);
        if let Err(error) = epoll::modify(&self.epoll, fd, data, interest.flags()) {
            tracing::error!(%error, "change what is watched of a file descriptor");
        }
    }

    /// Forgets `fd`; an event that was already taken may still be told.
    pub(crate) fn remove(&self, token: Token, fd: BorrowedFd<'_>) {
        if let Err(error) = epoll::delete(&self.epoll, fd) {
            tracing::error!(%error, "stop watching a file descriptor");
        }
        self.lock().remove(&token.0);
    }

    /// Has the source of a watched descriptor called soon, whatever the descriptor's state.
    pub(crate) fn nudge(&self, token: Token) {
        let mut nudged = self.nudged.lock().unwrap_or_else(PoisonError::into_inner);
        if nudged.insert(token.0) {
            drop(nudged);
            self.wake();
        }
    }

    fn run_nudged(&self) {
        if self.closed.load(Ordering::Acquire) {
            // Left readable, so that the thread sees it whoever leads.
            return;
        }
        // Before the list is taken, so that what is added later wakes the thread again.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        let mut nudged = self.nudged.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = std::mem::take(&mut *nudged);
        drop(nudged);
        for token in tokens {
            let source = self.lock().get(&token).cloned();
            if let Some(source) = source {
                source.ready(Interest {
                    readable: false,
                    writable: false,
                });
            }
        }
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // Only fails when the counter is full, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Does the reactor's work in the calling thread until `done` or `until`, or not at all if somebody else does as long
    /// as it looks. Sleeps only after the look.
    ///
    /// What makes it `done` happens either in that work, or is followed by a [`Reactor::kick`]. `done` synchronises with it.
    pub(crate) fn lead(&self, until: Instant, look: &Look<'_>, done: &dyn Fn() -> bool) {
        let lead = loop {
            if let Some(lead) = self.try_lead() {
                break lead;
            }
            if done() || !look.goes_on() {
                return;
            }
            give_way();
        };
        self.leads.fetch_add(1, Ordering::Relaxed);
        if !self.lingers.load(Ordering::SeqCst) {
            self.set_gate(EventFlags::empty());
        }
        // Given back even if a source panics.
        let _leading = Leading {
            reactor: self,
            lead: Some(lead),
        };
        let mut events = Vec::with_capacity(EVENTS_MAX);
        while look.goes_on() {
            if done() || self.closed.load(Ordering::Acquire) {
                return;
            }
            match self.serve(&mut events, Some(&Timespec::default())) {
                Ok(0) => give_way(),
                Ok(_) => {}
                Err(_) => return,
            }
        }
        // Before it is asked once more: whoever decides from now on kicks.
        self.sleeper.store(this_thread(), Ordering::Release);
        while !done() && !self.closed.load(Ordering::Acquire) {
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return;
            };
            let left = Timespec::try_from(left).ok();
            if self.serve(&mut events, left.as_ref()).is_err() {
                return;
            }
        }
    }

    /// Has whoever leads look whether it is done. Costs nothing if that is this thread, nobody, or somebody who looks
    /// anyway.
    pub(crate) fn kick(&self) {
        let sleeper = self.sleeper.load(Ordering::Acquire);
        if sleeper != 0 && sleeper != this_thread() {
            self.wake();
        }
    }

    fn try_lead(&self) -> Option<MutexGuard<'_, ()>> {
        match self.lead.try_lock() {
            Ok(lead) => Some(lead),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn set_gate(&self, flags: EventFlags) {
        if let Err(error) = epoll::modify(&self.gate, &self.epoll, EventData::new_u64(WAKE), flags)
        {
            tracing::error!(%error, "change what the reactor's thread watches");
        }
    }

    /// Waits for sockets, at most so long, and calls their sources. How many had something to tell.
    fn serve(
        &self,
        events: &mut Vec<epoll::Event>,
        left: Option<&Timespec>,
    ) -> rustix::io::Result<usize> {
        events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), left) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        for event in &*events {
            // The field is not aligned, so it is copied out.
            let (data, flags) = ({ event.data }, { event.flags });
            if data.u64() == WAKE {
                self.run_nudged();
                continue;
            }
            let source = self.lock().get(&data.u64()).cloned();
            if let Some(source) = source {
                source.ready(Interest {
                    readable: flags.intersects(
                        EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR,
                    ),
                    writable: flags.contains(EventFlags::OUT),
                });
            }
        }
        Ok(events.len())
    }

    /// Sleeps until sockets have something to tell and nobody leads, and calls their sources. `seen` is how often somebody
    /// had led at the last look.
    fn turn(&self, events: &mut Vec<epoll::Event>, seen: &mut u64) -> rustix::io::Result<()> {
        let lingers = self.lingers.load(Ordering::SeqCst);
        let linger = Timespec::try_from(LINGER).ok();
        events.clear();
        let spare = rustix::buffer::spare_capacity(events);
        match epoll::wait(&self.gate, spare, linger.as_ref().filter(|_| lingers)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let before = std::mem::replace(seen, self.leads.load(Ordering::Relaxed));
        let led = seen.wrapping_sub(before);
        match lingers {
            true if led == 0 => {
                self.lingers.store(false, Ordering::SeqCst);
                // Also if somebody leads now: whoever has just left may have left the gate to this thread.
                self.set_gate(EventFlags::IN);
                return Ok(());
            }
            false if led >= QUICK => {
                self.lingers.store(true, Ordering::SeqCst);
                self.set_gate(EventFlags::empty());
            }
            _ => {}
        }
        let mut lead = self.try_lead();
        if lead.is_none() && !self.lingers.load(Ordering::SeqCst) {
            // Whoever began to lead has not closed the gate yet, and may have left before it is closed here.
            self.set_gate(EventFlags::empty());
            lead = self.try_lead();
            if lead.is_some() {
                self.set_gate(EventFlags::IN);
            }
        }
        match lead {
            None => Ok(()),
            Some(_lead) => self.serve(events, Some(&Timespec::default())).map(drop),
        }
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut seen = 0;
        while !self.closed.load(Ordering::Acquire) {
            if let Err(error) = self.turn(&mut events, &mut seen) {
                tracing::error!(%error, "wait for sockets; the agent's connections end");
                self.closed.store(true, Ordering::Release);
            }
        }
        let sources = std::mem::take(&mut *self.lock());
        sources.into_values().for_each(|source| source.orphaned());
    }
}

/// Gives the reactor's work back to its thread.
struct Leading<'a> {
    reactor: &'a Reactor,
    lead: Option<MutexGuard<'a, ()>>,
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        self.reactor.sleeper.store(0, Ordering::Release);
        // Before the gate is opened: the thread that it wakes finds the place free.
        drop(self.lead.take());
        if !self.reactor.lingers.load(Ordering::SeqCst) {
            self.reactor.set_gate(EventFlags::IN);
        }
    }
}

/// Tells threads apart; never 0.
fn this_thread() -> usize {
    thread_local! {
        static PLACE: u8 = const { 0 };
    }
    PLACE.with(|place| std::ptr::from_ref(place).addr())
}
