//! One connection, of either side: what it sends, what it receives, how it ends.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use super::frame::Header;
use super::initiator::Initiator;
use super::outbox::Outbox;
use super::receive::{Handler, Intake, Receiver, Stopped};
use super::target::TargetSide;
use super::tls::Session;
use crate::look::Look;
use crate::reactor::{Interest, Reactor, Source, Token};
use crate::sys::memory::{Sink, Span};
use crate::sys::socket;

/// Bytes that one connection moves before others get their turn.
pub(super) const TURN_BYTES: u64 = 4 << 20;

/// Bytes that a poster sends by itself; the rest is the reactor's work.
pub(super) const INLINE_BYTES_MAX: u64 = 64 << 10;

/// Which side of the protocol this process plays on a connection.
pub(super) enum Role {
    Initiator(Initiator),
    Target(TargetSide),
}

/// A socket, with or without encryption.
pub(super) struct Wire<'a> {
    socket: BorrowedFd<'a>,
    tls: Option<&'a Session>,
}

impl Wire<'_> {
    pub(super) fn send(&self, spans: &[Span<'_>]) -> io::Result<usize> {
        match self.tls {
            None => socket::send(self.socket, spans),
            Some(tls) => tls.send(self.socket, spans),
        }
    }

    /// Whether all that was taken to be sent is.
    fn flush(&self) -> io::Result<bool> {
        self.tls.map_or(Ok(true), |tls| tls.flush(self.socket))
    }

    /// Fills the sinks in order with what is there; 0 is the end.
    pub(super) fn receive(&self, sinks: &[Sink<'_>]) -> io::Result<usize> {
        match self.tls {
            None => socket::receive(self.socket, sinks),
            Some(tls) => tls.receive(self.socket, sinks),
        }
    }
}

struct Watch {
    token: Option<Token>,
    interest: Interest,
}

/// One TCP connection.
pub(super) struct Connection {
    own: Weak<Self>,
    stream: TcpStream,
    tls: Option<Session>,
    reactor: Arc<Reactor>,
    watch: Mutex<Watch>,
    receiver: Mutex<Receiver>,
    outbox: Mutex<Outbox>,
    pub(super) role: Role,
    /// Someone wants memory back.
    poked: AtomicBool,
    /// It stands still, and others are to bring what it owes.
    hands_over: AtomicBool,
    lost: OnceLock<String>,
    /// Bytes sent and received, frames and all.
    moved: [AtomicU64; 2],
}

/// Settles what is over, after letting go of the outbox.
pub(super) fn settle(mut outbox: MutexGuard<'_, Outbox>) {
    let settled = std::mem::take(&mut outbox.settled);
    drop(outbox);
    for (job, outcome) in settled {
        job.settle(outcome);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Takes over a non-blocking stream and has the reactor watch it.
    pub(super) fn start(
        (stream, tls): (TcpStream, Option<Session>),
        reactor: &Arc<Reactor>,
        role: Role,
    ) -> Result<Arc<Self>> {
        let receiver = match &role {
            Role::Initiator(_) => Receiver::of_connected(),
            Role::Target(_) => Receiver::of_accepted(),
        };
        let connection = Arc::new_cyclic(|own| Self {
            own: own.clone(),
            stream,
            tls,
            reactor: reactor.clone(),
            watch: Mutex::new(Watch {
                token: None,
                interest: Interest::READABLE,
            }),
            receiver: Mutex::new(receiver),
            outbox: Mutex::default(),
            role,
            poked: AtomicBool::new(false),
            hands_over: AtomicBool::new(false),
            lost: OnceLock::new(),
            moved: Default::default(),
        });
        let mut watch = lock(&connection.watch);
        let source: Arc<dyn Source> = connection.clone();
        watch.token = Some(reactor.add(connection.socket(), Interest::READABLE, source)?);
        drop(watch);
        Ok(connection)
    }

    pub(super) fn downgrade(&self) -> Weak<Self> {
        self.own.clone()
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn wire(&self) -> Wire<'_> {
        Wire {
            socket: self.stream.as_fd(),
            tls: self.tls.as_ref(),
        }
    }

    /// # Errors
    /// When the other side is known by a certificate, and that is not one of this name.
    pub(super) fn check_name(&self, name: &str) -> Result<()> {
        self.tls.as_ref().map_or(Ok(()), |tls| tls.check_name(name))
    }

    pub(super) fn outbox(&self) -> MutexGuard<'_, Outbox> {
        lock(&self.outbox)
    }

    /// # Errors
    /// Why it can't be used any more.
    pub(super) fn check(&self) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some(reason) => Err(Error::new(ErrorKind::PeerLost, reason.clone())),
        }
    }

    /// Bytes sent and received so far, frames and all.
    pub(super) fn moved(&self) -> [u64; 2] {
        self.moved
            .each_ref()
            .map(|bytes| bytes.load(Ordering::Relaxed))
    }

    fn set_interest(&self, change: impl FnOnce(&mut Interest)) {
        let mut watch = lock(&self.watch);
        let before = watch.interest;
        change(&mut watch.interest);
        if let Some(token) = watch.token
            && watch.interest != before
        {
            self.reactor.modify(token, self.socket(), watch.interest);
        }
    }

    /// Has the reactor send what waits, soon.
    pub(super) fn pump_later(&self) {
        self.set_interest(|interest| interest.writable = true);
    }

    /// Has the reactor take back memory that is no longer to be used, soon.
    pub(super) fn poke(&self) {
        self.poked.store(true, Ordering::Release);
        self.call_again();
    }

    /// Has the reactor give what the connection owes to the others of the peer, as far as it can be repeated, soon.
    pub(super) fn hand_over(&self) {
        self.hands_over.store(true, Ordering::Release);
        self.call_again();
    }

    fn call_again(&self) {
        // Not by asking for room in the socket: a peer that stands still leaves none.
        if let Some(token) = lock(&self.watch).token {
            self.reactor.nudge(token);
        }
    }

    /// Sends what waits until the socket is full, or about `budget` bytes.
    pub(super) fn pump(&self, budget: u64) {
        let mut outbox = self.outbox();
        self.pump_locked(&mut outbox, budget);
        settle(outbox);
    }

    fn pump_locked(&self, outbox: &mut Outbox, budget: u64) {
        let mut left = budget;
        while !outbox.ended {
            match self.wire().flush() {
                Ok(true) => {}
                Ok(false) => return self.pump_later(),
                Err(error) => return self.lose(&format!("send to the other side: {error}")),
            }
            if let Role::Initiator(initiator) = &self.role {
                initiator.refill(outbox);
            }
            if outbox.frames.is_empty() {
                self.set_interest(|interest| interest.writable = false);
                return;
            }
            if left == 0 {
                self.pump_later();
                return;
            }
            match outbox.send(&self.wire()) {
                Ok(Ok(sent)) => {
                    self.moved[0].fetch_add(sent, Ordering::Relaxed);
                    left = left.saturating_sub(sent);
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.pump_later();
                    return;
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return self.lose(&format!("send to the other side: {error}")),
                Err(error) => return self.lose(&error.to_string()),
            }
        }
    }

    /// Ends the connection; the reactor does the rest when it sees that.
    pub(super) fn lose(&self, reason: &str) {
        // The first reason is the interesting one.
        let _ = self.lost.set(reason.to_owned());
        // Fails only when the other side was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn receive(&self, receiver: &mut Receiver) -> Option<Stopped> {
        if receiver.has_ended() {
            return None;
        }
        let outcome = receiver.run(&self.wire(), self, TURN_BYTES);
        self.moved[1].store(receiver.received(), Ordering::Relaxed);
        match outcome {
            Ok(stopped) => {
                self.pump(TURN_BYTES);
                if let (Stopped::Budget, Some(_)) = (&stopped, &self.tls) {
                    // What is decrypted shows at no socket.
                    self.call_again();
                }
                Some(stopped)
            }
            Err(error) => {
                if error.kind() != ErrorKind::PeerLost {
                    tracing::warn!(%error, role = self.role.name(), "a connection broke the protocol");
                }
                if receiver.awaits_greeting()
                    && let Role::Target(target) = &self.role
                {
                    target.refuse(self, &error);
                }
                self.lose(&error.to_string());
                self.end(receiver);
                None
            }
        }
    }

    /// Nothing is sent or received any more: memory is given back, requests fail.
    fn end(&self, receiver: &mut Receiver) {
        receiver.end();
        let token = lock(&self.watch).token.take();
        if let Some(token) = token {
            self.reactor.remove(token, self.socket());
        }
        let mut outbox = self.outbox();
        outbox.ended = true;
        let frames = std::mem::take(&mut outbox.frames);
        let mut jobs = std::mem::take(&mut outbox.jobs);
        jobs.append(&mut outbox.background);
        jobs.append(&mut outbox.take_notices());
        drop(outbox);
        drop(frames);
        match &self.role {
            Role::Initiator(initiator) => {
                let reason = self
                    .lost
                    .get()
                    .map_or("the connection ended", String::as_str);
                initiator.end(jobs, reason);
            }
            Role::Target(target) => target.end(),
        }
    }

    /// Reads the agent's sockets in the calling thread until `done`, in place of the reactor's.
    pub(super) fn assist(&self, until: Instant, look: &Look<'_>, done: &dyn Fn() -> bool) {
        self.reactor.lead(until, look, done);
    }
}

