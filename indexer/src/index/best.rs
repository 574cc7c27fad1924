//! The best few, without a look at everybody.
//!
//! Prompts begin with what nearly all pods hold, which says little of who is best. So while a walk that wants a few pods has
//! met only wide sets, it puts them aside. The first narrow set says who can still be deepest: its holders are searched for
//! in those put aside. Only if that makes fewer than are wanted, others are added: the deepest first, equals by name.

use std::collections::HashSet;

use super::View;
use super::arena::get;
use super::hash::KeyState;
use super::lookup::{Depth, Depths, Walk, Wanted};
use super::pods::Pods;
use super::runs::partition;
use super::sets::{Holder, SourceNumber, members};
use crate::sync::{AtomicU32, WIDE_MIN};

/// The most sets that are put aside; after those even a wide one is looked at.
const WIDE_MAX: usize = 16;
/// How many pods are tried by name, for each that is wanted and besides, before all holders are.
const NAMES_TRIED: usize = 4;

/// Which holders count.
pub(super) struct Filter<'a> {
    leaving: Option<&'a HashSet<SourceNumber, KeyState>>,
    allowed: Option<&'a [u32]>,
}

impl<'a> Filter<'a> {
    pub(super) fn new(view: &'a View, wanted: Wanted, allowed: &'a [u32]) -> Self {
        let leaving = &view.pods.leaving;
        Self {
            leaving: (!leaving.is_empty()).then_some(leaving),
            allowed: wanted.is_limited.then_some(allowed),
        }
    }

    /// Whether every holder counts that is no claim.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.leaving.is_none() && self.allowed.is_none()
    }

    #[inline]
    pub(super) fn counts(&self, holder: Holder) -> bool {
        self.is_held(holder)
            && self
                .allowed
                .is_none_or(|allowed| allowed.binary_search(&holder.pod()).is_ok())
    }

    /// The same for a holder that may be asked for.
    #[inline]
    fn is_held(&self, holder: Holder) -> bool {
        !holder.is_claim()
            && self
                .leaving
                .is_none_or(|leaving| !leaving.contains(&holder.source()))
    }

    /// The pods that are asked for, if they are fewer than the members of a set.
    pub(super) fn fewer_than(&self, members: &[AtomicU32]) -> Option<&'a [u32]> {
        self.allowed.filter(|allowed| allowed.len() < members.len())
    }
}

/// The fastest tier in which a pod that may be asked for is among a set's members.
pub(super) fn fastest(members: &[AtomicU32], pod: u32, filter: &Filter<'_>) -> Option<usize> {
    let first = partition(members.len() as u32, |place| {
        Holder::from_raw(get(&members[place as usize])).pod() < pod
    });
    let holders = members[first as usize..].iter();
    holders
        .map(|member| Holder::from_raw(get(member)))
        .take_while(|holder| holder.pod() == pod)
        .filter(|holder| filter.is_held(*holder))
        .map(Holder::tier)
        .min()
}

/// A set that was put aside, and how many blocks in a row have it.
type Aside<'a> = (&'a [AtomicU32], u32);

/// A pod as deep as all of these sets make it; none when it is not in each.
fn in_all(aside: &[Aside<'_>], start: Depth, filter: &Filter<'_>) -> Option<Depth> {
    aside.iter().try_fold(start, |depth, (members, blocks)| {
        let tier = fastest(members, depth.pod.0, filter)?;
        Some(depth.deeper(tier, *blocks))
    })
}

impl Walk<'_> {
    /// Whether a set is put aside.
    pub(super) fn is_wide(&self, members: &[AtomicU32]) -> bool {
        let most = match self.wanted.is_limited {
            true => members.len().min(self.depths.allowed.len()),
            false => members.len(),
        };
        let is_few = most <= self.wanted.pods.max(WIDE_MIN);
        self.wanted.pods > 0 && !is_few && self.depths.wide.len() < WIDE_MAX
    }

    /// Keeps those who hold what was put aside too, after the holders of the next blocks were taken; none when torn.
    pub(super) fn start_behind(&mut self, next: &[AtomicU32]) -> Option<()> {
        if self.depths.wide.is_empty() {
            return Some(());
        }
        let mut room = [(&[][..], 0); WIDE_MAX];
        let aside = self.aside(&mut room)?;
        let filter = Filter::new(self.view, self.wanted, &self.depths.allowed);
        self.depths.pods.retain_mut(|depth| {
            let whole = in_all(aside, *depth, &filter);
            *depth = whole.unwrap_or(*depth);
            whole.is_some()
        });
        self.add_behind(aside, next);
        Some(())
    }

    /// What was put aside has the deepest when nothing narrower came; none when torn.
    pub(super) fn end_wide(&mut self) -> Option<()> {
        if !self.depths.wide.is_empty() {
            let mut room = [(&[][..], 0); WIDE_MAX];
            let aside = self.aside(&mut room)?;
            self.add_behind(aside, &[]);
        }
        Some(())
    }
}

