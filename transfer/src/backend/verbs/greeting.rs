//! What two agents tell each other by TCP before their queue pairs can talk: a question, an answer, each after its length.
//!
//! The connection stays open beside the queue pairs. Over it the user of memory says that it has stopped ([`STOP`]), and the
//! owner that no work of the user's can have any effect any more ([`STOPPED`]).

use kvcache_core::{Error, ErrorKind, Result};

use super::appointment::Appointment;
use super::options::{RAILS_MAX, VerbsConnect};
use crate::backend::unix::Outcome;
use crate::metadata::{Incarnation, check_name};
use crate::sys::verbs::End;
use crate::wire::{Reader, put_counted};

/// The version that this build speaks, and the only one that it accepts.
const VERSION: u16 = 3;

const MAGIC: [u8; 4] = *b"KVFV";

/// The longest question or answer.
pub(super) const BYTES_MAX: usize = 1024;

/// The user of memory is done, and its queue pair stopped.
pub(super) const STOP: u8 = b's';

/// The owner's queue pair is gone: nothing that the user sent can land any more.
pub(super) const STOPPED: u8 = b'd';

/// A queue pair, and what its side can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    pub(super) end: End,
    /// RoCE; InfiniBand otherwise.
    pub(super) is_ethernet: bool,
    /// As verbs number it.
    pub(super) mtu: u8,
    /// Reads that it answers at once.
    pub(super) reads_served: u8,
    /// Where it is to be connected by rdma_cm: of what the owner of memory offers.
    pub(super) appointment: Option<Appointment>,
}

/// The first message, of the side that connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) name: String,
    pub(super) wanted: Incarnation,
    /// How queue pairs are to be connected.
    pub(super) connect: VerbsConnect,
    /// One for each rail that is wanted, the best first.
    pub(super) offers: Vec<Offer>,
}

/// Of the offers of a question, by position, those that were taken, each with the other end.
pub(super) type Taken = Vec<(u8, Offer)>;

fn framed(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + 2);
    put_counted(&mut out, body);
    out
}

fn head() -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out
}

fn read_head(reader: &mut Reader<'_>) -> Result<()> {
    let magic: [u8; 4] = reader.array("magic")?;
    if magic != MAGIC {
        let text = format!("magic is {magic:02x?}, not {MAGIC:02x?}");
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    let version = reader.u16("version")?;
    if version != VERSION {
        let text = format!("the other side speaks version {version}, this build {VERSION}");
        return Err(Error::new(ErrorKind::Version, text));
    }
    Ok(())
}

impl Offer {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.end.pair.to_le_bytes());
        out.extend_from_slice(&self.end.first.to_le_bytes());
        out.extend_from_slice(&self.end.lid.to_le_bytes());
        out.extend_from_slice(&self.end.gid);
        let ethernet = u8::from(self.is_ethernet);
        out.extend_from_slice(&[ethernet, self.mtu, self.reads_served]);
        out.push(u8::from(self.appointment.is_some()));
        if let Some(appointment) = &self.appointment {
            appointment.encode(out);
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self> {
        let end = End {
            pair: number(reader, "queue pair")?,
            first: number(reader, "first packet")?,
            lid: reader.u16("lid")?,
            gid: reader.array("gid")?,
        };
        let is_ethernet = match reader.u8("link")? {
            0 => false,
            1 => true,
            other => return Err(Error::invalid("link", other, 0..=1)),
        };
        let mtu = reader.u8("mtu")?;
        if !(1..=5).contains(&mtu) {
            return Err(Error::invalid("mtu", mtu, 1..=5));
        }
        let reads_served = reader.u8("reads")?;
        let appointment = match reader.u8("appointment")? {
            0 => None,
            1 => Some(Appointment::decode(reader)?),
            other => return Err(Error::invalid("appointment", other, 0..=1)),
        };
        Ok(Self {
            end,
            is_ethernet,
            mtu,
            reads_served,
            appointment,
        })
    }
}

/// Queue pairs and packets have numbers of 24 bits.
fn number(reader: &mut Reader<'_>, field: &str) -> Result<u32> {
    let value = reader.u32(field)?;
    if value >> 24 != 0 {
        return Err(Error::invalid(field, value, 0..1 << 24));
    }
    Ok(value)
}

/// How many offers follow.
fn count(reader: &mut Reader<'_>) -> Result<u8> {
    let count = reader.u8("rails")?;
    if (1..=RAILS_MAX).contains(&count) {
        return Ok(count);
    }
    Err(Error::invalid("rails", count, 1..=RAILS_MAX))
}

impl Question {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = head();
        out.extend_from_slice(&self.wanted.0.to_le_bytes());
        put_counted(&mut out, self.name.as_bytes());
        out.push(match self.connect {
            VerbsConnect::Exchange => 0,
            VerbsConnect::RdmaCm => 1,
        });
        out.push(self.offers.len() as u8);
        for offer in &self.offers {
            offer.encode(&mut out);
        }
        framed(&out)
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(body);
        read_head(&mut reader)?;
        let wanted = Incarnation(reader.u64("wanted incarnation")?);
        let name = reader.text("agent name")?.to_owned();
        check_name(&name)?;
        let connect = match reader.u8("way to connect")? {
            0 => VerbsConnect::Exchange,
            1 => VerbsConnect::RdmaCm,
            other => return Err(Error::invalid("way to connect", other, 0..=1)),
        };
        let offers = (0..count(&mut reader)?)
            .map(|_| Offer::decode(&mut reader))
            .collect::<Result<_>>()?;
        reader.end("question")?;
        Ok(Self {
            name,
            wanted,
            connect,
            offers,
        })
    }
}

