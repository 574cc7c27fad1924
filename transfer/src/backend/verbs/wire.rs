//! A queue pair that carries messages beside the work of jobs.
//!
//! Messages are sent in fragments, each into a place that the other side has offered; they arrive after all work that was
//! posted before them. The send queue has room for the fragments by itself, so jobs never keep messages back.

use std::collections::VecDeque;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use crate::backend::unix::Message;
use crate::request::NOTIFICATION_BYTES_MAX;
use crate::sys::verbs::{
    Channel, Depth, Domain, End, Far, Finished, Memory, Pair, PairSettings, Place, Work,
};

/// Bytes of a fragment, with its first one, which says whether more follow.
const FRAGMENT_BYTES: u32 = 4096;

/// Places that are offered for fragments.
const RECEIVES: u32 = 64;

/// Fragments that are under way.
const SENDS: u32 = 16;

/// Fragments that may wait.
const OUTBOX_MAX: usize = 16_384;

/// The longest message.
const MESSAGE_BYTES_MAX: usize = NOTIFICATION_BYTES_MAX + 1024;

/// Set in the tags of fragments; the others are numbers of jobs.
const FRAGMENT: u64 = 1 << 63;

const LAST: u8 = 0;
const MORE: u8 = 1;

/// What a queue needs for fragments.
pub(super) const FRAGMENTS: Depth = Depth {
    sends: SENDS,
    receives: RECEIVES,
};

/// What came by a wire.
pub(super) enum Heard {
    Message(Message),
    /// Work of a job is over.
    Over {
        job: u64,
        outcome: Result<()>,
        /// It failed only because other work had failed.
        is_flushed: bool,
    },
    /// The wire is of no use any more.
    Failed(Error),
}

pub(super) struct Wire {
    pair: Pair,
    /// Places to receive, then places to send from.
    slab: Arc<Memory>,
    /// Places to send from that are free.
    free: Vec<u32>,
    outbox: VecDeque<Vec<u8>>,
    /// The fragments of a message that is not complete.
    arriving: Vec<u8>,
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
        (port, work): (u8, u32),
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
            pair.receive(place(&slab, number, FRAGMENT_BYTES), u64::from(number))?;
        }
        pair.arm()?;
        Ok(Self {
            pair,
            slab,
            free: (RECEIVES..RECEIVES + SENDS).collect(),
            outbox: VecDeque::new(),
            arriving: Vec::new(),
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

    /// Ends all work: it is told of as flushed.
    pub(super) fn stop(&mut self) {
        if let Err(error) = self.pair.stop() {
            tracing::warn!(%error, "a queue pair");
        }
    }

    /// Whether no work is under way.
    pub(super) fn is_drained(&self) -> bool {
        self.pair.is_drained()
    }

    /// How much work of jobs can be posted.
    pub(super) fn room(&self) -> usize {
        self.pair.room() - self.free.len()
    }

    /// Moves bytes for a job, to or from the peer's memory. There must be [`Wire::room`].
    pub(super) fn work(&mut self, job: u64, writes: bool, place: Place, far: Far) -> Result<()> {
        let work = if writes {
            Work::Write(far)
        } else {
            Work::Read(far)
        };
        self.pair.post(work, place, job)
    }

    /// Sends a message, now or as soon as there is room.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when too much waits.
    pub(super) fn say(&mut self, message: &Message) -> Result<()> {
        let bytes = message.encode();
        let mut parts = bytes.chunks(FRAGMENT_BYTES as usize - 1).peekable();
        if self.outbox.len() + parts.len() > OUTBOX_MAX {
            let text = format!("{OUTBOX_MAX} fragments of messages wait");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        while let Some(part) = parts.next() {
            let mut fragment = Vec::with_capacity(part.len() + 1);
            fragment.push(if parts.peek().is_some() { MORE } else { LAST });
            fragment.extend_from_slice(part);
            self.outbox.push_back(fragment);
        }
        self.send()
    }

    /// Whether there is room for a notification, and for what else is to be said beside.
    pub(super) fn may_notify(&self) -> bool {
        self.outbox.len() < OUTBOX_MAX / 2
    }

    fn send(&mut self) -> Result<()> {
        while let Some(&number) = self.free.last() {
            let Some(fragment) = self.outbox.pop_front() else {
                break;
            };
            let place = place(&self.slab, number, fragment.len() as u32);
            self.slab.mapping()?.write(place.offset, &fragment)?;
            self.pair
                .post(Work::Send, place, FRAGMENT | u64::from(number))?;
            self.free.pop();
        }
        Ok(())
    }

    /// What has come since the last time; whether there was anything.
    pub(super) fn poll(&mut self, heard: &mut Vec<Heard>) -> Result<bool> {
        let mut finished = Vec::new();
        let count = self.pair.poll(&mut finished)?;
        for finished in finished {
            if let Some(bytes) = finished.received {
                self.received(&finished, bytes, heard);
            } else if finished.tag & FRAGMENT == 0 {
                heard.push(Heard::Over {
                    job: finished.tag,
                    outcome: finished.outcome,
                    is_flushed: finished.is_flushed,
                });
            } else {
                self.free.push((finished.tag & !FRAGMENT) as u32);
                match finished.outcome {
                    Ok(()) => self.send()?,
                    Err(_) if finished.is_flushed => {}
                    Err(error) => heard.push(Heard::Failed(error)),
                }
            }
        }
        Ok(count > 0)
    }

    fn received(&mut self, finished: &Finished, bytes: u32, heard: &mut Vec<Heard>) {
        if finished.outcome.is_err() {
            // Whatever made the queue pair fail is told of otherwise.
            return;
        }
        match self.take_fragment(finished.tag as u32, bytes) {
            Ok(Some(message)) => heard.push(Heard::Message(message)),
            Ok(None) => {}
            Err(error) => heard.push(Heard::Failed(error)),
        }
    }

    /// Reads a fragment, and offers its place again; the message that it was the last one of.
    fn take_fragment(&mut self, number: u32, bytes: u32) -> Result<Option<Message>> {
        let from = place(&self.slab, number, FRAGMENT_BYTES);
        let mut fragment = vec![0; bytes.min(FRAGMENT_BYTES) as usize];
        self.slab.mapping()?.read(from.offset, &mut fragment)?;
        self.pair.receive(from, u64::from(number))?;
        let Some((&kind, part)) = fragment.split_first() else {
            return Err(Error::new(ErrorKind::Corrupt, "an empty fragment"));
        };
        if self.arriving.len() + part.len() > MESSAGE_BYTES_MAX {
            let text = format!("a message has more than {MESSAGE_BYTES_MAX} bytes");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        self.arriving.extend_from_slice(part);
        match kind {
            MORE => Ok(None),
            LAST => Message::decode(&std::mem::take(&mut self.arriving)).map(Some),
            other => Err(Error::invalid("fragment kind", other, LAST..=MORE)),
        }
    }

    /// Has the thread told of what comes next. What has come before is not told: poll once more.
    pub(super) fn arm(&mut self) -> Result<()> {
        self.pair.arm()
    }
}
