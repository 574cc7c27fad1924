//! From a publisher's payload to events.

use kvcache_core::{Error, Result};

use super::event::{Found, NAME_BYTES_MAX, event_of_array, event_of_map};
use super::msgpack::{Head, Reader};
use super::{Batch, Media, SourceEvent, SourceKind};

/// The largest payload accepted, in bytes.
pub const BATCH_BYTES_MAX: usize = 64 << 20;
/// The most events read of one batch; the rest are refused with one error.
pub const EVENTS_MAX: u32 = 1 << 16;

/// The most unknown media that are named of one batch.
pub const UNKNOWN_MEDIA_MAX: usize = 16;
/// The most media with weights that are named of one batch; further ones weigh what their tiers do.
pub const WEIGHED_MEDIA_MAX: usize = 64;

/// How a batch is read.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    pub(super) kind: SourceKind,
    pub(super) media: &'a Media,
}

/// Reads one message's payload as a source of `kind` publishes it.
///
/// Unknown fields and trailing elements are ignored. A payload that ends early yields the events before the cut and an
/// error after them.
///
/// # Errors
/// [`kvcache_core::ErrorKind::Invalid`] with the place when the payload is too large or is no batch at all.
pub fn decode_batch(payload: &[u8], kind: SourceKind) -> Result<Batch> {
    decode_batch_with(payload, kind, &Media::default())
}

/// The same where it is configured what media are taken for.
///
/// # Errors
/// As [`decode_batch`].
pub fn decode_batch_with(payload: &[u8], kind: SourceKind, media: &Media) -> Result<Batch> {
    let how = Reading { kind, media };
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
        unknown_media: Vec::new(),
        weighed_media: Vec::new(),
    };
    let place = reader;
    match reader.head()? {
        Head::Array(count) if count >= 2 => {
            batch.timestamp = timestamp(&mut reader)?;
            let whole = events(&mut reader, how, &mut batch)?;
            if whole && count >= 3 {
                batch.rank = rank(&mut reader);
            }
        }
        Head::Array(count) => {
            return Err(place.error(format_args!(
                "a batch of {count} elements, expected 2 or more"
            )));
        }
        Head::Map(count) => batch_of_map(&mut reader, count, how, &mut batch)?,
        other => return Err(place.expected("a batch", &other)),
    }
    Ok(batch)
}

fn batch_of_map(
    reader: &mut Reader<'_>,
    count: u32,
    how: Reading<'_>,
    batch: &mut Batch,
) -> Result<()> {
    let mut has_events = false;
    for _ in 0..count {
        match reader.text_or_nil("a batch field's name", NAME_BYTES_MAX)? {
            Some("ts") => batch.timestamp = timestamp(reader)?,
            Some("events") => {
                has_events = true;
                if !events(reader, how, batch)? {
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
fn events(reader: &mut Reader<'_>, how: Reading<'_>, batch: &mut Batch) -> Result<bool> {
    let count = reader.array_or_nil("the list of events")?.unwrap_or(0);
    for position in 0..count {
        if position == EVENTS_MAX {
            let refused = count - EVENTS_MAX;
            batch.events.push(Err(
                reader.error(format_args!("{refused} events beyond {EVENTS_MAX}"))
            ));
            return Ok(false);
        }
        let mut after = *reader;
        let found = event(reader, how);
        if let Some(medium) = found.unknown_medium {
            note_medium(&mut batch.unknown_media, medium);
        }
        if how.media.has_weights() && matches!(found.event, Ok(Some(SourceEvent::Stored(_)))) {
            // As where it becomes a tier.
            weigh_medium(&mut batch.weighed_media, found.medium.unwrap_or("GPU"), how);
        }
        let is_bad = found.event.is_err();
        let event = found
            .event
            .map_err(|cause| cause.at(format_args!("event {position}")));
        batch.events.extend(event.transpose());
        if is_bad {
            if after.skip().is_err() {
                return Ok(false);
            }
            *reader = after;
        }
    }
    Ok(true)
}

/// Notes a medium that blocks were stored in.
fn weigh_medium(media: &mut Vec<String>, medium: &str, how: Reading<'_>) {
    let is_known = media.iter().any(|known| known.eq_ignore_ascii_case(medium));
    if is_known || media.len() == WEIGHED_MEDIA_MAX {
        return;
    }
    media.extend(how.media.weight_of(medium).map(|found| found.medium));
}

/// Counts an event about a medium that nobody has told of.
fn note_medium(media: &mut Vec<(String, u32)>, medium: &str) {
    if let Some((_, events)) = media.iter_mut().find(|(known, _)| known == medium) {
        *events += 1;
    } else if media.len() < UNKNOWN_MEDIA_MAX {
        media.push((medium.to_owned(), 1));
    }
}

fn event<'a>(reader: &mut Reader<'a>, how: Reading<'_>) -> Found<'a> {
    let place = *reader;
    match reader.head() {
        Ok(Head::Array(count)) => event_of_array(reader, count, how),
        Ok(Head::Map(count)) => event_of_map(reader, count, how),
        // Some publishers encode each event by itself and send the list of byte strings.
        Ok(Head::Bin(bytes)) => {
            let mut inner = Reader::new(bytes);
            match inner.head() {
                Ok(Head::Array(count)) => event_of_array(&mut inner, count, how),
                Ok(Head::Map(count)) => event_of_map(&mut inner, count, how),
                Ok(other) => Found::none(place.expected("a wrapped event", &other)),
                Err(error) => Found::none(error),
            }
        }
        Ok(other) => Found::none(place.expected("an event", &other)),
        Err(error) => Found::none(error),
    }
}
