//! Everything that one thread at a time looks at: the ports, and who is connected by them.

use std::collections::{HashMap, VecDeque};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::event::epoll;

use super::active::Active;
use super::aside::Aside;
use super::burying::Parting;
use super::card::Cards;
use super::controls::Fragment;
use super::greeting::Offer;
use super::lending::{Leaving, Stranger, User};
use super::options::RAILS_MAX;
use super::rails::is_of_rail;
use super::tie::{Rail, Tie};
use super::using::{RailTold, Shared, Using};
use super::wire::{Heard, Piece, Wire};
use crate::agent::Exports;
use crate::backend::Job;
use crate::backend::Operation;
use crate::backend::late::Late;
use crate::backend::spare::Spare;
use crate::backend::unix::{Call, Message};
use crate::region::RegionId;
use crate::sys::verbs::{Memory, Notice};

/// What the thread is woken for, beside connections: itself, each device's completions and notices, rdma_cm, each listener.
pub(super) const WAKE: u64 = 0;
pub(super) const COMPLETIONS: u64 = 0x100;
pub(super) const NOTICES: u64 = 0x200;
pub(super) const CONNECTIONS: u64 = 0x280;
pub(super) const LISTENERS: u64 = 0x300;
pub(super) const LINES: u64 = 0x400;

/// A connection of this agent, to a peer that it uses or of one that uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Line(pub(super) u64);

impl Line {
    /// Numbers above those of what the thread is woken for.
    const FIRST: Self = Self(LINES);
}

/// The number by which a device tells of completions of a path's rail over this port.
pub(super) fn number(line: Line, card: usize) -> u64 {
    line.0 * u64::from(RAILS_MAX) + card as u64
}

fn of_number(number: u64) -> (Line, usize) {
    let rails = u64::from(RAILS_MAX);
    (Line(number / rails), (number % rails) as usize)
}

/// Own memory that devices know: of each region what each device knows.
pub(super) type Memories = HashMap<RegionId, Vec<Option<Arc<Memory>>>>;

/// A rail that a peer has taken.
pub(super) struct Met {
    pub(super) card: usize,
    pub(super) told: RailTold,
    pub(super) wire: Result<Wire>,
}

/// Rails that are offered to a peer: the port of each, its end, and what the peer is told of it.
pub(super) type Offered = Vec<(usize, Wire, Offer)>;

pub(super) struct State {
    pub(super) cards: Arc<Cards>,
    pub(super) aside: Arc<Aside>,
    pub(super) exports: Arc<Exports>,
    pub(super) listeners: Vec<TcpListener>,
    pub(super) spare: Spare,
    pub(super) epoll: Arc<std::os::fd::OwnedFd>,
    pub(super) strangers: HashMap<Line, Stranger>,
    pub(super) users: HashMap<Line, User>,
    pub(super) using: HashMap<Line, Using>,
    next_line: Line,
    pub(super) memories: Memories,
    pub(super) jobs: HashMap<u64, Active>,
    next_job: u64,
    /// Jobs that may have something to do.
    pub(super) ready: VecDeque<u64>,
    /// Wires that have something, or may have.
    hot: Vec<(Line, usize)>,
    /// Peers that were cut off, until their queue pairs are gone.
    pub(super) parting: HashMap<Line, Parting>,
    /// Threads that take queue pairs away.
    pub(super) burials: usize,
    /// Deregistered regions that peers may still use.
    pub(super) leaving: Vec<Leaving>,
    /// Answers that others give.
    pub(super) late: Arc<Late<Line>>,
    /// Jobs that are over, to be settled without the lock.
    pub(super) settled: Vec<(Job, Result<()>)>,
    /// Something has a time limit.
    pub(super) is_timed: bool,
    /// When something is to be done about a rail.
    pub(super) due: Option<Instant>,
    /// Nobody is let in any more.
    pub(super) is_closed: bool,
}

