//! The global index: which pods hold a block, in which tiers.
//!
//! One [`KvIndex`] serves one model. Blocks are known by [`IndexKey`]s, made from tokens with one scheme, so that pods
//! whose engines hash differently still share entries: each source's own hashes are bridged to keys by the tokens in
//! its events. Lookups take a short shared lock that event batches hold only while their changes are put in; keys are
//! computed outside of it.
//!
//! What the index says is never deeper than what the events said, read literally: a block counts for a pod when more
//! copies were announced than withdrawn in some tier, and a pod's depth ends at the first block that does not.

mod config;
mod holders;
mod image;
mod ledger;
mod lookup;
mod table;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kvcache_core::prefix::Namespace;
use kvcache_core::{Error, ErrorKind, IndexKey, PodName, Result};

use self::ledger::{EngineLedger, Keys, NodeLedger};
use self::table::{Change, Table};
use crate::adapter::{SourceEvent, SourceKind};

pub use config::{Applied, IndexConfig, ORPHAN_BLOCKS_MAX, SOURCES_MAX, SourceId, SourceSpec};
pub use image::{
    IMAGE_BLOCKS_MAX, ImageBlock, ImageContent, ImageNamespace, ImageOrphan, ImagePiece,
    SourceImage,
};
pub use lookup::{Answer, PodDepth, Query};

/// How many changes are put in before readers get their turn.
const CHANGES_PER_LOCK: usize = 1024;

enum Ledger {
    Engine(Box<EngineLedger>),
    Node(NodeLedger),
}

impl Ledger {
    fn forget(&mut self, changes: &mut Vec<Change>) {
        match self {
            Self::Engine(ledger) => ledger.forget(changes),
            Self::Node(ledger) => ledger.forget(changes),
        }
    }
}

struct Source {
    spec: SourceSpec,
    /// Its place in the table.
    slot: u32,
    state: Mutex<SourceState>,
}

struct SourceState {
    ledger: Ledger,
    is_removed: bool,
    /// Kept between events, so that they do not allocate.
    changes: Vec<Change>,
}

#[derive(Default)]
struct Sources {
    by_id: HashMap<SourceId, Arc<Source>>,
    last: u64,
}

/// Which pods hold a prefix, how deep, in which tier; shared by all threads.
pub struct KvIndex {
    config: IndexConfig,
    keys: Arc<Keys>,
    // Locks are taken in this order: a source's state, then the table; `sources` is never held with another.
    sources: RwLock<Sources>,
    table: RwLock<Table>,
}

