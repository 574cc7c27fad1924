//! A region of the peer that this process may use.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::Access;
use super::link::Link;
use crate::region::RegionId;

/// Let go of when the last copy is done with it; the peer hears of that, because it may be waiting to give the memory
/// up.
pub(crate) struct Held<A: Access> {
    id: RegionId,
    memory: Option<A::Memory>,
    link: Arc<Link>,
}

impl<A: Access> Held<A> {
    pub(crate) fn new(id: RegionId, memory: A::Memory, link: &Arc<Link>) -> Self {
        Self {
            id,
            memory: Some(memory),
            link: link.clone(),
        }
    }

    pub(crate) fn memory(&self) -> Result<&A::Memory> {
        self.memory.as_ref().ok_or_else(|| {
            let text = format!("region {} was let go of", self.id);
            Error::new(ErrorKind::Internal, text)
        })
    }
}

impl<A: Access> Drop for Held<A> {
    fn drop(&mut self) {
        self.memory = None;
        self.link.send_last_word(self.id);
    }
}
