//! What a connection has to send.

use std::collections::{LinkedList, VecDeque};
use std::io;
use std::sync::Arc;

use kvcache_core::Result;

use super::active::Active;
use super::connection::{TURN_BYTES, Wire};
use super::devices::Allowed;
use super::scatter::Scatter;
use crate::backend::Job;
use crate::request::Priority;
use crate::sys::memory::Span;
use crate::sys::socket::SPANS_MAX;

/// A frame to send: encoded bytes, then memory.
pub(super) struct Frame {
    bytes: Vec<u8>,
    sent: usize,
    payload: Option<Scatter>,
    /// Given back when it is sent.
    _allowed: Option<Allowed>,
}

impl Frame {
    pub(super) fn new(bytes: Vec<u8>, payload: Option<Scatter>) -> Self {
        Self {
            bytes,
            sent: 0,
            payload,
            _allowed: None,
        }
    }

    /// Part of an allowance until it is sent.
    pub(super) fn keeping(self, allowed: Allowed) -> Self {
        Self {
            _allowed: Some(allowed),
            ..self
        }
    }

    /// Counts `count` sent bytes; returns those beyond this frame, and whether the frame is finished.
    fn advance(&mut self, count: u64) -> (u64, bool) {
        let own = count.min((self.bytes.len() - self.sent) as u64);
        self.sent += own as usize;
        let mut beyond = count - own;
        let mut finished = self.sent == self.bytes.len();
        if let Some(payload) = &mut self.payload {
            let moved = beyond.min(payload.left());
            payload.advance(moved);
            beyond -= moved;
            finished &= payload.left() == 0;
        }
        (beyond, finished)
    }
}

/// What waits to be sent.
#[derive(Default)]
pub(super) struct Outbox {
    pub(super) frames: VecDeque<Frame>,
    /// Initiator: requests that are not wholly cut into frames. As many as callers hold, each with a place of its own: so
    /// none is refused, and no post has to make room for others.
    pub(super) jobs: LinkedList<Arc<Active>>,
    /// Initiator: those of them that give way to the others.
    pub(super) background: LinkedList<Arc<Active>>,
    /// Initiator: requests whose notifications are to be sent, alone, when earlier ones are answered.
    pub(super) notices: LinkedList<Arc<Active>>,
    pub(super) ended: bool,
    /// Requests that are over; settled without the lock, because that runs wakers of others.
    pub(super) settled: Vec<(Job, Result<()>)>,
}

impl Outbox {
    /// Puts a request at the end of its queue.
    pub(super) fn queue(&mut self, active: Arc<Active>) {
        match active.priority {
            Priority::Normal => self.jobs.push_back(active),
            Priority::Background => self.background.push_back(active),
        }
    }

    /// Puts a request back at the head of its queue.
    pub(super) fn put_back(&mut self, active: Arc<Active>) {
        match active.priority {
            Priority::Normal => self.jobs.push_front(active),
            Priority::Background => self.background.push_front(active),
        }
    }

    /// Requests whose notifications were not sent: another connection may send them.
    pub(super) fn take_notices(&mut self) -> LinkedList<Arc<Active>> {
        let notices = std::mem::take(&mut self.notices);
        notices
            .iter()
            .for_each(|active| active.lock().hand_back_notice());
        notices
    }

    /// One system call's worth of frames.
    pub(super) fn send(&mut self, wire: &Wire<'_>) -> Result<io::Result<u64>> {
        let mut spans = Vec::with_capacity(16);
        let mut bytes = 0;
        for frame in &self.frames {
            if spans.len() + 2 > SPANS_MAX || bytes >= TURN_BYTES {
                break;
            }
            if frame.sent < frame.bytes.len() {
                spans.push(Span::of_bytes(&frame.bytes[frame.sent..]));
            }
            if let Some(payload) = &frame.payload {
                let before = spans.len();
                payload.spans(&mut spans, SPANS_MAX)?;
                let ready = spans[before..]
                    .iter()
                    .map(|span| span.len() as u64)
                    .sum::<u64>();
                bytes += ready;
                // The rest of this frame must go before the next one.
                if ready < payload.left() {
                    break;
                }
            }
        }
        let sent = match wire.send(&spans) {
            Ok(sent) => sent as u64,
            Err(error) => return Ok(Err(error)),
        };
        drop(spans);
        let mut left = sent;
        while let Some(frame) = self.frames.front_mut() {
            let (beyond, finished) = frame.advance(left);
            left = beyond;
            if !finished {
                break;
            }
            self.frames.pop_front();
        }
        Ok(Ok(sent))
    }
}
