//! What two agents of one host tell each other over a Unix socket, one datagram a message. The same build is not
//! promised, so the version is in every greeting.

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use crate::metadata::{Incarnation, check_name};
use crate::region::{RegionId, RegionKey};
use crate::request::NOTIFICATION_BYTES_MAX;
use crate::sys::cuda::Offer;
use crate::sys::process_vm::NONCE_BYTES;
use crate::wire::{Reader, put_counted};

mod device;

/// The version that this build speaks, and the only one that it accepts.
const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"KVFS";

/// Error texts are cut here.
const CONTEXT_BYTES_MAX: usize = 512;

/// Ranges whose checksums one message asks for.
pub(crate) const SUMS_MAX: usize = 1024;

/// The longest message.
pub(super) const MESSAGE_BYTES_MAX: usize = NOTIFICATION_BYTES_MAX + 1024;

/// One message.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    /// The first one, from the side that connects.
    Hello { name: String, wanted: Incarnation },
    /// Asks to use a region's memory.
    Map {
        id: u64,
        region: RegionId,
        key: RegionKey,
    },
    /// The memory is no longer used.
    Unmapped { region: RegionId },
    /// A notification for the inbox.
    Notify { id: u64, bytes: Bytes },
    /// How a greeting (id 0), a map or a notification ended. Memory to be mapped comes with a descriptor.
    Done { id: u64, outcome: Outcome },
    /// The memory is not to be used any more: its region is being deregistered.
    Revoke { region: RegionId },
    /// Asks for the checksums of ranges of a region, each an offset and a length.
    Sums {
        id: u64,
        region: RegionId,
        key: RegionKey,
        ranges: Vec<(u64, u64)>,
    },
    /// Asks for a piece of a region that was granted in pieces.
    Piece {
        id: u64,
        region: RegionId,
        key: RegionKey,
        number: u32,
    },
}

/// An outcome as it travels.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Done,
    /// Memory of this size, in the descriptor that comes along.
    Granted {
        bytes: u64,
        writable: bool,
    },
    Failed {
        code: u32,
        text: String,
    },
    /// Memory of this size, at this address of the process that answers.
    Located {
        address: u64,
        bytes: u64,
        writable: bool,
    },
    /// The greeting is answered with a random word, and where the process that answers has it.
    Welcome {
        nonce_at: u64,
        nonce: [u8; NONCE_BYTES],
    },
    /// Memory of this size, at this address of the process that answers, for whoever has this key of its network.
    Keyed {
        address: u64,
        bytes: u64,
        writable: bool,
        key: Vec<u8>,
    },
    /// The CRC-32C of each range, in order.
    Summed {
        sums: Vec<u32>,
    },
    /// Memory of a device, of this size: how another process opens it, or nothing for the process that has it itself.
    Device {
        bytes: u64,
        writable: bool,
        offer: Option<Offer>,
    },
}

impl Outcome {
    pub(crate) fn of(outcome: Result<()>) -> Self {
        match outcome {
            Ok(()) => Self::Done,
            Err(error) => {
                let mut text = error.to_string();
                let mut end = text.len().min(CONTEXT_BYTES_MAX);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                text.truncate(end);
                Self::Failed {
                    code: error.kind().code(),
                    text,
                }
            }
        }
    }

