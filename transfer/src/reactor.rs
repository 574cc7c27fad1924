//! One thread an agent that sleeps until a socket has something to do.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvcache_core::{Error, Result};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

const EVENTS_MAX: usize = 64;
const WAKE: u64 = 0;

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
    /// Called on the reactor's thread, and again as long as it holds: must not block. With neither, it was nudged.
    fn ready(&self, readiness: Interest);

    /// The reactor ends: nothing will be told any more. Called on its thread, once.
    fn orphaned(&self);
}

/// Names a watched descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token(u64);

pub(crate) struct Reactor {
    epoll: OwnedFd,
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
        let reactor = Arc::new(Self {
            epoll,
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
    pub(crate) fn add(
        &self,
        fd: BorrowedFd<'_>,
        interest: Interest,
        source: Arc<dyn Source>,
    ) -> Result<Token> {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(token, source);
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

    fn run(&self) {
        let mut events = Vec::with_capacity(EVENTS_MAX);
        while !self.closed.load(Ordering::Acquire) {
            events.clear();
            let buffer = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(self.epoll.as_fd(), buffer, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "wait for sockets; the agent's connections end");
                    break;
                }
            }
            for event in &events {
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
        }
        let sources = std::mem::take(&mut *self.lock());
        sources.into_values().for_each(|source| source.orphaned());
    }
}
