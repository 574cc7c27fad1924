//! Datagrams between named nodes in virtual time: the part of the simulation that decides what arrives, and when.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result, Time};

use super::link::{Chance, LinkProfile};
use super::random::{Random, mix};

/// The most datagrams in the network at once; a sender is told `Busy` beyond it.
pub const DATAGRAMS_MAX: usize = 1 << 20;
/// The most nodes of one network.
pub const NODES_MAX: usize = 4096;
/// The most trace events kept; the digest covers all of them.
pub const TRACE_EVENTS_MAX: usize = 1 << 16;

/// A node of a simulated network, counted from 0 in the order of joining.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SimNode(pub u32);

/// What the network did with a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceKind {
    /// It was handed over.
    Sent,
    /// It arrived.
    Delivered,
    /// It arrived with one bit wrong.
    Corrupted,
    /// It was lost by chance.
    Lost,
    /// It met a partition or a dead node.
    Cut,
    /// A second copy was made.
    Repeated,
}

/// One step of the network, for comparing runs and for printing beside a failing seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceEvent {
    /// When.
    pub at: Time,
    /// The sender.
    pub from: SimNode,
    /// The receiver.
    pub to: SimNode,
    /// The datagram's number, counted from 0.
    pub datagram: u64,
    /// What happened to it.
    pub kind: TraceKind,
}

/// A datagram at its receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery<T> {
    /// When it arrived.
    pub at: Time,
    /// The sender.
    pub from: SimNode,
    /// The receiver.
    pub to: SimNode,
    /// What was sent.
    pub payload: T,
    /// The wrong bit, when there is one: an even random number, to be taken modulo the payload's bits.
    pub corruption: Option<u64>,
}

/// What became of one datagram copy when its time came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival<T> {
    /// It reached the receiver.
    Delivered(Delivery<T>),
    /// A partition or the death of a node swallowed it; the network holds it no longer.
    Cut(T),
}

struct Flying<T> {
    from: SimNode,
    to: SimNode,
    datagram: u64,
    payload: T,
    corruption: Option<u64>,
}

#[derive(Default)]
struct LinkState {
    profile: Option<LinkProfile>,
    busy_until: Time,
    last_arrival: Time,
}

/// Datagrams between named nodes: seeded, without I/O or a clock; the same calls give the same trace.
pub struct Network<T> {
    random: Random,
    profile: LinkProfile,
    names: Vec<String>,
    dead: BTreeSet<SimNode>,
    cuts: BTreeSet<(SimNode, SimNode)>,
    links: BTreeMap<(SimNode, SimNode), LinkState>,
    flying: BTreeMap<(Time, u64), Flying<T>>,
    datagrams: u64,
    copies: u64,
    trace: VecDeque<TraceEvent>,
    digest: u64,
}

impl<T: Clone> Network<T> {
    /// A network without nodes, every link of which behaves like `profile`.
    ///
    /// # Errors
    /// `Invalid` for a link without bandwidth.
    pub fn new(seed: u64, profile: LinkProfile) -> Result<Self> {
        profile.check()?;
        Ok(Self {
            random: Random::new(seed),
            profile,
            names: Vec::new(),
            dead: BTreeSet::new(),
            cuts: BTreeSet::new(),
            links: BTreeMap::new(),
            flying: BTreeMap::new(),
            datagrams: 0,
            copies: 0,
            trace: VecDeque::new(),
            digest: mix(seed),
        })
    }