impl State {
    pub(super) fn new(
        cards: Arc<Cards>,
        aside: Arc<Aside>,
        exports: Arc<Exports>,
        listeners: Vec<TcpListener>,
        epoll: Arc<std::os::fd::OwnedFd>,
    ) -> Self {
        let spare = Spare::default();
        spare.keep();
        Self {
            cards,
            aside,
            exports,
            listeners,
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
            parting: HashMap::new(),
            burials: 0,
            leaving: Vec::new(),
            late: Arc::default(),
            settled: Vec::new(),
            is_timed: false,
            due: None,
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

    /// Rails for a peer that will be asked for a connection.
    pub(super) fn offer(&mut self) -> Result<(Line, Offered)> {
        if self.is_closed {
            return Err(Error::new(ErrorKind::Cancelled, "the agent is closed"));
        }
        let line = self.new_line();
        let cards = self.cards.cards.iter().enumerate();
        let offered = cards.map(|(at, card)| {
            let (wire, offer) = card.wire(number(line, at))?;
            Ok((at, wire, offer))
        });
        Ok((line, offered.collect::<Result<_>>()?))
    }

    /// The peer has taken some rails, which were connected as far as they could be. Whoever waits for `opening` learns when
    /// the first is up.
    pub(super) fn connect(
        &mut self,
        line: Line,
        met: Vec<Met>,
        stream: TcpStream,
        (opening, patience): (&Arc<Call>, Duration),
    ) -> Result<Arc<Shared>> {
        if self.is_closed {
            return Err(Error::new(ErrorKind::Cancelled, "the agent is closed"));
        }
        self.watch(line, &stream)?;
        let until = Instant::now() + patience;
        let (mut rails, mut told) = (Vec::new(), Vec::new());
        let mut failed = Vec::new();
        for (
            rail,
            Met {
                card,
                told: one,
                wire,
            },
        ) in met.into_iter().enumerate()
        {
            told.push(one);
            let (wire, error) = match wire {
                Ok(wire) => (Some(wire), None),
                Err(error) => (None, Some(error)),
            };
            rails.push(Rail::new(card, wire, until));
            failed.extend(error.map(|error| (rail, error.to_string())));
        }
        let (shared, count) = (Arc::new(Shared::new(told)), rails.len());
        let using = Using::new(Tie::new(rails), stream, shared.clone(), opening.clone());
        self.using.insert(line, using);
        for rail in 0..count {
            match failed.iter().find(|(at, _)| *at == rail) {
                None => self.prove(line, rail),
                Some((_, reason)) => self.fail_rail(line, rail, reason),
            }
        }
        Ok(shared)
    }

    /// A wire is looked at from now on.
    pub(super) fn heat(&mut self, line: Line, rail: usize) {
        if let Some(wire) = self.wire(line, rail)
            && !std::mem::replace(&mut wire.is_hot, true)
        {
            self.hot.push((line, rail));
        }
    }

    /// Goes on with what is to be said.
    pub(super) fn say_on(&mut self, line: Line) {
        let Some(tie) = self.tie(line) else { return };
        match tie.speak() {
            Ok(Some(rail)) => self.heat(line, rail),
            Ok(None) => {}
            Err(error) => match tie.speech.over {
                Some(rail) => self.fail_rail(line, rail, &error.to_string()),
                None => self.fail(line, &error.to_string()),
            },
        }
    }

    /// Says something to the peer that we use.
    pub(super) fn ask(&mut self, line: Line, message: &Message) -> Result<()> {
        let gone = || Error::new(ErrorKind::PeerLost, "the path is closed");
        let using = self.using.get_mut(&line).ok_or_else(gone)?;
        if using.shared.is_lost() {
            return Err(using.shared.loss());
        }
        using.tie.speech.put(message)?;
        self.say_on(line);
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
        if self.is_timed || self.due.is_some_and(|due| due <= Instant::now()) {
            self.tidy();
        }
        busy
    }

    pub(super) fn poll(&mut self) -> bool {
        let hot = std::mem::take(&mut self.hot);
        let mut busy = false;
        let mut heard = Vec::new();
        for (line, rail) in hot {
            let Some(wire) = self.wire(line, rail) else {
                continue;
            };
            let polled = wire.poll(&mut heard);
            self.hot.push((line, rail));
            for heard in heard.drain(..) {
                self.hear(line, rail, heard);
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
        for (line, rail) in std::mem::take(&mut self.hot) {
            let Some(wire) = self.wire(line, rail) else {
                continue;
            };
            wire.is_hot = false;
            if let Err(error) = wire.arm() {
                self.fail_rail(line, rail, &error.to_string());
            }
            self.heat(line, rail);
        }
        if self.poll() {
            return false;
        }
        let mut works = false;
        for (line, rail) in std::mem::take(&mut self.hot) {
            if let Some(wire) = self.wire(line, rail) {
                wire.is_hot = false;
                works |= wire.due().is_some();
            }
        }
        if works {
            self.look_after();
        }
        true
    }

    /// Has the thread look, some time, whether what is under way still ends. Whether it would have.
    fn look_after(&mut self) -> bool {
        let would = self.due.is_some();
        let patience = self.cards.options.patience();
        self.due.get_or_insert_with(|| Instant::now() + patience);
        would
    }

    pub(super) fn hear(&mut self, line: Line, rail: usize, heard: Heard) {
        if let Some(using) = self.using.get(&line) {
            using.shared.arrived.fetch_add(1, Ordering::Relaxed);
        }
        match heard {
            Heard::Fragment(bytes) => {
                if let Err(error) = self.hear_fragment(line, rail, &bytes) {
                    self.fail(line, &error.to_string());
                }
            }
            Heard::Arrived => {
                if let Some(tie) = self.tie(line) {
                    tie.speech.arrived(rail);
                }
            }
            // What waits to be said is looked at below.
            Heard::Told => {}
            Heard::Failed(error) if is_of_rail(&error) => {
                self.fail_rail(line, rail, &error.to_string());
            }
            Heard::Failed(error) => self.fail(line, &error.to_string()),
            Heard::Over {
                piece,
                outcome,
                is_flushed,
            } => self.over(line, rail, piece, outcome, is_flushed),
        }
        self.say_on(line);
        self.ask_questions(line);
        self.send_notifications(line);
    }

    fn hear_fragment(&mut self, line: Line, rail: usize, bytes: &[u8]) -> Result<()> {
        let (is_last, part) = match Fragment::decode(bytes)? {
            Fragment::Control(control) => return self.hear_control(line, rail, control),
            Fragment::Part { is_last, bytes } => (is_last, bytes),
        };
        let Some(tie) = self.tie(line) else {
            return Ok(());
        };
        match tie.speech.hear(is_last, part)? {
            Some(message) if self.users.contains_key(&line) => self.lend(line, message),
            Some(message) => self.answered(line, message),
            None => {}
        }
        Ok(())
    }

    /// A piece of a job is over.
    fn over(
        &mut self,
        line: Line,
        rail: usize,
        piece: Piece,
        outcome: Result<()>,
        is_flushed: bool,
    ) {
        match &outcome {
            Ok(()) => self.count(line, rail, &piece),
            Err(error) if is_of_rail(error) => self.fail_rail(line, rail, &error.to_string()),
            Err(error) => self.lose(line, &error.to_string()),
        }
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        let one = &mut using.tie.rails[rail];
        if outcome.is_err() && !using.shared.is_lost() && one.is_ending() {
            return one.unfinished.push(piece);
        }
        let mut gives_way = false;
        if let Some(active) = self.jobs.get_mut(&piece.job) {
            active.open -= 1;
            gives_way = active.gives_way();
            if let Err(error) = outcome {
                let is_lost = is_flushed && using.shared.is_lost();
                let error = if is_lost { using.shared.loss() } else { error };
                active.error.get_or_insert(error);
            }
            self.ready.push_back(piece.job);
        }
        self.ready.extend(using.waiting.drain(..));
        if gives_way {
            using.background.end();
            self.go_on_behind(line);
        }
    }

    fn count(&self, line: Line, rail: usize, piece: &Piece) {
        let (Some(using), Some(active)) = (self.using.get(&line), self.jobs.get(&piece.job)) else {
            return;
        };
        let port = &self.cards.cards[using.tie.rails[rail].card].told;
        let one = &using.shared.rails[rail];
        let counters = match active.job.plan().operation {
            Operation::Write => [&one.written, &port.written],
            Operation::Read => [&one.read, &port.read],
        };
        for counter in counters {
            counter.fetch_add(piece.extent.len, Ordering::Relaxed);
        }
    }

    /// A device has something to tell beside completions.
    pub(super) fn notices(&mut self, device: usize) {
        while let Some(notice) = self.cards.devices[device].context.notice() {
            let name = self.cards.devices[device].context.name();
            tracing::debug!(?notice, device = name, "verbs");
            let failed = match notice {
                Notice::PairFailed(pair) => Some(Some(pair)),
                Notice::DeviceFailed => Some(None),
                Notice::Port { number, is_up } => {
                    tracing::warn!(device = name, port = number, is_up, "an RDMA port changed");
                    self.port_changed(device, number, is_up);
                    None
                }
                Notice::Other(_) => None,
            };
            let Some(pair) = failed else { continue };
            let is_it = |rail: &Rail| {
                let wire = rail.wire.as_ref();
                let is_it = |wire: &Wire| pair.is_none_or(|pair| pair == wire.pair());
                self.cards.cards[rail.card].device == device && wire.is_some_and(is_it)
            };
            for (line, rail) in self.rails_of(is_it) {
                // Completions that are here already say more of the reason.
                self.heat(line, rail);
                self.poll();
                self.fail_rail(line, rail, "the device says that the queue pair failed");
            }
        }
    }

    /// Completions have come to a device.
    pub(super) fn completions(&mut self, device: usize) {
        while let Some(number) = self.cards.devices[device].channel.next() {
            let (line, card) = of_number(number);
            let rails = self.tie(line).map(|tie| tie.rails.iter());
            let rail = rails.and_then(|mut rails| rails.position(|rail| rail.card == card));
            if let Some(rail) = rail {
                self.heat(line, rail);
            }
        }
    }

    /// Whether the thread need not be woken for what the caller has done.
    pub(super) fn is_quiet(&mut self) -> bool {
        self.ready.is_empty() && !self.is_timed && self.look_after()
    }

    /// Whether completions are likely to come soon.
    pub(super) fn is_working(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Whether nothing is left that a closed agent waits for.
    pub(super) fn is_over(&self) -> bool {
        let is_empty = self.using.is_empty() && self.leaving.is_empty() && self.jobs.is_empty();
        is_empty && self.burials == 0
    }
}
