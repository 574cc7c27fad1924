//! A queue pair that carries fragments of messages, and words about rails, beside the work of jobs.
//!
//! Fragments are sent each into a place that the other side has offered; they arrive after all work that was posted before
//! them. The send queue has room for them by itself, so jobs never keep messages back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::appointment::Goodbyes;
use super::controls::Control;
use crate::plan::Extent;
use crate::sys::verbs::cm::{Events, Id, Param};
use crate::sys::verbs::{
    Channel, Depth, Domain, End, Far, Finished, Memory, Pair, PairSettings, Place, Reached, Work,
};

/// Bytes of a fragment, with its first one, which says what it is.
pub(super) const FRAGMENT_BYTES: u32 = 4096;

/// Places that are offered for fragments.
const RECEIVES: u32 = 64;

/// Fragments that are under way.
const SENDS: u32 = 16;

/// Words about rails that may wait.
const WORDS_MAX: usize = 1024;

/// What a queue needs for fragments.
pub(super) const FRAGMENTS: Depth = Depth {
    sends: SENDS,
    receives: RECEIVES,
};

/// A piece of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) job: u64,
    pub(super) extent: Extent,
}

/// What came by a wire.
pub(super) enum Heard {
    /// A fragment of the other side's.
    Fragment(Vec<u8>),
    /// A fragment of a message of ours has arrived.
    Arrived,
    /// A word of ours about rails has arrived: there is room for messages that it kept back.
    Told,
    /// A piece of a job is over.
    Over {
        piece: Piece,
        outcome: Result<()>,
        /// It failed only because other work had failed.
        is_flushed: bool,
    },
    /// The wire is of no use any more.
    Failed(Error),
}

/// What work was posted for.
#[derive(Clone, Copy)]
enum Tag {
    Piece(Piece),
    /// From this place of the slab.
    Fragment(u32),
    Control(u32),
    /// Into this place of the slab.
    Receive(u32),
}

/// What is known of a connection by rdma_cm beside the connection: its number, and who ends it.
pub(super) struct Ours {
    number: u64,
    goodbyes: Arc<Goodbyes>,
}

impl Ours {
    pub(super) fn new(number: u64, goodbyes: &Arc<Goodbyes>) -> Self {
        let goodbyes = goodbyes.clone();
        Self { number, goodbyes }
    }
}

/// What rdma_cm knows of a wire.
struct Connection {
    ours: Ours,
    reached: Reached,
    /// The other side is told when it ends.
    id: Option<Id>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.ours.goodbyes.say(id);
        }
    }
}

pub(super) struct Wire {
    pair: Pair<Tag>,
    /// The connection that it was made by rdma_cm, which ends after the queue pair.
    connection: Option<Connection>,
    /// Places to receive, then places to send from.
    slab: Arc<Memory>,
    /// Places to send from that are free.
    free: Vec<u32>,
    /// All work ends.
    is_stopped: bool,
    /// Words about rails that wait for room.
    words: VecDeque<Vec<u8>>,
    /// Bytes of jobs that are under way.
    load: u64,
    /// How long nothing of it may end while something is under way.
    patience: Duration,
    /// When something of it ended, or was begun after nothing was.
    moved_at: Instant,
    /// It is among those that are looked at.
    pub(super) is_hot: bool,
}

fn place(slab: &Arc<Memory>, number: u32, len: u32) -> Place {
    Place {
        memory: slab.clone(),
        offset: u64::from(number) * u64::from(FRAGMENT_BYTES),
        len,
    }
}

