//! What the two processes of a transfer say to each other: JSON, a line each, over the target's standard streams.

use serde::{Deserialize, Serialize};

use super::plan::Shape;

/// From the initiator.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Make memory for this case and let it be reached; filled with the source's bytes when the case is a read.
    Expose {
        shape: Shape,
        /// Whether it is the raw TCP reference that wants to reach it.
        is_raw: bool,
    },
    /// Overwrite the memory.
    Poison,
    /// Compare the memory with what the case must have left there.
    Verify,
    /// Tell the CPU time.
    Cpu,
}

/// From the target; one for each [`Ask`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// The agent's metadata.
    Exposed { region: u64, metadata: Vec<u8> },
    /// Where the raw reference listens.
    Listening { port: u16 },
    /// Done, or as it must be.
    Done,
    /// CPU time so far.
    Cpu { nanoseconds: u64 },
    /// It could not be done.
    Failed {
        /// Whether bytes are wrong.
        is_corrupt: bool,
        text: String,
    },
}
