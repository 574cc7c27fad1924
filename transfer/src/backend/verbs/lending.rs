//! The side that owns memory: lets peers in, hands out regions, takes them back.

use std::collections::HashSet;
use std::io::{ErrorKind as IoKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::greeting::{self, Question, Taken};
use super::state::{Line, State};
use super::tie::Tie;
use crate::agent::{CONNECT_TIMEOUT, Door};
use crate::backend::Operation;
use crate::backend::direct::{self, Landing};
use crate::backend::late::Notifier;
use crate::backend::unix::{Message, Outcome};
use crate::metadata::Incarnation;
use crate::region::{RegionCore, RegionId, RegionKey};
use crate::sys::verbs::{Access, Memory};

/// Peers that may use memory of ours.
pub(super) const USERS_MAX: usize = 4096;

/// Peers that have connected and not said who they are.
const STRANGERS_MAX: usize = 256;

/// Regions that one peer may use.
const USED_MAX: usize = 65_536;

/// How long peers have to let go of a region that is deregistered. Then the device refuses it to them, which ends their
/// connections when they still use it.
const LEAVING_MAX: Duration = Duration::from_secs(2);

/// Somebody who has connected and not said all of its question.
pub(super) struct Stranger {
    stream: TcpStream,
    read: Vec<u8>,
    pub(super) until: Instant,
}

/// A peer that uses memory of ours.
pub(super) struct User {
    pub(super) tie: Tie,
    stream: TcpStream,
    name: Arc<str>,
    /// By which its notifications come.
    door: Door,
    used: HashSet<RegionId>,
    /// What it may write into, beside memory of the host.
    landing: Landing,
}

/// A deregistered region that peers, or work of our own, may still use. It counts as a user of the region.
pub(super) struct Leaving {
    region: Arc<RegionCore>,
    /// Peers may use it until then.
    pub(super) until: Instant,
}

impl Leaving {
    /// It can't be taken from the device.
    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    pub(super) fn keep(self) {
        let region = self.region.id();
        tracing::error!(%region, "memory stays registered with the device; it is kept for good");
        std::mem::forget(self.region);
    }
}

impl State {
    /// Somebody wants to connect.
    pub(super) fn accept(&mut self, listener: usize) {
        loop {
            let listener = &self.listeners[listener];
            match listener.accept() {
                Ok((stream, from)) => {
                    if let Err(error) = self.receive(stream) {
                        tracing::warn!(%error, %from, "a connection for verbs was not accepted");
                    }
                }
                Err(error) if error.kind() == IoKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "accept a connection for verbs");
                    if !self.spare.shed(|| drop(listener.accept())) {
                        return;
                    }
                }
            }
        }
    }

    fn receive(&mut self, stream: TcpStream) -> Result<()> {
        if self.is_closed || self.strangers.len() >= STRANGERS_MAX {
            let text = format!("{STRANGERS_MAX} peers have not said who they are");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        tune(&stream)?;
        let line = self.new_line();
        self.watch(line, &stream)?;
        let stranger = Stranger {
            stream,
            read: Vec::new(),
            until: Instant::now() + CONNECT_TIMEOUT,
        };
        self.strangers.insert(line, stranger);
        self.is_timed = true;
        Ok(())
    }

    /// Somebody who has not said who it is has said something.
    pub(super) fn stranger_spoke(&mut self, line: Line) {
        let Some(stranger) = self.strangers.get_mut(&line) else {
            return;
        };
        let mut bytes = [0; greeting::BYTES_MAX + 2];
        match stranger.stream.read(&mut bytes) {
            Ok(count) if count > 0 => stranger.read.extend_from_slice(&bytes[..count]),
            Err(error) if error.kind() == IoKind::WouldBlock => return,
            Ok(_) | Err(_) => {
                self.strangers.remove(&line);
                return;
            }
        }
        let question = match greeting::whole(&stranger.read) {
            Ok(None) => return,
            Ok(Some(body)) => Question::decode(body),
            Err(error) => Err(error),
        };
        let Some(stranger) = self.strangers.remove(&line) else {
            return;
        };
        match question.and_then(|question| self.let_in(line, question)) {
            Ok(guest) => self.receive_guest(line, stranger.stream, guest),
            Err(error) => self.answer(line, stranger.stream, Err(error)),
        }
    }

    pub(super) fn check(&self, name: &str, wanted: Incarnation) -> Result<()> {
        let own = self.exports.incarnation();
        if wanted != own {
            let text = format!("incarnation {wanted:?} is gone, this is {own:?}");
            return Err(Error::new(ErrorKind::PeerLost, text));
        }
        self.exports.check_allowed(name)
    }

    pub(super) fn answer(
        &mut self,
        line: Line,
        mut stream: TcpStream,
        made: Result<(String, (Tie, Taken))>,
    ) {
        let (made, answer) = match made {
            Ok((name, (tie, taken))) => (Some((name, tie)), Ok(taken)),
            Err(error) => {
                tracing::warn!(%error, "a peer was not let in over verbs");
                (None, Err(error))
            }
        };
        let bytes = greeting::encode_answer(&answer);
        // The answer fits into the buffer of a new connection.
        let said = stream.write(&bytes).is_ok_and(|count| count == bytes.len());
        let Some((name, tie)) = made.filter(|_| said) else {
            return;
        };
        let rails = tie.rails.len();
        let user = User {
            tie,
            stream,
            name: name.into(),
            door: self.exports.inbox().door(),
            used: HashSet::new(),
            landing: Landing::default(),
        };
        self.users.insert(line, user);
        for rail in 0..rails {
            self.heat(line, rail);
        }
        self.is_timed = true;
    }

    /// A peer that uses our memory has said by TCP that it stops, or closed that.
    pub(super) fn user_spoke(&mut self, line: Line) {
        let Some(user) = self.users.get_mut(&line) else {
            return;
        };
        let mut bytes = [0; 16];
        match user.stream.read(&mut bytes) {
            Err(error) if error.kind() == IoKind::WouldBlock => {}
            Ok(_) | Err(_) => self.cut_off(line, "the peer stops"),
        }
    }

    /// Nothing more of this peer's reaches our memory: its queue pairs go, and then it is told so.
    pub(super) fn cut_off(&mut self, line: Line, reason: &str) {
        let Some(user) = self.users.remove(&line) else {
            return;
        };
        let User {
            mut tie,
            stream,
            name,
            door,
            used,
            landing: _,
        } = user;
        tracing::debug!(peer = %name, reason, "a peer over verbs is cut off");
        tie.stop();
        let going = tie.going();
        self.begin_parting(line, (stream, used), (tie.end(), going));
        self.exports.inbox().shut(door, reason);
        self.is_timed = true;
        self.let_leave(Instant::now());
    }

    /// Says something to a peer that uses our memory.
    fn tell(&mut self, line: Line, message: &Message) {
        let Some(user) = self.users.get_mut(&line) else {
            return;
        };
        if let Err(error) = user.tie.speech.put(message) {
            return self.cut_off(line, &error.to_string());
        }
        self.say_on(line);
    }

    /// Sends the answers to notifications that the inbox has taken.
    pub(super) fn answer_late(&mut self) {
        for (line, answer) in self.late.take() {
            self.tell(line, &answer);
        }
    }

    /// A peer that uses our memory says something.
    pub(super) fn lend(&mut self, line: Line, message: Message) {
        let answer = match message {
            Message::Map { id, region, key } => {
                let outcome = self.grant(line, region, &key);
                let outcome = outcome.unwrap_or_else(|error| Outcome::of(Err(error)));
                Message::Done { id, outcome }
            }
            Message::Notify { id, bytes } => {
                let Some(user) = self.users.get(&line) else {
                    return;
                };
                if let Err(error) = user.landing.land() {
                    let outcome = Outcome::of(Err(error));
                    return self.tell(line, &Message::Done { id, outcome });
                }
                let (name, door) = (user.name.clone(), user.door);
                let sender = Notifier {
                    late: self.late.clone(),
                    peer: line,
                    id,
                };
                let delivered = self.exports.inbox().deliver(door, &name, bytes, sender);
                let Some((_, outcome)) = delivered else {
                    return;
                };
                let outcome = Outcome::of(outcome);
                Message::Done { id, outcome }
            }
            Message::Sums {
                id,
                region,
                key,
                ranges,
            } => {
                let outcome = self.sum(region, &key, &ranges);
                let outcome = outcome.unwrap_or_else(|error| Outcome::of(Err(error)));
                Message::Done { id, outcome }
            }
            Message::Unmapped { region } => {
                if let Some(user) = self.users.get_mut(&line) {
                    user.used.remove(&region);
                }
                return self.let_leave(Instant::now());
            }
            // Greetings, answers and revocations, and what is asked within a machine.
            _ => return self.cut_off(line, "it says what users of memory do not say"),
        };
        self.tell(line, &answer);
    }

    fn grant(&mut self, line: Line, id: RegionId, key: &RegionKey) -> Result<Outcome> {
        let admitted = self
            .exports
            .admit(id, key, Operation::Write)
            .or_else(|_| self.exports.admit(id, key, Operation::Read))?;
        let region = admitted.region();
        let (address, keys) = (direct::lend(region)?, self.register(line, region)?);
        let granted = Outcome::Keyed {
            address,
            bytes: region.bytes(),
            writable: region.options().remote_write,
            key: keys.into_iter().flat_map(u32::to_le_bytes).collect(),
        };
        // Either this sees that the region or the agent was closed, or whoever closed it finds the entry: both look
        // under one lock.
        if self.is_closed || region.is_closed() {
            let text = format!("region {id} is deregistered");
            self.forget_closed(region);
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        let Some(user) = self.users.get_mut(&line) else {
            return Err(Error::new(ErrorKind::PeerLost, "the path is closed"));
        };
        if user.used.len() >= USED_MAX {
            let text = format!("{USED_MAX} regions are in use");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        user.used.insert(id);
        user.landing.lend(region);
        Ok(granted)
    }

    /// Makes a region known to the devices of a path, which pin it; its keys, one for each rail.
    pub(super) fn register(&mut self, line: Line, region: &Arc<RegionCore>) -> Result<Vec<u32>> {
        let Some(tie) = self.tie(line) else {
            return Err(Error::new(ErrorKind::PeerLost, "the path is closed"));
        };
        let cards: Vec<usize> = tie.rails.iter().map(|rail| rail.card).collect();
        let access = Access {
            read: region.options().remote_read,
            write: region.options().remote_write,
        };
        let devices = &self.cards.devices;
        let known = self.memories.entry(region.id());
        let known = known.or_insert_with(|| devices.iter().map(|_| None).collect());
        let mut keys = Vec::new();
        for card in cards {
            let device = self.cards.cards[card].device;
            let memory = match &known[device] {
                Some(memory) => memory,
                None => {
                    let memory = Memory::of_region(&devices[device].domain, region, access)?;
                    known[device].insert(Arc::new(memory))
                }
            };
            keys.push(memory.remote_key());
        }
        Ok(keys)
    }

    /// Takes a region from the devices; false while work of our own uses it. No byte of anybody's lands there after that.
    fn deregister(&mut self, region: RegionId) -> Result<bool> {
        let Some(known) = self.memories.get_mut(&region) else {
            return Ok(true);
        };
        let (mut is_free, mut failed) = (true, None);
        for place in known {
            match place.take().map(Arc::try_unwrap) {
                None => {}
                Some(Ok(memory)) => failed = memory.deregister().err().or(failed),
                Some(Err(used)) => {
                    *place = Some(used);
                    is_free = false;
                }
            }
        }
        if is_free {
            self.memories.remove(&region);
        }
        failed.map_or(Ok(is_free), Err)
    }

    /// A region that was closed while a job was still to come that made it known to the device.
    pub(super) fn forget_closed(&mut self, region: &RegionCore) {
        let id = region.id();
        let is_leaving = self.leaving.iter().any(|leaving| leaving.region.id() == id);
        if region.is_closed() && !is_leaving {
            // The device may keep it if it must: the memory is then never given back.
            let _ = self.deregister(id);
        }
    }

    /// A region is being deregistered: peers are asked to let go of it, and it counts as used until it is taken from the
    /// device.
    pub(super) fn withdraw(&mut self, region: &Arc<RegionCore>) {
        let id = region.id();
        let users = self.users.iter();
        let told: Vec<Line> = users
            .filter_map(|(line, user)| user.used.contains(&id).then_some(*line))
            .collect();
        if !self.memories.contains_key(&id) {
            return;
        }
        region.hold();
        self.leaving.push(Leaving {
            region: region.clone(),
            until: Instant::now() + LEAVING_MAX,
        });
        self.is_timed = true;
        for line in told {
            self.tell(line, &Message::Revoke { region: id });
        }
        self.let_leave(Instant::now());
    }

    /// Takes regions from the device that nobody uses any more, or that peers have had long enough.
    pub(super) fn let_leave(&mut self, now: Instant) {
        for leaving in std::mem::take(&mut self.leaving) {
            let id = leaving.region.id();
            let parting = self.parting.values().map(|parting| &parting.used);
            let users = self.users.values().map(|user| &user.used);
            let is_used = users.chain(parting).any(|used| used.contains(&id));
            if is_used && now < leaving.until {
                self.leaving.push(leaving);
                continue;
            }
            match self.deregister(id) {
                Ok(true) => {
                    if is_used {
                        tracing::warn!(region = %id, "peers did not let go of memory; it is refused to them");
                    }
                    for user in self.users.values_mut() {
                        user.used.remove(&id);
                    }
                    leaving.region.leave();
                }
                Ok(false) => self.leaving.push(leaving),
                Err(error) => {
                    tracing::error!(%error, "verbs");
                    leaving.keep();
                }
            }
        }
    }
}

/// Small words go at once, and nobody waits for them.
pub(super) fn tune(stream: &TcpStream) -> Result<()> {
    let tuned = stream
        .set_nodelay(true)
        .and_then(|()| stream.set_nonblocking(true));
    tuned.map_err(|e| Error::io("prepare a connection for verbs", e))
}
