//! What the index knows of sources beside their blocks: ranks, cache groups, sizes; and which pods are composed of
//! parts because of it.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, PodName, Result};

use super::compose::Part;
use super::config::{Learnt, SourceId};
use super::groups::{GROUPS_MAX, Group};
use super::source::Size;
use super::{KvIndex, State, gone, lock, read, write};
use crate::adapter::{CacheGroup, GroupRule, SourceKind, StoredBlocks, WEIGHED_MEDIA_MAX};
use crate::score::{MediumWeight, PodWeights};

impl KvIndex {
    /// Says which data-parallel rank of its pod a source tells of; none when it tells of the whole pod.
    ///
    /// As soon as a pod has sources of several ranks, its depth is that of its deepest rank: a request runs on one.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::NotFound`] when the source is gone.
    pub fn set_rank(&self, id: SourceId, rank: Option<u32>) -> Result<()> {
        let mut state = lock(&self.state);
        let source = state.sources.get_mut(&id).ok_or_else(|| gone(id))?;
        if source.rank != rank {
            source.rank = rank;
            let pod = source.spec.pod.clone();
            self.compose_pod(&state, &pod);
        }
        Ok(())
    }

    /// Says which cache groups an engine has, so that none is missed before its first event; events say the rest.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::NotFound`] when the source is gone; [`kvcache_core::ErrorKind::Invalid`] naming the count when there are too many.
    pub fn set_groups(&self, id: SourceId, groups: &[CacheGroup]) -> Result<()> {
        if groups.len() > GROUPS_MAX {
            return Err(Error::invalid("cache groups", groups.len(), 0..=GROUPS_MAX));
        }
        let mut state = lock(&self.state);
        let source = state.sources.get_mut(&id).ok_or_else(|| gone(id))?;
        source.groups.tell(groups, self.config.block_size.get());
        let pod = source.spec.pod.clone();
        self.compose_pod(&state, &pod);
        Ok(())
    }

    /// Says that a pod, which has a source, is a pool: what it holds is answered once, apart from pods.
    pub fn set_pool(&self, pod: &PodName) {
        let state = lock(&self.state);
        {
            let mut view = write(&self.view);
            let Some(number) = view.pods.number(pod) else {
                return;
            };
            view.pods.pools.insert(number);
        }
        self.compose_pod(&state, pod);
    }

    /// Says that a source's events have named a medium, where media have weights of their own.
    ///
    /// The pod's blocks in that tier are worth what the least of its media there is ([`PodWeights::of`]), until the source
    /// begins anew.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::NotFound`] when the source is gone; [`kvcache_core::ErrorKind::Busy`] when it has named
    /// too many.
    pub fn weigh_medium(&self, id: SourceId, named: &MediumWeight) -> Result<()> {
        let mut state = lock(&self.state);
        let source = state.sources.get_mut(&id).ok_or_else(|| gone(id))?;
        if source.media.contains(named) {
            return Ok(());
        }
        if source.media.len() >= WEIGHED_MEDIA_MAX {
            let context = format!("a source with {WEIGHED_MEDIA_MAX} media of different weights");
            return Err(Error::new(ErrorKind::Busy, context));
        }
        source.media.push(named.clone());
        let pod = source.spec.pod.clone();
        self.weigh_pod(&state, &pod);
        Ok(())
    }

    /// Finds out anew what a pod's blocks are worth.
    fn weigh_pod(&self, state: &State, pod: &PodName) {
        let Some(number) = read(&self.view).pods.number(pod) else {
            return;
        };
        let of_pod = state.by_pod.get(pod).map_or(&[][..], Vec::as_slice);
        let sources = of_pod.iter().filter_map(|id| state.sources.get(id));
        let named = sources.flat_map(|source| &source.media);
        let weights = PodWeights::of(named, &self.config.weights);
        let known = read(&self.view).pods.weights.get(&number).cloned();
        if known.as_deref() == weights.as_ref() {
            return;
        }
        let mut view = write(&self.view);
        match weights {
            Some(weights) => view.pods.weights.insert(number, Arc::new(weights)),
            None => view.pods.weights.remove(&number),
        };
    }

    /// Takes in what another index had learnt of a source from its events.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::NotFound`] when the source is gone; [`kvcache_core::ErrorKind::Invalid`] naming what
    /// does not fit: a size that is neither a multiple nor a divisor of the index's, or too many groups.
    pub fn take_learnt(&self, id: SourceId, learnt: &Learnt) -> Result<()> {
        let own = self.config.block_size.get();
        let size = learnt.block_size;
        let told = Size::of(size, own);
        if size > 0 && told.is_none() {
            let fitting = format!("a multiple or a divisor of {own}");
            return Err(Error::invalid("tokens a block of a source", size, fitting));
        }
        let mut state = lock(&self.state);
        let source = state.sources.get_mut(&id).ok_or_else(|| gone(id))?;
        source.rank = source.rank.or(learnt.rank);
        for group in &learnt.groups {
            if !source.groups.learn(group, own) {
                let most = format!("one of {GROUPS_MAX}");
                return Err(Error::invalid("cache group", group.number, most));
            }
        }
        if let Some(size) = told {
            source.set_size(size);
        }
        let pod = source.spec.pod.clone();
        self.compose_pod(&state, &pod);
        Ok(())
    }

