//! Everything that one thread at a time looks at: the port, and who is connected by it.

use std::collections::{HashMap, VecDeque};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::event::epoll;

use super::active::Active;
use super::card::Card;
use super::greeting::Offer;
use super::lending::{Leaving, Stranger, User};
use super::using::{Shared, Using};
use super::wire::{Heard, Wire};
use crate::agent::Exports;
use crate::backend::Job;
use crate::backend::late::Late;
use crate::backend::spare::Spare;
use crate::backend::unix::Message;
use crate::region::RegionId;
use crate::sys::verbs::{Memory, Notice};

/// What the thread is woken for, beside connections.
pub(super) const WAKE: u64 = 0;
pub(super) const COMPLETIONS: u64 = 1;
pub(super) const NOTICES: u64 = 2;
pub(super) const LISTENER: u64 = 3;

/// A connection of this agent, to a peer that it uses or of one that uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Line(pub(super) u64);

impl Line {
    /// Numbers above those of what the thread is woken for.
    const FIRST: Self = Self(16);
}

pub(super) struct State {
    pub(super) card: Card,
    pub(super) exports: Arc<Exports>,
    pub(super) listener: TcpListener,
    pub(super) spare: Spare,
    pub(super) epoll: Arc<std::os::fd::OwnedFd>,
    pub(super) strangers: HashMap<Line, Stranger>,
    pub(super) users: HashMap<Line, User>,
    pub(super) using: HashMap<Line, Using>,
    next_line: Line,
    /// Own memory that the device knows.
    pub(super) memories: HashMap<RegionId, Arc<Memory>>,
    pub(super) jobs: HashMap<u64, Active>,
    next_job: u64,
    /// Jobs that may have something to do.
    pub(super) ready: VecDeque<u64>,
    /// Wires that have something, or may have.
    hot: Vec<Line>,
    /// Deregistered regions that peers may still use.
    pub(super) leaving: Vec<Leaving>,
    /// Answers that others give.
    pub(super) late: Arc<Late<Line>>,
    /// Jobs that are over, to be settled without the lock.
    pub(super) settled: Vec<(Job, Result<()>)>,
    /// Something has a time limit.
    pub(super) is_timed: bool,
    /// Nobody is let in any more.
    pub(super) is_closed: bool,
}

impl State {
    pub(super) fn new(
        card: Card,
        exports: Arc<Exports>,
        listener: TcpListener,
        epoll: Arc<std::os::fd::OwnedFd>,
    ) -> Self {
        let spare = Spare::default();
        spare.keep();
        Self {
            card,
            exports,
            listener,
            spare,
            epoll,
            strangers: HashMap::new(),
            users: HashMap::new(),
            using: HashMap::new(),
            next_line: Line::FIRST,
            memories: HashMap::new(),
            jobs: HashMap::new(),
            next_job: 0,
            ready: VecDeque::new(),
            hot: Vec::new(),
            leaving: Vec::new(),
            late: Arc::default(),
            settled: Vec::new(),
            is_timed: false,
            is_closed: false,
        }
    }

    /// A number that no connection had.
    pub(super) fn new_line(&mut self) -> Line {
        let line = self.next_line;
        self.next_line = Line(line.0 + 1);
        line
    }

    /// Has the thread told of what comes over a connection.
    pub(super) fn watch(&self, line: Line, stream: &TcpStream) -> Result<()> {
        let data = epoll::EventData::new_u64(line.0);
        epoll::add(&self.epoll, stream.as_fd(), data, epoll::EventFlags::IN)
            .map_err(|e| Error::io("watch a connection", e.into()))
    }

    /// A wire for a peer that will be asked for a connection.
    pub(super) fn offer(&mut self) -> Result<(Line, Wire, Offer)> {
        if self.is_closed {
            return Err(Error::new(ErrorKind::Cancelled, "the agent is closed"));
        }
        let line = self.new_line();
        let (wire, offer) = self.card.wire(line.0)?;
        Ok((line, wire, offer))
    }

    /// The peer has answered with an offer of its own.
    pub(super) fn connect(
        &mut self,
        line: Line,
        (mut wire, own): (Wire, Offer),
        (stream, peer): (TcpStream, Offer),
    ) -> Result<Arc<Shared>> {
        if self.is_closed {
            return Err(Error::new(ErrorKind::Cancelled, "the agent is closed"));
        }
        self.card.connect(&mut wire, &own, &peer)?;
        self.watch(line, &stream)?;
        let shared = Arc::<Shared>::default();
        self.using
            .insert(line, Using::new(wire, stream, shared.clone()));
        self.heat(line);
        Ok(shared)
    }

    fn wire(&mut self, line: Line) -> Option<&mut Wire> {
        if let Some(user) = self.users.get_mut(&line) {
            return Some(&mut user.wire);
        }
        self.using.get_mut(&line)?.wire.as_mut()
    }

    /// Its wire is looked at from now on.
    pub(super) fn heat(&mut self, line: Line) {
        if let Some(wire) = self.wire(line)
            && !std::mem::replace(&mut wire.is_hot, true)
        {
            self.hot.push(line);
        }
    }

    /// Says something to the peer that we use.
    pub(super) fn ask(&mut self, line: Line, message: &Message) -> Result<()> {
        let gone = || Error::new(ErrorKind::PeerLost, "the path is closed");
        let using = self.using.get_mut(&line).ok_or_else(gone)?;
        if using.shared.is_lost() {
            return Err(using.shared.loss());
        }
        using.wire.as_mut().ok_or_else(gone)?.say(message)?;
        self.heat(line);
        Ok(())
    }

