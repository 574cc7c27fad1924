//! The pieces in which a request is handed to its backend.

use std::sync::Arc;

use crate::plan::{Extent, Plan};

/// Bytes that a request with a rate hands over at a time.
const PACED_BYTES: u64 = 1 << 20;

/// The most pieces that a rate makes of a request: a larger one has larger pieces.
const PACED_PIECES_MAX: u64 = 4096;

/// What is handed over at once, and settled at once.
pub(super) struct Piece {
    pub(super) plan: Arc<Plan>,
    /// Which of the caller's parts it belongs to.
    pub(super) part: u32,
}

/// Cuts a plan: at the ends of the caller's parts (`ends`, in extents), and if it is `paced` into small pieces.
pub(super) fn cut(plan: &Arc<Plan>, ends: &[usize], paced: bool) -> Vec<Piece> {
    let limit = match paced {
        true => PACED_BYTES.max(plan.bytes / PACED_PIECES_MAX),
        false => u64::MAX,
    };
    if ends.len() <= 1 && plan.bytes <= limit {
        let plan = plan.clone();
        return vec![Piece { plan, part: 0 }];
    }
    let mut pieces = Vec::with_capacity(ends.len());
    let mut start = 0;
    for (part, &end) in ends.iter().enumerate() {
        let (mut gathered, mut bytes) = (Vec::new(), 0);
        for extent in &plan.extents[start..end] {
            let mut done = 0;
            while done < extent.len {
                let len = (extent.len - done).min(limit - bytes);
                gathered.push(Extent {
                    local_offset: extent.local_offset + done,
                    remote_offset: extent.remote_offset + done,
                    len,
                    ..*extent
                });
                (done, bytes) = (done + len, bytes + len);
                if bytes == limit {
                    pieces.push(piece(plan, std::mem::take(&mut gathered), part));
                    bytes = 0;
                }
            }
        }
        if !gathered.is_empty() {
            pieces.push(piece(plan, gathered, part));
        }
        start = end;
    }
    pieces
}

fn piece(plan: &Plan, extents: Vec<Extent>, part: usize) -> Piece {
    Piece {
        plan: Arc::new(plan.with(extents)),
        part: part as u32,
    }
}
