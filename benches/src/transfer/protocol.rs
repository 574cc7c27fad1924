//! What the processes of a transfer say to each other: JSON, a line each, over the target's standard streams or a socket.

use std::io::{BufRead, Read};

use kvcache_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use super::plan::Shape;

/// The longest line. Metadata are in it, byte by byte as numbers.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// From the one who asks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Whether both are of one version.
    Hello { version: String },
    /// Make memory for this case and let it be reached; filled with the source's bytes when the case is a read.
    Expose {
        shape: Shape,
        /// Whether it is the raw TCP reference that wants to reach it.
        is_raw: bool,
    },
    /// Tell again how to reach the memory, since others may have exposed some in between.
    Whereabouts,
    /// Make ready to move the blocks of this case between own memory and what another process exposed.
    Initiate {
        shape: Shape,
        region: u64,
        metadata: Vec<u8>,
    },
    /// Send back every notification of the agent that has this metadata.
    Echo { metadata: Vec<u8> },
    /// Move all blocks once.
    Move,
    /// Overwrite the memory.
    Poison,
    /// Compare the memory with what the case must have left there.
    Verify,
    /// Tell the CPU time.
    Cpu,
}

/// From the one who is asked; one for each [`Ask`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// The agent's metadata.
    Exposed { region: u64, metadata: Vec<u8> },
    /// Where the raw reference listens.
    Listening { port: u16 },
    /// Done, or as it must be.
    Done,
    /// All blocks are there.
    Moved { bytes: u64, nanoseconds: u64 },
    /// CPU time so far.
    Cpu { nanoseconds: u64 },
    /// It could not be done.
    Failed {
        /// Whether bytes are wrong.
        is_corrupt: bool,
        text: String,
    },
}

/// The next line; none at the end.
///
/// # Errors
/// `Io` when it cannot be read, `Invalid` when it is too long or no text.
pub(super) fn read_line(reader: &mut impl BufRead) -> Result<Option<String>> {
    let mut line = Vec::new();
    let read = reader
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut line)
        .map_err(|error| Error::io("read a message", error))?;
    if read == 0 {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        let context = format!("a message of {read} bytes that does not end");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    String::from_utf8(line)
        .map(Some)
        .map_err(|error| Error::new(ErrorKind::Invalid, "a message").with_source(error))
}

/// A message as a line.
///
/// # Errors
/// `Internal`, which nobody has seen.
pub(super) fn line(message: &impl Serialize) -> Result<String> {
    let mut line = serde_json::to_string(message)
        .map_err(|error| Error::new(ErrorKind::Internal, "encode a message").with_source(error))?;
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads two lines and the end; then a line that is cut, and bytes that are no text.
    #[test]
    fn messages_are_whole_lines_of_text() {
        let mut reader = &b"one\n\n"[..];
        assert_eq!(read_line(&mut reader).unwrap().as_deref(), Some("one"));
        assert_eq!(read_line(&mut reader).unwrap().as_deref(), Some(""));
        assert_eq!(read_line(&mut reader).unwrap(), None);
        for bytes in [&b"cut"[..], &b"\xff\xfe\n"[..]] {
            let error = read_line(&mut &*bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
    }
}
