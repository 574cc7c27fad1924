//! A process that uses memory of ours, seen from the end that owns it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::Access;
use super::link::{Link, Received, Wake};
use super::message::{Message, Outcome};
use crate::agent::{Door, Exports, Sender};
use crate::backend::Operation;
use crate::reactor::{Interest, Reactor, Source};
use crate::region::{RegionCore, RegionId, RegionKey};

/// How long an agent that goes waits for others to let go of its memory, all together.
const PARTING_MAX: Duration = Duration::from_secs(1);

/// Messages that are still read when a path ends; a socket holds fewer.
const UNREAD_MAX: usize = 65_536;

/// Regions that one client may use.
const USED_MAX: usize = 65_536;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the server and its clients share.
pub(super) struct Lender<A> {
    pub(super) access: Arc<A>,
    pub(super) exports: Arc<Exports>,
    /// When nobody is waited for any more; set by the first client that is still there when the agent goes.
    pub(super) parting: OnceLock<Instant>,
}

/// A process that uses memory of ours. Lives until it has let go of everything, or is dead.
pub(super) struct Client<A> {
    link: Arc<Link>,
    lender: Arc<Lender<A>>,
    door: Door,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    name: Option<Arc<str>>,
    /// With the region that waits for it, if it is being deregistered.
    used: HashMap<RegionId, Option<Arc<RegionCore>>>,
    /// Nothing can be sent or received any more.
    closed: bool,
    /// Nothing is handed out any more.
    parting: bool,
}

impl<A: Access> Client<A> {
    /// Starts to listen to a process that connected.
    pub(super) fn start(
        socket: OwnedFd,
        lender: &Arc<Lender<A>>,
        reactor: &Arc<Reactor>,
    ) -> Result<Arc<Self>> {
        let client = Arc::new(Self {
            link: Arc::new(Link::new(socket, reactor)?),
            lender: lender.clone(),
            door: lender.exports.inbox().door(),
            state: Mutex::default(),
        });
        let messages = Arc::new(Messages(client.clone()));
        client
            .link
            .watch(messages, Arc::new(Death(client.clone())))?;
        Ok(client)
    }

    fn handle(self: &Arc<Self>, message: Message) -> Result<()> {
        match message {
            Message::Hello { name, wanted } => {
                let outcome = match self.greet(&name, wanted) {
                    Ok(()) => self.lender.access.welcome(),
                    Err(error) => Outcome::of(Err(error)),
                };
                self.answer(0, outcome)
            }
            Message::Map { id, region, key } => match self.map(region, &key) {
                Ok((outcome, file)) => self.link.send(&Message::Done { id, outcome }, file),
                Err(error) => self.answer(id, Outcome::of(Err(error))),
            },
            Message::Piece {
                id,
                region,
                key,
                number,
            } => match self.piece(region, &key, number) {
                Ok((outcome, file)) => self.link.send(&Message::Done { id, outcome }, file),
                Err(error) => self.answer(id, Outcome::of(Err(error))),
            },
            Message::Unmapped { region } => {
                self.let_go(region);
                Ok(())
            }
            Message::Notify { id, bytes } => {
                let name = lock(&self.state).name.clone();
                let Some(name) = name else {
                    return Err(Error::new(
                        ErrorKind::Corrupt,
                        "a notification before a greeting",
                    ));
                };
                let sender = Notifier {
                    client: Arc::downgrade(self),
                    id,
                };
                let inbox = self.lender.exports.inbox();
                match inbox.deliver(self.door, &name, bytes, sender) {
                    Some((_, outcome)) => self.answer(id, Outcome::of(outcome)),
                    None => Ok(()),
                }
            }
            Message::Done { .. } | Message::Revoke { .. } => Err(Error::new(
                ErrorKind::Corrupt,
                "a message that only owners of memory send",
            )),
            // Who shares memory computes them.
            Message::Sums { .. } => Err(Error::new(
                ErrorKind::Corrupt,
                "a question for checksums within a host",
            )),
        }
    }

    fn answer(&self, id: u64, outcome: Outcome) -> Result<()> {
        self.link.send(&Message::Done { id, outcome }, None)
    }

    fn greet(&self, name: &str, wanted: crate::metadata::Incarnation) -> Result<()> {
        let own = self.lender.exports.incarnation();
        if wanted != own {
            let text = format!("incarnation {wanted:?} is gone, this is {own:?}");
            return Err(Error::new(ErrorKind::PeerLost, text));
        }
        self.lender.exports.check_allowed(name)?;
        lock(&self.state).name = Some(name.into());
        Ok(())
    }

