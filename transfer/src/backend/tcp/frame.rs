//! The bytes on a TCP connection, as `docs/wire-format.md` describes them.

use kvcache_core::{Error, ErrorKind, Result};

use crate::metadata::{AGENT_NAME_BYTES_MAX, Incarnation, check_name};
use crate::region::{RegionId, RegionKey};
use crate::request::NOTIFICATION_BYTES_MAX;
use crate::wire::{Reader, put_counted};

/// The version that this build speaks, and the only one that it accepts.
pub(crate) const PROTOCOL_VERSION: u16 = 1;

pub(super) const MAGIC: [u8; 4] = *b"KVFT";

/// Magic, version, and the length of what follows.
pub(super) const PREAMBLE_BYTES: usize = 8;

/// The longest greeting or answer to one, after the preamble.
pub(super) const GREETING_BYTES_MAX: usize = 2048;

/// Every frame starts with a header of this size.
pub(super) const HEADER_BYTES: usize = 24;

/// Bytes of memory that one frame moves at most.
pub(super) const CHUNK_BYTES_MAX: u64 = 1 << 20;

/// Ranges that one frame names at most.
pub(super) const CHUNK_RANGES_MAX: usize = 1024;

const RANGE_BYTES: usize = 16;
const REGION_BYTES: usize = 24;

/// The longest head: a full table of regions and ranges, and a notification.
pub(super) const HEAD_BYTES_MAX: usize =
    8 + CHUNK_RANGES_MAX * (RANGE_BYTES + REGION_BYTES) + NOTIFICATION_BYTES_MAX;

/// Error texts sent to a peer are cut here.
const CONTEXT_BYTES_MAX: usize = 512;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum FrameKind {
    /// Asks for the bytes of the ranges in the head.
    Read = 1,
    /// Brings bytes for the ranges in the head.
    Write = 2,
    /// Brings a notification, as the head.
    Notify = 3,
    /// Answers a read with its bytes.
    Data = 4,
    /// Answers anything with how it ended.
    Done = 5,
    /// Asks for the CRC-32C of each range in the head.
    Sums = 6,
}

impl FrameKind {
    /// Whether it is answered by [`FrameKind::Data`].
    pub(super) fn asks_for_bytes(self) -> bool {
        matches!(self, Self::Read | Self::Sums)
    }
}

/// What every frame starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: FrameKind,
    pub(super) head_bytes: u32,
    /// Chosen by the initiator, rising; answers repeat it.
    pub(super) id: u64,
    pub(super) payload_bytes: u64,
}

impl Header {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.push(self.kind as u8);
        out.extend_from_slice(&[0; 3]);
        out.extend_from_slice(&self.head_bytes.to_le_bytes());
        out.extend_from_slice(&self.id.to_le_bytes());
        out.extend_from_slice(&self.payload_bytes.to_le_bytes());
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let kind = match reader.u8("frame kind")? {
            1 => FrameKind::Read,
            2 => FrameKind::Write,
            3 => FrameKind::Notify,
            4 => FrameKind::Data,
            5 => FrameKind::Done,
            6 => FrameKind::Sums,
            other => return Err(Error::invalid("frame kind", other, 1..=6)),
        };
        let reserved: [u8; 3] = reader.array("frame flags")?;
        if reserved != [0; 3] {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("frame flags are {reserved:02x?}"),
            ));
        }
        let head_bytes = reader.u32("head length")?;
        if head_bytes as usize > HEAD_BYTES_MAX {
            return Err(Error::invalid(
                "head length",
                head_bytes,
                0..=HEAD_BYTES_MAX,
            ));
        }
        let id = reader.u64("request id")?;
        let payload_bytes = reader.u64("payload length")?;
        if payload_bytes > CHUNK_BYTES_MAX {
            return Err(Error::invalid(
                "payload length",
                payload_bytes,
                0..=CHUNK_BYTES_MAX,
            ));
        }
        Ok(Self {
            kind,
            head_bytes,
            id,
            payload_bytes,
        })
    }
}

/// A range of one of the regions that a head names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WireRange {
    /// Position in [`Access::regions`].
    pub(super) region: u32,
    pub(super) len: u32,
    pub(super) offset: u64,
}

/// The head of a read or write: what it touches, and what to deliver after it.
#[derive(Debug, Default)]
pub(super) struct Access {
    pub(super) regions: Vec<(RegionId, RegionKey)>,
    pub(super) ranges: Vec<WireRange>,
    pub(super) notification: Option<Vec<u8>>,
}

