//! The messages of `Locate` and `Unpin`.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::ports::{Holder, Located};
use kvcache_core::{Error, ErrorKind, PinId, PodName, Result};
use kvfabric_proto::v1;

use super::{milliseconds, short_hex};
use crate::cache::{HeldDepth, Reach};

/// The most bytes of names in one question: 64 for each of 65,536 blocks.
pub(crate) const NAMES_BYTES_MAX: usize = 4 << 20;

/// The longest that an answer may be asked to take.
pub(crate) const LOCATE_DEADLINE_MAX: Duration = Duration::from_secs(20);

/// The most holders in one answer; an index names far fewer.
pub(crate) const HOLDERS_MAX: usize = 1024;

/// The most shared ranges in one answer: every other block of the longest chain.
pub(crate) const RANGES_MAX: usize = 1 << 15;

/// A question where blocks are, checked; the names are not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocateQuestion {
    pub(crate) names: Bytes,
    pub(crate) deadline: Duration,
}

/// Asks where blocks are.
pub(crate) fn locate_request(question: &LocateQuestion) -> v1::LocateRequest {
    v1::LocateRequest {
        names: question.names.clone(),
        deadline_ms: milliseconds(question.deadline.min(LOCATE_DEADLINE_MAX)).max(1),
    }
}

/// Checks a question where blocks are.
pub(crate) fn check_locate(message: v1::LocateRequest) -> Result<LocateQuestion> {
    let bytes = message.names.len();
    if bytes == 0 || bytes > NAMES_BYTES_MAX {
        return Err(Error::invalid("bytes of names", bytes, 1..=NAMES_BYTES_MAX));
    }
    if message.deadline_ms == 0 {
        return Err(Error::invalid("deadline_ms", 0, 1..));
    }
    let deadline = Duration::from_millis(message.deadline_ms.into());
    Ok(LocateQuestion {
        names: message.names,
        deadline: deadline.min(LOCATE_DEADLINE_MAX),
    })
}

/// Tells where blocks are; of more holders and ranges than fit, the first.
pub(crate) fn locate_response(reach: &Reach) -> v1::LocateResponse {
    let holders = reach.located.holders.iter().take(HOLDERS_MAX);
    let ranges = reach.located.shared.iter().take(RANGES_MAX);
    v1::LocateResponse {
        depth: reach.depth,
        own_depth: reach.own.depth,
        own_host: reach.own.host,
        own_disk: reach.own.disk,
        own_expected: reach.own.expected,
        holders: holders
            .map(|holder| v1::LocatedHolder {
                pod: holder.pod.as_str().to_owned(),
                depth: holder.depth,
                peer_address: holder.peer_address.clone().unwrap_or_default(),
            })
            .collect(),
        shared: ranges
            .map(|range| v1::LocatedRange {
                start: range.start,
                end: range.end,
            })
            .collect(),
    }
}

/// Checks where blocks are said to be.
pub(crate) fn check_locate_response(message: v1::LocateResponse) -> Result<Reach> {
    let own = HeldDepth {
        depth: message.own_depth,
        host: message.own_host,
        disk: message.own_disk,
        // A node that does not tell expects nothing.
        expected: message.own_expected.max(message.own_depth),
    };
    if own.host.checked_add(own.disk) != Some(own.depth) {
        let accepted = format!("{} in DRAM and {} on disk together", own.host, own.disk);
        return Err(Error::invalid("own_depth", own.depth, accepted));
    }
    if message.depth < own.depth {
        return Err(Error::invalid("depth", message.depth, own.depth..));
    }
    let (holders, ranges) = (message.holders.len(), message.shared.len());
    if holders > HOLDERS_MAX {
        return Err(Error::invalid("holders", holders, ..=HOLDERS_MAX));
    }
    if ranges > RANGES_MAX {
        return Err(Error::invalid("shared ranges", ranges, ..=RANGES_MAX));
    }
    let holders = message.holders.into_iter().enumerate().map(|(at, holder)| {
        let pod = PodName::new(&holder.pod).map_err(|e| e.at(format_args!("holder {at}")))?;
        let address = holder.peer_address;
        if !address.is_empty() {
            let checked = crate::peer::check_address(&address);
            checked.map_err(|error| error.at(format_args!("holder {at}")))?;
        }
        Ok(Holder {
            pod,
            depth: holder.depth,
            peer_address: (!address.is_empty()).then_some(address),
        })
    });
    Ok(Reach {
        own,
        depth: message.depth,
        located: Located {
            holders: holders.collect::<Result<_>>()?,
            shared: check_ranges(&message.shared)?,
        },
    })
}

fn check_ranges(ranges: &[v1::LocatedRange]) -> Result<Vec<Range<u32>>> {
    let mut least = 0;
    let mut checked = Vec::with_capacity(ranges.len());
    for (at, range) in ranges.iter().enumerate() {
        if range.start < least || range.end <= range.start {
            let value = format!("{}..{}", range.start, range.end);
            let accepted = format!("ascending, from {least} on");
            let error = Error::invalid("range", value, accepted);
            return Err(error.at(format_args!("shared range {at}")));
        }
        least = range.end;
        checked.push(range.start..range.end);
    }
    Ok(checked)
}

/// Lets go of a pin.
pub(crate) fn unpin_request(pin: PinId, model_identity: &[u8; 32]) -> v1::UnpinRequest {
    v1::UnpinRequest {
        pin: pin.0,
        model_identity: Bytes::copy_from_slice(model_identity),
    }
}

/// Checks that a pin was meant for a node of this model; its number, as others were told it.
pub(crate) fn check_unpin(message: &v1::UnpinRequest, model_identity: &[u8; 32]) -> Result<PinId> {
    if message.model_identity[..] != model_identity[..] {
        let theirs = short_hex(&message.model_identity);
        let ours = short_hex(model_identity);
        let context = format!("the pin is for model identity {theirs}…, this node has {ours}…");
        return Err(Error::new(ErrorKind::Denied, context));
    }
    Ok(PinId(message.pin))
}

#[cfg(test)]
mod tests;
