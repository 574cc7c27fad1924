//! The pods that a walk follows: who is among them, and how deep.

use super::arena::get;
use super::best::{Filter, fastest};
use super::lookup::{Depth, Depths, Walk};
use super::sets::Holder;
use crate::sync::AtomicU32;

/// With so many times more holders than pods that are followed, the pods are searched for among the holders.
const MANY: usize = 8;

impl Walk<'_> {
    /// Everybody who holds some blocks, without a look at those before. `is_plain` when no member is a claim, and each
    /// another pod's.
    pub(super) fn start(&mut self, members: &[AtomicU32], is_plain: bool, blocks: u32) {
        let Depths { pods, allowed, .. } = &mut *self.depths;
        let filter = Filter::new(self.view, self.wanted, allowed);
        if let Some(allowed) = filter.fewer_than(members) {
            pods.extend(allowed.iter().filter_map(|pod| {
                let tier = fastest(members, *pod, &filter)?;
                Some(Depth::new(*pod).deeper(tier, blocks))
            }));
            return;
        }
        // Nearly always everybody counts, which a loop that need not ask is much faster for.
        match filter.is_open() {
            true if is_plain => pods.extend(members.iter().map(|member| {
                let holder = Holder::from_raw(get(member));
                Depth::at(holder.pod(), holder.tier(), blocks)
            })),
            true => start_with(pods, members, blocks, |holder| !holder.is_claim()),
            false => start_with(pods, members, blocks, |holder| filter.counts(holder)),
        }
    }

    /// Who holds these blocks goes on, who does not stays behind.
    pub(super) fn narrow(&mut self, members: &[AtomicU32], blocks: u32) {
        let Depths { pods, allowed, .. } = &mut *self.depths;
        let filter = Filter::new(self.view, self.wanted, allowed);
        if members.len() > MANY * (pods.len() - self.alive) {
            self.alive = narrow_few(pods, self.alive, members, blocks, &filter);
            return;
        }
        // Both are ascending, so that a search goes on where the last one ended, from behind; who goes on is moved to
        // the end, which leaves those before the search as they were.
        let mut front = pods.len();
        let mut end = front;
        let mut member = members.len();
        while member > 0 && self.alive < end {
            member -= 1;
            let holder = Holder::from_raw(get(&members[member]));
            if !filter.counts(holder) {
                continue;
            }
            let (pod, mut tier) = (holder.pod(), holder.tier());
            while let Some(next) = member.checked_sub(1) {
                let other = Holder::from_raw(get(&members[next]));
                if other.pod() != pod {
                    break;
                }
                if filter.counts(other) {
                    tier = tier.min(other.tier());
                }
                member = next;
            }
            let followed = &mut pods[self.alive..end];
            // Torn members may come in any order; then the answer is thrown away, but the search must end.
            let limit = front.clamp(self.alive, end) - self.alive;
            let Some(found) = search_back(&followed[..limit], pod) else {
                continue;
            };
            followed[found] = followed[found].deeper(tier, blocks);
            let last = followed.len() - 1;
            followed.swap(found, last);
            front = self.alive + found;
            end -= 1;
        }
        self.alive = end;
    }
}

/// Adds everybody of whom a holder counts, at the fastest of the tiers.
#[inline]
fn start_with(
    pods: &mut Vec<Depth>,
    members: &[AtomicU32],
    blocks: u32,
    counts: impl Fn(Holder) -> bool,
) {
    let mut end = pods.len();
    // Room is made once, not with every pod.
    pods.resize(end + members.len(), Depth::new(0));
    let mut last = None;
    for member in members {
        let holder = Holder::from_raw(get(member));
        if !counts(holder) {
            continue;
        }
        let (pod, tier) = (holder.pod(), holder.tier());
        let fastest = match last {
            Some((last_pod, fastest)) if last_pod == pod => {
                end -= 1;
                tier.min(fastest)
            }
            _ => tier,
        };
        pods[end] = Depth::new(pod).deeper(fastest, blocks);
        end += 1;
        last = Some((pod, fastest));
    }
    pods.truncate(end);
}

/// As [`Walk::narrow`], for a few of many; returns from where on pods go on.
fn narrow_few(
    pods: &mut [Depth],
    alive: usize,
    members: &[AtomicU32],
    blocks: u32,
    filter: &Filter<'_>,
) -> usize {
    let mut end = pods.len();
    for place in (alive..end).rev() {
        if let Some(tier) = fastest(members, pods[place].pod.0, filter) {
            pods[place] = pods[place].deeper(tier, blocks);
            end -= 1;
            pods.swap(place, end);
        }
    }
    end
}

/// Where a pod is in an ascending list; it is probably near the end.
fn search_back(followed: &[Depth], pod: u32) -> Option<usize> {
    let (mut reach, mut high) = (1, followed.len());
    while high >= reach && followed[high - reach].pod.0 > pod {
        high -= reach;
        reach *= 2;
    }
    let low = high.saturating_sub(reach);
    let place = followed[low..high].binary_search_by_key(&pod, |depth| depth.pod.0);
    place.ok().map(|place| low + place)
}