    /// Sets the cache group that a source is followed in, as its image says.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::NotFound`] when the source is gone.
    pub fn follow_group(&self, id: SourceId, group: Option<u32>) -> Result<()> {
        let mut state = lock(&self.state);
        let source = state.sources.get_mut(&id).ok_or_else(|| gone(id))?;
        let block_size = self.config.block_size.get() * source.stride;
        source.groups.set_main(group, block_size);
        Ok(())
    }

    /// Whether a pod's depth is that of all it holds together: without ranks, groups of several kinds and larger blocks.
    #[must_use]
    pub fn is_plain(&self, pod: &PodName) -> bool {
        let view = read(&self.view);
        let number = view.pods.number(pod);
        number.is_none_or(|number| !view.pods.composed.contains_key(&number))
    }

    /// Takes in what an event says of its group, before its blocks.
    pub(super) fn learn(
        &self,
        state: &mut State,
        id: SourceId,
        blocks: &StoredBlocks,
    ) -> Result<()> {
        let Some(source) = state.sources.get_mut(&id) else {
            return Ok(());
        };
        let own = self.config.block_size.get();
        let is_new = !source.is_node() && source.groups.is_new(blocks.group.as_ref());
        if is_new
            && let Some(group) = &blocks.group
            && !source.groups.learn(group, own)
        {
            let most = format!("one of {GROUPS_MAX}");
            return Err(Error::invalid("cache group", group.number, most));
        }
        if !source.learn_size(blocks, own) && !is_new {
            return Ok(());
        }
        let pod = source.spec.pod.clone();
        self.compose_pod(state, &pod);
        Ok(())
    }

    /// Finds out anew what a pod is composed of.
    pub(super) fn compose_pod(&self, state: &State, pod: &PodName) {
        self.weigh_pod(state, pod);
        let Some(number) = read(&self.view).pods.number(pod) else {
            return;
        };
        let is_pool = read(&self.view).pods.pools.contains(&number);
        let parts = parts_of(state, pod, is_pool);
        let known = read(&self.view).pods.composed.get(&number) == parts.as_ref();
        if known {
            return;
        }
        let mut view = write(&self.view);
        match parts {
            Some(parts) => view.pods.composed.insert(number, parts),
            None => view.pods.composed.remove(&number),
        };
    }
}

/// The parts of a pod; none when its holdings are one.
fn parts_of(state: &State, pod: &PodName, is_pool: bool) -> Option<Vec<Part>> {
    let of_pod = state.by_pod.get(pod)?;
    let sources = || of_pod.iter().filter_map(|id| state.sources.get(id));
    let engines = || sources().filter(|source| source.spec.kind != SourceKind::Node);
    let mut ranks: Vec<Option<u32>> = engines().map(|source| source.rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    // Sources that have told no rank are not believed to be of another's.
    let has_ranks = ranks.len() > 1 && !is_pool;
    if !has_ranks {
        ranks = vec![None];
    }
    let parts: Vec<Part> = ranks
        .into_iter()
        .map(|rank| {
            let of_part = || engines().filter(move |source| !has_ranks || source.rank == rank);
            let nodes = sources().filter(|source| source.spec.kind == SourceKind::Node);
            let numbers = of_part().chain(nodes).map(|source| source.number);
            let stride = of_part().map(|source| source.stride).max().unwrap_or(1);
            let mut part = Part {
                rank,
                sources: numbers.collect(),
                groups: Vec::new(),
                main: None,
            };
            for source in of_part() {
                part.main = part.main.or(source.groups.main());
                for group in source.groups.known() {
                    if !part.groups.iter().any(|known| known.number == group.number) {
                        part.groups.push(*group);
                    }
                }
            }
            if let Some(main) = part.main {
                let of_main = part.groups.iter_mut().filter(|group| group.number == main);
                of_main.for_each(|group| group.stride = stride);
            }
            if part.groups.is_empty() {
                let rule = GroupRule::Full;
                part.groups.push(Group {
                    number: 0,
                    rule,
                    stride,
                });
                part.main = Some(0);
            }
            part
        })
        .collect();
    let is_plain = |part: &Part| match part.groups.as_slice() {
        [group] => group.rule == GroupRule::Full && group.stride == 1,
        _ => false,
    };
    (is_pool || has_ranks || !parts.iter().all(is_plain)).then_some(parts)
}