impl Access {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.regions.len() as u16).to_le_bytes());
        out.extend_from_slice(&(self.ranges.len() as u16).to_le_bytes());
        out.extend_from_slice(&u32::from(self.notification.is_some()).to_le_bytes());
        for (id, key) in &self.regions {
            out.extend_from_slice(&id.0.to_le_bytes());
            out.extend_from_slice(&key.0);
        }
        for range in &self.ranges {
            out.extend_from_slice(&range.region.to_le_bytes());
            out.extend_from_slice(&range.len.to_le_bytes());
            out.extend_from_slice(&range.offset.to_le_bytes());
        }
        out.extend_from_slice(self.notification.as_deref().unwrap_or_default());
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let region_count = usize::from(reader.u16("number of regions")?);
        let range_count = usize::from(reader.u16("number of ranges")?);
        if range_count == 0 || range_count > CHUNK_RANGES_MAX {
            return Err(Error::invalid(
                "number of ranges",
                range_count,
                1..=CHUNK_RANGES_MAX,
            ));
        }
        if region_count == 0 || region_count > range_count {
            return Err(Error::invalid(
                "number of regions",
                region_count,
                1..=range_count,
            ));
        }
        let has_notification = match reader.u32("notification flag")? {
            0 => false,
            1 => true,
            other => return Err(Error::invalid("notification flag", other, 0..=1)),
        };
        let mut regions = Vec::with_capacity(region_count);
        for _ in 0..region_count {
            let id = RegionId(reader.u64("region id")?);
            regions.push((id, RegionKey(reader.array("region key")?)));
        }
        let mut ranges = Vec::with_capacity(range_count);
        for _ in 0..range_count {
            let region = reader.u32("region of a range")?;
            if region as usize >= region_count {
                return Err(Error::invalid("region of a range", region, 0..region_count));
            }
            let len = reader.u32("length of a range")?;
            if len == 0 {
                return Err(Error::invalid("length of a range", len, 1..=u32::MAX));
            }
            ranges.push(WireRange {
                region,
                len,
                offset: reader.u64("offset of a range")?,
            });
        }
        let rest = reader.bytes("notification", reader.left())?;
        if rest.len() > NOTIFICATION_BYTES_MAX || (!has_notification && !rest.is_empty()) {
            return Err(Error::invalid(
                "notification length",
                rest.len(),
                has_notification,
            ));
        }
        let notification = has_notification.then(|| rest.to_vec());
        Ok(Self {
            regions,
            ranges,
            notification,
        })
    }

    /// Bytes of all ranges together.
    pub(super) fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| u64::from(range.len)).sum()
    }
}

/// How a request ended, as the head of [`FrameKind::Done`].
pub(super) fn encode_outcome(outcome: &Result<()>, out: &mut Vec<u8>) {
    match outcome {
        Ok(()) => out.extend_from_slice(&0_u32.to_le_bytes()),
        Err(error) => {
            out.extend_from_slice(&error.kind().code().to_le_bytes());
            put_counted(out, cut(&error.to_string()).as_bytes());
        }
    }
}

/// # Errors
/// When it is malformed; what the peer said is the value.
pub(super) fn decode_outcome(bytes: &[u8]) -> Result<Result<()>> {
    let mut reader = Reader::new(bytes);
    let code = reader.u32("status")?;
    if code == 0 {
        reader.end("status")?;
        return Ok(Ok(()));
    }
    let text = reader.text("reason")?;
    reader.end("status")?;
    Ok(Err(Error::new(
        kind_of(code),
        format!("the peer answered: {text}"),
    )))
}

/// Unknown codes come from newer peers: what failed there is known only as text.
fn kind_of(code: u32) -> ErrorKind {
    use ErrorKind as K;
    const KINDS: [ErrorKind; 10] = [
        K::Invalid,
        K::Busy,
        K::Corrupt,
        K::PeerLost,
        K::Unsupported,
        K::Timeout,
        K::Cancelled,
        K::Version,
        K::NoSpace,
        K::Denied,
    ];
    let known = KINDS.into_iter().find(|kind| kind.code() == code);
    match known {
        Some(kind) => kind,
        None if code == K::NotFound.code() => K::NotFound,
        None => K::Io,
    }
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(CONTEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// What the side that connects says first.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    pub(super) name: String,
    /// The agent's own.
    pub(super) incarnation: Incarnation,
    /// Whom it wants to reach.
    pub(super) wanted: Incarnation,
}

impl Greeting {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&self.incarnation.0.to_le_bytes());
        body.extend_from_slice(&self.wanted.0.to_le_bytes());
        put_counted(&mut body, self.name.as_bytes());
        with_preamble(&body)
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(body);
        let incarnation = Incarnation(reader.u64("incarnation")?);
        let wanted = Incarnation(reader.u64("wanted incarnation")?);
        let name = reader.text("agent name")?.to_owned();
        check_name(&name)?;
        reader.end("greeting")?;
        Ok(Self {
            name,
            incarnation,
            wanted,
        })
    }
}

/// The answer to a greeting.
pub(super) fn encode_welcome(outcome: &Result<()>) -> Vec<u8> {
    let mut body = Vec::new();
    encode_outcome(outcome, &mut body);
    with_preamble(&body)
}

fn with_preamble(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(PREAMBLE_BYTES + body.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    out.extend_from_slice(&(body.len() as u16).to_le_bytes());
    out.extend_from_slice(body);
    out
}

/// Checks magic and version; how many bytes follow.
pub(super) fn decode_preamble(bytes: &[u8; PREAMBLE_BYTES]) -> Result<usize> {
    let mut reader = Reader::new(bytes);
    let magic: [u8; 4] = reader.array("magic")?;
    if magic != MAGIC {
        let text = format!("the connection starts with {magic:02x?}, not with {MAGIC:02x?}");
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    let version = reader.u16("version")?;
    if version != PROTOCOL_VERSION {
        let text =
            format!("the other side speaks version {version}, this build {PROTOCOL_VERSION}");
        return Err(Error::new(ErrorKind::Version, text));
    }
    let len = usize::from(reader.u16("greeting length")?);
    if len > GREETING_BYTES_MAX {
        return Err(Error::invalid(
            "greeting length",
            len,
            0..=GREETING_BYTES_MAX,
        ));
    }
    Ok(len)
}

const _: () = assert!(AGENT_NAME_BYTES_MAX + 64 < GREETING_BYTES_MAX);
const _: () = assert!(CONTEXT_BYTES_MAX + 64 < GREETING_BYTES_MAX);
const _: () = assert!(CHUNK_RANGES_MAX <= u16::MAX as usize);

#[cfg(test)]
mod tests;
