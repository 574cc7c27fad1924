//! Notifications that came when the inbox was full: they wait for room, behind those that came before them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use super::Notification;
use crate::backend::{Job, abandoned};

/// Notifications of one connection that may be unanswered: their senders send no more before that, and whoever does is
/// refused.
pub(crate) const UNHEARD_MAX: usize = 1024;

/// As [`UNHEARD_MAX`], in bytes: one more is sent as long as those before it are fewer.
pub(crate) const UNHEARD_BYTES_MAX: usize = 128 << 10;

/// Where notifications come from: one connection of one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Door(pub(super) u64);

/// Whoever is to be told that the inbox has taken a notification.
pub(crate) trait Sender: Send {
    /// Whether the memory of what waits is this agent's, and so has a limit.
    const IS_REMOTE: bool;

    /// Whether nobody waits for the answer any more, so that the notification need not be taken.
    fn has_given_up(&self) -> bool {
        false
    }

    /// The inbox has taken it, or never will. Called without any lock of the inbox.
    fn answer(self, outcome: Result<()>);
}

/// A request of this process: as many wait as callers hold, and each has its own bytes.
impl Sender for Job {
    const IS_REMOTE: bool = false;

    fn has_given_up(&self) -> bool {
        self.is_abandoned()
    }

    fn answer(self, outcome: Result<()>) {
        self.settle(outcome);
    }
}

/// [`Sender`], whichever it is.
pub(super) trait Waiter: Send {
    fn has_given_up(&self) -> bool;
    fn answer(self: Box<Self>, outcome: Result<()>);
}

impl<S: Sender> Waiter for S {
    fn has_given_up(&self) -> bool {
        Sender::has_given_up(self)
    }

    fn answer(self: Box<Self>, outcome: Result<()>) {
        Sender::answer(*self, outcome);
    }
}

struct Late {
    notification: Notification,
    door: Door,
    is_remote: bool,
    sender: Box<dyn Waiter>,
}

/// Those who are to be told, and what.
pub(super) type Answers = Vec<(Box<dyn Waiter>, Result<()>)>;

/// What waits for room, oldest first, with the number and the bytes of each connection's.
#[derive(Default)]
pub(super) struct Queue {
    late: VecDeque<Late>,
    doors: HashMap<Door, (usize, usize)>,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.late.is_empty()
    }

    /// The length of the next one, if any waits.
    pub(super) fn next_bytes(&self) -> Option<usize> {
        self.late.front().map(|late| late.notification.bytes.len())
    }

    /// Puts a notification behind the others; hands its sender back, with the reason, when it cannot wait.
    pub(super) fn push<S: Sender + 'static>(
        &mut self,
        door: Door,
        peer: &Arc<str>,
        bytes: Bytes,
        sender: S,
    ) -> Result<(), (S, Error)> {
        if Sender::has_given_up(&sender) {
            return Err((sender, abandoned()));
        }
        if S::IS_REMOTE {
            let (count, held) = self.doors.entry(door).or_default();
            if *count >= UNHEARD_MAX || *held >= UNHEARD_BYTES_MAX {
                let text = format!("{count} notifications of {held} bytes wait for room already");
                return Err((sender, Error::new(ErrorKind::Busy, text)));
            }
            *count += 1;
            *held += bytes.len();
        }
        self.late.push_back(Late {
            notification: Notification {
                peer: peer.clone(),
                bytes,
            },
            door,
            is_remote: S::IS_REMOTE,
            sender: Box::new(sender),
        });
        Ok(())
    }

    fn forget(&mut self, late: &Late) {
        if late.is_remote
            && let Some((count, held)) = self.doors.get_mut(&late.door)
        {
            *count -= 1;
            *held -= late.notification.bytes.len();
            if *count == 0 {
                self.doors.remove(&late.door);
            }
        }
    }

    pub(super) fn pop(&mut self) -> Option<(Notification, Box<dyn Waiter>)> {
        let late = self.late.pop_front()?;
        self.forget(&late);
        Some((late.notification, late.sender))
    }

    fn extract(&mut self, wanted: impl Fn(&Late) -> bool) -> Vec<Late> {
        let (taken, left) = std::mem::take(&mut self.late)
            .into_iter()
            .partition::<VecDeque<_>, _>(wanted);
        self.late = left;
        taken.iter().for_each(|late| self.forget(late));
        taken.into()
    }

    /// Those who have given up.
    pub(super) fn given_up(&mut self) -> Answers {
        // Most times nobody has.
        if !self.late.iter().any(|late| late.sender.has_given_up()) {
            return Answers::new();
        }
        let taken = self.extract(|late| late.sender.has_given_up()).into_iter();
        taken.map(|late| (late.sender, Err(abandoned()))).collect()
    }

    /// Those of one connection, or all: it is over.
    pub(super) fn end(&mut self, door: Option<Door>, reason: &str) -> Answers {
        let of_it = |late: &Late| door.is_none_or(|door| late.door == door);
        let lost = || Err(Error::new(ErrorKind::PeerLost, reason.to_owned()));
        let taken = self.extract(of_it).into_iter();
        taken.map(|late| (late.sender, lost())).collect()
    }
}
