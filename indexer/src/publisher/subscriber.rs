//! Sends what is published to one subscriber.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use kvcache_core::{Error, Result};
use tokio::time::{Instant, sleep_until};

use super::readers::Reader;
use super::serve::{Queued, STALL_MAX, stalled};
use super::{SEND_AHEAD_BYTES, Shared};
use crate::zmtp::{Connection, Step};

/// Subscriptions of one subscriber.
const TOPICS_MAX: usize = 64;

/// What a subscriber wants: topics that begin with any of these.
#[derive(Debug, Default)]
struct Topics(Vec<Bytes>);

impl Topics {
    /// Takes a message of a subscriber, the way of ZMTP 3.0.
    ///
    /// # Errors
    /// As [`Topics::add`].
    fn message(&mut self, frames: &[Bytes]) -> Result<()> {
        match frames {
            [frame] if frame.first() == Some(&1) => self.add(frame.slice(1..)),
            [frame] if frame.first() == Some(&0) => {
                self.remove(&frame.slice(1..));
                Ok(())
            }
            // Subscribers may say what they like to publishers that listen.
            _ => Ok(()),
        }
    }

    /// Takes a command, the way of ZMTP 3.1.
    ///
    /// # Errors
    /// As [`Topics::add`].
    fn command(&mut self, name: &[u8], topic: Bytes) -> Result<()> {
        match name {
            b"SUBSCRIBE" => self.add(topic),
            b"CANCEL" => {
                self.remove(&topic);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// # Errors
    /// `Invalid` when there are too many.
    fn add(&mut self, topic: Bytes) -> Result<()> {
        if self.0.len() >= TOPICS_MAX {
            let found = self.0.len() + 1;
            return Err(Error::invalid("subscriptions", found, 0..=TOPICS_MAX));
        }
        self.0.push(topic);
        Ok(())
    }

    fn remove(&mut self, topic: &Bytes) {
        if let Some(place) = self.0.iter().position(|known| known == topic) {
            self.0.swap_remove(place);
        }
    }

    fn cover(&self, topic: &[u8]) -> bool {
        self.0.iter().any(|prefix| topic.starts_with(prefix))
    }
}

/// Serves a subscriber; returns why that ended, `Busy` if it stopped reading.
pub(super) async fn serve(shared: &Shared, mut peer: Connection) -> Error {
    let mut topics = Topics::default();
    let mut published = shared.published.subscribe();
    let mut queued = Queued::new(shared);
    // None while it wants nothing. Like any publisher's, it gets what comes after its subscription.
    let mut reader: Option<Reader<'_>> = None;
    let mut look_at = Instant::now();
    loop {
        match (&reader, topics.cover(&shared.topic)) {
            (None, true) => reader = Some(shared.readers.enter(shared.history().next())),
            (Some(_), false) => reader = None,
            _ => {}
        }
        published.mark_unchanged();
        queued.set(peer.unsent());
        if let Some(reader) = &mut reader
            && peer.unsent() == 0
        {
            send_more(shared, &mut peer, reader);
        }
        queued.set(peer.unsent());
        let stall_at = peer
            .waiting_since()
            .map(|since| (since + STALL_MAX).max(look_at));
        let step = tokio::select! {
            step = peer.step() => step,
            _ = published.changed(), if stall_at.is_none() => continue,
            () = sleep_until(stall_at.unwrap_or(look_at)), if stall_at.is_some() => {
                if let Some(waiting) = reader.as_ref().and_then(|reader| too_much(shared, reader)) {
                    return stalled(waiting);
                }
                look_at = Instant::now() + STALL_MAX;
                continue;
            }
        };
        let taken = match step {
            Ok(Step::Sent) => Ok(()),
            Ok(Step::Message(frames)) => topics.message(&frames),
            Ok(Step::Command { name, body }) => topics.command(&name, body),
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            return error;
        }
    }
}

/// Queues the next batches, as all before them are sent.
fn send_more(shared: &Shared, peer: &mut Connection, reader: &mut Reader<'_>) {
    let mut next = reader.sent();
    while peer.unsent() < SEND_AHEAD_BYTES {
        let Some((sequence, payload)) = shared.history().at_or_after(next) else {
            break;
        };
        let skipped = &shared.counters.skipped;
        skipped.fetch_add(sequence - next, Ordering::Relaxed);
        let number = Bytes::copy_from_slice(&sequence.to_be_bytes());
        peer.queue(&[shared.topic.clone(), number, payload]);
        next = sequence + 1;
    }
    reader.queue(next);
}

/// The bytes that wait for a subscriber, if they are more than may.
fn too_much(shared: &Shared, reader: &Reader<'_>) -> Option<u64> {
    let history = shared.history();
    let waiting = history.bytes_from(reader.queued());
    let is_too_much =
        history.has_dropped(reader.queued()) || waiting > shared.queue_bytes_max as u64;
    is_too_much.then_some(waiting)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }

    /// Both ways of saying it, what is none of them, and one more than is taken.
    #[test]
    fn subscriptions_are_added_taken_back_and_bounded() {
        let mut topics = Topics::default();
        assert!(!topics.cover(b"kv@pod@m"));
        topics.message(&[bytes("\x01kv@")]).unwrap();
        assert!(topics.cover(b"kv@pod@m") && !topics.cover(b"other"));
        topics.message(&[bytes("\x00kv@")]).unwrap();
        assert!(!topics.cover(b"kv@pod@m"));
        topics.command(b"SUBSCRIBE", bytes("")).unwrap();
        topics.command(b"HELLO", bytes("kv@")).unwrap();
        topics.message(&[bytes("\x02kv@"), bytes("")]).unwrap();
        topics.message(&[bytes("")]).unwrap();
        assert!(topics.cover(b"anything"));
        topics.command(b"CANCEL", bytes("")).unwrap();
        assert!(!topics.cover(b"anything"));

        for _ in 0..TOPICS_MAX {
            topics.message(&[bytes("\x01kv@")]).unwrap();
        }
        let error = topics.command(b"SUBSCRIBE", bytes("")).unwrap_err();
        assert!(error.to_string().contains("subscriptions is 65"), "{error}");
    }
}