// A panic elsewhere must not end all answers, and no change leaves a table halfway: so poison is passed over.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvIndex {
    /// An index without sources.
    #[must_use]
    pub fn new(config: IndexConfig) -> Self {
        let keys = Arc::new(Keys {
            scheme: config.scheme.clone(),
            model: config.model.clone(),
            block_size: config.block_size,
        });
        Self {
            config,
            keys,
            sources: RwLock::default(),
            table: RwLock::new(Table::new()),
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
    /// [`ErrorKind::Invalid`] when its blocks have another size than the index's (both are named) or the pod has a
    /// source of this name already; [`ErrorKind::Busy`] when there are [`SOURCES_MAX`] sources.
    pub fn add_source(&self, spec: SourceSpec) -> Result<SourceId> {
        let place = || format!("source {:?} of pod {}", spec.name, spec.pod);
        if spec.block_size != self.config.block_size.get() {
            let sizes = (spec.block_size, self.config.block_size.get());
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{} has blocks of {} tokens, the index of {}",
                    place(),
                    sizes.0,
                    sizes.1
                ),
            ));
        }
        let mut sources = write(&self.sources);
        if sources.by_id.len() >= SOURCES_MAX {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{}: {SOURCES_MAX} sources are registered", place()),
            ));
        }
        let is_same = |known: &Source| known.spec.pod == spec.pod && known.spec.name == spec.name;
        if sources.by_id.values().any(|known| is_same(known)) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{} exists already", place()),
            ));
        }
        let ledger = match spec.kind {
            SourceKind::Node => Ledger::Node(NodeLedger::default()),
            engine => Ledger::Engine(Box::new(EngineLedger::new(
                engine,
                Arc::clone(&self.keys),
                self.config.orphan_blocks_max,
            ))),
        };
        let slot = write(&self.table).add_source(&spec.pod);
        let state = Mutex::new(SourceState {
            ledger,
            is_removed: false,
            changes: Vec::new(),
        });
        sources.last += 1;
        let id = SourceId(sources.last);
        sources
            .by_id
            .insert(id, Arc::new(Source { spec, slot, state }));
        Ok(id)
    }

    fn source(&self, id: SourceId) -> Result<Arc<Source>> {
        read(&self.sources)
            .by_id
            .get(&id)
            .cloned()
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("source {} is gone", id.0)))
    }

    /// Applies one event of a source; those of one source must come in their order.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when its blocks have another size than the index's (both are named; nothing was applied);
    /// [`ErrorKind::NotFound`] when the source is gone.
    pub fn apply(&self, id: SourceId, event: &SourceEvent) -> Result<Applied> {
        let source = self.source(id)?;
        let mut state = lock(&source.state);
        let SourceState {
            ledger,
            is_removed,
            changes,
        } = &mut *state;
        if *is_removed {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("source {} is gone", id.0),
            ));
        }
        changes.clear();
        let mut applied = match (ledger, event) {
            (Ledger::Engine(ledger), SourceEvent::Stored(blocks)) => ledger
                .store(blocks, changes)
                .map_err(|cause| cause.at(format_args!("pod {}", source.spec.pod)))?,
            (Ledger::Engine(ledger), SourceEvent::Removed(blocks)) => {
                ledger.remove(blocks, changes)
            }
            (Ledger::Engine(ledger), SourceEvent::Cleared) => {
                ledger.clear(changes);
                Applied::default()
            }
            (Ledger::Node(ledger), SourceEvent::Stored(blocks)) => {
                ledger.store(blocks, changes);
                Applied::default()
            }
            (Ledger::Node(ledger), SourceEvent::Removed(blocks)) => ledger.remove(blocks, changes),
            (Ledger::Node(ledger), SourceEvent::Cleared) => {
                ledger.forget(changes);
                Applied::default()
            }
        };
        self.commit(source.slot, changes, &mut applied);
        // A clear of a large cache must not keep its list of changes for ever.
        changes.shrink_to(CHANGES_PER_LOCK);
        Ok(applied)
    }

    fn commit(&self, slot: u32, changes: &[Change], applied: &mut Applied) {
        for some in changes.chunks(CHANGES_PER_LOCK) {
            let mut table = write(&self.table);
            for &change in some {
                if table.change(slot, change) {
                    let count = if change.is_stored {
                        &mut applied.stored
                    } else {
                        &mut applied.removed
                    };
                    *count += 1;
                }
            }
        }
    }

    /// Forgets all that a source said of its own tiers, as when it has restarted; it may go on telling.
    ///
    /// What it put in shared tiers stays. A source that is gone already has nothing to forget.
    pub fn clear_source(&self, id: SourceId) {
        if let Ok(source) = self.source(id) {
            self.forget(&source, false);
        }
    }

    /// Removes a source with its entries; lookups stop seeing them at once.
    ///
    /// What it put in shared tiers stays. Costs time by what the source held, in steps between which lookups are
    /// answered.
    pub fn remove_source(&self, id: SourceId) {
        let removed = write(&self.sources).by_id.remove(&id);
        if let Some(source) = removed {
            self.forget(&source, true);
        }
    }

    fn forget(&self, source: &Source, is_removed: bool) {
        let mut state = lock(&source.state);
        // From here on lookups skip the source, however long the rest takes.
        write(&self.table).sources[source.slot as usize].is_alive = false;
        let SourceState {
            ledger,
            is_removed: gone,
            changes,
        } = &mut *state;
        *gone = is_removed;
        changes.clear();
        ledger.forget(changes);
        self.commit(source.slot, changes, &mut Applied::default());
        *changes = Vec::new();
        let mut table = write(&self.table);
        if is_removed {
            table.free_source(source.slot);
        } else {
            table.sources[source.slot as usize].is_alive = true;
        }
    }

    /// The source as of one moment between two events.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when the source is gone.
    pub fn export(&self, id: SourceId) -> Result<SourceImage> {
        let _ = self.source(id)?;
        Err(Error::new(ErrorKind::Unsupported, "images of sources"))
    }

    /// Takes a piece of an image up, beside what the source holds already.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming what contradicts itself or exceeds a bound (nothing of the piece was taken);
    /// [`ErrorKind::NotFound`] when the source is gone.
    pub fn import(&self, id: SourceId, piece: &ImagePiece) -> Result<Applied> {
        let (_, _) = (self.source(id)?, piece);
        Err(Error::new(ErrorKind::Unsupported, "images of sources"))
    }

    /// Sets the cache group that a source is followed in, as its image says.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when the source is gone.
    pub fn follow_group(&self, id: SourceId, group: Option<u32>) -> Result<()> {
        let (_, _) = (self.source(id)?, group);
        Err(Error::new(ErrorKind::Unsupported, "images of sources"))
    }

    /// Removes all sources of a pod.
    pub fn remove_pod(&self, pod: &PodName) {
        for id in self.sources_of(pod) {
            self.remove_source(id);
        }
    }

    fn sources_of(&self, pod: &PodName) -> Vec<SourceId> {
        let sources = read(&self.sources);
        let of_pod = sources
            .by_id
            .iter()
            .filter(|(_, source)| source.spec.pod == *pod);
        of_pod.map(|(id, _)| *id).collect()
    }

    /// The keys of all full blocks of a prompt, appended to `keys`.
    pub fn keys_of(
        &self,
        lora: Option<&str>,
        cache_salt: Option<&str>,
        tokens: &[u32],
        keys: &mut Vec<IndexKey>,
    ) {
        let namespace = Namespace {
            model: self.config.scheme.model_in_root(&self.config.model),
            lora,
            cache_salt,
        };
        let root = self.config.scheme.root(&namespace);
        keys.extend(root.chain(tokens, self.config.block_size));
    }

    /// Finds who holds the chain that `keys` names from its first block on.
    ///
    /// The walk ends with the last pod, so its cost is that of the depth found, not of the prompt.
    pub fn lookup(&self, keys: &[IndexKey], query: &Query<'_>, answer: &mut Answer) {
        answer.fill(&read(&self.table), keys, query, &self.config.weights);
    }

    /// Entries: blocks by source and tier, and those in shared tiers.
    #[must_use]
    pub fn entries(&self) -> u64 {
        read(&self.table).entries()
    }

    /// Distinct blocks that somebody holds.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        read(&self.table).blocks()
    }

    /// Entries of a pod's sources; 0 for a pod that has none.
    #[must_use]
    pub fn pod_entries(&self, pod: &PodName) -> u64 {
        let table = read(&self.table);
        let Some(slot) = table.pod_slot(pod) else {
            return 0;
        };
        let of_pod = table
            .sources
            .iter()
            .filter(|source| source.is_alive && source.pod == slot);
        of_pod.map(|source| source.entries).sum()
    }

    /// Blocks of a source that wait for the block before them; 0 when the source is gone.
    #[must_use]
    pub fn orphans(&self, id: SourceId) -> u64 {
        let Ok(source) = self.source(id) else {
            return 0;
        };
        match &lock(&source.state).ledger {
            Ledger::Engine(ledger) => ledger.orphans() as u64,
            Ledger::Node(_) => 0,
        }
    }

    /// About how many bytes the index takes: tables by their capacity, what waits by its content.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let sources: Vec<_> = read(&self.sources).by_id.values().cloned().collect();
        let ledgers: usize = sources
            .iter()
            .map(|source| match &lock(&source.state).ledger {
                Ledger::Engine(ledger) => ledger.bytes(),
                Ledger::Node(ledger) => ledger.bytes(),
            })
            .sum();
        (ledgers + read(&self.table).bytes()) as u64
    }
}
