//! The global index: which pods hold a block, in which tiers.
//!
//! One [`KvIndex`] serves one model. Blocks are known by [`IndexKey`]s, made from tokens with one scheme, so that pods
//! whose engines hash differently still share entries: each source's own hashes are bridged to keys by the tokens in
//! its events.
//!
//! Blocks stand in *runs*, in the order of their chain; a run says by stretches who holds its blocks, as sets that are
//! interned. One writer at a time applies events. Lookups take no lock that a writer holds: they read, then check
//! whether what they read stood still, and else read again; so they see an event whole or not at all.
//!
//! What the index says is what the events said, read literally: a block counts for a pod when more copies were
//! announced than withdrawn in some tier, and a pod's depth ends at the first block that does not.

mod answer;
mod arena;
mod best;
mod blocks;
mod budget;
mod buried;
mod compose;
mod config;
mod counts;
mod doors;
mod expected;
mod fine;
mod followed;
mod groups;
mod hash;
mod huge;
mod image;
mod leaves;
mod leaving;
mod lookup;
mod meaning;
mod names;
mod orphans;
mod parts;
mod pods;
mod recency;
mod roots;
mod runs;
mod sets;
mod source;
mod stack;
mod together;
mod tree;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::PoisonError;

use kvcache_core::prefix::{ChainRoot, IndexChain, Namespace};
use kvcache_core::{Error, ErrorKind, IndexKey, PodName, Result};

use self::budget::Budget;
use self::expected::Expected;
use self::hash::KeyState;
use self::leaving::Leaving;
use self::lookup::{Torn, Wanted};
use self::pods::Pods;
use self::roots::Keys;
use self::source::{Size, Source, Writer};
use self::tree::Shared;
use crate::adapter::{SourceEvent, SourceKind};
use crate::sync::{
    AtomicU64, Mutex, MutexGuard, Ordering, RwLock, RwLockReadGuard, RwLockWriteGuard, TRIES,
    spin_loop,
};

pub use answer::{Answer, PodDepth, PoolDepth, Query};

pub use budget::{BYTES_MIN, Usage};
pub use compose::{GroupDepth, PartDepth};
pub use config::{
    Applied, IndexConfig, Learnt, ORPHAN_BLOCKS_MAX, SOURCES_MAX, SourceId, SourceSpec,
};
pub use expected::{EXPECTED_BLOCKS_MAX, Expectation, Recorded};
pub use image::{
    IMAGE_BLOCKS_MAX, ImageBlock, ImageContent, ImageNamespace, ImageOrphan, ImagePart, ImagePiece,
    SourceImage,
};
pub use lookup::{Depth, Depths};
pub use parts::Parts;
pub use pods::PodNumber;
pub use source::Evicted;

/// How long it waits for an event to end before it tries again, in turns of a loop.
const TURNS: u32 = 32;

/// What lookups read.
struct View {
    tree: Shared,
    pods: Pods,
    /// Blocks in shared tiers.
    shared_blocks: AtomicU64,
}

/// What only the one writer reads.
struct State {
    writer: Writer,
    sources: HashMap<SourceId, Source, KeyState>,
    by_pod: BTreeMap<PodName, Vec<SourceId>>,
    /// Sources that are gone for everybody outside, but whose entries are still to be taken out.
    leaving: VecDeque<Leaving>,
    last: u64,
    /// None when the index may grow as it likes.
    budget: Option<Budget>,
}

/// Which pods hold a prefix, how deep, in which tier; shared by all threads.
pub struct KvIndex {
    config: IndexConfig,
    // The state is locked before the view, and never by someone who has the view.
    state: Mutex<State>,
    /// Locked after neither, or with the state.
    expected: Expected,
    /// Locked for oneself only to take memory away or exchange it; whoever changes what is in it has the state.
    view: RwLock<View>,
}

// A panic elsewhere must not end all answers: so poison is passed over.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone(id: SourceId) -> Error {
    Error::new(ErrorKind::NotFound, format!("source {} is gone", id.0))
}

impl KvIndex {
    /// An index without sources that takes as much memory as what it is told needs.
    #[must_use]
    pub fn new(config: IndexConfig) -> Self {
        Self::with_budget(config, None)
    }

    fn with_budget(config: IndexConfig, budget: Option<Budget>) -> Self {
        let is_bounded = budget.is_some();
        let keys = Keys {
            scheme: config.scheme.clone(),
            model: config.model.clone(),
            block_size: config.block_size,
        };
        Self {
            config,
            state: Mutex::new(State {
                writer: Writer::new(keys, is_bounded),
                sources: HashMap::default(),
                by_pod: BTreeMap::new(),
                leaving: VecDeque::new(),
                last: 0,
                budget,
            }),
            expected: Expected::new(),
            view: RwLock::new(View {
                tree: Shared::new(is_bounded),
                pods: Pods::new(),
                shared_blocks: AtomicU64::new(0),
            }),
        }
    }

    /// What the index was made for.
    #[must_use]
    pub fn config(&self) -> &IndexConfig {
        &self.config
    }

