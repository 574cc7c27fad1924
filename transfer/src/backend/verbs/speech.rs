//! What one side says to the other: messages in fragments, in order, over one rail at a time.
//!
//! When that rail is lost the other side tells how many fragments it has heard, and what it has not is said again over
//! another rail: so each is heard once, and in order.

use std::collections::VecDeque;

use kvcache_core::{Error, ErrorKind, Result};

use super::controls::{LAST, MORE};
use super::wire::{FRAGMENT_BYTES, Wire};
use crate::backend::unix::Message;
use crate::request::NOTIFICATION_BYTES_MAX;

/// Fragments that may wait.
const OUTBOX_MAX: usize = 16_384;

/// The longest message.
const MESSAGE_BYTES_MAX: usize = NOTIFICATION_BYTES_MAX + 1024;

#[derive(Default)]
pub(super) struct Speech {
    /// The rail that it goes over.
    pub(super) over: Option<usize>,
    /// The rail that it went over, which was lost, until the other side has told what it has heard.
    held: Option<usize>,
    outbox: VecDeque<Vec<u8>>,
    /// Handed to the device, and not known to have arrived.
    under_way: VecDeque<Vec<u8>>,
    /// Fragments before those.
    arrived: u64,
    /// Fragments that were heard of the other side.
    pub(super) heard: u64,
    /// The fragments of a message that is not complete.
    arriving: Vec<u8>,
}

impl Speech {
    /// Adds a message to what is to be said.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when too much waits.
    pub(super) fn put(&mut self, message: &Message) -> Result<()> {
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
        Ok(())
    }

    /// Whether there is room for a notification, and for what else is to be said beside.
    pub(super) fn may_notify(&self) -> bool {
        self.outbox.len() < OUTBOX_MAX / 2
    }

    /// Whether something is to be said, and may be.
    pub(super) fn wants_to_go_on(&self) -> bool {
        self.held.is_none() && !self.outbox.is_empty()
    }

    /// Says as much as there is room for.
    pub(super) fn go_on(&mut self, wire: &mut Wire) -> Result<()> {
        while wire.may_say() {
            let Some(fragment) = self.begin() else {
                break;
            };
            wire.say(fragment)?;
        }
        Ok(())
    }

    /// The next fragment, which is under way from now on.
    fn begin(&mut self) -> Option<&[u8]> {
        let fragment = self.outbox.pop_front()?;
        self.under_way.push_back(fragment);
        self.under_way.back().map(Vec::as_slice)
    }

    /// A fragment that went over this rail has arrived.
    pub(super) fn arrived(&mut self, rail: usize) {
        if (self.over == Some(rail) || self.held == Some(rail))
            && self.under_way.pop_front().is_some()
        {
            self.arrived += 1;
        }
    }

    /// Nothing goes over this rail any more.
    pub(super) fn lose(&mut self, rail: usize) {
        if self.over == Some(rail) {
            self.over = None;
            self.held = Some(rail);
        }
    }

    /// The other side has heard so many fragments, and hears no more over this rail.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when there were not as many, or more are known to have arrived.
    pub(super) fn resume(&mut self, rail: usize, heard: u64) -> Result<()> {
        if self.held != Some(rail) {
            return Ok(());
        }
        let more = heard
            .checked_sub(self.arrived)
            .and_then(|more| usize::try_from(more).ok());
        let Some(more) = more.filter(|&more| more <= self.under_way.len()) else {
            let (arrived, under_way) = (self.arrived, self.under_way.len());
            let text = format!(
                "the peer has heard {heard} fragments; {arrived} and at most {under_way} more were said"
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        };
        self.held = None;
        self.under_way.drain(..more);
        self.arrived = heard;
        while let Some(fragment) = self.under_way.pop_back() {
            self.outbox.push_front(fragment);
        }
        Ok(())
    }

    /// Takes a fragment of the other side's; the message that it was the last one of.
    pub(super) fn hear(&mut self, is_last: bool, part: &[u8]) -> Result<Option<Message>> {
        self.heard += 1;
        if self.arriving.len() + part.len() > MESSAGE_BYTES_MAX {
            let text = format!("a message has more than {MESSAGE_BYTES_MAX} bytes");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        self.arriving.extend_from_slice(part);
        match is_last {
            false => Ok(None),
            true => Message::decode(&std::mem::take(&mut self.arriving)).map(Some),
        }
    }
}

#[cfg(test)]
mod tests;
