//! Reliable one-sided reads and writes over the faulty [`Network`], as a state machine in virtual time.
//!
//! A transfer is cut into chunks; each is sent, answered, and sent again when the answer stays away, as an RDMA queue
//! pair does. The machine moves no bytes: it says which range lands when ([`Effect::Landed`]), and its driver copies.
//! After a failure ranges may still land until [`Effect::Drained`], which is what quarantine is for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kvcache_core::{Error, ErrorKind, Result, Time};

use super::link::LinkProfile;
use super::network::{Arrival, Delivery, Network, SimNode};
use super::transfer::{Direction, Effect, ExchangeConfig, SimTransfer, SimTransferId};

/// The most transfers under way at once; more are refused as `Busy`.
pub const TRANSFERS_MAX: usize = 1 << 16;
/// The most chunks of one transfer.
pub const CHUNKS_MAX: u64 = 1 << 20;
/// What a datagram carries beside its data, in bytes.
const HEADER_BYTES: u64 = 64;
/// Waiting times double with each attempt, at most this often.
const BACKOFF_DOUBLINGS_MAX: u32 = 6;

#[derive(Clone, Copy)]
enum Packet {
    Forward { transfer: SimTransferId, chunk: u32 },
    Return { transfer: SimTransferId, chunk: u32 },
    Message { tag: u64 },
}

#[derive(Clone, Copy, Default)]
struct Chunk {
    attempts: u32,
    /// The peer has acted on it: data written, or notification seen.
    landed: bool,
    answered: bool,
    timer: Option<Time>,
}

struct Running {
    plan: SimTransfer,
    /// Data chunks, then one for the notification if it is wanted.
    chunks: Vec<Chunk>,
    data_chunks: u32,
    next: u32,
    answered: u32,
    in_network: u32,
    finished: bool,
    unsettled: bool,
}

impl Running {
    /// The data of one chunk; none for the notification.
    fn data_bytes(&self, chunk: u32, chunk_bytes: u64) -> u64 {
        self.plan
            .bytes
            .saturating_sub(u64::from(chunk) * chunk_bytes)
            .min(chunk_bytes)
    }
}

/// Reliable transfers and unreliable messages between named nodes, without I/O or a clock.
pub struct Exchange {
    config: ExchangeConfig,
    network: Network<Packet>,
    running: BTreeMap<SimTransferId, Running>,
    timers: BTreeSet<(Time, SimTransferId, u32)>,
    deadlines: BTreeSet<(Time, SimTransferId)>,
    effects: VecDeque<Effect>,
    transfers: u64,
}