    /// What the peer said, as an error of ours.
    pub(crate) fn failure(code: u32, text: &str) -> Error {
        let kind = match code {
            2 => ErrorKind::Busy,
            4 => ErrorKind::PeerLost,
            8 => ErrorKind::Version,
            10 => ErrorKind::Denied,
            12 => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Error::new(kind, format!("the peer answered: {text}"))
    }
}

const HELLO: u8 = 1;
const MAP: u8 = 2;
const UNMAPPED: u8 = 3;
const NOTIFY: u8 = 4;
const DONE: u8 = 5;
const REVOKE: u8 = 6;
const SUMS: u8 = 7;
const PIECE: u8 = 8;

impl Message {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        match self {
            Self::Hello { name, wanted } => {
                out.push(HELLO);
                out.extend_from_slice(&MAGIC);
                out.extend_from_slice(&VERSION.to_le_bytes());
                out.extend_from_slice(&wanted.0.to_le_bytes());
                put_counted(&mut out, name.as_bytes());
            }
            Self::Map { id, region, key } => {
                out.push(MAP);
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(&region.0.to_le_bytes());
                out.extend_from_slice(&key.0);
            }
            Self::Unmapped { region } => {
                out.push(UNMAPPED);
                out.extend_from_slice(&region.0.to_le_bytes());
            }
            Self::Notify { id, bytes } => {
                out.push(NOTIFY);
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(bytes);
            }
            Self::Done { id, outcome } => {
                out.push(DONE);
                out.extend_from_slice(&id.to_le_bytes());
                outcome.encode(&mut out);
            }
            Self::Revoke { region } => {
                out.push(REVOKE);
                out.extend_from_slice(&region.0.to_le_bytes());
            }
            Self::Sums {
                id,
                region,
                key,
                ranges,
            } => {
                out.push(SUMS);
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(&region.0.to_le_bytes());
                out.extend_from_slice(&key.0);
                out.extend_from_slice(&(ranges.len() as u16).to_le_bytes());
                for (offset, len) in ranges {
                    out.extend_from_slice(&offset.to_le_bytes());
                    out.extend_from_slice(&len.to_le_bytes());
                }
            }
            Self::Piece {
                id,
                region,
                key,
                number,
            } => {
                out.push(PIECE);
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(&region.0.to_le_bytes());
                out.extend_from_slice(&key.0);
                out.extend_from_slice(&number.to_le_bytes());
            }
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let message = match reader.u8("message kind")? {
            HELLO => {
                let magic: [u8; 4] = reader.array("magic")?;
                if magic != MAGIC {
                    let text = format!("magic is {magic:02x?}, not {MAGIC:02x?}");
                    return Err(Error::new(ErrorKind::Corrupt, text));
                }
                let version = reader.u16("version")?;
                if version != VERSION {
                    let text =
                        format!("the other side speaks version {version}, this build {VERSION}");
                    return Err(Error::new(ErrorKind::Version, text));
                }
                let wanted = Incarnation(reader.u64("wanted incarnation")?);
                let name = reader.text("agent name")?.to_owned();
                check_name(&name)?;
                Self::Hello { name, wanted }
            }
            MAP => Self::Map {
                id: reader.u64("request id")?,
                region: RegionId(reader.u64("region id")?),
                key: RegionKey(reader.array("region key")?),
            },
            UNMAPPED => Self::Unmapped {
                region: RegionId(reader.u64("region id")?),
            },
            NOTIFY => {
                let id = reader.u64("request id")?;
                let bytes = reader.bytes("notification", reader.left())?;
                if bytes.len() > NOTIFICATION_BYTES_MAX {
                    return Err(Error::invalid("notification length", bytes.len(), ..65537));
                }
                Self::Notify {
                    id,
                    bytes: Bytes::copy_from_slice(bytes),
                }
            }
            DONE => Self::Done {
                id: reader.u64("request id")?,
                outcome: Outcome::decode(&mut reader)?,
            },
            REVOKE => Self::Revoke {
                region: RegionId(reader.u64("region id")?),
            },
            SUMS => Self::Sums {
                id: reader.u64("request id")?,
                region: RegionId(reader.u64("region id")?),
                key: RegionKey(reader.array("region key")?),
                ranges: decode_each(&mut reader, |reader| {
                    Ok((reader.u64("offset")?, reader.u64("length")?))
                })?,
            },
            PIECE => Self::Piece {
                id: reader.u64("request id")?,
                region: RegionId(reader.u64("region id")?),
                key: RegionKey(reader.array("region key")?),
                number: reader.u32("number of a piece")?,
            },
            other => return Err(Error::invalid("message kind", other, HELLO..=PIECE)),
        };
        reader.end("message")?;
        Ok(message)
    }
}

impl Outcome {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Done => out.push(0),
            Self::Granted { bytes, writable } => {
                out.push(1);
                out.extend_from_slice(&bytes.to_le_bytes());
                out.push(u8::from(*writable));
            }
            Self::Failed { code, text } => {
                out.push(2);
                out.extend_from_slice(&code.to_le_bytes());
                put_counted(out, text.as_bytes());
            }
            Self::Located {
                address,
                bytes,
                writable,
            } => {
                out.push(3);
                out.extend_from_slice(&address.to_le_bytes());
                out.extend_from_slice(&bytes.to_le_bytes());
                out.push(u8::from(*writable));
            }
            Self::Welcome { nonce_at, nonce } => {
                out.push(4);
                out.extend_from_slice(&nonce_at.to_le_bytes());
                out.extend_from_slice(nonce);
            }
            Self::Keyed {
                address,
                bytes,
                writable,
                key,
            } => {
                out.push(5);
                out.extend_from_slice(&address.to_le_bytes());
                out.extend_from_slice(&bytes.to_le_bytes());
                out.push(u8::from(*writable));
                put_counted(out, key);
            }
            Self::Summed { sums } => {
                out.push(6);
                out.extend_from_slice(&(sums.len() as u16).to_le_bytes());
                sums.iter()
                    .for_each(|sum| out.extend_from_slice(&sum.to_le_bytes()));
            }
            Self::Device {
                bytes,
                writable,
                offer,
            } => {
                out.push(7);
                out.extend_from_slice(&bytes.to_le_bytes());
                out.push(u8::from(*writable));
                device::encode(offer.as_ref(), out);
            }
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self> {
        match reader.u8("outcome")? {
            0 => Ok(Self::Done),
            1 => Ok(Self::Granted {
                bytes: reader.u64("region size")?,
                writable: decode_writable(reader)?,
            }),
            2 => {
                let code = reader.u32("error code")?;
                Ok(Self::Failed {
                    code,
                    text: reader.text("reason")?.to_owned(),
                })
            }
            3 => Ok(Self::Located {
                address: reader.u64("region address")?,
                bytes: reader.u64("region size")?,
                writable: decode_writable(reader)?,
            }),
            4 => Ok(Self::Welcome {
                nonce_at: reader.u64("address of the word")?,
                nonce: reader.array("word")?,
            }),
            5 => Ok(Self::Keyed {
                address: reader.u64("region address")?,
                bytes: reader.u64("region size")?,
                writable: decode_writable(reader)?,
                key: reader.counted("remote key")?.to_vec(),
            }),
            6 => Ok(Self::Summed {
                sums: decode_each(reader, |reader| reader.u32("checksum"))?,
            }),
            7 => Ok(Self::Device {
                bytes: reader.u64("region size")?,
                writable: decode_writable(reader)?,
                offer: device::decode(reader)?,
            }),
            other => Err(Error::invalid("outcome", other, 0..=7)),
        }
    }
}

/// As many as are counted before them.
fn decode_each<T>(
    reader: &mut Reader<'_>,
    one: impl Fn(&mut Reader<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let count = usize::from(reader.u16("count")?);
    if count > SUMS_MAX {
        return Err(Error::invalid("checksums", count, 0..=SUMS_MAX));
    }
    (0..count).map(|_| one(reader)).collect()
}

fn decode_writable(reader: &mut Reader<'_>) -> Result<bool> {
    match reader.u8("writable flag")? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Error::invalid("writable flag", other, 0..=1)),
    }
}

#[cfg(test)]
mod tests;
