//! How memory of a device is opened, as it travels.

use kvcache_core::{Error, Result};

use crate::sys::cuda::{Form, Offer, PIECES_MAX};
use crate::wire::Reader;

/// In the process that has it.
const HERE: u8 = 0;
const ALLOCATION: u8 = 1;
const PIECES: u8 = 2;

pub(super) fn encode(offer: Option<&Offer>, out: &mut Vec<u8>) {
    let Some(offer) = offer else {
        out.push(HERE);
        return;
    };
    out.push(match offer.form {
        Form::Allocation { .. } => ALLOCATION,
        Form::Pieces { .. } => PIECES,
    });
    out.extend_from_slice(&offer.device);
    out.extend_from_slice(&offer.offset.to_le_bytes());
    match &offer.form {
        Form::Allocation { name, bytes } => {
            out.extend_from_slice(&bytes.to_le_bytes());
            out.extend_from_slice(name);
        }
        Form::Pieces { count, bytes } => {
            out.extend_from_slice(&bytes.to_le_bytes());
            out.extend_from_slice(&count.to_le_bytes());
        }
    }
}

pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Option<Offer>> {
    let form = reader.u8("form of device memory")?;
    if form == HERE {
        return Ok(None);
    }
    let device = reader.array("device")?;
    let offset = reader.u64("offset in device memory")?;
    let bytes = reader.u64("bytes of device memory")?;
    let form = match form {
        ALLOCATION => Form::Allocation {
            name: reader.array("name of an allocation")?,
            bytes,
        },
        PIECES => {
            let count = reader.u32("number of pieces")?;
            if count == 0 || count > PIECES_MAX {
                return Err(Error::invalid("number of pieces", count, 1..=PIECES_MAX));
            }
            Form::Pieces { count, bytes }
        }
        other => return Err(Error::invalid("form of device memory", other, 0..=PIECES)),
    };
    Ok(Some(Offer {
        device,
        offset,
        form,
    }))
}