impl Role {
    fn name(&self) -> &'static str {
        match self {
            Self::Initiator(_) => "initiator",
            Self::Target(_) => "target",
        }
    }
}

impl Handler for Connection {
    fn greeted(&self, greeting: &[u8]) -> Result<()> {
        match &self.role {
            Role::Initiator(_) => Err(Error::new(ErrorKind::Internal, "greeted twice")),
            Role::Target(target) => target.greeted(self, greeting),
        }
    }

    fn begin(&self, header: &Header, head: &[u8]) -> Result<Intake> {
        match &self.role {
            Role::Initiator(initiator) => initiator.begin(self, header, head),
            Role::Target(target) => target.begin(self, header, head),
        }
    }

    fn finish(&self, header: &Header, intake: Intake) -> Result<()> {
        match &self.role {
            Role::Initiator(initiator) => initiator.finish(self, header, intake),
            Role::Target(target) => target.finish(self, header, intake),
        }
    }
}

impl Source for Connection {
    fn ready(&self, readiness: Interest) {
        if self.poked.swap(false, Ordering::AcqRel) {
            let mut receiver = lock(&self.receiver);
            if let Role::Initiator(initiator) = &self.role {
                initiator.reap();
                let mut outbox = self.outbox();
                initiator.sweep(&mut outbox);
                settle(outbox);
            }
            receiver.yield_memory();
        }
        if self.hands_over.swap(false, Ordering::AcqRel)
            && let Role::Initiator(initiator) = &self.role
        {
            let mut receiver = lock(&self.receiver);
            initiator.hand_over(self);
            receiver.drop_payload(|id| initiator.is_dropped(id));
        }
        if readiness.writable {
            self.pump(TURN_BYTES);
        }
        if readiness.readable || self.tls.is_some() {
            self.receive(&mut lock(&self.receiver));
        }
    }

    fn orphaned(&self) {
        self.lose("the agent was closed");
        let mut receiver = lock(&self.receiver);
        if !receiver.has_ended() {
            self.end(&mut receiver);
        }
    }
}