/// Answers a question.
pub(super) fn encode_answer(answer: &Result<Taken>) -> Vec<u8> {
    let mut out = head();
    match answer {
        Ok(taken) => {
            out.extend_from_slice(&[0, taken.len() as u8]);
            for (number, offer) in taken {
                out.push(*number);
                offer.encode(&mut out);
            }
        }
        Err(error) => {
            let said = Error::new(error.kind(), error.to_string());
            if let Outcome::Failed { code, text } = Outcome::of(Err(said)) {
                out.push(1);
                out.extend_from_slice(&code.to_le_bytes());
                put_counted(&mut out, text.as_bytes());
            }
        }
    }
    framed(&out)
}

/// # Errors
/// What the peer answered, if it refused; [`ErrorKind::Corrupt`] or [`ErrorKind::Version`] for another answer.
pub(super) fn decode_answer(body: &[u8]) -> Result<Taken> {
    let mut reader = Reader::new(body);
    read_head(&mut reader)?;
    match reader.u8("answer")? {
        0 => {
            let mut taken = Taken::new();
            for _ in 0..count(&mut reader)? {
                let number = reader.u8("position of an offer")?;
                let next = taken.last().map_or(0, |(last, _)| last + 1);
                if number < next || number >= RAILS_MAX {
                    let text = "position of an offer";
                    return Err(Error::invalid(text, number, next..RAILS_MAX));
                }
                taken.push((number, Offer::decode(&mut reader)?));
            }
            reader.end("answer")?;
            Ok(taken)
        }
        1 => {
            let code = reader.u32("error code")?;
            Err(Outcome::failure(code, reader.text("reason")?))
        }
        other => Err(Error::invalid("answer", other, 0..=1)),
    }
}

/// The keys of a region, one for each rail, from how they are told.
///
/// # Errors
/// [`ErrorKind::Corrupt`] when they are not as many.
pub(super) fn decode_keys(bytes: &[u8], rails: usize) -> Result<Vec<u32>> {
    let (keys, rest) = bytes.as_chunks::<4>();
    if keys.len() != rails || !rest.is_empty() {
        let text = format!("{} bytes of keys for {rails} rails", bytes.len());
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    Ok(keys.iter().map(|key| u32::from_le_bytes(*key)).collect())
}

/// The body of a whole message; none as long as some of it is missing.
///
/// # Errors
/// [`ErrorKind::Invalid`] for one that is too long.
pub(super) fn whole(read: &[u8]) -> Result<Option<&[u8]>> {
    let Some((length, rest)) = read.split_first_chunk::<2>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_le_bytes(*length));
    if length > BYTES_MAX {
        return Err(Error::invalid("greeting length", length, 0..=BYTES_MAX));
    }
    Ok(rest.get(..length))
}

#[cfg(test)]
mod tests;
