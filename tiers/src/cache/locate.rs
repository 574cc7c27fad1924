//! How much of a chain can be had, and where: this node's own tiers first, then what the directory says.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::manager::PeerHint;
use kvcache_core::ports::{Directory, Holder, Located};
use kvcache_core::{BlockInfo, PodName, Result};

use super::desk::{Desk, Request};
use super::types::{HeldDepth, Reach};
use crate::mover::Mover;

/// Answers where blocks are, for this node's engine and for peers that ask.
pub(crate) struct Locator {
    pub(super) desk: Desk,
    pub(super) mover: Arc<Mover>,
    pub(super) directory: Arc<dyn Directory>,
    pub(super) pod: PodName,
    /// The longest that one question to the directory may take.
    pub(super) timeout: Duration,
}

impl Locator {
    /// How much of the chain can be had. The directory is asked only if this node lacks some of it; its error, or no
    /// answer by `deadline`, is as good as nobody else holding anything.
    pub(crate) async fn reach(&self, infos: &[BlockInfo], deadline: Instant) -> Result<Reach> {
        let (own, mut located) = self.ask(infos.iter(), deadline).await?;
        let reachable = self.reachable(&located);
        let deepest = reachable.iter().map(|(hint, _)| hint.depth).max();
        let depth = depth(own.depth.max(deepest.unwrap_or(0)), &located.shared);
        located.holders = reachable.into_iter().map(|(_, holder)| holder).collect();
        Ok(Reach {
            own,
            depth: depth.min(infos.len() as u32),
            located,
        })
    }

    /// What this node has by itself, and who else has something, if it lacks any.
    pub(super) async fn ask<'a>(
        &self,
        infos: impl ExactSizeIterator<Item = &'a BlockInfo> + Clone,
        deadline: Instant,
    ) -> Result<(HeldDepth, Located)> {
        let keys = infos.clone().map(|info| info.key).collect();
        let held = self
            .desk
            .ask(|reply| Request::Lookup { keys, reply })
            .await?;
        if held.depth as usize == infos.len() {
            return Ok((held, Located::default()));
        }
        let chain = infos.map(|info| info.index_key).collect();
        let left = deadline
            .saturating_duration_since(Instant::now())
            .min(self.timeout);
        match tokio::time::timeout(left, self.directory.locate(chain)).await {
            Ok(Ok(mut located)) => {
                if self.mover.objects.is_none() {
                    // Every pod can reach shared objects, except those that know no object store.
                    located.shared.clear();
                }
                return Ok((held, located));
            }
            Ok(Err(error)) => tracing::debug!(%error, "the directory does not answer"),
            Err(_) => tracing::debug!(?left, "the directory does not answer in time"),
        }
        Ok((held, Located::default()))
    }

    /// The holders that can be asked.
    pub(super) fn hints(&self, located: &Located) -> Vec<PeerHint> {
        let reachable = self.reachable(located).into_iter();
        reachable.map(|(hint, _)| hint).collect()
    }

    /// The holders that can be asked: not this node, and with a known address, which is filled in.
    fn reachable(&self, located: &Located) -> Vec<(PeerHint, Holder)> {
        let roster = &self.mover.peers.roster;
        let others = located
            .holders
            .iter()
            .filter(|holder| holder.pod != self.pod);
        others
            .filter_map(|holder| {
                if let Some(address) = &holder.peer_address
                    && let Err(error) = roster.set_address(&holder.pod, address)
                {
                    tracing::warn!(%error, "peer address not remembered");
                }
                let peer = roster.id(&holder.pod).ok()?;
                let Some(address) = roster.address(peer) else {
                    tracing::debug!(pod = %holder.pod, "holder without a known peer address");
                    return None;
                };
                let depth = holder.depth;
                let holder = Holder {
                    peer_address: Some(address),
                    ..holder.clone()
                };
                Some((PeerHint { peer, depth }, holder))
            })
            .collect()
    }
}

/// How far blocks go without a hole, when the first `depth` can be had, and those of the ascending ranges.
fn depth(mut depth: u32, shared: &[Range<u32>]) -> u32 {
    for range in shared {
        if range.start <= depth {
            depth = depth.max(range.end);
        }
    }
    depth
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranges below, at, across and beyond what is there already.
    #[test]
    fn shared_ranges_extend_the_depth_up_to_the_first_hole() {
        assert_eq!(depth(3, &[]), 3);
        assert_eq!(depth(3, &[0..2, 3..5, 5..6, 7..9]), 6);
        assert_eq!(depth(3, &[4..5, 6..7]), 3);
        assert_eq!(depth(0, &[0..4, 5..6]), 4);
        assert_eq!(depth(8, &[2..5, 9..10]), 8);
    }
}