impl Wire {
    /// Makes one for so much work of jobs, which can take messages as soon as it is connected.
    pub(super) fn new(
        domain: &Arc<Domain>,
        channel: &Arc<Channel>,
        number: u64,
        (port, work, patience): (u8, u32, Duration),
    ) -> Result<Self> {
        let depth = Depth {
            sends: work + SENDS,
            receives: RECEIVES,
        };
        let mut pair = Pair::new(domain, channel, number, depth)?;
        pair.prepare(port)?;
        let bytes = u64::from(FRAGMENT_BYTES) * u64::from(RECEIVES + SENDS);
        let slab = Arc::new(Memory::own(domain, bytes)?);
        for number in 0..RECEIVES {
            pair.receive(place(&slab, number, FRAGMENT_BYTES), Tag::Receive(number))?;
        }
        pair.arm()?;
        Ok(Self {
            pair,
            connection: None,
            slab,
            free: (RECEIVES..RECEIVES + SENDS).collect(),
            is_stopped: false,
            words: VecDeque::new(),
            load: 0,
            patience,
            moved_at: Instant::now(),
            is_hot: false,
        })
    }

    /// The device's number of its queue pair.
    pub(super) fn pair(&self) -> u32 {
        self.pair.number()
    }

    pub(super) fn connect(&mut self, peer: &End, first: u32, how: &PairSettings) -> Result<()> {
        self.pair.connect(peer, first, how)
    }

    /// Connects it the way that the kernel has found, after the peer has accepted, and tells the peer. What happens to the
    /// connection is told by `events`, by our number.
    pub(super) fn establish(
        &mut self,
        mut id: Id,
        how: &PairSettings,
        ours: Ours,
        events: &Arc<Events>,
    ) -> Result<()> {
        let reached = self.pair.connect_by(&id, how)?;
        id.establish(events)?;
        self.connection = Some(Connection {
            ours,
            reached,
            id: Some(id),
        });
        Ok(())
    }

    /// Connects it for a request, and accepts that. What happens to the connection is told by our number.
    pub(super) fn accept(
        &mut self,
        mut id: Id,
        how: &PairSettings,
        ours: Ours,
        param: &Param<'_>,
    ) -> Result<()> {
        let reached = self.pair.connect_by(&id, how)?;
        id.number(ours.number);
        id.accept(param)?;
        self.connection = Some(Connection {
            ours,
            reached,
            id: Some(id),
        });
        Ok(())
    }

    /// The number of its connection by rdma_cm; none without one.
    pub(super) fn connection(&self) -> Option<u64> {
        self.connection.as_ref().map(|one| one.ours.number)
    }

    /// Which way it was connected by rdma_cm.
    pub(super) fn reached(&self) -> Option<Reached> {
        self.connection.as_ref().map(|one| one.reached)
    }

    /// Ends all work: it is told of as flushed.
    pub(super) fn stop(&mut self) {
        self.is_stopped = true;
        if let Err(error) = self.pair.stop() {
            tracing::warn!(%error, "a queue pair");
        }
    }

    /// Takes it away: the device touches no memory for it any more. The pieces that are not known to be over.
    pub(super) fn end(self) -> Vec<Piece> {
        let left = self.pair.end().into_iter();
        left.filter_map(|tag| match tag {
            Tag::Piece(piece) => Some(piece),
            _ => None,
        })
        .collect()
    }

    /// Whether no work is under way: the device uses no memory for it.
    pub(super) fn is_drained(&self) -> bool {
        self.pair.is_drained()
    }

    /// Whether it was stopped and all has ended, places for messages too: what the peer sends by it is taken no more.
    pub(super) fn is_flushed(&self) -> bool {
        self.is_stopped && self.pair.is_drained() && self.pair.takes_nothing()
    }

    /// When something of what is under way must have ended: the device has gone on for too long after that. None while nothing
    /// is under way.
    pub(super) fn due(&self) -> Option<Instant> {
        (!self.is_drained()).then(|| self.moved_at + self.patience)
    }

    /// Whether something is under way, and some of that has ended since.
    pub(super) fn has_moved_since(&self, then: Instant) -> bool {
        !self.is_drained() && self.moved_at > then
    }

    /// Something is to be posted.
    fn begin(&mut self) {
        if self.is_drained() {
            self.moved_at = Instant::now();
        }
    }

    /// How much work of jobs can be posted.
    pub(super) fn room(&self) -> usize {
        self.pair.room() - self.free.len()
    }

    /// Bytes of jobs that are under way.
    pub(super) fn load(&self) -> u64 {
        self.load
    }

