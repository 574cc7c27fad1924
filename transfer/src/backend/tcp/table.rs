//! What was sent on a connection and is not answered.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::active::{Active, Chunk};
use super::frame::FrameKind;
use super::scatter::Piece;

/// A frame that was not answered.
pub(super) struct Open {
    pub(super) active: Arc<Active>,
    pub(super) kind: FrameKind,
    pub(super) chunk: Chunk,
    /// Whether the request counts it among its open ones. If not, what arrives for it is dropped.
    pub(super) counts: bool,
    /// Read: where the bytes go.
    pub(super) pieces: Vec<Piece>,
    /// Notification: how long it is.
    pub(super) notice_bytes: usize,
}

#[derive(Default)]
pub(super) struct Table {
    /// Since when there are some that move data.
    pub(super) since: Option<Instant>,
    pub(super) next: u64,
    pub(super) open: HashMap<u64, Open>,
    /// Notifications among them, and their bytes. They have a window of their own: a peer answers them when it has taken what
    /// came before, and data does not wait for that.
    pub(super) notices: usize,
    pub(super) notice_bytes: usize,
}

impl Table {
    pub(super) fn owes_data(&self) -> bool {
        self.open.len() > self.notices
    }
}
