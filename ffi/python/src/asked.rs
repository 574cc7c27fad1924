//! What a caller asks of a transfer, as Rust takes it.

use std::sync::Arc;

use bytes::Bytes;
use kvfabric::Error;
use kvfabric::transfer::{Operation, Priority, RegionOptions, RequestOptions};
use pyo3::prelude::*;

use crate::buffer::integers;
use crate::errors::to_python;
use crate::fabric::Fabric;
use crate::life::parse_timeout;
use crate::peer::Peer;
use crate::prepared::{Prepared, Ranges};
use crate::transfer::{Transfer, Wanted};

/// What peers may do.
pub(crate) fn options(readable: bool, writable: bool) -> RegionOptions {
    RegionOptions {
        remote_read: readable,
        remote_write: writable,
    }
}

/// How a transfer of all ranges of both lists differs from a silent one.
pub(crate) fn once(notification: Option<&[u8]>, deadline: f64) -> PyResult<RequestOptions> {
    Ok(RequestOptions {
        positions: None,
        notification: notification.map(Bytes::copy_from_slice),
        deadline: Some(parse_timeout(deadline)?),
        ..RequestOptions::default()
    })
}

pub(crate) fn priority(background: bool) -> Priority {
    match background {
        true => Priority::Background,
        false => Priority::Normal,
    }
}

pub(crate) fn parse_operation(text: &str) -> PyResult<Operation> {
    match text {
        "read" => Ok(Operation::Read),
        "write" => Ok(Operation::Write),
        _ => {
            let found = format!("{text:?}");
            let accepted = "\"read\" or \"write\"";
            Err(to_python(Error::invalid("operation", found, accepted)))
        }
    }
}

/// The positions of both lists that take part; all of a list that names none.
pub(crate) fn positions(
    local: (&Prepared, Option<&Bound<'_, PyAny>>),
    remote: (&Prepared, Option<&Bound<'_, PyAny>>),
) -> PyResult<Option<(Vec<u32>, Vec<u32>)>> {
    if local.1.is_none() && remote.1.is_none() {
        return Ok(None);
    }
    let chosen = |what: &str, (list, positions): (&Prepared, Option<&Bound<'_, PyAny>>)| {
        match positions {
            Some(positions) => integers(positions, what),
            // Lists are far shorter than this type's range.
            None => Ok((0..u32::try_from(list.list.len()).unwrap_or(u32::MAX)).collect()),
        }
    };
    Ok(Some((
        chosen("local_positions", local)?,
        chosen("remote_positions", remote)?,
    )))
}

/// Prepares, makes and posts a transfer of ranges that are used once.
pub(crate) fn begin(
    py: Python<'_>,
    fabric: &Arc<Fabric>,
    operation: Operation,
    local: &Bound<'_, PyAny>,
    peer: Option<&Bound<'_, Peer>>,
    remote: &Bound<'_, PyAny>,
    options: RequestOptions,
) -> PyResult<Transfer> {
    let peer = peer.map(|peer| peer.get().of(fabric)).transpose();
    let peer = peer.map_err(to_python)?;
    let local = Ranges::read(fabric, None, local)?;
    let remote = Ranges::read(fabric, peer, remote)?;
    let begin = || {
        let local = Prepared::of(fabric, None, &local).map_err(|e| e.at("local"))?;
        let remote = Prepared::of(fabric, peer, &remote).map_err(|e| e.at("remote"))?;
        let wanted = Wanted {
            operation,
            local: &local,
            remote: &remote,
            options,
        };
        let transfer = Transfer::make(fabric, wanted)?;
        transfer.start(None, None)?;
        Ok(transfer)
    };
    py.detach(begin).map_err(|e: Error| to_python(e))
}