    /// Joins a node.
    ///
    /// # Errors
    /// `Invalid` for a name in use by a living node, `Busy` beyond [`NODES_MAX`].
    pub fn add_node(&mut self, name: &str) -> Result<SimNode> {
        if self.node(name).is_some() {
            let text = format!("simulated node {name:?} is already in the network");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        if self.names.len() >= NODES_MAX {
            let text = format!("the simulated network already has {NODES_MAX} nodes");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        self.names.push(name.to_owned());
        Ok(SimNode(self.names.len() as u32 - 1))
    }

    /// The living node of this name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<SimNode> {
        let nodes = self
            .names
            .iter()
            .zip(0..)
            .filter(|(known, _)| *known == name);
        nodes
            .map(|(_, number)| SimNode(number))
            .find(|node| !self.dead.contains(node))
    }

    /// The name a node joined with; empty for a number that no node has.
    #[must_use]
    pub fn name(&self, node: SimNode) -> &str {
        self.names.get(node.0 as usize).map_or("", String::as_str)
    }

    /// Ends a node for good: what is on its way to it, or sent by it from now on, is cut.
    pub fn kill(&mut self, node: SimNode) {
        self.dead.insert(node);
    }

    /// Whether the node was killed.
    #[must_use]
    pub fn is_dead(&self, node: SimNode) -> bool {
        self.dead.contains(&node)
    }

    /// Gives the direction `from` → `to` its own behaviour.
    ///
    /// # Errors
    /// `Invalid` for a link without bandwidth.
    pub fn set_link(&mut self, from: SimNode, to: SimNode, profile: LinkProfile) -> Result<()> {
        profile.check()?;
        self.links.entry((from, to)).or_default().profile = Some(profile);
        Ok(())
    }

    /// Cuts both directions between two nodes, for datagrams under way too.
    pub fn partition(&mut self, one: SimNode, other: SimNode) {
        self.cuts.insert((one.min(other), one.max(other)));
    }

    /// Mends [`Network::partition`].
    pub fn heal(&mut self, one: SimNode, other: SimNode) {
        self.cuts.remove(&(one.min(other), one.max(other)));
    }

    /// Sends a datagram of `bytes`; answers how many copies are now on their way (0: lost, 2: repeated).
    ///
    /// # Errors
    /// `Busy` when [`DATAGRAMS_MAX`] are in the network, `NotFound` for a node that never joined.
    pub fn handle_send(
        &mut self,
        now: Time,
        from: SimNode,
        to: SimNode,
        bytes: u64,
        payload: T,
    ) -> Result<u32> {
        for node in [from, to] {
            if node.0 as usize >= self.names.len() {
                let text = format!("simulated node {} never joined", node.0);
                return Err(Error::new(ErrorKind::NotFound, text));
            }
        }
        if self.flying.len() + 2 > DATAGRAMS_MAX {
            let text = format!("{DATAGRAMS_MAX} datagrams are in the simulated network");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let datagram = self.datagrams;
        self.datagrams += 1;
        self.note(now, from, to, datagram, TraceKind::Sent);
        let link = self.links.entry((from, to)).or_default();
        let profile = link.profile.as_ref().unwrap_or(&self.profile).clone();
        let sent = now.max(link.busy_until) + transmission(bytes, profile.bytes_per_second);
        link.busy_until = sent;
        let jitter = Duration::from_nanos(self.random.below(nanos(profile.jitter)));
        let in_order = (sent + profile.latency + jitter).max(link.last_arrival);
        if self.random.happens(profile.loss.millionths()) {
            self.note(now, from, to, datagram, TraceKind::Lost);
            return Ok(0);
        }
        let mut arrival = in_order;
        if self.random.happens(profile.reorder.millionths()) {
            arrival = in_order + self.held_back(&profile);
        } else if let Some(link) = self.links.get_mut(&(from, to)) {
            link.last_arrival = in_order;
        }
        let repeated = self.random.happens(profile.duplicate.millionths());
        if repeated {
            self.note(now, from, to, datagram, TraceKind::Repeated);
            let second = arrival + self.held_back(&profile);
            self.fly(
                second,
                (from, to),
                datagram,
                payload.clone(),
                profile.corruption,
            );
        }
        self.fly(arrival, (from, to), datagram, payload, profile.corruption);
        Ok(1 + u32::from(repeated))
    }

    /// When the next datagram is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.flying.first_key_value().map(|((at, _), _)| *at)
    }

    /// The next datagram that is due at `now`, in order of arrival.
    pub fn poll_arrival(&mut self, now: Time) -> Option<Arrival<T>> {
        let entry = self.flying.first_entry()?;
        let at = entry.key().0;
        if at > now {
            return None;
        }
        let Flying {
            from,
            to,
            datagram,
            payload,
            corruption,
        } = entry.remove();
        let cut = self.cuts.contains(&(from.min(to), from.max(to)))
            || self.dead.contains(&from)
            || self.dead.contains(&to);
        if cut {
            self.note(at, from, to, datagram, TraceKind::Cut);
            return Some(Arrival::Cut(payload));
        }
        let kind = if corruption.is_some() {
            TraceKind::Corrupted
        } else {
            TraceKind::Delivered
        };
        self.note(at, from, to, datagram, kind);
        Some(Arrival::Delivered(Delivery {
            at,
            from,
            to,
            payload,
            corruption,
        }))
    }

    /// How many datagram copies are on their way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flying.len()
    }

    /// The latest [`TRACE_EVENTS_MAX`] steps, oldest first.
    pub fn trace(&self) -> impl Iterator<Item = &TraceEvent> {
        self.trace.iter()
    }

    /// A hash over every step so far: equal runs have equal digests.
    #[must_use]
    pub fn trace_digest(&self) -> u64 {
        self.digest
    }

    fn held_back(&mut self, profile: &LinkProfile) -> Duration {
        Duration::from_nanos(1 + self.random.below(nanos(profile.reorder_delay)))
    }

    fn fly(
        &mut self,
        at: Time,
        (from, to): (SimNode, SimNode),
        datagram: u64,
        payload: T,
        corruption: Chance,
    ) {
        let corruption = self
            .random
            .happens(corruption.millionths())
            .then(|| self.random.next());
        let flying = Flying {
            from,
            to,
            datagram,
            payload,
            corruption,
        };
        self.flying.insert((at, self.copies), flying);
        self.copies += 1;
    }

    fn note(&mut self, at: Time, from: SimNode, to: SimNode, datagram: u64, kind: TraceKind) {
        for word in [
            at.0,
            u64::from(from.0) << 32 | u64::from(to.0),
            datagram,
            kind as u64,
        ] {
            self.digest = mix(self.digest ^ word).wrapping_add(word);
        }
        if self.trace.len() == TRACE_EVENTS_MAX {
            self.trace.pop_front();
        }
        self.trace.push_back(TraceEvent {
            at,
            from,
            to,
            datagram,
            kind,
        });
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn transmission(bytes: u64, bytes_per_second: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_second);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}