    pub(super) fn post(&mut self, line: Line, job: Job) {
        let Some(using) = self.using.get_mut(&line) else {
            let lost = Error::new(ErrorKind::PeerLost, "the path is closed");
            return self.settled.push((job, Err(lost)));
        };
        using.jobs += 1;
        let number = self.next_job;
        self.next_job += 1;
        self.jobs.insert(number, Active::new(job, line));
        self.enter(number);
    }

    /// One turn: what wires have to tell, and what is to be handed to them. Whether there was anything to do.
    pub(super) fn turn(&mut self) -> bool {
        self.answer_late();
        let mut busy = self.poll();
        busy |= self.pump();
        if self.is_timed {
            self.tidy();
        }
        busy
    }

    fn poll(&mut self) -> bool {
        let hot = std::mem::take(&mut self.hot);
        let mut busy = false;
        let mut heard = Vec::new();
        for line in hot {
            let Some(wire) = self.wire(line) else {
                continue;
            };
            let polled = wire.poll(&mut heard);
            self.hot.push(line);
            for heard in heard.drain(..) {
                self.hear(line, heard);
            }
            match polled {
                Ok(any) => busy |= any,
                Err(error) => self.fail(line, &error.to_string()),
            }
        }
        busy
    }

    /// Lets the thread sleep: wires tell of what comes next. False when something has come meanwhile.
    pub(super) fn arm(&mut self) -> bool {
        for line in std::mem::take(&mut self.hot) {
            let Some(wire) = self.wire(line) else {
                continue;
            };
            wire.is_hot = false;
            if let Err(error) = wire.arm() {
                self.fail(line, &error.to_string());
            }
            self.heat(line);
        }
        if self.poll() {
            return false;
        }
        for line in std::mem::take(&mut self.hot) {
            if let Some(wire) = self.wire(line) {
                wire.is_hot = false;
            }
        }
        true
    }

    fn hear(&mut self, line: Line, heard: Heard) {
        if let Some(using) = self.using.get(&line) {
            using.shared.arrived.fetch_add(1, Ordering::Relaxed);
        }
        match heard {
            Heard::Message(message) if self.users.contains_key(&line) => self.lend(line, message),
            Heard::Message(message) => self.answered(line, message),
            Heard::Failed(error) => self.fail(line, &error.to_string()),
            Heard::Over {
                job,
                outcome,
                is_flushed,
            } => {
                if let Err(error) = &outcome
                    && !is_flushed
                {
                    self.lose(line, &error.to_string());
                }
                let using = self.using.get_mut(&line);
                let mut gives_way = false;
                if let Some(active) = self.jobs.get_mut(&job) {
                    active.open -= 1;
                    gives_way = active.gives_way();
                    if let Err(error) = outcome {
                        let lost = using.as_ref().filter(|using| using.shared.is_lost());
                        let lost = lost.filter(|_| is_flushed);
                        let error = lost.map_or(error, |using| using.shared.loss());
                        active.error.get_or_insert(error);
                    }
                    self.ready.push_back(job);
                }
                if let Some(using) = using {
                    self.ready.extend(using.waiting.drain(..));
                    if gives_way {
                        using.background.end();
                        self.go_on_behind(line);
                    }
                }
            }
        }
        self.ask_questions(line);
        self.send_notifications(line);
    }

    /// The device has something to tell beside completions.
    pub(super) fn notices(&mut self) {
        while let Some(notice) = self.card.context.notice() {
            tracing::debug!(?notice, device = self.card.context.name(), "verbs");
            let failed = match notice {
                Notice::PairFailed(pair) => Some(Some(pair)),
                Notice::DeviceFailed => Some(None),
                Notice::Port { number, is_up } => {
                    let device = self.card.context.name();
                    tracing::warn!(device, port = number, is_up, "an RDMA port changed");
                    None
                }
                Notice::Other(_) => None,
            };
            let Some(pair) = failed else { continue };
            let is_it = |wire: &Wire| pair.is_none_or(|pair| pair == wire.pair());
            let using = self.using.iter();
            let using = using.filter_map(|(line, using)| Some((line, using.wire.as_ref()?)));
            let users = self.users.iter().map(|(line, user)| (line, &user.wire));
            let lines: Vec<Line> = using
                .chain(users)
                .filter(|(_, wire)| is_it(wire))
                .map(|(line, _)| *line)
                .collect();
            for line in lines {
                // Completions that are here already say more of the reason.
                self.heat(line);
                self.poll();
                self.fail(line, "the device says that the queue pair failed");
            }
        }
    }

    /// Completions have come.
    pub(super) fn completions(&mut self) {
        while let Some(number) = self.card.channel.next() {
            self.heat(Line(number));
        }
    }

    /// Whether the thread need not be woken for what the caller has done.
    pub(super) fn is_quiet(&self) -> bool {
        self.ready.is_empty() && !self.is_timed
    }

    /// Whether completions are likely to come soon.
    pub(super) fn is_working(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Whether nothing is left that a closed agent waits for.
    pub(super) fn is_over(&self) -> bool {
        self.using.is_empty() && self.leaving.is_empty() && self.jobs.is_empty()
    }
}
