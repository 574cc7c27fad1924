//! The bytes that are hashed: see the encoding in the parent module.

use super::Weights;
use crate::error::{Error, ErrorKind};

/// Lengths in messages are u32; nothing that is hashed here comes near.
pub(super) fn count(len: usize) -> u32 {
    assert!(u32::try_from(len).is_ok(), "{len} items in one block");
    len as u32
}

/// A message in the making; the buffer is kept from block to block.
#[derive(Clone, Debug, Default)]
pub(super) struct Message(Vec<u8>);

impl Message {
    pub(super) fn new(domain: &[u8]) -> Self {
        Self(domain.to_vec())
    }

    pub(super) fn begin(&mut self, domain: &[u8]) {
        self.0.clear();
        self.bytes(domain);
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn str(&mut self, value: &[u8]) {
        self.bytes(&(value.len() as u64).to_le_bytes());
        self.bytes(value);
    }

    pub(super) fn optional(&mut self, value: Option<&[u8]>) {
        match value {
            None => self.bytes(&[0]),
            Some(value) => {
                self.bytes(&[1]);
                self.str(value);
            }
        }
    }

    pub(super) fn weights(&mut self, weights: &Weights<'_>) -> Result<(), Error> {
        let empty = |what: &str| {
            let context = format!("the {what} that names the weights is empty");
            Err(Error::new(ErrorKind::Invalid, context))
        };
        match *weights {
            Weights::Snapshot { commit: "", .. } => return empty("commit"),
            Weights::Named("") => return empty("name"),
            Weights::Snapshot { repository, commit } => {
                self.bytes(&[1]);
                self.str(repository.as_bytes());
                self.str(commit.as_bytes());
            }
            Weights::Digest(digest) => {
                self.bytes(&[2]);
                self.bytes(&digest);
            }
            Weights::Named(name) => {
                self.bytes(&[3]);
                self.str(name.as_bytes());
            }
        }
        Ok(())
    }

    pub(super) fn digest(&self) -> [u8; 32] {
        *blake3::hash(&self.0).as_bytes()
    }
}