    /// Moves bytes for a job, to or from the peer's memory. There must be [`Wire::room`].
    pub(super) fn work(
        &mut self,
        piece: Piece,
        writes: bool,
        place: Place,
        far: Far,
    ) -> Result<()> {
        let work = if writes {
            Work::Write(far)
        } else {
            Work::Read(far)
        };
        self.begin();
        self.pair.post(work, place, Tag::Piece(piece))?;
        self.load += piece.extent.len;
        Ok(())
    }

    /// Whether there is room for a fragment of a message.
    pub(super) fn may_say(&self) -> bool {
        !self.free.is_empty() && self.words.is_empty()
    }

    /// Sends a fragment of a message. There must be room.
    pub(super) fn say(&mut self, fragment: &[u8]) -> Result<()> {
        let Some(&number) = self.free.last() else {
            let text = "no place to send a fragment from";
            return Err(Error::new(ErrorKind::Busy, text));
        };
        self.send(number, fragment, Tag::Fragment(number))
    }

    /// Sends a word about rails, now or as soon as there is room.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when too many wait.
    pub(super) fn tell(&mut self, control: &Control) -> Result<()> {
        if self.words.len() >= WORDS_MAX {
            let text = format!("{WORDS_MAX} words about rails wait");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        self.words.push_back(control.encode());
        self.tell_on()
    }

    fn tell_on(&mut self) -> Result<()> {
        while let Some(&number) = self.free.last() {
            let Some(word) = self.words.pop_front() else {
                break;
            };
            self.send(number, &word, Tag::Control(number))?;
        }
        Ok(())
    }

    fn send(&mut self, number: u32, fragment: &[u8], tag: Tag) -> Result<()> {
        let place = place(&self.slab, number, fragment.len() as u32);
        self.slab.mapping()?.write(place.offset, fragment)?;
        self.begin();
        self.pair.post(Work::Send, place, tag)?;
        self.free.pop();
        Ok(())
    }

    /// What has come since the last time; whether there was anything.
    pub(super) fn poll(&mut self, heard: &mut Vec<Heard>) -> Result<bool> {
        let mut finished = Vec::new();
        let count = self.pair.poll(&mut finished)?;
        if finished.iter().any(|one| one.received.is_none()) {
            self.moved_at = Instant::now();
        }
        for finished in finished {
            let Finished {
                tag,
                outcome,
                is_flushed,
                received,
            } = finished;
            let (number, sent) = match tag {
                Tag::Piece(piece) => {
                    self.load -= piece.extent.len;
                    heard.push(Heard::Over {
                        piece,
                        outcome,
                        is_flushed,
                    });
                    continue;
                }
                Tag::Receive(number) => {
                    // Whatever made the queue pair fail is told of otherwise.
                    if let (Ok(()), Some(bytes)) = (outcome, received) {
                        let taken = self.take_fragment(number, bytes);
                        heard.push(taken.map_or_else(Heard::Failed, Heard::Fragment));
                    }
                    continue;
                }
                Tag::Fragment(number) => (number, Heard::Arrived),
                Tag::Control(number) => (number, Heard::Told),
            };
            self.free.push(number);
            match outcome {
                Ok(()) => heard.push(sent),
                Err(_) if is_flushed => continue,
                Err(error) => heard.push(Heard::Failed(error)),
            }
            if let Err(error) = self.tell_on() {
                heard.push(Heard::Failed(error));
            }
        }
        Ok(count > 0)
    }

    /// Reads a fragment, and offers its place again.
    fn take_fragment(&mut self, number: u32, bytes: u32) -> Result<Vec<u8>> {
        let from = place(&self.slab, number, FRAGMENT_BYTES);
        let mut fragment = vec![0; bytes.min(FRAGMENT_BYTES) as usize];
        self.slab.mapping()?.read(from.offset, &mut fragment)?;
        if !self.is_stopped {
            self.pair.receive(from, Tag::Receive(number))?;
        }
        Ok(fragment)
    }

    /// Has the thread told of what comes next. What has come before is not told: poll once more.
    pub(super) fn arm(&mut self) -> Result<()> {
        self.pair.arm()
    }
}