    /// Hands out a region.
    fn map(&self, id: RegionId, key: &RegionKey) -> Result<(Outcome, Option<OwnedFd>)> {
        if lock(&self.state).name.is_none() {
            return Err(Error::new(ErrorKind::Denied, "a map before a greeting"));
        }
        let exports = &self.lender.exports;
        let used = exports
            .admit(id, key, Operation::Write)
            .or_else(|_| exports.admit(id, key, Operation::Read))?;
        let region = used.region();
        let granted = self.lender.access.grant(region, self.link.pid())?;
        let mut state = lock(&self.state);
        if state.used.len() >= USED_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{USED_MAX} regions are in use"),
            ));
        }
        // Either this sees that the region or the agent was closed, or whoever closed it finds the entry.
        if state.parting || region.is_closed() {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("region {id} is deregistered"),
            ));
        }
        state.used.insert(id, None);
        Ok(granted)
    }

    /// Hands out a piece of a region that this process may use.
    fn piece(
        &self,
        id: RegionId,
        key: &RegionKey,
        number: u32,
    ) -> Result<(Outcome, Option<OwnedFd>)> {
        if !lock(&self.state).used.contains_key(&id) {
            return Err(Error::new(ErrorKind::Denied, "a piece before its region"));
        }
        let exports = &self.lender.exports;
        let used = exports
            .admit(id, key, Operation::Write)
            .or_else(|_| exports.admit(id, key, Operation::Read))?;
        self.lender.access.grant_piece(used.region(), number)
    }

    /// A region is being deregistered: it counts as used until this process has let go of it, if it has it.
    pub(super) fn revoke(&self, region: &Arc<RegionCore>) {
        let mut state = lock(&self.state);
        let Some(waiting @ None) = state.used.get_mut(&region.id()) else {
            return;
        };
        region.hold();
        *waiting = Some(region.clone());
        let closed = state.closed;
        drop(state);
        // After a failure only the process's death ends its use.
        if !closed
            && let Err(error) = self.link.send(
                &Message::Revoke {
                    region: region.id(),
                },
                None,
            )
        {
            tracing::debug!(%error, pid = self.link.pid(), "revoke a region");
        }
    }

    fn let_go(&self, id: RegionId) {
        let mut state = lock(&self.state);
        if let Some(Some(region)) = state.used.remove(&id) {
            region.leave();
        }
        let over = state.closed && state.used.is_empty();
        drop(state);
        if over {
            self.link.ignore_death();
        }
    }

    /// The agent goes.
    pub(super) fn part(&self) {
        let mut state = lock(&self.state);
        state.parting = true;
        let used: Vec<RegionId> = state.used.keys().copied().collect();
        drop(state);
        if !A::IN_PLACE {
            return;
        }
        // Those that are not found are being deregistered, and were revoked then.
        let found = used
            .iter()
            .filter_map(|id| self.lender.exports.find(*id).ok());
        found.for_each(|region| self.revoke(&region));
    }

    /// Nothing more comes over the socket. What is used may be until the process dies.
    fn hang_up(&self) {
        self.link.ignore_messages();
        self.take_last_words();
        let mut state = lock(&self.state);
        state.closed = true;
        let over = state.used.is_empty();
        drop(state);
        if over {
            self.link.ignore_death();
        }
        let inbox = self.lender.exports.inbox();
        inbox.shut(self.door, "the path is closed");
    }

    /// The peer may have closed the path after it had said what it let go of, and that may be unread.
    fn take_last_words(&self) {
        for _ in 0..UNREAD_MAX {
            match self.link.receive() {
                Ok(Some(Received {
                    message: Message::Unmapped { region },
                    ..
                })) => self.let_go(region),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// A dead process uses nothing.
    fn bury(&self) {
        let used = std::mem::take(&mut lock(&self.state).used);
        used.into_values()
            .flatten()
            .for_each(|region| region.leave());
        self.hang_up();
    }

    /// The reactor has ended, so nobody hears of this process any more: the last chance to learn that it has let go of
    /// memory that it uses in place.
    fn wait_for_last_words(&self) {
        let until = *self
            .lender
            .parting
            .get_or_init(|| Instant::now() + PARTING_MAX);
        let mut listens = !lock(&self.state).closed;
        while !lock(&self.state).used.is_empty() {
            match self.link.wait(until, listens) {
                Wake::Death => break,
                Wake::TimeOut => return self.keep_for_good(),
                Wake::Message => {}
            }
            match self.link.receive() {
                Ok(Some(Received {
                    message: Message::Unmapped { region },
                    ..
                })) => self.let_go(region),
                Ok(_) => {}
                // It may have ended the path and go on using memory: only its death would tell.
                Err(_) => listens = false,
            }
        }
        self.bury();
    }

    /// Memory that may be used for ever is never given back.
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn keep_for_good(&self) {
        let used = std::mem::take(&mut lock(&self.state).used);
        let pid = self.link.pid();
        for region in used.into_values().flatten() {
            let region_id = region.id();
            tracing::warn!(pid, %region_id, "a process did not let go of memory; it is kept for good");
            std::mem::forget(region);
        }
    }
}

/// Whoever has sent a notification, by its number.
struct Notifier<A> {
    client: Weak<Client<A>>,
    id: u64,
}

impl<A: Access> Sender for Notifier<A> {
    const IS_REMOTE: bool = true;

    fn answer(self, outcome: Result<()>) {
        let Some(client) = self.client.upgrade() else {
            return;
        };
        if let Err(error) = client.answer(self.id, Outcome::of(outcome)) {
            tracing::debug!(%error, pid = client.link.pid(), "answer a notification");
            client.hang_up();
        }
    }
}

/// A client's socket.
struct Messages<A>(Arc<Client<A>>);

impl<A: Access> Source for Messages<A> {
    fn ready(&self, readiness: Interest) {
        if readiness.writable && self.0.link.flush().is_err() {
            return self.0.hang_up();
        }
        // One of them: whether there is another is asked with all other sockets.
        let outcome = match self.0.link.receive() {
            Ok(None) => Ok(()),
            // Descriptors that a client sends are closed: none are asked for.
            Ok(Some(received)) => self.0.handle(received.message),
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            if error.kind() != ErrorKind::PeerLost {
                tracing::warn!(%error, pid = self.0.link.pid(), "a path within this host");
            }
            self.0.hang_up();
        }
    }

    fn orphaned(&self) {}
}

/// A client's process.
struct Death<A>(Arc<Client<A>>);

impl<A: Access> Source for Death<A> {
    fn ready(&self, _readiness: Interest) {
        self.0.bury();
    }

    fn orphaned(&self) {
        if A::IN_PLACE {
            return self.0.wait_for_last_words();
        }
        // A process that still has memory of ours mapped keeps the pages, not our mapping.
        self.0.bury();
    }
}