impl<'a> Walk<'a> {
    fn aside<'b>(&self, room: &'b mut [Aside<'a>; WIDE_MAX]) -> Option<&'b [Aside<'a>]> {
        let view: &'a View = self.view;
        let wide = &self.depths.wide;
        for (place, (set, blocks)) in room.iter_mut().zip(wide) {
            *place = (without_shared(members(&view.tree.words, *set)?), *blocks);
        }
        room.get(..wide.len())
    }

    /// Adds of those who hold only what was put aside as many as are wanted besides those who go on, and puts them before.
    fn add_behind(&mut self, aside: &[Aside<'_>], next: &[AtomicU32]) {
        let going_on = self.depths.pods.len();
        let mut next = next;
        for (last, (members, _)) in aside.iter().enumerate().rev() {
            let missing = self.wanted.pods.saturating_sub(self.depths.pods.len());
            if missing == 0 {
                break;
            }
            self.add_best(&aside[..=last], next, missing);
            next = members;
        }
        let pods = &mut self.depths.pods;
        pods[going_on..].reverse();
        pods.rotate_left(going_on);
        self.alive = pods.len() - going_on;
        self.depths.wide.clear();
    }

    /// Adds of those who are in all these sets, but not in the next, as many, first by name; all if they are fewer.
    fn add_best(&mut self, aside: &[Aside<'_>], next: &[AtomicU32], missing: usize) {
        let pods_of: &Pods = &self.view.pods;
        let Depths { pods, allowed, .. } = &mut *self.depths;
        let filter = Filter::new(self.view, self.wanted, allowed);
        // Who is in the next one too has been added already.
        let found = |pod: u32| match fastest(next, pod, &filter) {
            Some(_) => None,
            None => in_all(aside, Depth::new(pod), &filter),
        };
        let before = pods.len();
        if filter.allowed.is_none() {
            let tried = NAMES_TRIED * missing + WIDE_MIN;
            let by_name = pods_of.by_name().take(tried);
            pods.extend(by_name.filter_map(found).take(missing));
            if pods.len() - before == missing {
                return;
            }
            pods.truncate(before);
        }
        let narrowest = aside.iter().map(|(members, _)| *members);
        let narrowest = narrowest
            .min_by_key(|members| members.len())
            .unwrap_or_default();
        match filter.fewer_than(narrowest) {
            Some(allowed) => pods.extend(allowed.iter().copied().filter_map(found)),
            None => {
                let holders = narrowest.iter().map(|member| Holder::from_raw(get(member)));
                let holders = holders.filter(|holder| filter.counts(*holder));
                let mut last = None;
                let of_pods = holders.map(Holder::pod);
                let of_pods = of_pods.filter(|pod| last.replace(*pod) != Some(*pod));
                pods.extend(of_pods.filter_map(found));
            }
        }
        let added = &mut pods[before..];
        if added.len() > missing {
            added.select_nth_unstable_by_key(missing, |depth| pods_of.order(depth.pod.0));
            pods.truncate(before + missing);
        }
    }
}

/// The members that are pods' own: what shared tiers hold comes first, and is nobody's.
pub(super) fn without_shared(members: &[AtomicU32]) -> &[AtomicU32] {
    match members.first() {
        Some(first) if get(first) == Holder::SHARED.raw() => &members[1..],
        _ => members,
    }
}