    /// Lets a source in.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when its blocks are no whole number of the index's (both sizes are named; a node's must be
    /// equal) or the pod has a source of this name already; [`ErrorKind::Busy`] when there are [`SOURCES_MAX`] sources, or too many of the pod.
    pub fn add_source(&self, spec: SourceSpec) -> Result<SourceId> {
        let place = || format!("source {:?} of pod {}", spec.name, spec.pod);
        let (theirs, own) = (spec.block_size, self.config.block_size.get());
        let size = Size::of(theirs, own);
        let size = size.filter(|size| *size == Size::ONE || spec.kind != SourceKind::Node);
        let Some(size) = size else {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{} has blocks of {theirs} tokens, the index of {own}; only multiples and divisors of that fit",
                    place(),
                ),
            ));
        };
        let mut state = lock(&self.state);
        self.admit_source(&mut state, &spec)?;
        let State {
            sources, by_pod, ..
        } = &*state;
        if sources.len() >= SOURCES_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{}: {SOURCES_MAX} sources are registered", place()),
            ));
        }
        let of_pod = by_pod.get(&spec.pod).map_or(&[][..], Vec::as_slice);
        if of_pod.iter().any(|id| {
            sources
                .get(id)
                .is_some_and(|known| known.spec.name == spec.name)
        }) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{} exists already", place()),
            ));
        }
        let added = write(&self.view).pods.add(&spec.pod);
        let number = match added {
            // Those that leave still have their numbers.
            Err(_) if !state.leaving.is_empty() => {
                self.take_out_all(&mut state);
                write(&self.view).pods.add(&spec.pod)?
            }
            added => added?,
        };
        let State {
            writer,
            sources,
            by_pod,
            last,
            budget,
            ..
        } = &mut *state;
        if spec.kind == SourceKind::Node {
            writer.tree.index_keys(&read(&self.view).tree);
        }
        *last += 1;
        let id = SourceId(*last);
        by_pod.entry(spec.pod.clone()).or_default().push(id);
        let pod = spec.pod.clone();
        let orphans_max = self.config.orphan_blocks_max;
        sources.insert(id, Source::new(spec, number, size, orphans_max));
        if let Some(budget) = budget {
            budget.by_number.insert(number, id);
        }
        self.compose_pod(&state, &pod);
        self.settle(&mut state, Some(id));
        Ok(id)
    }

    /// Applies one event of a source; those of one source must come in their order. Lookups see all of it or nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when its blocks have another size than the index's (both are named; nothing was applied);
    /// [`ErrorKind::NotFound`] when the source is gone; [`ErrorKind::Busy`] when the index is full.
    pub fn apply(&self, id: SourceId, event: &SourceEvent) -> Result<Applied> {
        self.apply_one(&mut lock(&self.state), id, event)
    }

    fn apply_one(&self, state: &mut State, id: SourceId, event: &SourceEvent) -> Result<Applied> {
        let known = state.sources.get(&id).ok_or_else(|| gone(id))?;
        if let SourceEvent::Stored(blocks) = event
            && known.has_news(blocks)
        {
            self.learn(state, id, blocks)?;
        }
        self.admit_event(state, id, event)?;
        let applied = self.apply_to(state, id, event);
        self.settle(state, Some(id));
        applied
    }

    fn apply_to(&self, state: &mut State, id: SourceId, event: &SourceEvent) -> Result<Applied> {
        let State {
            writer, sources, ..
        } = state;
        let source = sources.get_mut(&id).ok_or_else(|| gone(id))?;
        let is_awaited = self.expected.of_pod(&source.spec.pod);
        writer.noted = is_awaited.then(Vec::new);
        let mut view = read(&self.view);
        let mut applied = match event {
            SourceEvent::Stored(blocks) => {
                let most = blocks.hashes.len() + source.orphans.len();
                view = self.make_room(writer, view, most)?;
                source
                    .store(writer, &view.tree, blocks)
                    .map_err(|cause| cause.at(format_args!("pod {}", source.spec.pod)))?
            }
            SourceEvent::Removed(blocks) => source.remove(writer, &view.tree, blocks),
            SourceEvent::Cleared => {
                source.clear(writer, &view.tree);
                Applied::default()
            }
        };
        applied.evicted_before = source.withdraw_evicted(applied.unknown);
        applied.unknown -= applied.evicted_before;
        Self::finish(writer, &view);
        drop(view);
        if let Some(noted) = writer.noted.take() {
            self.expected.confirm(&source.spec.pod, &noted);
        }
        if *event == SourceEvent::Cleared {
            self.begin_sweep(state);
            self.trim(&mut state.writer);
        }
        self.take_out_some(state);
        Ok(applied)
    }

    /// Makes sure that so many blocks can be taken in.
    fn make_room<'a>(
        &'a self,
        writer: &mut Writer,
        view: RwLockReadGuard<'a, View>,
        blocks: usize,
    ) -> Result<RwLockReadGuard<'a, View>> {
        if !writer.tree.has_room(blocks) {
            return Err(Error::new(ErrorKind::Busy, "the index is full"));
        }
        if writer.tree.has_doors(&view.tree, blocks) {
            return Ok(view);
        }
        // Made beside the readers, so that they wait for the exchange only.
        let more = writer.tree.more_doors(&view.tree, blocks);
        drop(view);
        write(&self.view).tree.doors = more;
        let view = read(&self.view);
        writer.tree.refit_doors(&view.tree);
        Ok(view)
    }

    fn finish(writer: &mut Writer, view: &View) {
        view.shared_blocks
            .store(writer.shared_blocks, Ordering::Relaxed);
        writer.finish(&view.tree);
    }

    fn trim(&self, writer: &mut Writer) {
        if writer.tree.is_loose(&read(&self.view).tree) {
            writer.tree.trim(&mut write(&self.view).tree);
        }
    }

    /// Forgets all that a source said of its own tiers, as when it has restarted; it may go on telling.
    ///
    /// What it put in shared tiers stays. A source that is gone already has nothing to forget.
    pub fn clear_source(&self, id: SourceId) {
        let mut state = lock(&self.state);
        let State {
            writer, sources, ..
        } = &mut *state;
        let Some(source) = sources.get_mut(&id) else {
            return;
        };
        self.forget(writer, source);
        let pod = source.spec.pod.clone();
        self.begin_sweep(&mut state);
        self.trim(&mut state.writer);
        self.expected.forget(&pod);
        self.compose_pod(&state, &pod);
        self.settle(&mut state, Some(id));
    }

    fn forget(&self, writer: &mut Writer, source: &mut Source) {
        // From here on lookups skip the source, however long the rest takes.
        write(&self.view).pods.leaving.insert(source.number);
        {
            let view = read(&self.view);
            source.forget(writer, &view.tree, true);
            Self::finish(writer, &view);
        }
        write(&self.view).pods.leaving.remove(&source.number);
    }

    /// The keys of all full blocks of a prompt, appended to `keys`.
    pub fn keys_of(
        &self,
        lora: Option<&str>,
        cache_salt: Option<&str>,
        tokens: &[u32],
        keys: &mut Vec<IndexKey>,
    ) {
        let root = self.root(lora, cache_salt);
        keys.extend(root.chain(tokens, self.config.block_size));
    }

    /// The same from tokens as they travel, u32 little-endian each.
    pub fn keys_of_le(
        &self,
        lora: Option<&str>,
        cache_salt: Option<&str>,
        tokens: &[u8],
        keys: &mut Vec<IndexKey>,
    ) {
        let root = self.root(lora, cache_salt);
        IndexChain::new(&root).extend_le(tokens, self.config.block_size, keys);
    }

    fn root(&self, lora: Option<&str>, cache_salt: Option<&str>) -> ChainRoot {
        let namespace = Namespace {
            model: self.config.scheme.model_in_root(&self.config.model),
            lora,
            cache_salt,
        };
        self.config.scheme.root(&namespace)
    }

    /// Reads until nothing has changed meanwhile.
    fn look<R>(&self, mut attempt: impl FnMut(&View) -> std::result::Result<R, Torn>) -> R {
        loop {
            let view = read(&self.view);
            for _ in 0..TRIES {
                if let Ok(found) = attempt(&view) {
                    return found;
                }
                (0..TURNS).for_each(|_| spin_loop());
            }
            drop(view);
            let _still = lock(&self.state);
            if let Ok(found) = attempt(&read(&self.view)) {
                return found;
            }
        }
    }

    /// Finds who holds the chain that `keys` names from its first block on.
    ///
    /// The walk ends with the last pod, so its cost is that of the depth found, not of the prompt.
    pub fn lookup(&self, keys: &[IndexKey], query: &Query<'_>, answer: &mut Answer) {
        self.look(|view| answer.fill(view, keys, query, &self.config));
    }

    /// The same with pods by number, which costs a fraction: at most `pods_max` of them (0 means all), and only those
    /// of `pods` unless that is empty.
    ///
    /// Pods of equal depth come in no order.
    pub fn depths(
        &self,
        keys: &[IndexKey],
        pods_max: usize,
        pods: &[PodNumber],
        depths: &mut Depths,
    ) {
        depths.allow(pods.iter().copied());
        let block_size = self.config.block_size.get();
        let wanted = Wanted {
            pods: pods_max,
            is_limited: !pods.is_empty(),
        };
        self.look(|view| {
            depths.fill(view, keys, wanted)?;
            let mut parts = HashMap::new();
            depths.compose(view, keys, block_size, !pods.is_empty(), &mut parts)
        });
        depths.deepest_first(pods_max);
    }

    /// The number of a pod; none when it has no source.
    #[must_use]
    pub fn pod_number(&self, pod: &PodName) -> Option<PodNumber> {
        let view = read(&self.view);
        let number = view.pods.number(pod).map(PodNumber);
        number.filter(|number| view.pods.is_there(number.0))
    }

    /// The pod with a number; none when no pod has it now.
    #[must_use]
    pub fn pod_name(&self, number: PodNumber) -> Option<PodName> {
        let view = read(&self.view);
        let name = view.pods.name(number.0).cloned();
        name.filter(|_| view.pods.is_there(number.0))
    }
}
