//! Hints about where blocks are.

use std::ops::Range;

use kvfabric::{Error, Holder, Located, PodName, Result};

/// Reads hints as `Reach` has them.
///
/// # Errors
/// [`kvfabric::ErrorKind::Invalid`] for a pod's name or a range that cannot be one.
pub(crate) fn located(
    holders: Vec<(String, u32, Option<String>)>,
    shared: Vec<(u32, u32)>,
) -> Result<Located> {
    let holder = |(pod, depth, peer_address): (String, u32, Option<String>)| {
        Ok(Holder {
            pod: PodName::new(&pod).map_err(|e| e.at("holders"))?,
            depth,
            peer_address,
        })
    };
    let range = |(start, stop): (u32, u32)| -> Result<Range<u32>> {
        if start < stop {
            return Ok(start..stop);
        }
        let found = format!("({start}, {stop})");
        Err(Error::invalid("shared", found, "start before stop"))
    };
    Ok(Located {
        holders: holders.into_iter().map(holder).collect::<Result<_>>()?,
        shared: shared.into_iter().map(range).collect::<Result<_>>()?,
    })
}