impl Exchange {
    /// An exchange without nodes.
    ///
    /// # Errors
    /// `Invalid` for a zero among the settings.
    pub fn new(seed: u64, config: ExchangeConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            network: Network::new(seed, config.link.clone())?,
            config,
            running: BTreeMap::new(),
            timers: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            effects: VecDeque::new(),
            transfers: 0,
        })
    }

    /// Joins a node; see [`Network::add_node`].
    ///
    /// # Errors
    /// Those of [`Network::add_node`].
    pub fn add_node(&mut self, name: &str) -> Result<SimNode> {
        self.network.add_node(name)
    }

    /// The living node of this name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<SimNode> {
        self.network.node(name)
    }

    /// Gives the direction `from` → `to` its own behaviour.
    ///
    /// # Errors
    /// `Invalid` for a link without bandwidth.
    pub fn set_link(&mut self, from: SimNode, to: SimNode, profile: LinkProfile) -> Result<()> {
        self.network.set_link(from, to, profile)
    }

    /// Cuts both directions between two nodes.
    pub fn partition(&mut self, one: SimNode, other: SimNode) {
        self.network.partition(one, other);
    }

    /// Mends [`Exchange::partition`].
    pub fn heal(&mut self, one: SimNode, other: SimNode) {
        self.network.heal(one, other);
    }

    /// Ends a node for good; transfers with it run out of attempts or time.
    pub fn kill(&mut self, node: SimNode) {
        self.network.kill(node);
    }

    /// A hash over every step of the network so far: equal runs have equal digests.
    #[must_use]
    pub fn trace_digest(&self) -> u64 {
        self.network.trace_digest()
    }

    /// The latest steps of the network, oldest first.
    pub fn trace(&self) -> impl Iterator<Item = &super::TraceEvent> {
        self.network.trace()
    }

    /// How many transfers are unfinished or undrained.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.running.len()
    }

    /// Starts a transfer.
    ///
    /// # Errors
    /// `Busy` at [`TRANSFERS_MAX`], `Invalid` for neither bytes nor a notification and for more than [`CHUNKS_MAX`]
    /// chunks, `NotFound` for a node that never joined.
    pub fn handle_transfer(&mut self, now: Time, plan: SimTransfer) -> Result<SimTransferId> {
        let data_chunks = plan.bytes.div_ceil(self.config.chunk_bytes);
        let least = u64::from(!plan.notify);
        if !(least..=CHUNKS_MAX).contains(&data_chunks) {
            let accepted = least..=CHUNKS_MAX.saturating_mul(self.config.chunk_bytes);
            return Err(Error::invalid(
                "transfer length in bytes",
                plan.bytes,
                accepted,
            ));
        }
        if self.running.len() >= TRANSFERS_MAX {
            let text = format!("{TRANSFERS_MAX} simulated transfers are under way");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        for node in [plan.initiator, plan.peer] {
            if self.network.name(node).is_empty() {
                let text = format!("simulated node {} never joined", node.0);
                return Err(Error::new(ErrorKind::NotFound, text));
            }
        }
        let id = SimTransferId(self.transfers);
        self.transfers += 1;
        self.deadlines.insert((plan.deadline, id));
        let count = data_chunks as usize + usize::from(plan.notify);
        let running = Running {
            plan,
            chunks: vec![Chunk::default(); count],
            data_chunks: data_chunks as u32,
            next: 0,
            answered: 0,
            in_network: 0,
            finished: false,
            unsettled: false,
        };
        self.running.insert(id, running);
        self.fill_window(now, id);
        Ok(id)
    }

    /// Withdraws a transfer: it finishes now, unsettled while something of it is in the network. Unknown or finished
    /// ones are left alone.
    pub fn handle_cancel(&mut self, now: Time, transfer: SimTransferId) {
        self.finish(now, transfer, Some(ErrorKind::Cancelled));
    }

    /// Sends an unreliable message of `bytes`; the caller keeps its content under `tag`.
    ///
    /// # Errors
    /// Those of [`Network::handle_send`].
    pub fn handle_message(
        &mut self,
        now: Time,
        from: SimNode,
        to: SimNode,
        bytes: u64,
        tag: u64,
    ) -> Result<()> {
        let sent = HEADER_BYTES + bytes;
        self.network
            .handle_send(now, from, to, sent, Packet::Message { tag })
            .map(|_| ())
    }

    /// The next effect, in order.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When something is due next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let timer = self.timers.first().map(|(at, ..)| *at);
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        [self.network.poll_timeout(), timer, deadline]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does everything that is due at `now`, in order of time.
    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(due) = self.poll_timeout().filter(|due| *due <= now) {
            // What arrives at the very moment of a deadline is still in time.
            if let Some(arrival) = self.network.poll_arrival(due) {
                self.arrive(due, arrival);
            } else if self.deadlines.first().is_some_and(|(at, _)| *at == due) {
                if let Some((_, id)) = self.deadlines.pop_first() {
                    self.finish(due, id, Some(ErrorKind::Timeout));
                }
            } else if let Some((_, id, chunk)) = self.timers.pop_first() {
                self.retry(due, id, chunk);
            }
        }
    }

    fn fill_window(&mut self, now: Time, id: SimTransferId) {
        loop {
            let Some(running) = self.running.get_mut(&id) else {
                return;
            };
            let next = running.next;
            let unanswered = next - running.answered;
            // The notification waits until all data is acknowledged: it may not overtake any of it.
            let is_notification = next == running.data_chunks;
            if running.finished
                || next as usize == running.chunks.len()
                || unanswered >= self.config.window_chunks
                || (is_notification && unanswered > 0)
            {
                return;
            }
            running.next += 1;
            self.send_forward(now, id, next);
        }
    }

    fn send_forward(&mut self, now: Time, id: SimTransferId, chunk: u32) {
        let Some(running) = self.running.get_mut(&id) else {
            return;
        };
        let carried = match running.plan.direction {
            Direction::Write => running.data_bytes(chunk, self.config.chunk_bytes),
            Direction::Read => 0,
        };
        let state = &mut running.chunks[chunk as usize];
        let doublings = state.attempts.min(BACKOFF_DOUBLINGS_MAX);
        state.attempts += 1;
        let timer = now + self.config.retransmit_after * (1 << doublings);
        state.timer = Some(timer);
        self.timers.insert((timer, id, chunk));
        let (from, to) = (running.plan.initiator, running.plan.peer);
        let packet = Packet::Forward {
            transfer: id,
            chunk,
        };
        // A full network is a lost datagram: the timer sends it again.
        let copies = self
            .network
            .handle_send(now, from, to, HEADER_BYTES + carried, packet);
        running.in_network += copies.unwrap_or(0);
    }

    fn send_return(&mut self, now: Time, id: SimTransferId, chunk: u32) {
        let Some(running) = self.running.get_mut(&id) else {
            return;
        };
        let carried = match running.plan.direction {
            Direction::Write => 0,
            Direction::Read => running.data_bytes(chunk, self.config.chunk_bytes),
        };
        let (from, to) = (running.plan.peer, running.plan.initiator);
        let packet = Packet::Return {
            transfer: id,
            chunk,
        };
        let copies = self
            .network
            .handle_send(now, from, to, HEADER_BYTES + carried, packet);
        running.in_network += copies.unwrap_or(0);
    }

    fn arrive(&mut self, now: Time, arrival: Arrival<Packet>) {
        match arrival {
            Arrival::Cut(Packet::Message { .. }) => {}
            Arrival::Cut(Packet::Forward { transfer, .. } | Packet::Return { transfer, .. }) => {
                self.left_network(transfer);
            }
            Arrival::Delivered(Delivery {
                at,
                from,
                to,
                payload,
                corruption,
            }) => match payload {
                Packet::Message { tag } => {
                    let corrupted = corruption.is_some();
                    self.effects.push_back(Effect::Message {
                        at,
                        from,
                        to,
                        tag,
                        corrupted,
                    });
                }
                Packet::Forward { transfer, chunk } => {
                    if self.accept(transfer, chunk, Direction::Write, corruption) {
                        self.send_return(now, transfer, chunk);
                    }
                    self.left_network(transfer);
                }
                Packet::Return { transfer, chunk } => {
                    if self.accept(transfer, chunk, Direction::Read, corruption) {
                        self.answer(now, transfer, chunk);
                    }
                    self.left_network(transfer);
                }
            },
        }
    }

    /// Takes a datagram in; `carrier` is the direction whose data such a datagram carries. False: its header is
    /// damaged, which the receiver notices, so it is as good as lost.
    fn accept(
        &mut self,
        id: SimTransferId,
        chunk: u32,
        carrier: Direction,
        corruption: Option<u64>,
    ) -> bool {
        let Some(running) = self.running.get_mut(&id) else {
            return false;
        };
        let is_notification = chunk == running.data_chunks;
        let carries = running.plan.direction == carrier && !is_notification;
        if !carries && corruption.is_some() {
            return false;
        }
        let len = running.data_bytes(chunk, self.config.chunk_bytes);
        let state = &mut running.chunks[chunk as usize];
        // A repeated datagram must not write again: the memory may have a new owner by then.
        if state.landed {
            return true;
        }
        if carries {
            state.landed = true;
            let offset = u64::from(chunk) * self.config.chunk_bytes;
            self.effects.push_back(Effect::Landed {
                transfer: id,
                offset,
                len,
                corruption,
            });
        } else if is_notification && carrier == Direction::Write {
            state.landed = true;
            self.effects.push_back(Effect::Notified { transfer: id });
        }
        true
    }

    fn answer(&mut self, now: Time, id: SimTransferId, chunk: u32) {
        let Some(running) = self.running.get_mut(&id) else {
            return;
        };
        let state = &mut running.chunks[chunk as usize];
        if state.answered {
            return;
        }
        state.answered = true;
        running.answered += 1;
        if let Some(timer) = state.timer.take() {
            self.timers.remove(&(timer, id, chunk));
        }
        if running.answered as usize == running.chunks.len() {
            self.finish(now, id, None);
        } else {
            self.fill_window(now, id);
        }
    }

    fn retry(&mut self, now: Time, id: SimTransferId, chunk: u32) {
        let Some(running) = self.running.get(&id) else {
            return;
        };
        if running.chunks[chunk as usize].attempts >= self.config.attempts_max {
            self.finish(now, id, Some(ErrorKind::PeerLost));
        } else {
            self.send_forward(now, id, chunk);
        }
    }

    fn finish(&mut self, now: Time, id: SimTransferId, failure: Option<ErrorKind>) {
        let Some(running) = self.running.get_mut(&id) else {
            return;
        };
        if running.finished {
            return;
        }
        running.finished = true;
        self.deadlines.remove(&(running.plan.deadline, id));
        for (chunk, state) in (0..).zip(&mut running.chunks) {
            if let Some(timer) = state.timer.take() {
                self.timers.remove(&(timer, id, chunk));
            }
        }
        // After a success everything has landed once, and nothing lands twice.
        let settled = failure.is_none() || running.in_network == 0;
        self.effects.push_back(Effect::Finished {
            transfer: id,
            at: now,
            failure,
            settled,
        });
        running.unsettled = !settled;
        if running.in_network == 0 {
            self.running.remove(&id);
        }
    }

    fn left_network(&mut self, id: SimTransferId) {
        let Some(running) = self.running.get_mut(&id) else {
            return;
        };
        running.in_network -= 1;
        if running.finished && running.in_network == 0 {
            if running.unsettled {
                self.effects.push_back(Effect::Drained { transfer: id });
            }
            self.running.remove(&id);
        }
    }
}
