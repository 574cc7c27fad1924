//! From a publisher's payload to events.

use kvcache_core::{Error, Result};

use super::event::{NAME_BYTES_MAX, event_of_array, event_of_map};
use super::msgpack::{Head, Reader};
use super::{Batch, SourceEvent, SourceKind};

/// The largest payload accepted, in bytes.
pub const BATCH_BYTES_MAX: usize = 64 << 20;
/// The most events read of one batch; the rest are refused with one error.
pub const EVENTS_MAX: u32 = 1 << 16;

/// Reads one message's payload as a source of `kind` publishes it.
///
/// Unknown fields and trailing elements are ignored. A payload that ends early yields the events before the cut and an
/// error after them.
///
/// # Errors
/// [`kvcache_core::ErrorKind::Invalid`] with the place when the payload is too large or is no batch at all.
pub fn decode_batch(payload: &[u8], kind: SourceKind) -> Result<Batch> {
    if payload.len() > BATCH_BYTES_MAX {
        return Err(Error::invalid(
            "batch bytes",
            payload.len(),
            0..=BATCH_BYTES_MAX,
        ));
    }
    let mut reader = Reader::new(payload);
    let mut batch = Batch {
        timestamp: 0.0,
        rank: None,
        events: Vec::new(),
    };
    let place = reader;
    match reader.head()? {
        Head::Array(count) if count >= 2 => {
            batch.timestamp = timestamp(&mut reader)?;
            let whole = events(&mut reader, kind, &mut batch.events)?;
            if whole && count >= 3 {
                batch.rank = rank(&mut reader);
            }
        }
        Head::Array(count) => {
            return Err(place.error(format_args!(
                "a batch of {count} elements, expected 2 or more"
            )));
        }
        Head::Map(count) => batch_of_map(&mut reader, count, kind, &mut batch)?,
        other => return Err(place.expected("a batch", &other)),
    }
    Ok(batch)
}

fn batch_of_map(
    reader: &mut Reader<'_>,
    count: u32,
    kind: SourceKind,
    batch: &mut Batch,
) -> Result<()> {
    let mut has_events = false;
    for _ in 0..count {
        match reader.text_or_nil("a batch field's name", NAME_BYTES_MAX)? {
            Some("ts") => batch.timestamp = timestamp(reader)?,
            Some("events") => {
                has_events = true;
                if !events(reader, kind, &mut batch.events)? {
                    break;
                }
            }
            Some("data_parallel_rank" | "attn_dp_rank") => batch.rank = rank(reader),
            _ => reader.skip()?,
        }
    }
    if has_events {
        Ok(())
    } else {
        Err(reader.error("the batch has no field \"events\""))
    }
}

fn timestamp(reader: &mut Reader<'_>) -> Result<f64> {
    let place = *reader;
    match reader.head()? {
        Head::Float(seconds) => Ok(seconds),
        Head::Int {
            bits,
            negative: false,
        } => Ok(bits as f64),
        other => Err(place.expected("a timestamp", &other)),
    }
}

/// The rank only informs, so whatever else stands there is worth no error.
fn rank(reader: &mut Reader<'_>) -> Option<u32> {
    reader.u32_or_nil("the rank").ok().flatten()
}

/// Reads the list of events; false when the payload could not be followed to the list's end.
fn events(
    reader: &mut Reader<'_>,
    kind: SourceKind,
    out: &mut Vec<Result<SourceEvent>>,
) -> Result<bool> {
    let count = reader.array_or_nil("the list of events")?.unwrap_or(0);
    for position in 0..count {
        if position == EVENTS_MAX {
            let refused = count - EVENTS_MAX;
            out.push(Err(
                reader.error(format_args!("{refused} events beyond {EVENTS_MAX}"))
            ));
            return Ok(false);
        }
        let mut after = *reader;
        let event = event(reader, kind);
        let is_bad = event.is_err();
        out.push(event.map_err(|cause| cause.at(format_args!("event {position}"))));
        if is_bad {
            if after.skip().is_err() {
                return Ok(false);
            }
            *reader = after;
        }
    }
    Ok(true)
}

fn event(reader: &mut Reader<'_>, kind: SourceKind) -> Result<SourceEvent> {
    let place = *reader;
    match reader.head()? {
        Head::Array(count) => event_of_array(reader, count, kind),
        Head::Map(count) => event_of_map(reader, count, kind),
        // Some publishers encode each event by itself and send the list of byte strings.
        Head::Bin(bytes) => {
            let mut inner = Reader::new(bytes);
            match inner.head()? {
                Head::Array(count) => event_of_array(&mut inner, count, kind),
                Head::Map(count) => event_of_map(&mut inner, count, kind),
                other => Err(place.expected("a wrapped event", &other)),
            }
        }
        other => Err(place.expected("an event", &other)),
    }
}
